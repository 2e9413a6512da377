"""The ResNet whose residual units are one op each: the plain model, its losses and gradients."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.norm_relu_conv2d_equality import Watch, few_programs
from tolerances import MODEL_RELATIVE, STEPS_RELATIVE

from fastres.kernels import _launch
from fastres.models import ResNet
from fastres.ops import MePropConv2d, PreActUnit, StemConv2d, StepGenerator, _register


def _models(device: str, **settings: Any) -> tuple[ResNet, ResNet, ResNet]:
    """Of one state: with fused units, plain, and plain in fp64 on the CPU."""
    torch.manual_seed(0)
    fused = ResNet(8, fused=True, fused_units=True, **settings).to(device)
    plain = ResNet(8, fused=False, **settings).to(device)
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert all(unit.whole for unit in fused.units if isinstance(unit, PreActUnit))
    return fused, plain, copy.deepcopy(plain).to("cpu", torch.float64)


def _each(
    models: tuple[ResNet, ...], monkeypatch: pytest.MonkeyPatch, run: Callable[[ResNet], Any]
) -> list[Any]:
    """run(model) for each; the plain ones on a CPU by PyTorch's own operators."""
    found = []
    for model in models:
        with monkeypatch.context() as patched, few_programs():
            if model is not models[0]:
                patched.setattr(_register, "INTERPRET", False)
            found.append(run(model))
    return found


def _like(t: torch.Tensor, model: ResNet) -> torch.Tensor:
    p = next(model.parameters())
    return t.to(p.device, p.dtype if t.is_floating_point() else t.dtype)


