"""PreActUnit and NormReLUConv2d in the place of their layers: modes, states, copies, memory."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from ops.norm_relu_conv2d_equality import Watch, few_programs
from ops.stochastic_depth_units import skip_to
from tolerances import MODEL_RELATIVE, SAVED_SHARE
from torch import Tensor, nn

from fastres.models import ResNet
from fastres.ops import (
    MePropConv2d,
    NormReLUConv2d,
    PreActUnit,
    StepGenerator,
    StochasticDepth,
    _register,
)
from fastres.ops._norm_relu_conv2d_check import serves
from fastres.ops.preact_unit_module import PadShortcut

MODES = ["batch", "row", "subset"]
SHORTCUTS = ["identity", "A", "B"]
NHWC = torch.channels_last


def _meprop(C: int, K: int, size: int, stride: int, padding: int) -> nn.Conv2d:
    return MePropConv2d(C, K, size, stride, padding, bias=False, ratio=0.4)


def _unit(
    shortcut: str, device: str, mode: Any = None, generator: Any = None, **options: Any
) -> Any:
    """A unit with numbers in its norms; drops with probability 1/2 by a generator of its own."""
    drop = None
    if mode is not None:
        drop = StochasticDepth(0.5, mode, generator or StepGenerator(3).unit(0.5))
    sizes = (16, 16, 1) if shortcut == "identity" else (16, 32, 2)
    way = PadShortcut(*sizes) if shortcut == "A" else None
    unit = PreActUnit(*sizes, shortcut=way, drop=drop, **options)
    for bn in (unit.bn1, unit.bn2):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return unit.to(device)


def _x(device: str, N: int = 4) -> Tensor:
    return torch.randn(N, 16, 5, 6, device=device).to(memory_format=NHWC)


@contextmanager
def _layers() -> Iterator[None]:
    """The path that a CPU's tensors take: PyTorch's own layers, in fp64 too."""
    with mock.patch.object(_register, "INTERPRET", False):
        yield


def _step(unit: Any, x: Tensor, dtype: Any = None) -> dict[str, Tensor]:
    """y, every gradient, and the state after one step."""
    x = x.detach().requires_grad_()
    unit.zero_grad()
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        y = unit(x)
    dy = torch.linspace(-1, 1, y.numel(), device=x.device).view(y.shape).cos()
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad, "dy": dy}
    found |= {f"d{name}": p.grad for name, p in unit.named_parameters()}
    return found | {name: v.clone() for name, v in unit.named_buffers()}


def _agree(got: dict[str, Tensor], want: dict[str, Tensor], relative: float) -> None:
    assert got.keys() == want.keys()
    for name in got:
        a, b = got[name].double().cpu(), want[name].double().cpu()
        assert (a - b).abs().max() <= relative * b.abs().max(), name


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_equals_its_layers(device: str, shortcut: str, mode: Any) -> None:
    """In training, kept and dropped, and in evaluation, against the same layers in fp64."""
    unit = _unit(shortcut, device, mode)
    plain = copy.deepcopy(unit).cpu().double()
    x = _x(device)
    for dropped in (False, True) if mode == "batch" else (False,):
        for one in (unit, plain):
            if mode is not None:
                skip_to(one.drop.generator.steps, one.drop.generator, dropped)
        with few_programs(), Watch("preact_unit") as seen:
            got = _step(unit, x)
        assert bool(seen.args) != dropped
        with _layers():
            want = _step(plain, x.double().cpu())
        _agree(got, want, MODEL_RELATIVE)
    got, x = {"y": unit.eval()(x)}, x.double().cpu()
    with _layers():
        _agree(got, {"y": plain.eval()(x)}, MODEL_RELATIVE)


@pytest.mark.parametrize("shortcut", ["identity", "B"])
def test_meprop_equals_its_layers(device: str, shortcut: str) -> None:
    """Sparse, dense, and in evaluation, where its backward is dense."""
    unit = _unit(shortcut, device, conv=_meprop)
    plain, x = copy.deepcopy(unit), _x(device)
    plain.whole = False
    assert unit.whole
    for sparse, training in ((True, True), (False, True), (True, False)):
        for one in (unit, plain):
            one.train(training)
            for conv in one.modules():
                if isinstance(conv, MePropConv2d):
                    conv.dense = not sparse
        with few_programs():
            _agree(_step(unit, x), _step(plain, x), MODEL_RELATIVE)


@pytest.mark.parametrize("mode", MODES)
def test_pytorchs_generators_draw_as_for_the_layers(device: str, mode: Any) -> None:
    """Seeded alike, and by the default generator; several steps, some of them dropped."""
    for own in (True, False):
        generators = [torch.Generator("cpu" if mode == "batch" else device) for _ in range(2)]
        unit = _unit("identity", device, mode, generators[0] if own else torch.default_generator)
        if not own:
            unit.drop.generator = None
        plain = _unit("identity", device, mode, generators[1])
        plain.load_state_dict(unit.state_dict())
        plain.whole = False
        plain.drop.generator = generators[1] if own else None
        x, ys = _x(device, 3), []
        for one, generator in zip((unit, plain), generators, strict=True):
            torch.manual_seed(5) if not own else generator.manual_seed(5)
            with torch.no_grad():
                ys.append(torch.stack([one(x) for _ in range(4)]))
        _agree({"y": ys[0]}, {"y": ys[1]}, MODEL_RELATIVE)


@pytest.mark.parametrize("mode", ["batch", "subset"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_dropped_units_parameters_have_zero_gradients(
    device: str, shortcut: str, mode: Any
) -> None:
    """The branch's; in "subset" where not one sample is left."""
    unit, x = _unit(shortcut, device, mode), _x(device)
    skip_to(unit.drop.generator.steps, unit.drop.generator, True)
    if mode == "subset":
        with mock.patch("fastres.ops.preact_unit_module.subset_size", lambda N, p: 0):
            found = _step(unit, x)
    else:
        found = _step(unit, x)
    branch = [p for name, p in unit.named_parameters() if name.startswith(("conv", "bn2"))]
    assert all(p.grad is not None and not p.grad.any() for p in branch)
    if shortcut == "identity":
        assert not unit.bn1.weight.grad.any()
        assert torch.equal(found["y"], x) and torch.equal(found["dx"], found["dy"])
    else:
        # norm1 is the shortcut's, too.
        assert unit.bn1.weight.grad.any() and unit.bn1.num_batches_tracked == 1


