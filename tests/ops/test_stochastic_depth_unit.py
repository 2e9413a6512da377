"""StochasticDepthUnit: what it computes, what it leaves out, and what its parameters then get."""

from typing import Any

import pytest
import torch
from ops.stochastic_depth_add_equality import MODES
from ops.stochastic_depth_units import grads, in_pytorch, input_of, skip_to, unit_of
from tolerances import COMPILED_ATOL
from torch import Tensor, nn

from fastres.ops import (
    BatchNormReLU2d,
    StepGenerator,
    StochasticDepthUnit,
)
from fastres.ops.stochastic_depth_add import draw_subset, subset_size

pytestmark = pytest.mark.usefixtures("path")


def test_a_dropped_batch_is_not_computed(device: str) -> None:
    unit, steps, generator = unit_of(device, "batch")
    x = input_of(device)
    norm, conv = unit.branch
    skip_to(steps, generator, dropped=True)
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
    skip_to(steps, generator, dropped=False)
    unit(x)
    assert conv.seen == [6] and norm.num_batches_tracked == 1


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_kept_batch_is_scaled(device: str, fmt: torch.memory_format) -> None:
    unit, steps, generator = unit_of(device, "batch", p=0.25)
    plain, x = in_pytorch(unit.branch), input_of(device, fmt=fmt)
    skip_to(steps, generator, dropped=False)
    y = unit(x)
    torch.testing.assert_close(y, x + plain(x) / 0.75)
    assert y.is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.99])
def test_a_subset_is_all_that_is_computed(device: str, p: float) -> None:
    unit, steps, _ = unit_of(device, "subset", p)
    for step in range(3):
        steps.set_step(step)
        unit(input_of(device, 10))
    assert unit.branch[1].seen == [max(round(10 * (1 - p)), 1)] * 3


def test_rows_are_all_computed(device: str) -> None:
    unit, _, _ = unit_of(device, "row")
    unit(input_of(device))
    assert unit.branch[1].seen == [6]


@pytest.mark.parametrize("mode", MODES)
def test_p_of_one_and_of_zero(device: str, mode: Any) -> None:
    x = input_of(device)
    unit, _, _ = unit_of(device, mode, p=1.0)
    y = unit(x)
    assert torch.equal(y, x) and unit.branch[1].seen == ([6] if mode == "row" else [])
    y.sum().backward()
    for parameter in unit.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    unit, _, _ = unit_of(device, mode, p=0.0)
    torch.testing.assert_close(unit(x), x + in_pytorch(unit.branch)(x))


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_the_sum(device: str, mode: Any) -> None:
    unit, steps, _ = unit_of(device, mode, p=1.0)
    unit.eval()
    x = input_of(device)
    want = x + in_pytorch(unit.branch).eval()(x)
    for step in range(3):
        steps.set_step(step)
        torch.testing.assert_close(unit(x), want)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch(device: str, mode: Any) -> None:
    unit, steps, generator = unit_of(device, mode)
    skip_to(steps, generator, dropped=False)
    x = input_of(device, 0)
    y = unit(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in unit.parameters())


@pytest.mark.parametrize("fused", [True, False], ids=["fused gather", "plain gather"])
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_subset_equals_gather_branch_and_scatter(
    device: str, fmt: torch.memory_format, fused: bool
) -> None:
    """And its BatchNorm normalises by, and tracks, the samples of the subset."""
    unit, steps, generator = unit_of(device, "subset", p=0.4)
    plain = in_pytorch(unit.branch)
    if not fused:
        unit.branch = nn.Sequential(nn.Identity(), *unit.branch)
    steps.set_step(5)
    x = input_of(device, 7, fmt)
    index, _ = draw_subset(steps.key(x.device), 7, subset_size(7, 0.4), generator.number)
    assert len(index) == 4
    y = unit(x)
    want = x.index_add(0, index, plain(x[index]), alpha=7 / 4)
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=fmt)
    for got, wanted in zip(grads(y, x, unit.branch), grads(want, x, plain), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=COMPILED_ATOL)
    norm = unit.branch[0 if fused else 1]
    for name, v in plain[0].state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], v)


def test_batch_norm_sees_every_row(device: str) -> None:
    """In mode "row" its statistics are those of the whole batch, whoever is dropped."""
    unit, steps, _ = unit_of(device, "row")
    plain, x = in_pytorch(unit.branch), input_of(device)
    branch = plain(x)
    y = unit(x)
    torch.testing.assert_close(unit.branch[0].running_mean, plain[0].running_mean)
    torch.testing.assert_close(unit.branch[0].running_var, plain[0].running_var)
    kept = (y != x).flatten(1).any(1)
    assert 0 < kept.sum() < 6
    torch.testing.assert_close(y[kept], (x + 2 * branch)[kept])


def test_one_value_a_channel_in_a_subset_is_an_error(device: str) -> None:
    unit, _, _ = unit_of(device, "subset", p=0.9)
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


def test_skipping_adds_to_a_gradient_and_spares_the_frozen(device: str) -> None:
    unit, steps, generator = unit_of(device, "batch")
    conv = unit.branch[1]
    conv.bias.requires_grad_(False)
    conv.weight.grad = torch.ones_like(conv.weight)
    skip_to(steps, generator, dropped=True)
    # The input of a first layer asks for no gradient.
    unit(input_of(device).detach()).sum().backward()
    assert torch.equal(conv.weight.grad, torch.ones_like(conv.weight))
    assert conv.bias.grad is None
    with torch.no_grad():
        assert not unit(input_of(device)).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_a_relu_in_place_may_follow(device: str, mode: Any) -> None:
    unit, steps, generator = unit_of(device, mode)
    for dropped in (True, False):
        skip_to(steps, generator, dropped)
        x = input_of(device)
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


class _Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_branch_with_a_forward_of_its_own_or_hooks_is_called(device: str) -> None:
    """The fused gather goes round an nn.Sequential's forward, which must then be its plain one."""
    unit, _, _ = unit_of(device, "subset")
    x = input_of(device)
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
    skip_to(steps, generator, dropped=False)
    for training in (True, False):
        unit.train(training)
        with pytest.raises(ValueError, match=r"expected (branch's|the shortcut's shape) \["):
            unit(input_of(device))
