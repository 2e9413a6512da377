"""Draws for stochastic depth that are a pure function of seed, step, unit and rank."""

import torch
from torch import Tensor

from fastres.ops._philox import DROP_STREAM, philox, philox_int

_UNITS = 1 << 16


class StepGenerator:
    """What the residual units of a model draw from, where a run must be repeatable from any step.

    Each unit takes a UnitGenerator of it, in place of a torch.Generator. There is no state but the
    step, so a resumed run draws what an uninterrupted one does; processes with the same seed agree
    where a whole batch is dropped, and draw for their own samples by their rank.

        steps = StepGenerator(seed=1, rank=rank)
        units = [StochasticDepthUnit(b, 0.5, generator=steps.unit(0.5)) for b in branches]
        for step, (x, target) in enumerate(batches):
            steps.set_step(step)
            ...

    A deep copy of a model draws from a copy of its StepGenerator, which no set_step of the original
    reaches: give the copy's units one of their own.

    Args:
        seed: of the run, 64 bits.
        rank: of this process, 0 <= rank < 65,536.
    Raises:
        ValueError: seed or rank out of range.
    """

    def __init__(self, seed: int = 0, rank: int = 0) -> None:
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed: expected -2**63 <= seed < 2**63, got {seed}")
        _check_rank(rank)
        self.seed, self.rank = seed, rank
        self._units: list[UnitGenerator] = []
        self._step = 0
        self._keys = {torch.device("cpu"): torch.tensor([seed, 0, rank], device="cpu")}

    def set_step(self, step: int) -> None:
        """Every unit's next draw is that of this step, 0 <= step < 2**32; a launch a device.

        Raises:
            ValueError: step out of range.
        """
        self.decide(step)
        for key in self._keys.values():
            key[1:2].fill_(step)

    def decide(self, step: int) -> tuple[bool, ...]:
        """The host's part of set_step: for each unit, whether it drops the whole batch.

        Raises:
            ValueError: step out of range.
        """
        if not 0 <= step < 1 << 32:
            raise ValueError(f"step: expected 0 <= step < 2**32, got {step}")
        self._step = step
        for unit in self._units:
            unit.set_step(self.seed, step)
        return tuple(unit.dropped for unit in self._units)

    def follow(self, step: Tensor) -> None:
        """The device's part of set_step, for the device of step, int64 of one element."""
        self.key(step.device)[1:2].copy_(step)

    def set_rank(self, rank: int) -> None:
        """Draw as the process of this rank from here on; a launch a device.

        Raises:
            ValueError: rank out of range.
        """
        _check_rank(rank)
        self.rank = rank
        for key in self._keys.values():
            key[2:3].fill_(rank)

    def unit(self, p: float) -> "UnitGenerator":
        """The generator of one more unit, which drops its branch with probability p.

        Units are numbered in the order of these calls; a model that is built alike draws alike.

        Raises:
            ValueError: p out of range, or too many units.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"p: expected a drop probability, 0 <= p <= 1, got {p}")
        if len(self._units) == _UNITS:
            raise ValueError(f"a StepGenerator has at most {_UNITS} units")
        self._units.append(UnitGenerator(self, len(self._units), p))
        self._units[-1].set_step(self.seed, self._step)
        return self._units[-1]

    def key(self, device: torch.device) -> Tensor:
        """int64 [3] on a device: seed, step, rank."""
        if device not in self._keys:
            host = self._keys[torch.device("cpu")]
            self._keys[device] = host.to(device, non_blocking=device.type != "cpu")
        return self._keys[device]


class UnitGenerator:
    """One unit's draws from a StepGenerator, which makes it; see there."""

    def __init__(self, steps: StepGenerator, number: int, p: float) -> None:
        self.steps, self.number, self.p = steps, number, p
        # A plain bool, so that a compiled unit is guarded by it: two graphs a unit, not one a step.
        self.dropped = False

    def set_step(self, seed: int, step: int) -> None:
        """Draw on the host whether the whole batch is dropped: the host launches, or does not."""
        draw = philox_int(seed, 0, step, DROP_STREAM, self.number) >> 1
        self.dropped = draw < threshold(self.p)


def _check_rank(rank: int) -> None:
    if not 0 <= rank < 1 << 16:
        raise ValueError(f"rank: expected 0 <= rank < 65536, got {rank}")


def threshold(p: float) -> int:
    """A draw of 31 bits lies below it with probability p."""
    return round(p * (1 << 31))


def draws(key: Tensor, samples: int, unit: int, with_rank: bool) -> Tensor:
    """int64 [samples], 31 random bits each, as the kernels draw them.

    Args:
        key: int64 [3]: seed, step, rank.
        samples: how many; unit: whose; with_rank: whether each process draws for itself.
    """
    place = (unit + key[2] * 65536) & 0xFFFFFFFF if with_rank else unit
    number = torch.arange(samples, device=key.device)
    word, _, _, _ = philox(key[0], number, key[1] & 0xFFFFFFFF, DROP_STREAM, place)
    return word >> 1