def test_moments_travel_through_units(device: str) -> None:
    """Out of a unit, past one that is dropped, and none where nobody has taken them."""
    units = [_unit("identity", device, mode) for mode in (None, "batch", None)]
    skip_to(units[1].drop.generator.steps, units[1].drop.generator, True)
    x, moments = _x(device), None
    given: list[Any] = []
    with torch.no_grad():
        y = x
        for unit in units:
            given.append(moments)
            y, moments = unit(y, moments, True)
        z = units[2](units[1](units[0](x)))
    assert given[0] is None and given[1] is not None and given[2] is given[1]
    torch.testing.assert_close(y, z)
    assert units[0].eval()(x, None, True)[1] is None
    units[0].train().whole = False
    assert units[0](x, None, True)[1] is None


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_state_dict_is_that_of_the_layers(shortcut: str) -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    want = [f"bn1.{n}" for n in norm] + ["conv1.weight", *(f"bn2.{n}" for n in norm)]
    want += ["conv2.weight"] + ["shortcut.weight"] * (shortcut == "B")
    units = [_unit(shortcut, "cpu"), _unit(shortcut, "cpu", whole=False)]
    for unit in units:
        assert list(unit.state_dict()) == want
    units[1].load_state_dict(units[0].state_dict())
    assert "one op on a GPU" in repr(units[0]) and "layer by layer" in repr(units[1])


@pytest.mark.parametrize("mode", [None, *MODES])
def test_copies(device: str, mode: Any) -> None:
    unit, x = _unit("B", device, mode), _x(device)
    if mode is not None:
        skip_to(unit.drop.generator.steps, unit.drop.generator, False)
    with torch.no_grad():
        others = [copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))]
        want = unit(x)
        assert all(torch.equal(other(x), want) for other in others)
    others[0].conv1.weight.detach().zero_()
    assert unit.conv1.weight.any()


def test_a_zero_branch_is_the_shortcut(device: str) -> None:
    unit, x = _unit("identity", device), _x(device)
    unit.zero_branch()
    with few_programs():
        found = _step(unit, x)
    assert torch.equal(found["y"], x)
    assert found["dconv2.weight"].any() and not found["dconv1.weight"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [None, "row", "subset"])
def test_autocast(device: str, mode: Any, dtype: torch.dtype) -> None:
    """As for an x of that dtype, bitwise: y is in it, and the gradients in the parameters'."""
    unit, x = _unit("B", device, mode), _x(device)
    if mode is not None:
        skip_to(unit.drop.generator.steps, unit.drop.generator, False)
    other = copy.deepcopy(unit)
    with few_programs():
        got, want = _step(unit, x, dtype), _step(other, x.to(dtype))
    assert got["y"].dtype == dtype and got["dx"].dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in unit.parameters())
    for name in got:
        assert torch.equal(got[name], want[name].to(got[name].dtype)), name


