"""Errors for the person at the terminal."""


class TrainError(Exception):
    """One line: what was wrong, what was given, what to do."""
