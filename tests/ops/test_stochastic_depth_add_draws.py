"""Who survives: how often, and that units, steps, seeds and ranks draw for themselves.

Thousands of draws take the native path, which draws the same in a hundredth of the time.
"""

import itertools
import sys
from typing import Any

import pytest
import torch
from ops.stochastic_depth_add_equality import MODES, Case, draw_of
from torch import Tensor

from fastres.ops import StepGenerator, StochasticDepthAdd, _register, stochastic_depth_add
from fastres.ops.step_generator import draws, threshold
from fastres.ops.stochastic_depth_add import draw_subset, subset_size

# Of 10,000 draws: the deviation of a share is 0.005 at most.
SHARE = 0.015


def _survivors(module: StochasticDepthAdd, N: int) -> Tensor:
    """Bool [N]: which samples of a batch keep their branch."""
    y: Tensor = module(torch.ones(N, 1, 1, 1), torch.zeros(N, 1, 1, 1))
    return y.flatten() > 0


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("over", ["samples", "steps", "units", "ranks", "seeds", "default"])
def test_survival_rate_by_row(native: None, over: str, p: float) -> None:
    """1 - p of 10,000 draws, whatever it is that makes them differ."""
    kept = []
    match over:
        case "samples":
            kept.append(_survivors(StochasticDepthAdd(p, "row", StepGenerator(1).unit(p)), 10_000))
        case "steps":
            steps = StepGenerator(2)
            module = StochasticDepthAdd(p, "row", steps.unit(p))
            for step in range(1000):
                steps.set_step(step)
                kept.append(_survivors(module, 10))
        case "units":
            steps = StepGenerator(3)
            for _ in range(1000):
                kept.append(_survivors(StochasticDepthAdd(p, "row", steps.unit(p)), 10))
        case "ranks" | "seeds":
            for number in range(1000):
                steps = StepGenerator(**{over.removesuffix("s"): number})
                kept.append(_survivors(StochasticDepthAdd(p, "row", steps.unit(p)), 10))
        case "default":
            kept = [_survivors(StochasticDepthAdd(p, "row"), 100) for _ in range(100)]
    share = torch.cat(kept).double().mean().item()
    assert abs(share - (1 - p)) < SHARE


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("over", ["steps", "units", "seeds"])
def test_survival_rate_by_batch(over: str, p: float) -> None:
    """By the host's draw, which chooses what to launch; the function's is the same, see below."""
    steps, dropped = StepGenerator(5), []
    unit = steps.unit(p)
    for number in range(10_000):
        if over == "steps":
            steps.set_step(number)
        elif over == "units":
            unit = steps.unit(p)
        else:
            unit.set_step(number, 0)
        dropped.append(unit.dropped)
    assert abs(sum(dropped) / len(dropped) - p) < SHARE


def test_survival_rate_by_batch_of_the_default_generator(native: None) -> None:
    p = 0.2
    module = StochasticDepthAdd(p, "batch")
    kept = torch.stack([_survivors(module, 2) for _ in range(10_000)])
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert abs(kept[:, 0].double().mean().item() - (1 - p)) < SHARE


def test_a_subset_has_its_size_and_favours_nobody(native: None) -> None:
    p, steps, counts = 0.8, StepGenerator(6), torch.zeros(10)
    module = StochasticDepthAdd(p, "subset", steps.unit(p))
    for step in range(10_000):
        steps.set_step(step)
        kept = _survivors(module, 10)
        assert kept.sum() == round(10 * (1 - p))
        counts += kept
    assert ((counts / 10_000 - (1 - p)).abs() < SHARE).all()


