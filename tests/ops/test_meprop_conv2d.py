"""meprop_conv2d and MePropConv2d on both paths: the fp64 reference, and the corners."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from ops.batch_norm_relu_equality import LAYOUTS
from ops.meprop_equality import DTYPES, MODES, NAMES, VALUES, check, drawn, run
from torch import Tensor, nn

from fastres.ops import MePropConv2d, _register, meprop_conv2d
from fastres.ops.meprop_conv2d import meprop_conv2d_reference

DENSE = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# PyTorch says so of every even kernel with padding "same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


# x's shape, weight's shape, and the convolution's other arguments by their names.
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 3, 5, 6), (8, 3, 3, 3), {"padding": 1}),
    "3x3 stride 2": ((2, 3, 6, 5), (8, 3, 3, 3), {"padding": (1, 0), "stride": 2}),
    "1x1": ((3, 4, 3, 3), (6, 4, 1, 1), {"stride": (1,)}),
    "dilated": ((2, 2, 7, 7), (5, 2, 3, 2), {"dilation": (2, 1), "padding": "same"}),
    "same, even": ((1, 2, 4, 5), (5, 2, 2, 4), {"padding": "same"}),
    "valid": ((2, 2, 4, 5), (5, 2, 2, 4), {"padding": "valid", "stride": (1, 2)}),
    "groups": ((2, 4, 4, 4), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 4, 4, 4), (8, 1, 3, 3), {"groups": 4, "padding": 1}),
    "no batch": ((3, 5, 6), (8, 3, 3, 3), {"padding": 1}),
}


def _tensors(
    name: str, dtype: torch.dtype, device: str, values: str = "grid", bias: bool = True,
    seed: int = 0, layout: str = "nchw", batch: int | None = None,
) -> tuple[dict[str, Tensor | None], Tensor, dict[str, Any]]:  # fmt: skip
    """The op's tensors, dy, and the rest of the convolution's arguments."""
    shape, weight_shape, options = GEOMETRIES[name]
    if batch is not None and len(shape) == 4:
        shape = (batch, *shape[1:])
    generator = torch.Generator().manual_seed(seed)
    x, weight, b = (drawn(s, "grid", generator) for s in (shape, weight_shape, weight_shape[:1]))
    dy = drawn(F.conv2d(x, weight, **options).shape, values, generator)

    def placed(v: Tensor) -> Tensor:
        v = v.to(device, dtype)
        return v.contiguous(memory_format=DENSE[layout]) if v.dim() == 4 else v

    given_ = {"x": placed(x), "weight": placed(weight), "bias": placed(b) if bias else None}
    return given_, placed(dy), options


def _reference(k: int, mode: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options

    def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() == 3:
            return meprop_conv2d_reference(x[None], weight, bias, **defaults, k=k, mode=mode)[0]
        return meprop_conv2d_reference(x, weight, bias, **defaults, k=k, mode=mode)

    return reference


def _width(mode: str, dy: Tensor) -> int:
    return dy.shape[-3] * (dy.shape[-2] * dy.shape[-1] if mode == "row" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_equals_the_reference(
    path: str, mode: str, dtype: torch.dtype, device: str, data: st.DataObject
) -> None:
    given_, dy, options = _tensors(
        data.draw(st.sampled_from(list(GEOMETRIES)), label="geometry"), dtype, device,
        values=data.draw(st.sampled_from(VALUES), label="values"),
        bias=data.draw(st.booleans(), label="bias"),
        seed=data.draw(st.integers(0, 2**16), label="seed"),
        layout=data.draw(st.sampled_from(list(DENSE)), label="layout"),
        batch=data.draw(st.integers(0, 3), label="N"),
    )  # fmt: skip
    if dy.dim() == 4 and dy.numel():
        dy = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)), label="dy")](dy)
    width = _width(mode, dy)
    k = data.draw(st.one_of(st.just(1), st.just(width), st.integers(1, width)), label="k")
    assume(dy.numel() or k < width)
    op = partial(meprop_conv2d, k=k, mode=mode, **options)
    check(op, _reference(k, mode, options), given_, dy)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("mode", MODES)
def test_geometries(path: str, mode: str, name: str, device: str) -> None:
    given_, dy, options = _tensors(name, torch.float32, device)
    op = partial(meprop_conv2d, k=3, mode=mode, **options)
    check(op, _reference(3, mode, options), given_, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layouts_of_dy_and_x(path: str, mode: str, layout: str, device: str) -> None:
    """Each layout once as dy's and once as x's, beside the other dense one."""
    for dense in DENSE:
        given_, dy, options = _tensors("3x3", torch.float32, device, layout=dense)
        op, reference = partial(meprop_conv2d, k=4, mode=mode, **options), _reference
        check(op, reference(4, mode, options), given_, LAYOUTS[layout](dy))
        assert given_["x"] is not None
        check(op, reference(4, mode, options), given_ | {"x": LAYOUTS[layout](given_["x"])}, dy)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("mode", MODES)
def test_memory_formats_are_pytorchs(path: str, mode: str, layout: str, device: str) -> None:
    given_, dy, options = _tensors("3x3", torch.float32, device, layout=layout)
    got = run(partial(meprop_conv2d, k=4, mode=mode, **options), given_, dy)
    want = run(partial(F.conv2d, **options), given_, dy)
    for name in want:
        assert got[name].stride() == want[name].stride(), name
    assert torch.equal(got["y"], want["y"])
    if mode == "unified":
        assert int((got["weight"] != 0).flatten(1).any(1).sum()) == 4


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("mode", MODES)
def test_ratio_1_and_k_of_all_are_the_dense_backward_to_the_bit(
    path: str, mode: str, name: str, device: str
) -> None:
    given_, dy, options = _tensors(name, torch.float32, device)
    want = run(partial(F.conv2d, **options), given_, dy)
    for share in ({"ratio": 1.0}, {"k": _width(mode, dy)}):
        got = run(partial(meprop_conv2d, mode=mode, **share, **options), given_, dy)
        assert all(torch.equal(got[name], want[name]) for name in want), share
    with pytest.raises(ValueError, match=rf"k: expected 1 <= k <= {_width(mode, dy)}, the out"):
        run(partial(meprop_conv2d, mode=mode, k=_width(mode, dy) + 1, **options), given_, dy)


@pytest.mark.parametrize("name", ["3x3", "groups"])
@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_needed_gradients(path: str, mode: str, name: str, device: str) -> None:
    given_, dy, options = _tensors(name, torch.float32, device)
    op = partial(meprop_conv2d, k=2, mode=mode, **options)
    full = run(op, given_, dy)
    for count in range(len(NAMES)):
        for needs in itertools.combinations(NAMES, count):
            got = run(op, given_, dy, needs)
            assert got.keys() == {"y", *needs}
            for name_ in got:
                torch.testing.assert_close(got[name_], full[name_])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["3x3", "groups"])
def test_a_channel_with_nan_or_inf_is_kept(path: str, name: str, bad: float, device: str) -> None:
    given_, dy, options = _tensors(name, torch.float32, device)
    dy[1, 4, 1, 1] = bad
    got = run(partial(meprop_conv2d, k=1, **options), given_, dy)
    assert not got["weight"][4].isfinite().all() and not got["bias"][4].isfinite()
    others = [0, 1, 2, 3, 5]
    if name == "3x3":
        assert (got["weight"][others] == 0).all()
    assert got["bias"][others].isfinite().all() and got["x"][0].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_are_bitwise_the_same(path: str, mode: str, device: str) -> None:
    given_, dy, options = _tensors("3x3", torch.float32, device, layout="nhwc")
    op = partial(meprop_conv2d, k=3, mode=mode, **options)
    first, second = (run(op, given_, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_autocast(path: str, mode: str, dtype: torch.dtype, device: str) -> None:
    given_, dy, options = _tensors("3x3", torch.float32, device, layout="nhwc")
    op = partial(meprop_conv2d, k=3, mode=mode, **options)

    def under_autocast(*args: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return op(*args)

    def cast(*args: Tensor) -> Tensor:
        return op(*(v.to(dtype) for v in args))

    got, want = run(under_autocast, given_, dy.to(dtype)), run(cast, given_, dy.to(dtype))
    assert got["y"].dtype == dtype and got["weight"].dtype == torch.float32
    assert all(torch.equal(got[name], want[name]) for name in want)


MODULES: list[dict[str, Any]] = [
    {"padding": 1},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
    {"padding": "valid", "bias": False},
    {"padding": "same", "dilation": 2, "groups": 2},
]


@pytest.mark.parametrize("options", MODULES, ids=str)
def test_the_module_is_nn_conv2ds_in_all_but_the_backward(
    path: str, options: dict[str, Any], device: str
) -> None:
    peer = nn.Conv2d(4, 8, 3, **options, device=device)
    ours = MePropConv2d(4, 8, 3, **options, device=device, ratio=0.25)
    ours.load_state_dict(peer.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in peer.named_parameters()]
    assert repr(ours) == f"MeProp{peer!r}"[:-1] + ", ratio=0.25, mode='unified')"
    x = torch.randn(2, 4, 6, 6, device=device)
    dy = torch.randn_like(peer(x))

    def grads(module: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(module(x), list(module.parameters()), dy))

    def same(ours: nn.Module, peer: nn.Module) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(grads(ours), grads(peer), strict=True)]

    assert torch.equal(ours(x), peer(x)) and not same(ours, peer)[0]
    ours.dense = True
    assert all(same(ours, peer)) and repr(ours).endswith(", mode='unified', dense)")
    ours.dense = False
    ours.ratio, ours.k, ours.mode = None, 7, "row"
    assert not same(ours, peer)[0]
    assert all(same(ours.eval(), peer.eval()))
    ours.train().k, ours.ratio = None, 1.0
    assert all(same(ours, peer))
    with torch.no_grad():
        assert torch.equal(ours.train()(x), peer(x))


def _wrong() -> Iterator[tuple[dict[str, Any], str]]:
    x, weight = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
    yield {"ratio": None}, "k and ratio: expected one of the two, got neither"
    yield {"ratio": 1.5}, "ratio: expected 0 < ratio <= 1, got 1.5"
    yield {"ratio": None, "k": 7}, "k: expected 1 <= k <= 6, the out channels, got 7"
    example = {"ratio": None, "k": 55, "mode": "row"}
    yield example, "k: expected 1 <= k <= 54, the outputs of an example, got 55"
    yield {"x": x.int()}, r"x: expected one of .*float32.* on cpu, got torch.int32"
    yield {"x": x[0, 0]}, r"x: expected \[N, C, H, W\] or \[C, H, W\], got shape \[5, 5\]"
    yield (
        {"weight": weight[0]},
        r"weight: expected \[out, C / groups, h, w\], got shape \[4, 3, 3\]",
    )
    yield {"weight": weight[:, :3]}, r"weight: expected \[out, 4, h, w\] for x's 4 channels in 1 "
    yield {"weight": weight.half()}, "weight: expected x's torch.float32 on cpu, got torch.float16"
    for groups in (3, 4, 0, -1):
        yield {"groups": groups}, f"groups: expected a divisor of x's 4 .* 6 outputs, got {groups}"
    yield {"groups": 2}, r"weight: expected \[out, 2, h, w\] for x's 4 channels in 2 groups"
    yield {"bias": torch.zeros(4)}, r"bias: expected \[6\] in x's .*, got \[4\] in torch.float32"
    yield {"stride": 0}, "stride: expected one or two integers of at least 1, got 0"
    yield {"dilation": (1, 0)}, r"dilation: expected .* of at least 1, got \(1, 0\)"
    yield {"padding": (1, 1, 1)}, r"padding: expected .* of at least 0, got \(1, 1, 1\)"
    yield {"padding": "full"}, "padding: expected integers, 'same' or 'valid', got 'full'"
    yield {"padding": "same", "stride": 2}, "padding: 'same' wants a stride of 1, got stride"


@pytest.mark.parametrize(("change", "words"), list(_wrong()))
def test_wrong_input_is_refused_in_words(
    change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_register, "INTERPRET", True)
    right: dict[str, Any] = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(6, 4, 3, 3),
        "ratio": 0.5,
    }
    with pytest.raises(ValueError, match=words):
        meprop_conv2d(**(right | change))


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ({}, "got neither"),
        ({"k": 9}, "1 <= k <= 8"),
        ({"k": "3"}, "k: expected an integer of at least 1, got 3"),
        ({"k": True}, "k: expected an integer of at least 1, got True"),
        ({"ratio": 2.0}, "0 < ratio <= 1"),
    ],
)
def test_the_module_refuses_at_construction(share: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MePropConv2d(5, 8, 3, **share)
    if share == {"k": 9}:  # an example has more outputs than channels
        MePropConv2d(5, 8, 3, **share, mode="row")
