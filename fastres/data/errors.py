"""The one error that the data package shows to its user."""


class DataError(ValueError):
    """A data set cannot be used; one line: what is wrong, what was given, what to do."""

    def __init__(self, message: str) -> None:
        # Causes quoted from the system or from a library may span lines.
        super().__init__(" ".join(message.split()))
