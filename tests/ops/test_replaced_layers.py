"""Modules that are one op, where a layer was replaced, hooked, moved, or its output changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from fastres.models import ResNet
from fastres.ops import (
    BatchMoments,
    Norm,
    NormReLUConv2d,
    PreActUnit,
    StochasticDepth,
    classifier_cross_entropy,
    norm_relu_conv2d,
    preact_unit,
)


def layers_of(unit: PreActUnit, x: Tensor) -> Tensor:
    """The unit by the forwards of its layers, in evaluation."""
    a = unit.bn1(x)
    return unit.conv2(unit.bn2(unit.conv1(a))) + (x if unit.shortcut is None else unit.shortcut(a))


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


def _biased(unit: PreActUnit) -> None:
    unit.conv2 = nn.Conv2d(16, 16, 3, padding=1)
    nn.init.constant_(unit.conv2.bias, 100.0)  # type: ignore[arg-type]  # it has one


def _scaled(unit: PreActUnit) -> None:
    unit.conv1 = Scaled(16, 16, 3, padding=1, bias=False)


def _circular(unit: PreActUnit) -> None:
    unit.conv1.padding_mode = "circular"
    unit.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


def _hooked(unit: PreActUnit) -> None:
    unit.conv1.register_forward_hook(lambda module, args, y: 3 * y)


@pytest.mark.parametrize("change", [_biased, _scaled, _circular, _hooked])
def test_a_unit_is_what_its_layers_are(
    change: Callable[[PreActUnit], None], device: str, path: str
) -> None:
    torch.manual_seed(1)
    unit = PreActUnit(16, 16).to(device).eval()
    change(unit)
    unit.to(device)
    x = torch.randn(2, 16, 4, 4, device=device)
    torch.testing.assert_close(unit(x), layers_of(unit, x))


def test_a_convolution_is_what_its_layers_are(device: str, path: str) -> None:
    module = NormReLUConv2d(16, 16).to(device).eval()
    x = torch.randn(2, 16, 4, 4, device=device)
    module.norm = nn.InstanceNorm2d(16).to(device)  # type: ignore[assignment]  # a user's
    torch.testing.assert_close(module(x), module.conv(F.relu(module.norm(x))))
    seen: list[Any] = []
    module = NormReLUConv2d(16, 16).to(device)
    module.conv.register_forward_hook(lambda *args: seen.append(args))
    module(x)
    assert len(seen) == 1


def test_a_pruned_unit_trains(device: str, path: str) -> None:
    """Pruning makes the weight anew before each forward."""
    unit = PreActUnit(16, 16).to(device)
    prune.l1_unstructured(unit.conv1, "weight", 0.5)
    for _ in range(2):
        unit(torch.randn(2, 16, 4, 4, device=device)).sum().backward()
    assert unit.conv1.weight_orig.grad is not None


def test_another_classifier_is_taken(device: str, path: str) -> None:
    net = ResNet(8, 16, fused_units=True).to(device).eval()
    net.fc = nn.Sequential(nn.Linear(64, 10), nn.Tanh()).to(device)  # type: ignore[assignment]  # a user's
    x, target = torch.randn(2, 3, 8, 8, device=device), torch.tensor([0, 1], device=device)
    loss, logits = net(x, target)
    torch.testing.assert_close(logits, net(x))
    torch.testing.assert_close(loss, F.cross_entropy(net(x), target))


def _wrapped(net: ResNet) -> None:
    net.units[1] = nn.Sequential(net.units[1], Fifth())


class Fifth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 5


def _fifth(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y / 5


@pytest.mark.parametrize("name", ["wrapped", "stem", "units.0", "units.2", "bn", "fc"])
def test_a_network_is_what_its_modules_are(name: str, device: str, path: str) -> None:
    """Hooked or wrapped, by the moments of what came out, not of what went in."""
    torch.manual_seed(1)
    plain = ResNet(8, 16, fused=False).to(device)
    fused = ResNet(8, 16, fused_units=True).to(device)
    fused.load_state_dict(plain.state_dict())
    x, target = torch.randn(4, 3, 8, 8, device=device), torch.tensor([0, 1, 2, 3], device=device)
    for net in (plain, fused):
        if name == "wrapped":
            _wrapped(net)
        else:
            net.get_submodule(name).register_forward_hook(_fifth)
    for a, b in zip(fused(x, target), plain(x, target), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # fp32 in other orders


def test_a_shared_batch_needs_its_layers() -> None:
    unit = PreActUnit(16, 16)
    unit.process_group = object()  # type: ignore[assignment]  # which nobody asks
    unit.conv2 = Scaled(16, 16, 3, padding=1, bias=False)
    with pytest.raises(
        ValueError, match="process_group: .* layers of this unit have been replaced"
    ):
        unit(torch.randn(2, 16, 4, 4))


@pytest.mark.parametrize("out", [16, 32])
def test_an_output_may_be_changed_in_place(out: int, device: str, path: str) -> None:
    """Whether the branch was dropped or not; and x is not changed with it."""
    unit = PreActUnit(16, out, drop=StochasticDepth(1.0, "batch")).to(device)
    x = torch.randn(2, 16, 4, 4, device=device, requires_grad=True)
    before = x.detach().clone()
    unit(x).relu_().sum().backward()
    with torch.no_grad():
        unit(x).relu_()
    assert torch.equal(x.detach(), before)


def test_shortcut_a_survives_the_meta_device(device: str, path: str) -> None:
    """Its weight is in no state_dict."""
    sizes: Any = {"depth": 8, "width": 16, "shortcut": "A", "fused_units": True}
    wanted = ResNet(**sizes).to(device).eval()
    x = torch.randn(2, 3, 8, 8, device=device)
    for assign in (False, True):
        with torch.device("meta"):
            net = ResNet(**sizes).eval()
        net = net if assign else net.to_empty(device=device)
        net.load_state_dict(wanted.state_dict(), assign=assign)
        torch.testing.assert_close(net(x), wanted(x), rtol=0, atol=0)


def test_a_default_dtype_makes_no_difference(device: str, path: str) -> None:
    unit = PreActUnit(16, 16, drop=StochasticDepth(0.5, "row")).to(device)
    torch.set_default_dtype(torch.float16)
    try:
        assert unit(torch.randn(2, 16, 4, 4, device=device, dtype=torch.float32)).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


BATCH = Norm(None, None, training=True)


def run_unit(x: Tensor, weights: list[Tensor]) -> Tensor:
    return preact_unit(x, BATCH, weights[0], BATCH, weights[1])[0].square().sum()


def run_classifier(x: Tensor, weights: list[Tensor]) -> Tensor:
    target = torch.arange(len(x), device=x.device)
    return classifier_cross_entropy(x, BATCH, weights[2], None, target)[0]


def run_convolution(x: Tensor, weights: list[Tensor]) -> Tensor:
    return norm_relu_conv2d(x, BATCH, weights[0], stride=2).square().sum()


@pytest.mark.parametrize("run", [run_unit, run_classifier, run_convolution])
def test_what_is_saved_may_come_back_in_other_strides(
    run: Callable[[Tensor, list[Tensor]], Tensor], device: str
) -> None:
    """As torch.autograd.graph.save_on_cpu hands it back from pinned memory."""
    shapes = ((16, 16, 3, 3), (16, 16, 3, 3), (5, 16))
    weights = [torch.randn(*shape, device=device).requires_grad_() for shape in shapes]
    x = torch.randn(3, 16, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()

    def gradients() -> list[Tensor]:
        found = torch.autograd.grad(run(x, weights), [x, *weights], allow_unused=True)
        return [g for g in found if g is not None]

    wanted = gradients()
    pack = torch.Tensor.detach
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone().contiguous()):
        got = gradients()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("partial", "chunk"),
    [
        (torch.zeros(2, 1, 8), 0), (torch.zeros(2, 7, 16), 0), (torch.zeros(2, 1, 16).half(), 0),
        (torch.zeros(2, 1, 16), 1), (torch.zeros(2, 1, 16), -1), (torch.zeros(2, 16), 0),
    ],
)  # fmt: skip
def test_moments_that_are_not_of_x_are_refused(partial: Tensor, chunk: int, device: str) -> None:
    x, w = torch.randn(2, 16, 4, 4, device=device), torch.randn(16, 16, 3, 3, device=device)
    moments = BatchMoments(partial.to(device), chunk)
    with pytest.raises(ValueError, match="moments: expected"):
        preact_unit(x, BATCH, w, BATCH, w, moments=moments)
    with pytest.raises(ValueError, match="moments: expected"):
        classifier_cross_entropy(
            x, BATCH, w[:, :, 0, 0].contiguous(), None, torch.tensor([0, 1], device=device),
            moments=moments,
        )  # fmt: skip