def test_serves() -> None:
    """What the fused kernels take the place of, by shape alone."""

    def conv(
        C: int, K: int, size: Any, stride: Any = 1, padding: Any = 0, **options: Any
    ) -> nn.Conv2d:
        return nn.Conv2d(C, K, size, stride, padding, **({"bias": False} | options))

    channels = (16, 16), (16, 32), (80, 48)
    served = [conv(C, K, t, s, t // 2) for C, K in channels for t in (1, 3) for s in (1, 2)]
    served += [MePropConv2d(16, 16, 3, padding=1, bias=False, k=4)]
    unserved = [
        conv(3, 16, 3, 1, 1), conv(16, 8, 3, 1, 1), conv(16, 24, 1), conv(16, 16, 5, 1, 2),
        conv(16, 16, 3, 1, 0), conv(16, 16, 1, 1, 1), conv(16, 16, 3, 3, 1),
        conv(16, 16, (3, 1), 1, (1, 0)), conv(16, 16, 3, (2, 1), 1),
        conv(16, 16, 3, 1, 1, groups=2), conv(16, 16, 3, 1, 2, dilation=2),
        conv(16, 16, 3, 1, 1, bias=True), conv(16, 16, 3, 1, 1, padding_mode="circular"),
        MePropConv2d(16, 16, 3, padding=1, bias=False, k=4, mode="row"),
        type("Another", (nn.Conv2d,), {})(16, 16, 3, 1, 1, bias=False),
    ]  # fmt: skip
    assert [c for c in served if not serves(c)] == []
    assert [c for c in unserved if serves(c)] == []


def test_what_is_not_served_runs_by_layers(device: str) -> None:
    for unit in (
        PreActUnit(16, 24, 2),
        PreActUnit(16, 16, whole=False),
        PreActUnit(16, 16, shortcut=nn.Sequential(nn.Conv2d(16, 16, 1))),
        PreActUnit(16, 16, conv=nn.Conv2d),
    ):
        assert not unit.whole
        with torch.no_grad(), Watch("preact_unit") as seen:
            unit.to(device)(_x(device))
        assert not seen.args


@pytest.mark.parametrize("sizes", [(16, 32, 3, 2), (16, 16, 1, 1), (6, 9, 3, 1)], ids=str)
def test_norm_relu_conv2d_in_the_place_of_its_layers(
    path: str, device: str, sizes: tuple[int, int, int, int]
) -> None:
    """With a residual and without, in training and in evaluation; also where it is not served."""
    C = sizes[0]
    module = NormReLUConv2d(*sizes, momentum=None).to(device)
    norm = copy.deepcopy(module.norm)
    plain = nn.Sequential(norm, nn.ReLU(), copy.deepcopy(module.conv))
    names = [f"norm.{name}" for name in norm.state_dict()] + ["conv.weight"]
    assert list(module.state_dict()) == names and module.fused == (C == 16)
    assert ("unfused" in repr(module)) == (C != 16)
    for training in (True, True, False):
        x = torch.randn(3, C, 4, 5, device=device) + 1
        residual = torch.randn_like(plain(x)) if training else None
        module.train(training).zero_grad()
        plain.train(training).zero_grad()
        for one in (module.norm, norm):
            one.reset_running_stats()
        y = module(x, residual)
        dy = torch.randn_like(y)
        y.backward(dy)
        z = plain(x) if residual is None else plain(x) + residual
        z.backward(dy)
        torch.testing.assert_close(y, z)
        for a, b in zip(module.parameters(), plain.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            atol = MODEL_RELATIVE * b.grad.abs().max().item()
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=atol)
        for got, want in zip(module.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(got, want)


class _Bytes:
    """Counts what autograd keeps, every storage once, but for parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        state = [*module.parameters(), *module.buffers()]
        self.left = {t.untyped_storage().data_ptr() for t in state}
        self.kept: dict[int, Tensor] = {}

    def __call__(self, t: Tensor) -> Tensor:
        if (start := t.untyped_storage().data_ptr()) not in self.left:
            self.kept[start] = t
        return t

    @property
    def count(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.kept.values())


def _saved(module: nn.Module, x: Tensor) -> tuple[int, list[Tensor]]:
    saved = _Bytes(module)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t),
        torch.autocast(x.device.type, dtype=torch.bfloat16),
    ):
        y = module(x)
    del y
    return saved.count, list(saved.kept.values())


@pytest.mark.parametrize("shortcut", ["identity", "B"])
def test_a_unit_saves_x_h_and_vectors(device: str, shortcut: str) -> None:
    unit, x = _unit(shortcut, device), _x(device).bfloat16().requires_grad_()
    _, saved = _saved(unit, x)
    h = (4, 32, 3, 3) if shortcut == "B" else tuple(x.shape)
    images = [t for t in saved if t.dim() == 4]
    assert sorted(tuple(t.shape) for t in images) == sorted([tuple(x.shape), h])
    assert {t.dtype for t in images} == {torch.bfloat16}
    # Besides, of each norm the mean and the variance.
    assert [t.dim() for t in saved if t.dim() != 4] == [1] * 4


def test_a_model_saves_half_of_what_pytorch_saves(device: str) -> None:
    """ResNet-20 with bf16 autocast: the inputs of all BatchNorms and that of the stem remain."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 32, 32, device=device)
    plain = ResNet(20, fused=False).to(device).to(memory_format=NHWC)
    ours = ResNet(20, fused_units=True).to(device).to(memory_format=NHWC)
    want, _ = _saved(plain, x.to(memory_format=NHWC))
    got, _ = _saved(ours, x.to(memory_format=NHWC))
    assert got <= SAVED_SHARE * want, got / want
