"""batch_norm_relu against its reference in fp64: shapes, layouts, dtypes, values, corners."""

import dataclasses
import importlib
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.batch_norm_relu_equality import (
    GRADS,
    LAYOUTS,
    LEAVES,
    VALUES,
    Case,
    check,
    run,
    small_tiles,
    tensors,
)
from tolerances import GRADCHECK_ATOL
from torch import Tensor, nn

from fastres.ops import BatchNormReLU2d, batch_norm_relu
from fastres.ops.batch_norm_relu import batch_norm_relu_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, training: bool, picked: bool = True) -> Case:
    C = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 129])))
    N, H, W = draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if training and N * H * W == 1:
        N = 2
    share = draw(st.sampled_from([None, 0.25, 0.5, 1.0])) if picked else None
    if share is not None and round(share * N) * H * W <= training:
        share = None
    layouts = st.sampled_from(list(LAYOUTS))
    case = Case(
        shape=(N, C, H, W),
        x_layout=draw(layouts),
        dy_layout=draw(layouts),
        residual_layout=None if share is not None else draw(st.one_of(st.none(), layouts)),
        picked=share,
        dtype=dtype,
        half_params=dtype == torch.float64 or draw(st.booleans()),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        training=training,
        running=not training or draw(st.booleans()),
        relu=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.1, 1e-10])),
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, 0.9])),
        values=draw(st.sampled_from(VALUES)),
        seed=draw(st.integers(0, 2**16)),
    )
    # Without a bias such values may leave the ReLU as zeros of fp16, and y then hides the mask.
    underflows = dtype == torch.float16 and case.values == "denormal"
    return dataclasses.replace(case, bias=True) if underflows else case


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_equals_the_reference(
    device: str, dtype: torch.dtype, training: bool, data: st.DataObject
) -> None:
    case = data.draw(cases(dtype, training))
    with small_tiles() if data.draw(st.booleans(), label="small tiles") else nullcontext():
        check(case, device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@given(data=st.data())
def test_native_path_is_bitwise_the_reference(
    native: None, dtype: torch.dtype, training: bool, data: st.DataObject
) -> None:
    """It is PyTorch's own ops, with the add and the ReLU in place."""
    # Not with an index: the reference's x[index] may lie in another order, and sums with it.
    case = data.draw(cases(dtype, training, picked=False))
    given_ = tensors(case, "cpu")
    got, want = run(batch_norm_relu, case, given_), run(batch_norm_relu_reference, case, given_)
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_residual_and_dy_mix(layout: str, device: str) -> None:
    """Each layout once as x's, once as the residual's, once as dy's, against the two dense ones."""
    dense = "nhwc" if list(LAYOUTS).index(layout) % 2 else "nchw"
    other = "nchw" if dense == "nhwc" else "nhwc"
    case = Case(shape=(3, 12, 4, 6), residual_layout=other)
    check(dataclasses.replace(case, x_layout=layout, dy_layout=dense), device)
    check(dataclasses.replace(case, x_layout=dense, dy_layout=layout), device)
    check(dataclasses.replace(case, x_layout=other, residual_layout=layout), device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhwc_sliced_n", "expanded_c"])
def test_picked_samples(path: str, device: str, layout: str, training: bool) -> None:
    """By an index in any order: y of these alone, dx zero elsewhere; several chunks and tiles."""
    for shape, picked in (((9, 20, 9, 7), 0.5), ((4, 3, 5, 5), 1.0), ((5, 9, 6, 3), 0.0)):
        case = Case(shape=shape, x_layout=layout, training=training, picked=picked)
        check(case, device)
        with small_tiles() if path == "kernels" else nullcontext():
            check(dataclasses.replace(case, dy_layout="nhwc", values="large_mean"), device)
    check(Case(shape=(6, 16, 32, 24), x_layout=layout, training=training, picked=0.5), device)


def test_a_strided_index(path: str, device: str) -> None:
    x = torch.randn(5, 3, 2, 2, device=device)
    index = torch.tensor([4, 0, 0, 1, 2, 1], device=device)[::2]
    got = batch_norm_relu(x, None, None, training=True, index=index)
    torch.testing.assert_close(got, batch_norm_relu(x[[4, 0, 2]], None, None, training=True))


def test_what_no_index_names_is_not_read(path: str, device: str) -> None:
    x = torch.randn(5, 3, 2, 2, device=device)
    x[[1, 3]] = torch.nan
    x.requires_grad_()
    stats = torch.zeros(3, device=device), torch.ones(3, device=device)
    index = torch.tensor([4, 0, 2], device=device)
    y = batch_norm_relu(x, *stats, training=True, index=index)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert all(v.isfinite().all() for v in (y, dx, *stats))
    assert not dx[[1, 3]].any()


@pytest.mark.parametrize("values", VALUES)
def test_nasty_values(values: str, device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        check(Case(shape=(3, 6, 5, 7), values=values, dtype=dtype), device)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("C", [16, 129])
def test_several_programs_and_chunks(layout: str, C: int, device: str) -> None:
    """Tiles of their true size, with rows enough for more than one program."""
    case = Case(shape=(2, C, 17, 16), x_layout=layout, residual_layout="nchw", values="large_mean")
    check(case, device)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhwc_sliced_n"])
def test_more_partials_than_one_block(layout: str, device: str) -> None:
    with small_tiles():
        check(Case(shape=(4, 33, 9, 7), x_layout=layout, residual_layout="nhwc"), device)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_64_bit_offsets(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that tensors of 2^30 elements and more take, on small ones."""
    kernels: Any = importlib.import_module("fastres.kernels.batch_norm_relu")
    tiling = kernels.tiling
    monkeypatch.setattr(
        kernels, "tiling", lambda *a, **k: dataclasses.replace(tiling(*a, **k), WIDE=True)
    )
    with small_tiles():
        for residual_layout in (None, "nhwc"):
            case = Case(shape=(5, 9, 7, 8), x_layout=layout, residual_layout=residual_layout)
            check(case, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_bit_offsets_start_before_32_bits_end(layout: str) -> None:
    """A tensor's reach in memory is known for every layout; 2^30 of it, or of elements, is wide."""
    tiles: Any = importlib.import_module("fastres.kernels._tiles")
    v = LAYOUTS[layout](torch.zeros(3, 4, 5, 6))
    kept, rows = tiles.as_rows(v)
    last = sum((size - 1) * stride for size, stride in zip(v.shape, kept.stride(), strict=True))
    assert rows.extent == 1 + last
    assert not tiles.tiling(v.shape, rows).WIDE
    for extent in (2**30, 2**31, 2**40):
        far = dataclasses.replace(rows, extent=extent)
        assert tiles.tiling(v.shape, far).WIDE
        assert tiles.tiling(v.shape, rows, far).WIDE
    # Expanded from next to nothing: the elements count, since y and the bitmask are dense.
    assert tiles.tiling(torch.Size((2**15, 4, 2**7, 2**6)), rows).WIDE


def test_writes_nothing_beside_the_running_statistics(device: str) -> None:
    kept = [torch.full((9,), 7.0, device=device) for _ in range(2)]
    x = torch.randn(2, 5, 3, 3, device=device)
    batch_norm_relu(x, kept[0][2:7], kept[1][2:7], training=True)
    for v in kept:
        assert torch.equal(v == 7.0, torch.tensor([True] * 2 + [False] * 5 + [True] * 2).to(device))


def test_one_row_in_evaluation(device: str) -> None:
    for C in (1, 9):
        case = Case(shape=(1, C, 1, 1), training=False, residual_layout="nchw")
        check(case, device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_pass_as_in_pytorch(path: str, device: str, bad: float, training: bool) -> None:
    """In x, the residual and dy, each in a channel of its own; the last channel stays clean."""
    for residual_layout in (None, "nchw"):
        case = Case(shape=(2, 5, 3, 4), residual_layout=residual_layout, training=training)
        given_ = tensors(case, device)
        for channel, name in enumerate(("x", "residual", "dy")):
            if (t := given_[name]) is not None:
                t[1, channel, 1, 2] = bad
        ours, peer = (
            run(batch_norm_relu, case, given_),
            run(batch_norm_relu_reference, case, given_),
        )
        for name in ours:
            # Whether a sum over Inf ends as Inf or as NaN follows its order: PyTorch's own CPU and
            # CUDA kernels differ in it, for the running mean and for what is summed over x or dy.
            if training or name in ("dweight", "dbias"):
                assert torch.equal(ours[name].isfinite(), peer[name].isfinite()), name
            else:
                assert torch.equal(ours[name].isnan(), peer[name].isnan()), name
                assert torch.equal(ours[name].isinf(), peer[name].isinf()), name
            clean = ours[name].movedim(1, 0)[-1] if ours[name].dim() == 4 else ours[name][-1]
            assert clean.isfinite().all(), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_subset_of_needed_gradients(device: str, training: bool) -> None:
    """The gradients that are asked for are bitwise those of the full backward; no others come."""
    case = Case(shape=(2, 3, 2, 3), residual_layout="nhwc", training=training)
    given_ = tensors(case, device)
    full = run(batch_norm_relu, case, given_)
    for count in range(len(LEAVES)):
        for needs in itertools.combinations(LEAVES, count):
            got = run(batch_norm_relu, case, given_, needs)
            assert {name for name in got if name.startswith("d")} == {GRADS[n] for n in needs}
            for name in got:
                assert torch.equal(got[name], full[name]), f"{name} of {needs}"


def test_two_runs_are_bitwise_the_same(device: str) -> None:
    case = Case(shape=(4, 20, 9, 9), residual_layout="nhwc", dy_layout="nhwc")
    with small_tiles():
        given_ = tensors(case, device)
        first, second = (run(batch_norm_relu, case, given_) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Saved:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, t: Tensor) -> Tensor:
        self.tensors.append(t)
        return t


@pytest.mark.parametrize("residual_layout", [None, "nhwc"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_saves_x_vectors_and_a_bitmask(
    device: str, training: bool, layout: str, residual_layout: str | None
) -> None:
    case = Case(
        shape=(4, 16, 6, 8), x_layout=layout, training=training, residual_layout=residual_layout
    )
    given_, saved = tensors(case, device), _Saved()
    x = given_["x"]
    assert x is not None
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        run(batch_norm_relu, case, given_)
    large = [t for t in saved.tensors if t.is_floating_point() and t.numel() > 16]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    bits = sum(t.numel() for t in saved.tensors if t.dtype == torch.uint8)
    assert bits == (x.numel() // 8 if residual_layout else 0)
    assert {t.dtype for t in saved.tensors} <= {torch.float32, torch.uint8}


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "expanded_c", "nhwc_sliced_h", "transposed"])
def test_saved_tensors_may_return_in_another_memory_format(layout: str, device: str) -> None:
    """As torch.autograd.graph.save_on_cpu(pin_memory=True) returns them: the bitmask must not
    be read in x's new order."""
    case = Case(shape=(2, 5, 4, 6), x_layout=layout, residual_layout="nchw")
    given_ = tensors(case, device)
    want = run(batch_norm_relu, case, given_)
    for fmt in (torch.contiguous_format, NHWC):

        def unpack(t: Tensor, fmt: torch.memory_format = fmt) -> Tensor:
            return t.contiguous(memory_format=fmt) if t.dim() == 4 else t.contiguous()

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            got = run(batch_norm_relu, case, given_)
        assert torch.equal(got["dresidual"], want["dresidual"])
        torch.testing.assert_close(got["dx"], want["dx"])


def test_double_backward_is_refused_in_words(device: str) -> None:
    x = torch.randn(2, 3, 2, 2, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(
        batch_norm_relu(x, None, None, training=True).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_weight_and_bias_of_any_stride(path: str, device: str) -> None:
    x = torch.randn(2, 6, 3, 3, device=device)
    one = torch.randn(1, device=device)
    many = torch.randn(12, device=device)
    for weight, bias in ((one.expand(6), many[::2]), (many[1::2], one.expand(6))):
        results = []
        for op in (batch_norm_relu, batch_norm_relu_reference):
            leaves = [v.detach().requires_grad_() for v in (weight, bias)]
            y = op(x, None, None, leaves[0], leaves[1], training=True)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_native_path_passes_gradcheck(native: None, training: bool) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    stats = (torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))

    def op(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        mean, var = (None, None) if training else stats
        return batch_norm_relu(x, mean, var, weight, bias, training, residual=residual)

    args = (leaf(3, 4, 2, 3), leaf(4), leaf(4), leaf(3, 4, 2, 3))
    assert torch.autograd.gradcheck(op, args, atol=GRADCHECK_ATOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(path: str, device: str, dtype: torch.dtype) -> None:
    """After a convolution under autocast: the dtypes of nn.BatchNorm2d and ReLU there."""
    conv, x = nn.Conv2d(3, 6, 3, device=device), torch.randn(2, 3, 6, 6, device=device)
    peer = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()).to(device)
    ours = BatchNormReLU2d(6).to(device)
    results = []
    for module in (ours, peer):
        conv.zero_grad()
        with torch.autocast(device, dtype=dtype):
            y = module(conv(x))
        y.float().square().sum().backward()
        assert conv.weight.grad is not None
        results.append((y, conv.weight.grad.clone(), *(p.grad for p in module.parameters())))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        # Different roundings of bf16 at several places; equality proper is tested above.
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * want.abs().max().item())
