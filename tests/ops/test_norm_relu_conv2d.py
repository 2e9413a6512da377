"""norm_relu_conv2d against its reference in fp64: shapes, layouts, dtypes, values, corners."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.batch_norm_relu_equality import LAYOUTS
from ops.norm_relu_conv2d_equality import (
    LEAVES,
    VALUES,
    WEIGHT_LAYOUTS,
    Case,
    check,
    few_programs,
    overflows,
    run,
    small_tiles,
    tensor_of,
    tensors,
)
from tolerances import GRADCHECK_ATOL
from torch import Tensor

from fastres.ops import Norm, norm_relu_conv2d
from fastres.ops.norm_relu_conv2d import norm_relu_conv2d_reference

HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]
NHWC = torch.channels_last


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Case:
    channels = st.sampled_from([16, 32, 48])
    training = draw(st.booleans())
    N, H, W = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if training and N * H * W == 1:
        N = 2
    layouts = st.sampled_from(list(LAYOUTS))
    case = Case(
        shape=(N, draw(channels), H, W),
        K=draw(channels),
        taps=draw(st.sampled_from([1, 3])),
        stride=draw(st.sampled_from([1, 2])),
        x_layout=draw(layouts),
        dy_layout=draw(layouts),
        residual_layout=draw(st.one_of(st.none(), layouts)),
        weight_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        dtype=draw(st.sampled_from(dtypes)),
        half_norm=draw(st.booleans()),
        half_weight=draw(st.booleans()),
        norm_weight=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        training=training,
        running=not training or draw(st.booleans()),
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        scale=draw(st.sampled_from([1.0, 2.5, -0.3, 0.0])),
        row_scale=draw(st.booleans()),
        values=draw(st.sampled_from(VALUES)),
        zero_weight=draw(st.sampled_from([False, False, False, True])),
        seed=draw(st.integers(0, 2**16)),
    )
    return dataclasses.replace(case, values="normal") if overflows(case) else case


@pytest.mark.parametrize("dtypes", [[torch.float32], HALF], ids=["fp32", "half"])
@given(data=st.data())
def test_equals_the_reference(device: str, dtypes: list[torch.dtype], data: st.DataObject) -> None:
    case = data.draw(cases(dtypes))
    with few_programs():
        check(case, device)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_several_tiles_chunks_partials_and_blocks(device: str, stride: int, taps: int) -> None:
    case = Case(shape=(3, 32, 6, 7), taps=taps, stride=stride, residual_layout="nchw")
    with small_tiles():
        check(dataclasses.replace(case, values="large_mean", row_scale=True), device)
        check(dataclasses.replace(case, dtype=torch.float16, training=False, K=16), device)


@pytest.mark.parametrize(
    ("dtype", "C", "K"), [(torch.float32, 32, 48), (torch.bfloat16, 80, 128)], ids=str
)
def test_many_channels(device: str, dtype: torch.dtype, C: int, K: int) -> None:
    """Blocks of their true size, more than one on either side."""
    with few_programs():
        check(Case(shape=(2, C, 3, 4), K=K, dtype=dtype), device)


def test_tiles_and_slabs_of_their_true_size(device: str) -> None:
    """Nothing made smaller: three tiles, the last in part; most chunks of the slab are empty."""
    check(Case(shape=(2, 16, 9, 9), K=16, taps=1, stride=1), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_residual_and_dy_mix(layout: str, device: str) -> None:
    case = Case(shape=(2, 16, 4, 6), K=16, taps=1, residual_layout="nchw")
    with few_programs():
        check(dataclasses.replace(case, x_layout=layout, dy_layout="nchw"), device)
        check(dataclasses.replace(case, dy_layout=layout, residual_layout=layout), device)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_layouts_of_the_weight(layout: str, device: str) -> None:
    case = Case(shape=(2, 16, 3, 4), weight_layout=layout)
    with few_programs():
        check(case, device)


@pytest.mark.parametrize("values", VALUES)
def test_nasty_values(values: str, device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        with few_programs():
            check(Case(shape=(2, 16, 5, 3), K=16, values=values, dtype=dtype), device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_pixel_and_one_sample(device: str, training: bool) -> None:
    for stride, taps in itertools.product((1, 2), (1, 3)):
        shape = (2 if training else 1, 16, 1, 1)
        case = Case(shape=shape, taps=taps, stride=stride, training=training)
        with few_programs():
            check(case, device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_empty_batch(path: str, device: str, training: bool) -> None:
    case = Case(shape=(0, 16, 4, 5), stride=2, residual_layout="nhwc", training=training)
    check(case, device)
    got = run(norm_relu_conv2d, case, tensors(case, device))
    assert got["y"].shape == (0, 32, 2, 3) and not got["dweight"].any()


def test_one_value_per_channel_is_an_error(path: str, device: str) -> None:
    x, weight = torch.zeros(1, 16, 1, 1, device=device), torch.zeros(16, 16, 3, 3, device=device)
    stats = torch.zeros(16, device=device), torch.ones(16, device=device)
    with pytest.raises(ValueError, match="more than 1 value per channel in training"):
        norm_relu_conv2d(x, Norm(*stats, training=True), weight)
    assert not stats[0].any() and bool((stats[1] == 1).all())
    assert norm_relu_conv2d(x, Norm(*stats), weight).shape == x.shape


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_inf_pass_as_in_pytorch(device: str, bad: float, training: bool) -> None:
    """In x, the residual and dy, one at a time; what one of them does not reach stays clean."""
    case = Case(shape=(2, 16, 5, 4), K=16, residual_layout="nhwc", training=training, momentum=1.0)
    for name in ("x", "residual", "dy"):
        given_ = tensors(case, device)
        tensor_of(given_, name)[1, 3, 2, 1] = bad
        with few_programs():
            got = run(norm_relu_conv2d, case, given_)
        want = run(norm_relu_conv2d_reference, case, given_)
        for result in got:
            # Whether a sum over Inf ends as Inf or as NaN follows its order.
            assert torch.equal(got[result].isfinite(), want[result].isfinite()), (name, result)
            if result == "y" and not training:
                assert torch.equal(got[result].isnan(), want[result].isnan()), name
        assert name != "x" or got["dnorm_bias"].isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_subset_of_needed_gradients(device: str, training: bool) -> None:
    """The gradients that are asked for are bitwise those of the full backward; no others come."""
    case = Case(shape=(2, 16, 2, 3), K=16, taps=1, residual_layout="nhwc", training=training)
    given_ = tensors(case, device)
    with few_programs():
        full = run(norm_relu_conv2d, case, given_)
        for count in (0, 1, 2, len(LEAVES) - 1):
            for needs in itertools.combinations(LEAVES, count):
                got = run(norm_relu_conv2d, case, given_, needs)
                assert {n for n in got if n.startswith("d")} == {f"d{n}" for n in needs}
                for name in got:
                    assert torch.equal(got[name], full[name]), f"{name} of {needs}"


def test_without_gradients_none_is_kept(device: str) -> None:
    case = Case(shape=(2, 16, 3, 3), residual_layout="nhwc")
    given_, saved = tensors(case, device), _Saved()
    want = run(norm_relu_conv2d, case, given_, ())
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t), torch.no_grad():
        got = run(norm_relu_conv2d, case, given_, ())
    assert all(torch.equal(got[name], want[name]) for name in got)
    assert not saved.tensors


def test_two_runs_are_bitwise_the_same(device: str) -> None:
    case = Case(shape=(3, 32, 7, 5), stride=2, dy_layout="nchw")
    given_ = tensors(case, device)
    with small_tiles():
        first, second = (run(norm_relu_conv2d, case, given_) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Saved:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, t: Tensor) -> Tensor:
        self.tensors.append(t)
        return t


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_saves_x_the_weight_and_vectors(device: str, training: bool) -> None:
    case = Case(shape=(4, 16, 6, 8), training=training, residual_layout="nhwc", row_scale=True)
    given_, saved = tensors(case, device), _Saved()
    x, weight = tensor_of(given_, "x"), tensor_of(given_, "weight")
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t), few_programs():
        run(norm_relu_conv2d, case, given_)
    large = [t.data_ptr() for t in saved.tensors if t.numel() > 16]
    assert large == [x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(path: str, device: str, momentum: float | None) -> None:
    """Three batches, with the counter of batches: as torch.nn.BatchNorm2d tracks them."""
    peer = torch.nn.BatchNorm2d(16, momentum=momentum, device=device)
    ours = {name: v.clone() for name, v in peer.state_dict().items() if v.dim() == 1}
    count = torch.zeros((), dtype=torch.int64, device=device)
    weight = torch.randn(16, 16, 1, 1, device=device)
    for step in range(3):
        x = torch.randn(3, 16, 4, 3, device=device) * 3 + step
        norm = Norm(
            ours["running_mean"], ours["running_var"], training=True, momentum=momentum,
            num_batches_tracked=count,
        )  # fmt: skip
        norm_relu_conv2d(x, norm, weight)
        peer(x)
    torch.testing.assert_close(ours["running_mean"], peer.running_mean)
    torch.testing.assert_close(ours["running_var"], peer.running_var)
    assert count == 3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_native_path_is_the_reference(native: None, dtype: torch.dtype) -> None:
    """PyTorch's own ops, but for the order in which two factors and a sum are taken."""
    eps = torch.finfo(dtype).eps
    for stride, training, residual in itertools.product((1, 2), (True, False), (None, "nchw")):
        case = Case(
            shape=(3, 5, 5, 4), K=7, stride=stride, dtype=dtype, half_norm=True, half_weight=True,
            residual_layout=residual, training=training, scale=0.5, row_scale=residual is None,
        )  # fmt: skip
        given_ = tensors(case, "cpu")
        got = run(norm_relu_conv2d, case, given_)
        want = run(norm_relu_conv2d_reference, case, given_)
        assert got.keys() == want.keys()
        for name in got:
            atol = 8 * eps * want[name].abs().max().item()
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=atol)


