"""stem_conv2d against its reference in fp64: shapes, layouts, dtypes, values, corners."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.batch_norm_relu_equality import LAYOUTS
from ops.norm_relu_conv2d_equality import VALUES, WEIGHT_LAYOUTS, few_programs, tensor_of
from ops.stem_conv2d_equality import LEAVES, Case, check, run, small_tiles, tensors
from tolerances import EPSILONS
from torch import Tensor

from fastres.ops import Norm, preact_unit, stem_conv2d
from fastres.ops.stem_conv2d import stem_conv2d_reference

HALF = [torch.float16, torch.bfloat16]
NHWC = torch.channels_last


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Case:
    sizes = st.integers(1, 9)
    layouts = st.sampled_from(list(LAYOUTS))
    case = Case(
        shape=(draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(sizes), draw(sizes)),
        K=draw(st.sampled_from([16, 32, 48, 80, 128])),
        x_layout=draw(layouts),
        dy_layout=draw(layouts),
        weight_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        dtype=draw(st.sampled_from(dtypes)),
        half_weight=draw(st.booleans()),
        moments=draw(st.booleans()),
        values=draw(st.sampled_from(VALUES)),
        zero_weight=draw(st.sampled_from([False, False, False, True])),
        seed=draw(st.integers(0, 2**16)),
    )
    # Then y passes fp16's largest number, which of them by what rounding leaves.
    overflows = case.values == "huge" and case.dtype == torch.float16
    return dataclasses.replace(case, values="normal") if overflows else case


@pytest.mark.parametrize("dtypes", [[torch.float32], HALF], ids=["fp32", "half"])
@given(data=st.data())
def test_equals_the_reference(device: str, dtypes: list[torch.dtype], data: st.DataObject) -> None:
    check(data.draw(cases(dtypes)), device)


@pytest.mark.parametrize("C", [1, 2, 3, 4])
def test_several_tiles_chunks_partials_and_blocks(device: str, C: int) -> None:
    case = Case(shape=(4, C, 9, 8), K=80, values="large_mean")
    with small_tiles():
        check(case, device)
        check(dataclasses.replace(case, dtype=torch.float16, x_layout="nchw", K=16), device)


def test_tiles_of_their_true_size(device: str) -> None:
    """Nothing made smaller: several tiles, the last in part."""
    check(Case(shape=(2, 3, 13, 15)), device)
    check(Case(shape=(1, 4, 13, 15), K=128, dtype=torch.bfloat16, x_layout="nchw"), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_dy_mix(layout: str, device: str) -> None:
    case = Case(shape=(2, 3, 4, 6))
    check(dataclasses.replace(case, x_layout=layout, dy_layout="nchw"), device)
    check(dataclasses.replace(case, dy_layout=layout), device)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_layouts_of_the_weight(layout: str, device: str) -> None:
    check(Case(shape=(2, 3, 3, 4), weight_layout=layout), device)


@pytest.mark.parametrize("values", VALUES)
def test_nasty_values(values: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(Case(shape=(2, 3, 5, 3), values=values, dtype=dtype), device)


def test_one_pixel_and_one_sample(device: str) -> None:
    """No tap but the centre's is inside."""
    for N, C in itertools.product((1, 3), (1, 4)):
        check(Case(shape=(N, C, 1, 1)), device)


def test_an_empty_batch(path: str, device: str) -> None:
    case = Case(shape=(0, 3, 4, 5))
    check(case, device)
    got = run(stem_conv2d, case, tensors(case, device), fused=True)
    assert got["y"].shape == (0, 16, 4, 5) and not got["dweight"].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_inf_pass_as_in_pytorch(device: str, bad: float) -> None:
    """In x and dy, one at a time; what one of them does not reach stays clean."""
    case = Case(shape=(2, 3, 5, 4), moments=False)
    for name in ("x", "dy"):
        given_ = tensors(case, device)
        tensor_of(given_, name)[1, 2, 2, 1] = bad
        got = run(stem_conv2d, case, given_, fused=True)
        want = run(stem_conv2d_reference, case, given_)
        for result in got:
            assert torch.equal(got[result].isfinite(), want[result].isfinite()), (name, result)
        assert torch.equal(got["y"].isnan(), want["y"].isnan())


def test_nan_reaches_the_moments_of_its_channels(device: str) -> None:
    given_ = tensors(Case(), device)
    weight, x = tensor_of(given_, "weight"), tensor_of(given_, "x")
    weight[3] = torch.nan
    _, moments = stem_conv2d(x, weight, True)
    assert moments is not None
    bad = moments.partial.isnan()
    assert bad[:, :, 3].all() and not bad[:, :, :3].any() and not bad[:, :, 4:].any()


def test_every_subset_of_needed_gradients(device: str) -> None:
    """The gradients that are asked for are bitwise those of the full backward; no others come."""
    case = Case(shape=(2, 3, 2, 3))
    given_ = tensors(case, device)
    full = run(stem_conv2d, case, given_, fused=True)
    for needs in ((), ("x",), ("weight",)):
        got = run(stem_conv2d, case, given_, needs, fused=True)
        assert {n for n in got if n.startswith("d")} == {f"d{n}" for n in needs}
        for name in got:
            assert torch.equal(got[name], full[name]), f"{name} of {needs}"


class _Saved:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, t: Tensor) -> Tensor:
        self.tensors.append(t)
        return t


