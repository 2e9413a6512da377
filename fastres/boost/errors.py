"""The one error that boosting shows to its user."""


class BoostError(ValueError):
    """What cannot be boosted or cached, in one line: what is wrong, what was given, what to do."""
