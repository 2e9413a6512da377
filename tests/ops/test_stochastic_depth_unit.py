"""StochasticDepthUnit: what it computes, what it leaves out, and what its parameters then get."""

import copy
import pickle
from typing import Any

import pytest
import torch
from ops.stochastic_depth_add_equality import MODES
from tolerances import COMPILED_ATOL
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastres.ops import (
    BatchNormReLU2d,
    StepGenerator,
    StochasticDepthUnit,
    UnitGenerator,
    _register,
)
from fastres.ops.stochastic_depth_add import draw_subset, subset_size

PATHS = ["kernels", "native"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=PATHS, autouse=True)
def path(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path that the tensors may take."""
    if request.param == "native":
        if device != "cpu":
            pytest.skip("on a GPU there is one path")
        monkeypatch.setattr(_register, "INTERPRET", False)
    return str(request.param)


class Counting(nn.Conv2d):
    """A convolution that notes how many samples it was given."""

    def __init__(self, channels: int, device: str) -> None:
        super().__init__(channels, channels, 1, device=device)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return super().forward(x)


def _branch(device: str, channels: int = 3) -> Any:
    return nn.Sequential(BatchNormReLU2d(channels, device=device), Counting(channels, device))


def _plain(branch: Any) -> Any:
    """The same in PyTorch's own modules, with the same numbers."""
    device, channels = branch[1].weight.device, branch[1].in_channels
    norm = nn.BatchNorm2d(channels, device=device)
    norm.load_state_dict(branch[0].state_dict())
    conv = nn.Conv2d(channels, channels, 1, device=device)
    conv.load_state_dict(branch[1].state_dict())
    return nn.Sequential(norm, nn.ReLU(), conv)


def _unit(
    device: str, mode: Any, p: float = 0.5, seed: int = 0, **options: Any
) -> tuple[Any, StepGenerator, UnitGenerator]:
    steps = StepGenerator(seed)
    generator = steps.unit(p)
    return (
        StochasticDepthUnit(_branch(device), p, mode, generator=generator, **options),
        steps,
        generator,
    )


def _skip_to(steps: StepGenerator, generator: UnitGenerator, dropped: bool) -> None:
    """The first step that drops the batch, or keeps it."""
    for step in range(64):
        steps.set_step(step)
        if generator.dropped == dropped:
            return
    raise AssertionError("64 draws alike")


def _x(device: str, N: int = 6, fmt: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(N, 3, 2, 4, device=device).contiguous(memory_format=fmt).requires_grad_()


def test_a_dropped_batch_is_not_computed(device: str) -> None:
    unit, steps, generator = _unit(device, "batch")
    x = _x(device)
    norm, conv = unit.branch
    _skip_to(steps, generator, dropped=True)
    before = {name: v.clone() for name, v in unit.state_dict().items()}
    y = unit(x)
    assert conv.seen == [] and torch.equal(y, x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad is not None and torch.equal(x.grad, dy)
    # Nothing is tracked of a batch that was not seen.
    assert all(torch.equal(v, before[name]) for name, v in unit.state_dict().items())
    for name, parameter in unit.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
        assert parameter.grad.is_contiguous(), name
    _skip_to(steps, generator, dropped=False)
    unit(x)
    assert conv.seen == [6] and norm.num_batches_tracked == 1


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_kept_batch_is_scaled(device: str, fmt: torch.memory_format) -> None:
    unit, steps, generator = _unit(device, "batch", p=0.25)
    plain, x = _plain(unit.branch), _x(device, fmt=fmt)
    _skip_to(steps, generator, dropped=False)
    y = unit(x)
    torch.testing.assert_close(y, x + plain(x) / 0.75)
    assert y.is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.99])
def test_a_subset_is_all_that_is_computed(device: str, p: float) -> None:
    unit, steps, _ = _unit(device, "subset", p)
    for step in range(3):
        steps.set_step(step)
        unit(_x(device, 10))
    assert unit.branch[1].seen == [max(round(10 * (1 - p)), 1)] * 3


def test_rows_are_all_computed(device: str) -> None:
    unit, _, _ = _unit(device, "row")
    unit(_x(device))
    assert unit.branch[1].seen == [6]


@pytest.mark.parametrize("mode", MODES)
def test_p_of_one_and_of_zero(device: str, mode: Any) -> None:
    x = _x(device)
    unit, _, _ = _unit(device, mode, p=1.0)
    y = unit(x)
    assert torch.equal(y, x) and unit.branch[1].seen == ([6] if mode == "row" else [])
    y.sum().backward()
    for parameter in unit.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    unit, _, _ = _unit(device, mode, p=0.0)
    torch.testing.assert_close(unit(x), x + _plain(unit.branch)(x))


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_the_sum(device: str, mode: Any) -> None:
    unit, steps, _ = _unit(device, mode, p=1.0)
    unit.eval()
    x = _x(device)
    want = x + _plain(unit.branch).eval()(x)
    for step in range(3):
        steps.set_step(step)
        torch.testing.assert_close(unit(x), want)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch(device: str, mode: Any) -> None:
    unit, steps, generator = _unit(device, mode)
    _skip_to(steps, generator, dropped=False)
    x = _x(device, 0)
    y = unit(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in unit.parameters())


def _grads(y: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *module.parameters()], torch.linspace(
        -1, 1, y.numel(), device=y.device).view(y.shape)))  # fmt: skip