def test_subset_size() -> None:
    """max(int(N * (1 - p)), 1), where 10 * (1 - 0.8) means 2; no sample at p = 1 or of none."""
    for percent, N in itertools.product(range(100), range(1, 300)):
        assert subset_size(N, percent / 100) == max(N * (100 - percent) // 100, 1)
    assert [subset_size(0, p) for p in (0.0, 0.5, 1.0)] == [0, 0, 0]
    assert subset_size(100, 1.0) == 0 and subset_size(100, 0.999999) == 1


@pytest.mark.parametrize("N", [1, 63, 64, 65, 200])
def test_subset_on_both_paths(device: str, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """index lists the samples of least draw, and position is its inverse."""
    key = torch.tensor([2**40, 7, 3], device=device)
    case = Case(seed=2**40, step=7, unit=12)
    order = sorted(range(N), key=lambda n: (draw_of(case, n, 3), n))
    for kept in {0, 1, N // 2, N}:
        results = [draw_subset(key, N, kept, 12)]
        if device == "cpu":
            with monkeypatch.context() as patch:
                patch.setattr(_register, "INTERPRET", False)
                results.append(draw_subset(key, N, kept, 12))
        for index, position in results:
            assert index.tolist() == order[:kept]
            places = {n: place for place, n in enumerate(order[:kept])}
            assert position.tolist() == [places.get(n, -1) for n in range(N)]


def test_equal_draws_go_by_the_samples_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 2^31 pairs of draws is equal; here all of them are, but for the parity."""
    monkeypatch.setattr(_register, "INTERPRET", False)
    # By its name: as an attribute of fastres.ops it is the function.
    module = sys.modules["fastres.ops.stochastic_depth_add"]
    monkeypatch.setattr(module, "draws", lambda key, N, unit, with_rank: torch.arange(N) % 2)
    index, _ = draw_subset(torch.zeros(3, dtype=torch.int64), 7, 5, 0)
    assert index.tolist() == [0, 2, 4, 6, 1]


def _row(seed: int = 1, step: int = 1, unit: int = 1, rank: int = 1) -> Tensor:
    return draws(torch.tensor([seed, step, rank]), 100, unit, with_rank=True)


def test_seeds_steps_units_and_ranks_draw_for_themselves() -> None:
    """Not even the same numbers in another order."""
    base = _row()
    assert torch.equal(base, _row())
    others = [_row(seed=s) for s in (0, 2, -1, 1 + 2**32)]
    others += [_row(step=s) for s in (0, 2, 2**32 - 1)]
    others += [_row(unit=u) for u in (0, 2, 65535)] + [_row(rank=r) for r in (0, 2, 65535)]
    every = torch.stack([base, *others])
    assert len(every.unique()) >= every.numel() - 1
    assert 0 <= every.min() and every.max() < 2**31
    correlation = torch.corrcoef(every.double()).fill_diagonal_(0).abs().max()
    assert correlation < 0.5


def test_a_batch_is_dropped_on_all_ranks_or_none(device: str) -> None:
    """By the function and by the host's draw alike; rows and subsets differ between ranks."""
    branch = torch.ones(8, 1, 1, 1, device=device)
    seen = []
    for step in range(12):
        by_rank: dict[str, list[Any]] = {mode: [] for mode in MODES}
        for rank in (0, 1, 65535):
            steps = StepGenerator(9, rank)
            steps.set_step(step)
            unit = steps.unit(0.5)
            for mode in MODES:
                y = stochastic_depth_add(branch, 0 * branch, 0.5, mode, True, unit)
                by_rank[mode].append((y.flatten() > 0).tolist())
            assert by_rank["batch"][-1] == [not unit.dropped] * 8
        assert by_rank["batch"][0] == by_rank["batch"][1] == by_rank["batch"][2]
        assert by_rank["row"][0] != by_rank["row"][1]
        assert by_rank["subset"][0] != by_rank["subset"][1] or step > 0
        seen.append(by_rank["batch"][0][0])
    assert 0 < sum(seen) < 12


@pytest.mark.parametrize("mode", MODES)
def test_resumed_is_uninterrupted(device: str, mode: Any) -> None:
    """The draws of a step do not depend on the steps that were taken before it."""
    branch = torch.ones(16, 1, 1, 1, device=device)

    def run(start: int) -> list[Tensor]:
        steps = StepGenerator(4)
        units, found = [steps.unit(0.5) for _ in range(2)], []
        for step in range(start, 4):
            steps.set_step(step)
            found += [
                stochastic_depth_add(branch, 0 * branch, 0.5, mode, True, unit) for unit in units
            ]
        return found

    whole = run(0)
    for one, other in zip(whole[4:], run(2), strict=True):
        assert torch.equal(one, other)


def test_threshold() -> None:
    assert [threshold(p) for p in (0.0, 0.5, 1.0)] == [0, 2**30, 2**31]
    assert threshold(1e-12) == 0
