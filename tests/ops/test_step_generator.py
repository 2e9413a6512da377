"""StepGenerator: its key, its units and what it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
from ops.stochastic_depth_add_equality import Case, draw_of

from fastres.ops import StepGenerator, StochasticDepthUnit, stochastic_depth_add


def test_the_key_is_seed_step_and_rank(device: str) -> None:
    steps = StepGenerator(-5, rank=7)
    assert steps.key(torch.device("cpu")).tolist() == [-5, 0, 7]
    steps.set_step(2**32 - 1)
    key = steps.key(torch.empty(0, device=device).device)
    assert key.device.type == device and key.tolist() == [-5, 2**32 - 1, 7]
    # What a captured graph has read stays where it is.
    steps.set_step(3)
    assert key.tolist() == [-5, 3, 7] and steps.key(key.device) is key


def test_one_generator_can_draw_for_every_rank(device: str) -> None:
    steps = StepGenerator(3)
    steps.set_step(5)
    place = torch.empty(0, device=device).device
    key = steps.key(place)
    for rank in (65535, 0, 2):
        steps.set_rank(rank)
        assert key.tolist() == [3, 5, rank]
        assert steps.rank == rank and steps.key(place) is key
    for rank in (-1, 65536):
        with pytest.raises(ValueError, match=f"rank: expected 0 <= rank < 65536, got {rank}"):
            steps.set_rank(rank)
    assert steps.rank == 2


def test_the_hosts_part_and_the_devices_part_are_set_step(device: str) -> None:
    """What a captured graph follows is a tensor; which units it has the host decides before."""
    place = torch.empty(0, device=device).device
    one, other = StepGenerator(9, rank=1), StepGenerator(9, rank=1)
    units = [steps.unit(0.5) for steps in (one, other) for _ in range(6)]
    seen = set()
    for step in range(8):
        one.set_step(step)
        dropped = other.decide(step)
        other.follow(torch.tensor(step, device=place))
        assert dropped == tuple(unit.dropped for unit in units[:6])
        assert dropped == tuple(unit.dropped for unit in units[6:])
        assert torch.equal(one.key(place), other.key(place))
        seen.add(dropped)
    assert len(seen) > 1
    with pytest.raises(ValueError, match="step: expected"):
        other.decide(-1)


def test_units_draw_by_number_and_step() -> None:
    steps = StepGenerator(11, rank=2)
    steps.set_step(4)
    units = [steps.unit(p) for p in (0.0, 0.3, 0.6, 1.0)]
    for step in (4, 5, 6):
        if step > 4:
            steps.set_step(step)
        for number, unit in enumerate(units):
            case = Case(seed=11, step=step, unit=number)
            # The rank is no part of it: all processes launch, or none does.
            assert unit.dropped == (draw_of(case, 0, 0) < unit.p * 2**31)
    assert [unit.number for unit in units] == [0, 1, 2, 3]
    assert not units[0].dropped and units[3].dropped


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_keep_the_step_and_go_their_own_way(copied: Any) -> None:
    steps = StepGenerator(1)
    unit = steps.unit(0.5)
    steps.set_step(9)
    other = copied(unit)
    assert other.steps is not steps and other.dropped == unit.dropped
    assert other.steps.key(torch.device("cpu")).tolist() == [1, 9, 0]
    steps.set_step(10)
    assert other.steps.key(torch.device("cpu")).tolist() == [1, 9, 0]
    seen = set()
    for step in range(20):
        other.steps.set_step(step)
        seen.add(other.dropped)
    assert seen == {True, False}


def test_draws_have_a_place_of_their_own() -> None:
    """Whatever the default device; and on the meta device there is nothing to look at."""
    with torch.device("meta"):
        steps = StepGenerator(1)
    steps.set_step(3)
    x = torch.randn(4, 3, 2, 2)
    want = stochastic_depth_add(x, x, 0.5, "row", True, steps.unit(0.5))
    again = StepGenerator(1)
    again.set_step(3)
    assert torch.equal(want, stochastic_depth_add(x, x, 0.5, "row", True, again.unit(0.5)))
    unit = StochasticDepthUnit(torch.nn.ReLU(), 0.5, "row").to("meta")
    assert unit(x.to("meta")).shape == x.shape


def test_wrong_numbers_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"seed: expected -2\*\*63 <= seed < 2\*\*63, got"):
            StepGenerator(seed)
    for rank in (-1, 65536):
        with pytest.raises(ValueError, match=f"rank: expected 0 <= rank < 65536, got {rank}"):
            StepGenerator(0, rank)
    steps = StepGenerator(-(2**63), 65535)
    for step in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"step: expected 0 <= step < 2\*\*32, got {step}"):
            steps.set_step(step)
    for p in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"p: expected a drop probability.* got {p}"):
            steps.unit(p)
    monkeypatch.setattr("fastres.ops.step_generator._UNITS", 2)
    steps.unit(0.5), steps.unit(0.5)
    with pytest.raises(ValueError, match="has at most 2 units"):
        steps.unit(0.5)