@pytest.mark.parametrize("fused", [True, False], ids=["fused gather", "plain gather"])
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_subset_equals_gather_branch_and_scatter(
    device: str, fmt: torch.memory_format, fused: bool
) -> None:
    """And its BatchNorm normalises by, and tracks, the samples of the subset."""
    unit, steps, generator = _unit(device, "subset", p=0.4)
    plain = _plain(unit.branch)
    if not fused:
        unit.branch = nn.Sequential(nn.Identity(), *unit.branch)
    steps.set_step(5)
    x = _x(device, 7, fmt)
    index, _ = draw_subset(steps.key(x.device), 7, subset_size(7, 0.4), generator.number)
    assert len(index) == 4
    y = unit(x)
    want = x.index_add(0, index, plain(x[index]), alpha=7 / 4)
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=fmt)
    for got, wanted in zip(_grads(y, x, unit.branch), _grads(want, x, plain), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=COMPILED_ATOL)
    norm = unit.branch[0 if fused else 1]
    for name, v in plain[0].state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], v)


def test_batch_norm_sees_every_row(device: str) -> None:
    """In mode "row" its statistics are those of the whole batch, whoever is dropped."""
    unit, steps, _ = _unit(device, "row")
    plain, x = _plain(unit.branch), _x(device)
    branch = plain(x)
    y = unit(x)
    torch.testing.assert_close(unit.branch[0].running_mean, plain[0].running_mean)
    torch.testing.assert_close(unit.branch[0].running_var, plain[0].running_var)
    kept = (y != x).flatten(1).any(1)
    assert 0 < kept.sum() < 6
    torch.testing.assert_close(y[kept], (x + 2 * branch)[kept])


def test_one_value_a_channel_in_a_subset_is_an_error(device: str) -> None:
    unit, _, _ = _unit(device, "subset", p=0.9)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        unit(torch.randn(4, 3, 1, 1, device=device))


@pytest.mark.parametrize("mode", MODES)
def test_unbiased_in_expectation(device: str, mode: Any, path: str) -> None:
    """Without BatchNorm the mean over the steps is the sum without dropping."""
    if path == "kernels":
        pytest.skip("thousands of calls: the native path draws the same samples")
    steps, p = StepGenerator(1), 0.3
    conv = nn.Conv2d(2, 2, 1, device=device)
    unit = StochasticDepthUnit(conv, p, mode, generator=steps.unit(p))
    x = torch.randn(5, 2, 1, 1, device=device)
    total, count = torch.zeros_like(x), 500
    with torch.no_grad():
        for step in range(count):
            steps.set_step(step)
            total += unit(x)
        branch = conv(x)
    # Five deviations of a mean of so many draws, each branch / (1 - p) or nothing.
    allowed = 5 * branch.abs() * (p / (1 - p) / count) ** 0.5 + COMPILED_ATOL
    assert ((total / count - x - branch).abs() <= allowed).all()


