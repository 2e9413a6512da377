"""The ResNet: its shape, and that the fused and the plain model are one model."""

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from tolerances import MODEL_RELATIVE

from fastres.models import ResNet
from fastres.ops import BatchNormReLU2d, MePropConv2d, StepGenerator, StochasticDepth, _register


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
@pytest.mark.parametrize(
    ("training", "drop_mode"),
    [(True, None), (False, None), (True, "batch"), (True, "row"), (True, "subset")],
)
def test_fused_is_plain(
    block: Any,
    shortcut: Any,
    training: bool,
    drop_mode: Any,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    drop = {} if drop_mode is None else {"drop_prob": 0.6, "drop_mode": drop_mode}
    fused = ResNet(8, 4, block, shortcut, num_classes=5, fused=True, **drop).to(device)
    plain = ResNet(8, 4, block, shortcut, num_classes=5, fused=False, **drop).to(device)
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert any(isinstance(m, BatchNormReLU2d) for m in fused.modules())
    assert not any(isinstance(m, BatchNormReLU2d) for m in plain.modules())
    exact = copy.deepcopy(plain).double()
    # "subset" leaves half of them to a BatchNorm.
    x = torch.randn(8, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.arange(8, device=device) % 5

    def run(model: ResNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.detach().requires_grad_()
        draws = StepGenerator(seed=5)
        model.draw_from(draws)
        draws.set_step(1)
        y = model.train(training)(x)
        F.cross_entropy(y, target.to(y.device)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "x": x.grad, **grads, **dict(model.named_buffers())}

    results = [run(fused, x)]
    if device == "cpu":
        monkeypatch.setattr(_register, "INTERPRET", False)  # the plain model has no kernels
        results += [run(plain, x), run(exact, x.double())]
    else:
        exact.cpu()
        results += [run(plain, x), run(exact, x.cpu().double())]
    assert results[0].keys() == results[2].keys()
    for name, wanted in results[2].items():
        scale = wanted.abs().max().clamp_min(1e-3)  # some gradients are zero but for rounding
        errors = [
            float((r[name].double().to(wanted.device) - wanted).abs().max() / scale)
            for r in results[:2]
        ]
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
        ({"drop_prob": 1.5}, "0 <= p <= 1, got 1.5"),
        ({"drop_mode": "each"}, "'subset', got 'each'"),
        ({"drop_schedule": "log"}, "'linear', got 'log'"),
        ({"meprop_ratio": 0.0}, "got 0.0"),
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


@pytest.mark.parametrize("drop_mode", ["batch", "row", "subset"])
@pytest.mark.parametrize("block", ["preact", "postact"])
def test_a_dropped_unit_passes_its_shortcut_and_zero_gradients(
    block: Any, drop_mode: Any, device: str
) -> None:
    """With p = 1 nothing but the stem, the shortcuts, their BatchNorms and the head is left."""
    model = ResNet(8, 4, block, num_classes=5, drop_prob=1.0, drop_mode=drop_mode)
    model = model.to(device)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 1.0  # of the linear schedule the last alone has it
    x = torch.randn(4, 3, 8, 8, device=device)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        # A shape-changing pre-activation unit's shortcut reads what bn1 gives.
        branch = any(part in name for part in ("conv1", "conv2", "bn2"))
        branch |= "bn1" in name and (block == "postact" or name.startswith("units.0"))
        assert bool((p.grad == 0).all()) == branch, name
    if drop_mode == "batch":
        counters = [b for n, b in model.named_buffers() if "bn2.num_batches" in n]
        assert counters and not any(counters)


def test_meprop_takes_every_convolution_and_the_same_weights() -> None:
    plain, sparse = ResNet(8, 4), ResNet(8, 4, meprop_ratio=0.5, meprop_mode="row")
    sparse.load_state_dict(plain.state_dict())
    kinds = [m for m in sparse.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(kinds) == 9 and all(isinstance(m, MePropConv2d) for m in kinds)
    assert {(m.ratio, m.mode) for m in kinds if isinstance(m, MePropConv2d)} == {(0.5, "row")}


@pytest.mark.parametrize("block", ["preact", "postact"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_zero_init_begins_with_shortcuts_and_every_weight_learns(
    block: Any, shortcut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_register, "INTERPRET", False)
    torch.manual_seed(0)
    plain = ResNet(14, 4, block, shortcut)
    torch.manual_seed(0)
    model = ResNet(14, 4, block, shortcut, zero_init=True)
    last = {"preact": "conv2.weight", "postact": "bn2.weight"}[block]
    for (name, p), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert not p.any() if name.endswith(last) else torch.equal(p, wanted), name
    units: Any = model.units
    x = torch.randn(4, 4, 8, 8).relu()
    assert torch.equal(units[0](x), x)
    way = units[2].shortcut(units[2].bn1(x) if block == "preact" else x)
    torch.testing.assert_close(units[2](x), way if block == "preact" else way.relu())
    # The zeros move at the first step, and what stands before them from the second on.
    for step in range(2):
        model.zero_grad()
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            begins = "units" not in name or name.endswith(last) or "shortcut" in name
            assert p.grad.any() or not (step == 1 or begins), (step, name)
            with torch.no_grad():
                p.sub_(0.1 * p.grad)


def test_meprop_can_be_put_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off, its gradients are the plain model's bitwise; each of the two is compiled once."""
    monkeypatch.setattr(_register, "INTERPRET", False)
    x = torch.randn(4, 3, 8, 8)

    def gradients(model: Any) -> list[torch.Tensor]:
        model.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    sparse, plain = ResNet(8, 4, meprop_ratio=0.25), ResNet(8, 4)
    plain.load_state_dict(sparse.state_dict())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(sparse, backend=counter, fullgraph=True)
    wanted = {True: gradients(sparse), False: gradients(plain)}
    assert not all(torch.equal(a, b) for a, b in zip(wanted[True], wanted[False], strict=True))
    for on in (False, True, False, True):
        sparse.set_meprop(on)
        assert (", dense" in repr(sparse)) == (not on)
        for a, b in zip(gradients(sparse), wanted[on], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(gradients(compiled), wanted[on], strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 2