def _images(count: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 3, 6, 6, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.arange(count, device=device) % 10


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shortcut": "A"},
        {"drop_prob": 0.6, "drop_mode": "batch"},
        {"drop_prob": 0.6, "drop_mode": "row"},
        {"drop_prob": 0.6, "drop_mode": "subset"},
        {"meprop_ratio": 0.25},
    ],
    ids=str,
)
def test_fused_units_are_the_plain_model(
    settings: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = _models(device, **settings)
    x, target = _images(4, device)

    def run(model: ResNet) -> dict[str, torch.Tensor]:
        model.draw_from(StepGenerator(3))
        y = model(_like(x, model))
        F.cross_entropy(y, _like(target, model)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        saved = model.state_dict(keep_vars=True)
        buffers = {name: b for name, b in model.named_buffers() if name in saved}
        found = {"y": y.detach()} | grads | buffers
        model.eval()
        with torch.no_grad():
            found["y in evaluation"] = model(_like(x, model))
        return {name: t.cpu() for name, t in found.items()}

    _check(*_each(models, monkeypatch, run))


def _check(
    fused: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """Raise AssertionError unless the fused model is as near to fp64 as the plain one is."""
    assert fused.keys() == exact.keys()
    for name, want in exact.items():
        if not want.is_floating_point():
            assert name.endswith("num_batches_tracked") and torch.equal(fused[name], want)
            continue
        off, peer = ((a[name].double() - want).norm() for a in (fused, plain))
        bound = torch.maximum(2 * peer, MODEL_RELATIVE * want.norm())
        assert bool(off <= bound), f"{name} is off by {off}, the plain model by {peer}"


@pytest.mark.parametrize("settings", [{}, {"drop_prob": 0.6}], ids=str)
def test_the_loss_with_the_logits_is_the_plain_models(
    settings: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = _models(device, num_classes=7, keep_units=2, **settings)
    x, target = _images(4, device)

    def run(model: ResNet) -> dict[str, torch.Tensor]:
        model.draw_from(StepGenerator(3))
        loss, logits = model(_like(x, model), _like(target % 7, model), 0.1)
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        saved = model.state_dict(keep_vars=True)
        found |= {name: b.clone() for name, b in model.named_buffers() if name in saved}
        model.eval()
        with torch.no_grad():
            evaluated, _ = model(_like(x, model), _like(target % 7, model))
        found |= {"loss": loss, "logits": logits, "loss in evaluation": evaluated}
        return {name: t.detach().cpu() for name, t in found.items()}

    found = _each(models, monkeypatch, run)
    names = [name for name, _ in models[0].named_parameters()]
    assert set(names) <= found[0].keys()
    _check(*found)


def test_the_last_activation_is_read_once_forward_and_once_backward(device: str) -> None:
    """The last unit's moments go with it: no kernel takes them."""
    model, _, _ = _models(device, keep_units=2)
    x, target = _images(2, device)
    ran: list[str] = []

    def watcher(launch: _launch.Launch) -> AbstractContextManager[None]:
        ran.append(launch.kernel.__name__)
        return nullcontext()

    with _launch.watch(watcher), few_programs():
        loss, _ = model(x, target)
        units = [i for i, name in enumerate(ran) if name == "_norm_relu_conv2d_fwd_kernel"]
        end = [name for name in ran[units[-1] + 1 :] if not name.startswith("_update")]
        assert end == ["_classifier_cross_entropy_fwd_kernel"]
        ran.clear()
        loss.backward()
    assert ran[0] == "_classifier_cross_entropy_bwd_kernel"
    assert not ran[1].startswith("_classifier")


def test_what_the_loss_is_made_by_is_told() -> None:
    fused = "classifier and loss: one op on a GPU"
    layers = "classifier and loss: by layers"
    assert fused in repr(ResNet(8, fused_units=True)) and layers in repr(ResNet(8))
    assert layers in repr(ResNet(8, 12, fused_units=True, keep_units=1))
    assert layers in repr(ResNet(8, fused_units=True, num_classes=129))


def test_twenty_steps_lie_on_the_plain_models(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of twenty steps of SGD, beside those in fp64: an identity unit, and a projection."""
    models = _models(device, keep_units=2)
    x, target = _images(6, device)

    def run(model: ResNet) -> torch.Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        losses = []
        for _ in range(20):
            loss = F.cross_entropy(model(_like(x, model)), _like(target, model))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=torch.float64)

    fused, plain, exact = _each(models, monkeypatch, run)
    assert exact[-1] < 0.5 * exact[0]
    error, peer = ((a - exact).abs() / exact for a in (fused, plain))
    assert bool((error <= max(2 * peer.max().item(), STEPS_RELATIVE)).all()), (error, peer)


def test_two_steps_of_one_seed_are_bitwise_one(device: str) -> None:
    results = []
    for _ in range(2):
        model, _, _ = _models(device, keep_units=2)
        x, target = _images(3, device)
        with few_programs():
            F.cross_entropy(model(x), target).backward()
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_the_stem_hands_its_moments_to_the_first_unit(device: str) -> None:
    model, _, _ = _models(device, keep_units=1)
    x, _ = _images(4, device)
    assert isinstance(model.stem, StemConv2d) and model.stem.fused
    for training in (True, False):
        model.train(training)
        with few_programs(), Watch("stem_conv2d") as stem, Watch("preact_unit") as unit:
            model(x)
        (_, left), given = stem.out, unit.args[1]
        assert torch.equal(left, given) if training else given is None and not left.numel()
    # meProp's convolution has another backward, and leaves none.
    assert type(ResNet(8, fused_units=True, meprop_ratio=0.5).stem) is MePropConv2d


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="fused_units: expected with fused and block 'preact'"):
        ResNet(8, fused=False, fused_units=True)
    with pytest.raises(ValueError, match="fused_units: expected with fused and block 'preact'"):
        ResNet(8, block="postact", fused_units=True)


def test_widths_that_are_not_served_go_by_layers() -> None:
    model = ResNet(8, 12, fused_units=True)
    units = [unit for unit in model.units if isinstance(unit, PreActUnit)]
    # Twelve channels, and twenty-four, are none that the kernels take; forty-eight are.
    assert [unit.whole for unit in units] == [False, False, False]
    assert "layer by layer" in repr(units[0])
    assert all(unit.whole for unit in ResNet(8, 16, fused_units=True).units)