def test_momentum_and_decay_act_on_what_was_skipped(device: str) -> None:
    """A zero gradient, not none: the optimizer moves on, in one process as in many."""
    unit, steps, generator = _unit(device, "batch")
    optimizer = torch.optim.SGD(unit.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    weight = unit.branch[1].weight
    for dropped in (False, True):
        _skip_to(steps, generator, dropped)
        optimizer.zero_grad(set_to_none=True)
        unit(_x(device)).square().sum().backward()
        before, velocity = weight.detach().clone(), None
        if dropped:
            velocity = optimizer.state[weight]["momentum_buffer"].clone()
        optimizer.step()
    assert velocity is not None
    want = before - 0.1 * (0.9 * velocity + 0.1 * before)
    torch.testing.assert_close(weight.detach(), want)


def test_skipping_adds_to_a_gradient_and_spares_the_frozen(device: str) -> None:
    unit, steps, generator = _unit(device, "batch")
    conv = unit.branch[1]
    conv.bias.requires_grad_(False)
    conv.weight.grad = torch.ones_like(conv.weight)
    _skip_to(steps, generator, dropped=True)
    # The input of a first layer asks for no gradient.
    unit(_x(device).detach()).sum().backward()
    assert torch.equal(conv.weight.grad, torch.ones_like(conv.weight))
    assert conv.bias.grad is None
    with torch.no_grad():
        assert not unit(_x(device)).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_a_relu_in_place_may_follow(device: str, mode: Any) -> None:
    unit, steps, generator = _unit(device, mode)
    for dropped in (True, False):
        _skip_to(steps, generator, dropped)
        x = _x(device)
        kept = x.detach().clone()
        y = unit(x)
        want = y.detach().relu()
        y = nn.functional.relu(y, inplace=True)
        y.sum().backward()
        assert torch.equal(y, want) and torch.equal(x, kept)


@pytest.mark.parametrize("mode", MODES)
def test_a_shortcut_of_its_own(device: str, mode: Any) -> None:
    """One that changes the shape, as where a stage begins."""
    steps = StepGenerator(3)
    branch = nn.Sequential(
        BatchNormReLU2d(3, device=device), nn.Conv2d(3, 5, 3, 2, 1, device=device)
    )
    shortcut = nn.Conv2d(3, 5, 1, 2, device=device)
    unit = StochasticDepthUnit(branch, 0.5, mode, shortcut, steps.unit(0.5))
    x = torch.randn(6, 3, 4, 4, device=device)
    for step in range(4):
        steps.set_step(step)
        unit.zero_grad()
        y = unit(x)
        y.sum().backward()
        assert y.shape == (6, 5, 2, 2)
        assert all(p.grad is not None for p in unit.parameters())
        dropped = (y == shortcut(x)).flatten(1).all(1)
        assert len(dropped.unique()) == (1 if mode == "batch" else 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device: str, dtype: torch.dtype, mode: Any) -> None:
    """The branch comes in half precision, the shortcut in fp32, and so does the sum."""
    unit, steps, generator = _unit(device, mode)
    for dropped in (True, False):
        _skip_to(steps, generator, dropped)
        x = _x(device)
        with torch.autocast(device, dtype=dtype):
            y = unit(x)
        assert y.dtype == torch.float32
        y.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in unit.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(device: str, dtype: torch.dtype, mode: Any) -> None:
    steps = StepGenerator(2)
    unit = StochasticDepthUnit(
        nn.Conv2d(3, 3, 1, device=device, dtype=dtype), 0.5, mode, generator=steps.unit(0.5)
    )
    x = _x(device).detach().to(dtype).requires_grad_()
    for step in range(3):
        steps.set_step(step)
        y = unit(x)
        y.float().sum().backward()
        assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_copies(device: str, mode: Any) -> None:
    unit, steps, _ = _unit(device, mode)
    steps.set_step(2)
    x = _x(device)
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
    """Ten units of different p: two graphs a unit in mode "batch", one in the others; some share
    theirs, as where nothing is computed."""
    torch._dynamo.reset()
    steps, counter, count = StepGenerator(4), CompileCounter(), 10
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
    unit, steps, generator = _unit(device, mode)
    other = copy.deepcopy(unit)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for dropped in (True, False):
        _skip_to(steps, generator, dropped)
        other.drop.generator.steps.set_step(int(steps.key(torch.device("cpu"))[1]))
        x = _x(device)
        results = []
        for module, parameters in ((unit, unit.branch), (compiled, other.branch)):
            y = module(x)
            results.append([y, *_grads(y, x, parameters), *parameters.state_dict().values()])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=COMPILED_ATOL)


class _Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_branch_with_a_forward_of_its_own_or_hooks_is_called(device: str) -> None:
    """The fused gather goes round an nn.Sequential's forward, which must then be its plain one."""
    unit, _, _ = _unit(device, "subset")
    x = _x(device)
    want = unit(x) - x
    doubled = StochasticDepthUnit(_Doubled(*unit.branch), 0.5, "subset", None, unit.drop.generator)
    torch.testing.assert_close(doubled(x) - x, 2 * want)
    called: list[int] = []
    unit.branch.register_forward_hook(lambda module, args, y: called.append(len(y)))
    torch.testing.assert_close(unit(x) - x, want)
    assert called == [3]


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_that_does_not_fit_is_refused_in_words(device: str, mode: Any) -> None:
    """Also where `+` would broadcast it."""
    steps = StepGenerator(1)
    generator = steps.unit(0.5)
    unit = StochasticDepthUnit(nn.Conv2d(3, 1, 1, device=device), 0.5, mode, generator=generator)
    _skip_to(steps, generator, dropped=False)
    for training in (True, False):
        unit.train(training)
        with pytest.raises(ValueError, match=r"expected (branch's|the shortcut's shape) \["):
            unit(_x(device))


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