def test_native_path_passes_gradcheck(native: None) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def op(x: Tensor, weight: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        return norm_relu_conv2d(x, Norm(None, None, scale, training=True), weight, residual, 2)

    args = leaf(2, 2, 3, 2), leaf(1, 2, 3, 3), leaf(2, 1, 2, 1), leaf(2)
    assert torch.autograd.gradcheck(op, args, atol=GRADCHECK_ATOL)


def test_gradients_accumulate(path: str, device: str) -> None:
    case = Case(shape=(2, 16, 3, 3), K=16, taps=1)
    given_ = tensors(case, device)
    x, weight, dy = (tensor_of(given_, name) for name in ("x", "weight", "dy"))
    leaf = weight.clone().requires_grad_()
    grads = []
    for _ in range(2):
        with few_programs():
            norm_relu_conv2d(x, Norm(None, None, training=True), leaf).backward(dy)
        assert leaf.grad is not None
        grads.append(leaf.grad.clone())
    assert torch.equal(grads[1], 2 * grads[0])


def test_double_backward_is_refused_in_words(device: str) -> None:
    x = torch.randn(2, 16, 2, 2, device=device, requires_grad=True)
    weight = torch.randn(16, 16, 1, 1, device=device)
    y = norm_relu_conv2d(x, Norm(None, None, training=True), weight)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()
