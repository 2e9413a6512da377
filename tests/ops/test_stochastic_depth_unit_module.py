"""StochasticDepthUnit in a program: optimizers, autocast, dtypes, copies, compiled, errors."""

import copy
import pickle
from typing import Any

import pytest
import torch
from ops.stochastic_depth_add_equality import MODES
from ops.stochastic_depth_units import grads, input_of, skip_to, unit_of
from tolerances import COMPILED_ATOL
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastres.ops import BatchNormReLU2d, StepGenerator, StochasticDepthUnit

pytestmark = pytest.mark.usefixtures("path")


def test_momentum_and_decay_act_on_what_was_skipped(device: str) -> None:
    """A zero gradient, not none: the optimizer moves on, in one process as in many."""
    unit, steps, generator = unit_of(device, "batch")
    optimizer = torch.optim.SGD(unit.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    weight = unit.branch[1].weight
    for dropped in (False, True):
        skip_to(steps, generator, dropped)
        optimizer.zero_grad(set_to_none=True)
        unit(input_of(device)).square().sum().backward()
        before, velocity = weight.detach().clone(), None
        if dropped:
            velocity = optimizer.state[weight]["momentum_buffer"].clone()
        optimizer.step()
    assert velocity is not None
    want = before - 0.1 * (0.9 * velocity + 0.1 * before)
    torch.testing.assert_close(weight.detach(), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device: str, dtype: torch.dtype, mode: Any) -> None:
    """The branch comes in half precision, the shortcut in fp32, and so does the sum."""
    unit, steps, generator = unit_of(device, mode)
    for dropped in (True, False):
        skip_to(steps, generator, dropped)
        x = input_of(device)
        with torch.autocast(device, dtype=dtype):
            y = unit(x)
        assert y.dtype == torch.float32
        y.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in unit.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(device: str, dtype: torch.dtype, mode: Any) -> None:
    steps = StepGenerator(2)
    unit = StochasticDepthUnit(
        nn.Conv2d(3, 3, 1, device=device, dtype=dtype), 0.5, mode, generator=steps.unit(0.5)
    )
    x = input_of(device).detach().to(dtype).requires_grad_()
    for step in range(3):
        steps.set_step(step)
        y = unit(x)
        y.float().sum().backward()
        assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_copies(device: str, mode: Any) -> None:
    unit, steps, _ = unit_of(device, mode)
    steps.set_step(2)
    x = input_of(device)
    others = [copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))]
    want = unit(x)
    for other in others:
        assert torch.equal(other(x), want)
        assert other.state_dict().keys() == unit.state_dict().keys()
    assert f"p=0.5, mode='{mode}'" in repr(unit)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("own", [True, False], ids=["own generator", "default generator"])
def test_pytorchs_generators_repeat(device: str, mode: Any, own: bool) -> None:
    generator = torch.Generator("cpu" if mode == "batch" else device) if own else None
    unit = StochasticDepthUnit(nn.Identity(), 0.5, mode, generator=generator)
    x, runs = torch.ones(6, 1, 1, 1, device=device), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed) if generator is None else generator.manual_seed(seed)
        runs.append(torch.stack([unit(x) for _ in range(10)]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert any(not torch.equal(y, runs[0][0]) for y in runs[0])


@pytest.mark.parametrize("mode", MODES)
def test_compiled_one_by_one(device: str, mode: Any) -> None:
    """Units of different p: two graphs a unit in mode "batch", one in the others; some share
    theirs, as where nothing is computed."""
    torch._dynamo.reset()
    steps, counter, count = StepGenerator(4), CompileCounter(), 4
    x, seen = torch.randn(6, 3, 2, 2, device=device), set()
    units: list[Any] = []
    for number in range(count):
        p = (number + 1) / (2 * count)
        conv = nn.Conv2d(3, 3, 1, device=device)
        branch = nn.Sequential(BatchNormReLU2d(3, device=device), conv)
        units.append(StochasticDepthUnit(branch, p, mode, generator=steps.unit(p)))
    others: Any = copy.deepcopy(nn.ModuleList(units))
    others_steps = others[0].drop.generator.steps
    with torch._dynamo.config.patch(recompile_limit=2 * count):
        compiled = [torch.compile(unit, fullgraph=True, backend=counter) for unit in others]
        for step in range(4):
            steps.set_step(step)
            others_steps.set_step(step)
            for unit, other in zip(units, compiled, strict=True):
                torch.testing.assert_close(
                    other(x), unit(x), rtol=COMPILED_ATOL, atol=COMPILED_ATOL
                )
                seen.add(unit.drop.generator.dropped)
    assert seen == {True, False}
    assert 1 < counter.frame_count <= (2 * count if mode == "batch" else count)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_gradients(device: str, mode: Any) -> None:
    torch._dynamo.reset()
    unit, steps, generator = unit_of(device, mode)
    other = copy.deepcopy(unit)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for dropped in (True, False):
        skip_to(steps, generator, dropped)
        other.drop.generator.steps.set_step(int(steps.key(torch.device("cpu"))[1]))
        x = input_of(device)
        results = []
        for module, parameters in ((unit, unit.branch), (compiled, other.branch)):
            y = module(x)
            results.append([y, *grads(y, x, parameters), *parameters.state_dict().values()])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=COMPILED_ATOL)


def test_wrong_arguments_are_refused_in_words() -> None:
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"p: expected a drop probability.*got {p}"):
            StochasticDepthUnit(nn.Identity(), p)
    mode: Any = "rows"
    with pytest.raises(ValueError, match="mode: expected 'batch', 'row' or 'subset', got 'rows'"):
        StochasticDepthUnit(nn.Identity(), 0.5, mode)
    generator = StepGenerator().unit(0.25)
    with pytest.raises(ValueError, match="expected a unit of p = 0.5, got one of p = 0.25"):
        StochasticDepthUnit(nn.Identity(), 0.5, generator=generator)
