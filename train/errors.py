"""Errors for the person at the terminal."""


class TrainError(Exception):
    """One line: what was wrong, what was given, what to do."""


class LoneError(TrainError):
    """What one process has met and the others do not know: it says so itself."""