def test_saves_x_and_the_weight_and_without_gradients_nothing(device: str) -> None:
    case, saved = Case(), _Saved()
    given_ = tensors(case, device)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        want = run(stem_conv2d, case, given_, ("weight",), fused=True)
        kept = [t.data_ptr() for t in saved.tensors]
        assert kept == [tensor_of(given_, name).data_ptr() for name in LEAVES]
        with torch.no_grad():
            got = run(stem_conv2d, case, given_, (), fused=True)
    assert torch.equal(got["y"], want["y"]) and len(saved.tensors) == len(kept)


def test_two_runs_are_bitwise_the_same(device: str) -> None:
    case = Case(shape=(3, 3, 7, 5), dy_layout="nchw")
    given_ = tensors(case, device)
    with small_tiles():
        first, second = (run(stem_conv2d, case, given_, fused=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_moments_go_to_the_unit_that_follows(device: str, dtype: torch.dtype) -> None:
    """A chain that hands them on, against one in which the unit takes them: y and gradients."""
    given_ = tensors(Case(shape=(5, 3, 6, 5), dtype=dtype), device)
    x, stem = tensor_of(given_, "x"), tensor_of(given_, "weight")
    weights = [torch.randn(16, 16, 3, 3, device=device) / 12 for _ in range(2)]
    norm = Norm(None, None, training=True)
    results = []
    with small_tiles(), few_programs():
        for given_on in (True, False):
            leaf = stem.clone().requires_grad_()
            y, moments = stem_conv2d(x, leaf, given_on)
            assert (moments is not None) == given_on
            if moments is not None:
                assert moments.partial.shape == (2, 3, 16)
            y, _ = preact_unit(y, norm, weights[0], norm, weights[1], moments=moments)
            (dweight,) = torch.autograd.grad(y, leaf, tensor_of(given_, "dy"))
            results.append((y.detach(), dweight))
    for with_, without in zip(*results, strict=True):
        # What the merging's order leaves may be rounded otherwise between the kernels.
        atol = EPSILONS * torch.finfo(dtype).eps * without.abs().max().item()
        torch.testing.assert_close(with_, without, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
def test_native_path_is_the_reference(native: None, dtype: torch.dtype) -> None:
    """Any channels; no moments are taken, since a CPU's BatchNorm takes none."""
    case = Case(shape=(3, 5, 5, 4), K=7, dtype=dtype, half_weight=True)
    given_ = tensors(case, "cpu")
    got = run(stem_conv2d, case, given_, fused=True)
    want = run(stem_conv2d_reference, case, given_)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in got)
    assert stem_conv2d(tensor_of(given_, "x"), tensor_of(given_, "weight"), True)[1] is None


def test_gradients_accumulate(path: str, device: str) -> None:
    given_ = tensors(Case(), device)
    leaf, grads = tensor_of(given_, "weight").clone().requires_grad_(), []
    for _ in range(2):
        stem_conv2d(tensor_of(given_, "x"), leaf)[0].backward(tensor_of(given_, "dy"))
        assert leaf.grad is not None
        grads.append(leaf.grad.clone())
    assert torch.equal(grads[1], 2 * grads[0])


@pytest.mark.parametrize("name", LEAVES)
def test_double_backward_is_refused_in_words(device: str, name: str) -> None:
    given_ = tensors(Case(shape=(2, 3, 2, 2)), device)
    leaf = tensor_of(given_, name).requires_grad_()
    y, _ = stem_conv2d(tensor_of(given_, "x"), tensor_of(given_, "weight"))
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(path: str, device: str, dtype: torch.dtype) -> None:
    """As for an x of that dtype, bitwise; the gradients are in the leaves' own."""
    given_ = tensors(Case(), device)
    x, weight, dy = (tensor_of(given_, name) for name in ("x", "weight", "dy"))
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast(device, dtype=dtype):
        y, _ = stem_conv2d(x, weight)
    got = (y, *torch.autograd.grad(y, (x, weight), dy.to(dtype)))
    y, _ = stem_conv2d(x.to(dtype), weight)
    want = (y, *torch.autograd.grad(y, (x, weight), dy.to(dtype)))
    assert [v.dtype for v in got] == [dtype, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


_X, _WEIGHT = torch.zeros(2, 3, 4, 4), torch.zeros(16, 3, 3, 3)
_OF_WEIGHT = r"^weight: expected \[K, 3, 3, 3\], got "
_SERVED = r"^weight: expected at most 4 channels, .* at most 128 outputs in multiples of 16, got "
_DTYPE = "^weight: expected torch.float32 or torch.float32 on cpu, got "


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (_X[0], _WEIGHT, r"^x: expected \[N, C, H, W\], got shape \[3, 4, 4\]"),
        (_X.int(), _WEIGHT, "^x: expected one of .*float32.* on cpu, got torch.int32"),
        (_X.double(), _WEIGHT, "^x: expected one of .* on cpu, got torch.float64"),
        (_X, _WEIGHT[:, :2], _OF_WEIGHT + r"\[16, 2, 3, 3\]"),
        (_X, torch.zeros(16, 3, 5, 5), _OF_WEIGHT + r"\[16, 3, 5, 5\]"),
        (_X, _WEIGHT[0], _OF_WEIGHT + r"\[3, 3, 3\]"),
        (_X, _WEIGHT[:8], _SERVED + r"\[8, 3, 3, 3\]"),
        (_X, torch.zeros(144, 3, 3, 3), _SERVED + r"\[144, 3, 3, 3\]"),
        (torch.zeros(2, 5, 4, 4), torch.zeros(16, 5, 3, 3), _SERVED + r"\[16, 5, 3, 3\]"),
        (_X, _WEIGHT.half(), _DTYPE + "torch.float16 on cpu"),
        (_X, _WEIGHT.to("meta"), _DTYPE + "torch.float32 on meta"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(x: Any, weight: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stem_conv2d(x, weight, True)
