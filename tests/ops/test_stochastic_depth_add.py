"""stochastic_depth_add against its reference in fp64, with draws from the paper's Philox."""

import dataclasses
import importlib
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.augment_equality import SEEDS
from ops.batch_norm_relu_equality import LAYOUTS
from ops.stochastic_depth_add_equality import (
    MODES,
    Case,
    check,
    kept_of,
    ours,
    run,
    small_blocks,
    tensors,
)
from tolerances import GRADCHECK_ATOL
from torch import Tensor

from fastres.ops import StepGenerator, _register, stochastic_depth_add
from fastres.ops.stochastic_depth_add import add_subset

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last


PROBABILITIES = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0, 1e-12, 1 - 1e-6]) | st.floats(0, 1)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    layouts = st.sampled_from(list(LAYOUTS))
    return Case(
        shape=(
            draw(st.integers(0, 6)),
            draw(st.integers(1, 12)),
            draw(st.integers(1, 6)),
            draw(st.integers(1, 6)),
        ),
        # Where the scale overflows the storage type, how is up to the order of its products.
        p=draw(PROBABILITIES.filter(lambda p: p == 1 or p < 1 - 1e-7)),
        mode=draw(st.sampled_from(MODES)),
        training=draw(st.integers(0, 5)) > 0,
        dtype=dtype,
        branch_layout=draw(layouts),
        shortcut_layout=draw(layouts),
        dy_layout=draw(layouts),
        poisoned=draw(st.booleans()),
        seed=draw(SEEDS),
        step=draw(st.integers(0, 2**32 - 1)),
        unit=draw(st.integers(0, 2**16 - 1)),
        rank=draw(st.integers(0, 2**16 - 1)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_equals_the_reference(
    path: str, device: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    case = data.draw(cases(dtype))
    with small_blocks() if data.draw(st.booleans(), label="small blocks") else nullcontext():
        check(case, device)


@given(data=st.data())
def test_equals_the_reference_in_fp64(native: None, data: st.DataObject) -> None:
    check(data.draw(cases(torch.float64)), "cpu")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_mix(layout: str, mode: Any, device: str) -> None:
    """Each layout once as the branch's, the shortcut's and dy's, against the two dense ones."""
    dense = "nhwc" if list(LAYOUTS).index(layout) % 2 else "nchw"
    other = "nchw" if dense == "nhwc" else "nhwc"
    case = Case(shape=(4, 6, 3, 5), mode=mode, seed=2, branch_layout=other, shortcut_layout=other)
    with small_blocks():
        check(dataclasses.replace(case, branch_layout=layout, dy_layout=dense), device)
        check(dataclasses.replace(case, shortcut_layout=layout, branch_layout=dense), device)
        check(dataclasses.replace(case, dy_layout=layout, shortcut_layout=dense), device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("N", [0, 1])
def test_empty_batch_and_one_sample(path: str, device: str, N: int, p: float, mode: Any) -> None:
    for seed in range(3):
        check(Case(shape=(N, 3, 2, 2), p=p, mode=mode, seed=seed, poisoned=True), device)
    for shape in ((2, 0, 3, 3), (2, 3, 0, 3)):
        check(Case(shape=shape, p=p, mode=mode), device)


def test_blocks_of_their_true_size(device: str) -> None:
    """Samples of one block, of a whole number of them, and of a part more."""
    for shape in ((3, 16, 16, 16), (2, 16, 32, 16), (2, 17, 16, 17)):
        for layout in ("nchw", "nhwc"):
            check(Case(shape=shape, branch_layout=layout, seed=4), device)
    check(Case(shape=(130, 1, 1, 2), mode="subset", seed=4), device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_64_bit_offsets(
    mode: Any, layout: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that samples of 2^30 elements and more take, on small ones."""
    kernels: Any = importlib.import_module("fastres.kernels.stochastic_depth_add")
    monkeypatch.setattr(kernels, "_wide", lambda *args: True)
    with small_blocks():
        case = Case(shape=(5, 9, 4, 3), mode=mode, seed=3, branch_layout=layout)
        check(dataclasses.replace(case, shortcut_layout="nhwc", dy_layout="sliced_c"), device)


@pytest.mark.parametrize("forward", [True, False])
def test_a_large_sample_fits_its_grid_and_its_integers(forward: bool) -> None:
    """A grid's second axis ends at 65,535, and a product of 32-bit sizes at 2^31."""
    kernels: Any = importlib.import_module("fastres.kernels.stochastic_depth_add")
    launches: Any = importlib.import_module("fastres.kernels._launch")
    large = torch.empty(2, 3, 2**15, 2**15, device="meta", dtype=torch.float16)
    key = torch.empty(3, dtype=torch.int64, device="meta")
    with launches.record() as recorded:
        if forward:
            kernels.stochastic_depth_add_fwd(large, large, key, None, 1, 2.0, True, 0)
        else:
            kernels.stochastic_depth_add_bwd(large, key, None, 1, 2.0, True, 0, False)
    (launch,) = recorded
    assert launch.grid == (2 * 3 * 2**30 // kernels.BLOCK,)
    numbers = [arg for arg in launch.args if isinstance(arg, int)]
    assert launch.constexprs["WIDE"] and 3 * 2**30 in numbers


def test_wide_starts_before_32_bits_end() -> None:
    kernels: Any = importlib.import_module("fastres.kernels.stochastic_depth_add")
    tiles: Any = importlib.import_module("fastres.kernels._tiles")
    rows = tiles.Rows(2**40, 8, 1, 2**50)
    assert not kernels._wide(8, 2**20, rows)
    assert kernels._wide(8, 2**27, rows)
    assert kernels._wide(8, 2**20, rows, dataclasses.replace(rows, stride_s=2**11))


@pytest.mark.parametrize("mode", MODES)
def test_a_dropped_branch_is_not_read(device: str, mode: Any) -> None:
    """No NaN or Inf of it reaches y, and none of a dropped sample's dy the branch's gradient."""
    dropped = 0
    for seed in range(6):
        case = Case(shape=(6, 4, 3, 3), mode=mode, seed=seed, poisoned=True)
        check(case, device)
        got = run(ours(case), tensors(case, device))
        assert got["y"].isfinite().all() and got["dbranch"].isfinite().all()
        dropped += kept_of(case)[0].count(False)
    assert dropped > 6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_pass_where_a_sample_is_kept(path: str, device: str, bad: float) -> None:
    case = Case(seed=1)
    kept = kept_of(case)[0]
    assert any(kept) and not all(kept)
    given_ = tensors(case, device)
    for name in given_:
        given_[name] = given_[name].clone()
        given_[name][:, 1, 1, 1] = bad
    got = run(ours(case), given_)
    for n in range(len(kept)):
        for name in ("y", "dshortcut", *(["dbranch"] if kept[n] else [])):
            one = got[name][n, 1, 1, 1]
            assert torch.equal(one, torch.full_like(one, bad)) or one.isnan() == (bad != bad)
            assert not got[name][n, 1, 1, 1].isfinite()
            assert got[name][n, 0].isfinite().all()
        if not kept[n]:
            assert torch.equal(got["dbranch"][n], torch.zeros_like(got["dbranch"][n]))


@pytest.mark.parametrize("mode", MODES)
def test_both_paths_draw_the_same(device: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("on a GPU there is one path")
    case = Case(shape=(70, 2, 2, 2), mode=mode, seed=-7, step=2**32 - 1, unit=65535, rank=65535)
    with_kernels = run(ours(case), tensors(case, device))
    monkeypatch.setattr(_register, "INTERPRET", False)
    plain = run(ours(case), tensors(case, device))
    for name in plain:
        torch.testing.assert_close(with_kernels[name], plain[name])


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_are_bitwise_the_same(path: str, device: str, mode: Any) -> None:
    case = Case(shape=(9, 5, 4, 4), mode=mode, dy_layout="nhwc", seed=5)
    given_ = tensors(case, device)
    first, second = (run(ours(case), given_) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mode", MODES)
def test_pytorchs_generators_repeat(path: str, device: str, mode: Any) -> None:
    """The default one after torch.manual_seed, and one of the caller's own; and both move on."""
    branch, shortcut = torch.ones(6, 1, 1, 1, device=device), torch.zeros(6, 1, 1, 1)
    shortcut = shortcut.to(device)

    def several(generator: torch.Generator | None) -> Tensor:
        call = partial(stochastic_depth_add, branch, shortcut, 0.5, mode, True, generator)
        return torch.stack([call() for _ in range(8)])

    results = []
    for generator in (None, torch.Generator(device)):
        for seed in (1, 1, 2):
            (torch if generator is None else generator).manual_seed(seed)
            results.append(several(generator))
    for one, again, other in (results[:3], results[3:]):
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert any(not torch.equal(call, one[0]) for call in one[1:])


def test_no_gradient_where_none_is_asked_for(path: str, device: str) -> None:
    case = Case(seed=1)
    given_ = tensors(case, device)
    full = run(ours(case), given_)
    for name in ("branch", "shortcut"):
        t = {n: given_[n].detach().requires_grad_(n == name) for n in ("branch", "shortcut")}
        y = ours(case)(t["branch"], t["shortcut"])
        (got,) = torch.autograd.grad(y, t[name], given_["dy"])
        assert torch.equal(got, full[f"d{name}"])
    assert not ours(case)(given_["branch"], given_["shortcut"]).requires_grad


def test_saves_nothing_but_the_key(device: str) -> None:
    case, saved = Case(shape=(4, 8, 4, 4)), []

    def keep(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(ours(case), tensors(case, device))
    assert saved and max(saved) <= 3


def test_a_step_between_forward_and_backward_is_an_error(device: str) -> None:
    """The backward draws again: by another step's key it would be wrong in silence."""
    steps = StepGenerator(1)
    branch = torch.randn(4, 2, 2, 2, device=device, requires_grad=True)
    y = stochastic_depth_add(branch, branch.detach(), 0.5, "row", True, steps.unit(0.5))
    steps.set_step(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused_in_words(device: str) -> None:
    x = torch.randn(2, 3, 2, 2, device=device, requires_grad=True)
    y = stochastic_depth_add(x, x.detach(), 0.5)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_native_path_passes_gradcheck(native: None, mode: Any) -> None:
    unit = StepGenerator(3).unit(0.4)
    branch, shortcut = (
        torch.randn(4, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    assert torch.autograd.gradcheck(
        lambda b, s: stochastic_depth_add(b, s, 0.4, mode, True, unit),
        (branch, shortcut),
        atol=GRADCHECK_ATOL,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layouts", [("nchw", "nhwc"), ("nhwc", "nchw"), ("nhwc", "sliced_c")])
def test_add_subset_scatters_a_part_of_the_batch(
    path: str, device: str, layouts: tuple[str, str], dtype: torch.dtype
) -> None:
    """y[source[j]] = shortcut + scale * branch[j], and its gradients, for s of N samples."""
    index = torch.tensor([4, 0, 3], device=device)
    position = torch.tensor([1, -1, -1, 2, 0], device=device)
    case = Case(shape=(5, 6, 3, 4), dtype=dtype)
    given_ = tensors(case, device)
    branch = LAYOUTS[layouts[0]](given_["branch"][:3]).detach().requires_grad_()
    shortcut = LAYOUTS[layouts[1]](given_["shortcut"]).detach().requires_grad_()
    y = add_subset(branch, shortcut, position, index, 5 / 3)
    dbranch, dshortcut = torch.autograd.grad(y, (branch, shortcut), given_["dy"])
    want = shortcut.detach().double().clone()
    want[index] += 5 / 3 * branch.detach().double()
    # Twice the rounding of the product and of the sum, as PyTorch's own index_add has them.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=2 * tolerance)
    wanted = 5 / 3 * given_["dy"].double()[index]
    torch.testing.assert_close(dbranch.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(dshortcut, given_["dy"])
    assert torch.equal(y[1:3], shortcut[1:3])
    assert y.is_contiguous(memory_format=NHWC) == (layouts[1] == "nhwc")
