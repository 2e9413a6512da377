"""Integers that the host reckons with at every launch.

Triton's own cdiv and next_power_of_2 serve its kernels too, and take microseconds a call for it: a
unit's backward made 41 of them.
"""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; also of the symbols that torch.compile traces with."""
    return (a + b - 1) // b


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more."""
    power = 1
    while power < n:
        power *= 2
    return power
