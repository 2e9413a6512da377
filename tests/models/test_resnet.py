"""The ResNet: its shape, and that the fused and the plain model are one model."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import MODEL_RELATIVE

from fastres.models import ResNet
from fastres.ops import BatchNormReLU2d


@pytest.mark.parametrize(
    ("depth", "shortcut", "parameters"),
    [(20, "A", 0.27e6), (20, "B", 0.27e6), (110, "B", 1.7e6), (122, "A", 1.9e6), (122, "B", 1.9e6)],
)
def test_parameters_of_the_literature(depth: int, shortcut: Any, parameters: float) -> None:
    model = ResNet(depth, shortcut=shortcut)
    count = sum(p.numel() for p in model.parameters())
    # The papers round to two digits.
    assert count == pytest.approx(parameters, rel=0.03)
    weighted = [
        m
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and "shortcut" not in name
    ]
    assert len(weighted) == depth


@pytest.mark.parametrize("block", ["preact", "postact"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("training", [True, False])
def test_fused_is_plain(block: Any, shortcut: Any, training: bool, device: str) -> None:
    torch.manual_seed(0)
    fused = ResNet(8, 4, block, shortcut, num_classes=5, fused=True).to(device)
    plain = ResNet(8, 4, block, shortcut, num_classes=5, fused=False).to(device)
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert any(isinstance(m, BatchNormReLU2d) for m in fused.modules())
    assert not any(isinstance(m, BatchNormReLU2d) for m in plain.modules())
    exact = copy.deepcopy(plain).double()
    x = torch.randn(4, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.arange(4, device=device)

    def run(model: ResNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.detach().requires_grad_()
        y = model.train(training)(x)
        F.cross_entropy(y, target).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "x": x.grad, **grads, **dict(model.named_buffers())}

    results = run(fused, x), run(plain, x), run(exact, x.double())
    assert results[0].keys() == results[2].keys()
    for name, wanted in results[2].items():
        scale = wanted.abs().max().clamp_min(1e-3)  # some gradients are zero but for rounding
        errors = [float((r[name].double() - wanted).abs().max() / scale) for r in results[:2]]
        assert errors[0] <= max(2 * errors[1], MODEL_RELATIVE), (name, errors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, "6n . 2.*21"),
        ({"depth": 2}, "6n . 2.*2"),
        ({"block": "pre"}, "'preact' or 'postact', got 'pre'"),
        ({"shortcut": "C"}, "'A' or 'B', got 'C'"),
        ({"width": 0}, "got 0 and 10"),
        ({"num_classes": 0}, "got 16 and 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**arguments)


def test_shortcuts_are_those_of_the_papers() -> None:
    torch.manual_seed(0)
    for shortcut in ("A", "B"):
        unit: Any = ResNet(8, 4, shortcut=shortcut, fused=False).units[1]
        x = torch.randn(2, 4, 6, 6)
        a = F.relu(F.batch_norm(x, None, None, training=True))
        projected = F.conv2d(a, unit.shortcut.weight, stride=2) if shortcut == "B" else None
        sliced = torch.cat([a[:, :, ::2, ::2], torch.zeros(2, 4, 3, 3)], 1)
        way = unit.shortcut(a)
        torch.testing.assert_close(way, sliced if projected is None else projected)
        branch = unit.conv2(F.relu(F.batch_norm(unit.conv1(a), None, None, training=True)))
        torch.testing.assert_close(unit(x), branch + way)
