"""preact_unit against its reference in fp64: shapes, layouts, dtypes, modes, values, corners."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.batch_norm_relu_equality import LAYOUTS, plain
from ops.norm_relu_conv2d_equality import (
    VALUES,
    WEIGHT_LAYOUTS,
    few_programs,
    overflows,
    small_tiles,
    tensor_of,
)
from ops.preact_unit_equality import LEAVES, RUNNING, Case, check, run, tensors
from torch import nn

from fastres.ops import Norm, preact_unit
from fastres.ops.preact_unit import preact_unit_reference

MODES = [(True, True), (False, True), (True, False), (False, False)]
HALF = [torch.float16, torch.bfloat16]


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Case:
    channels = st.sampled_from([16, 16, 32, 48])
    project = draw(st.booleans())
    C = draw(channels)
    sampling = draw(st.sampled_from(["all", "row", "subset"]))
    layouts = st.sampled_from(list(LAYOUTS))
    case = Case(
        shape=(draw(st.integers(1, 3)), C, draw(st.integers(1, 6)), draw(st.integers(1, 5))),
        K=draw(channels) if project else C,
        stride=draw(st.sampled_from([1, 2])) if project else 1,
        project=project,
        x_layout=draw(layouts),
        dy_layout=draw(layouts),
        weight_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        dtype=draw(st.sampled_from(dtypes)),
        half_norm=draw(st.booleans()),
        half_weight=draw(st.booleans()),
        norm_weight=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        training=(draw(st.booleans()), draw(st.booleans())),
        running=draw(st.booleans()),
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0])),
        eps=(draw(st.sampled_from([1e-5, 0.1])), draw(st.sampled_from([1e-5, 1e-3]))),
        scale=draw(st.sampled_from([1.0, 2.5, 0.0])),
        row_scale=sampling == "row",
        picked=draw(st.sampled_from([0.25, 0.5, 1.0])) if sampling == "subset" else None,
        kept=draw(st.sampled_from([None, None, (5, 9, 16), (16, 1, 7)])),
        moments=draw(st.booleans()),
        values=draw(st.sampled_from(VALUES)),
        zero_weight=draw(st.sampled_from([False, False, False, True])),
        seed=draw(st.integers(0, 2**16)),
    )
    if case.taken == 0:
        case = dataclasses.replace(case, picked=None)
    if overflows(case):
        case = dataclasses.replace(case, values="normal")
    # One value per channel is an error in training.
    trains1, trains2 = case.training
    trains = (trains1 and case.seen1 != 1, trains2 and case.seen2 != 1)
    return dataclasses.replace(case, training=trains)


@pytest.mark.parametrize("dtypes", [[torch.float32], HALF], ids=["fp32", "half"])
@given(data=st.data())
def test_equals_the_reference(device: str, dtypes: list[torch.dtype], data: st.DataObject) -> None:
    with few_programs():
        check(data.draw(cases(dtypes)), device)


@pytest.mark.parametrize(
    ("fuses", "picked", "project"),
    [(True, None, False), (True, 0.6, True), (False, 0.6, False), (False, None, True)],
    ids=["fused, all", "fused, subset, projection", "split, subset", "split, all, projection"],
)
def test_several_tiles_chunks_partials_and_blocks(
    device: str, fuses: bool, picked: float | None, project: bool
) -> None:
    case = Case(shape=(4, 32, 6, 5), K=32, picked=picked, values="large_mean", moments=True)
    if project:
        case = dataclasses.replace(case, shape=(4, 16, 9, 8), stride=2, project=True)
    with small_tiles(fuses):
        check(case, device)
        half = dataclasses.replace(case, dtype=torch.float16, values="normal", scale=1.5)
        check(dataclasses.replace(half, row_scale=picked is None), device)


def test_many_channels(device: str) -> None:
    """Blocks of their true size, more than one on either side, the last in part."""
    case = Case(shape=(1, 80, 3, 4), K=80, dtype=torch.float16)
    with few_programs():
        check(case, device)
        project = dataclasses.replace(case, dtype=torch.float32, project=True, stride=2)
        check(dataclasses.replace(project, shape=(1, 32, 3, 4), K=48), device)


@pytest.mark.parametrize("layout", ["nchw", "expanded", "expanded_c", "nhwc_sliced_h", "offset"])
def test_layouts_of_x_and_dy(layout: str, device: str) -> None:
    for case in (Case(x_layout=layout), Case(dy_layout=layout, picked=0.5)):
        with few_programs():
            check(dataclasses.replace(case, shape=(2, 16, 2, 3)), device)


@pytest.mark.parametrize("moments", [False, True], ids=["taken", "given"])
@pytest.mark.parametrize("training", MODES, ids=str)
def test_a_norm_frozen_and_the_other_not(
    device: str, training: tuple[bool, bool], moments: bool
) -> None:
    """By running statistics or the batch's, each norm for itself; x's moments given or not."""
    case = Case(shape=(2, 16, 4, 3), training=training, moments=moments, values="large_mean")
    with few_programs():
        check(case, device)


@pytest.mark.parametrize("project", [False, True], ids=["identity", "projection"])
def test_one_pixel(device: str, project: bool) -> None:
    """At stride 2 a map of 2x2 becomes one; no tap but the centre's is inside."""
    shape = (3, 16, 2, 2) if project else (3, 16, 1, 1)
    with few_programs():
        check(Case(shape=shape, project=project, stride=1 + project), device)
        check(Case(shape=(1, 16, 1, 1), project=project, training=(False, False)), device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_empty_batch(path: str, device: str, training: bool) -> None:
    case = Case(shape=(0, 16, 4, 5), K=32, stride=2, project=True, training=(training, training))
    check(case, device)


@pytest.mark.parametrize("project", [False, True], ids=["identity", "projection"])
def test_an_empty_subset(path: str, device: str, project: bool) -> None:
    """The shortcut alone; the branch's parameters have gradients, which are zeros."""
    case = Case(picked=0.0, project=project, training=(False, False))
    given_ = tensors(case, device)
    got = run(preact_unit, case, given_, fused=True)
    want = run(preact_unit_reference, case, plain(given_))
    assert got.keys() == want.keys() and not got["dweight1"].any() and not got["dweight2"].any()
    for name in got:
        torch.testing.assert_close(got[name], want[name])


def test_one_value_per_channel_is_an_error(path: str, device: str) -> None:
    """Also where only the subset, or only the second map, has but one."""
    cases_ = (
        (Case(shape=(1, 16, 1, 1)), r"norm1: x: .*\[1, 16, 1, 1\]"),
        (Case(shape=(4, 16, 1, 1), picked=0.25), r"norm1: .*\[1, 16, 1, 1\]"),
        (Case(shape=(1, 16, 2, 2), stride=2, K=32, project=True), r"norm2: .*\[1, 32, 1, 1\]"),
        (Case(shape=(4, 16, 1, 1), project=True, picked=0.25), r"norm2: .*\[1, 16, 1, 1\]"),
    )
    for case, words in cases_:
        given_ = tensors(case, device)
        before = {name: v.clone() for name in RUNNING if (v := given_[name]) is not None}
        with pytest.raises(ValueError, match=words):
            run(preact_unit, case, given_, fused=True)
        assert all(torch.equal(v, tensor_of(given_, name)) for name, v in before.items())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_inf_pass_as_in_pytorch(device: str, bad: float, training: bool) -> None:
    case = Case(shape=(2, 16, 6, 5), training=(training, training), momentum=1.0)
    for name in ("x", "dy"):
        given_ = tensors(case, device)
        tensor_of(given_, name)[1, 3, 2, 1] = bad
        with few_programs():
            got = run(preact_unit, case, given_, fused=True)
        want = run(preact_unit_reference, case, plain(given_))
        for result in got:
            # Whether a sum over Inf ends as Inf or as NaN follows its order.
            assert torch.equal(got[result].isfinite(), want[result].isfinite()), (name, result)


def test_what_no_index_names_is_not_read(device: str) -> None:
    """But for the shortcut: NaN stays in the samples in which it is."""
    case = Case(shape=(5, 16, 3, 3), picked=0.6)
    given_ = tensors(case, device)
    left = tensor_of(given_, "position") < 0
    for name in ("x", "dy"):
        tensor_of(given_, name)[left] = torch.nan
    with few_programs():
        got = run(preact_unit, case, given_, fused=True)
    for name, v in got.items():
        kept = v[~left] if name in ("y", "dx") else v
        assert kept.isfinite().all(), name
        assert name not in ("y", "dx") or v[left].isnan().all()


@pytest.mark.parametrize("project", [False, True], ids=["identity", "projection"])
def test_every_kind_of_needed_gradients(device: str, project: bool) -> None:
    """The gradients that are asked for are bitwise those of the full backward; no others come."""
    case = Case(shape=(2, 16, 2, 2), project=project, K=16)
    given_ = tensors(case, device)
    leaves = [name for name in LEAVES if given_[name] is not None]
    several = [(), ("x",), ("weight2",), ("norm1_bias", "weight1"), tuple(leaves[1:])]
    with few_programs():
        full = run(preact_unit, case, given_, fused=True)
        for needs in several:
            got = run(preact_unit, case, given_, needs, fused=True)
            assert {n for n in got if n.startswith("d")} == {f"d{n}" for n in needs}
            for name in got:
                assert torch.equal(got[name], full[name]), f"{name} of {needs}"


@pytest.mark.parametrize("picked", [None, 0.7], ids=["all", "subset"])
def test_two_runs_are_bitwise_the_same(device: str, picked: float | None) -> None:
    case = Case(shape=(3, 16, 7, 5), K=32, stride=2, project=True, dy_layout="nchw", picked=picked)
    given_ = tensors(case, device)
    with small_tiles():
        first, second = (run(preact_unit, case, given_, fused=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("picked", "row_scale"), [(0.7, False), (None, True)])
def test_vectors_that_do_not_lie_dense(device: str, picked: float | None, row_scale: bool) -> None:
    """Weights, biases, index, position and row_scale are read by their strides."""
    case = Case(shape=(3, 16, 4, 5), picked=picked, row_scale=row_scale)
    dense = tensors(case, device)
    strided = {
        name: v.repeat_interleave(2)[::2]
        if v is not None and v.dim() == 1 and name not in RUNNING
        else v
        for name, v in dense.items()
    }
    with small_tiles():
        want, got = (run(preact_unit, case, t, fused=True) for t in (dense, strided))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(path: str, device: str, momentum: float | None) -> None:
    """Two batches, with the counters of batches: as torch.nn.BatchNorm2d tracks them."""
    case = Case(shape=(3, 16, 4, 3), K=32, project=True)
    norms = [nn.BatchNorm2d(c, momentum=momentum, device=device) for c in (16, 32)]
    peers = copy.deepcopy(norms)
    for seed in range(2):
        t = tensors(dataclasses.replace(case, seed=seed), device)
        given_norms = [Norm.of(norm) for norm in norms]
        with few_programs():
            preact_unit(
                tensor_of(t, "x"), given_norms[0], tensor_of(t, "weight1"), given_norms[1],
                tensor_of(t, "weight2"), t["shortcut_weight"],
            )  # fmt: skip
        a = peers[0](tensor_of(t, "x")).relu()
        peers[1](torch.conv2d(a, tensor_of(t, "weight1"), None, 1, 1))
    for norm, peer in zip(norms, peers, strict=True):
        for name, v in norm.state_dict().items():
            torch.testing.assert_close(v, peer.state_dict()[name], msg=name)
        assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [(0.1, None), (None, 0.3), (1.0, 0.0)], ids=str)
def test_two_running_statistics_at_once_are_two_in_turn(
    device: str, momentum: tuple[float | None, float | None]
) -> None:
    """Bitwise; of other channels, counts and momentum each; a counter only where there is one."""
    once: list[tuple[Any, ...]] = []
    in_turn: list[tuple[Any, ...]] = []
    for into in (once, in_turn):
        torch.manual_seed(1)
        for C, number, factor, count in ((5, 3, momentum[0], 12), (70, 8, momentum[1], 99)):
            running, batch = torch.rand(2, C, device=device), torch.rand(2, C, device=device)
            batches = None if factor == 0.0 else torch.tensor(number, device=device)
            into.append((*running, batches, *batch, factor, count))
    two = torch.ops.fastres.batch_norm_update_two_stats.default
    torch.library.opcheck(two, (*copy.deepcopy(once[0]), *copy.deepcopy(once[1])))
    two(*once[0], *once[1])
    for norm in in_turn:
        torch.ops.fastres.batch_norm_update_stats.default(*norm)
    for a, b in zip((*once[0], *once[1]), (*in_turn[0], *in_turn[1]), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_moments_go_from_unit_to_unit(device: str) -> None:
    """A chain of units that hand moments on, against one in which each takes them."""
    case = Case(shape=(4, 16, 6, 5))
    given_ = tensors(case, device)
    x = tensor_of(given_, "x")
    norm = Norm(None, None, given_["norm1_weight"], given_["norm1_bias"], training=True)
    weights = tensor_of(given_, "weight1"), tensor_of(given_, "weight2")
    with small_tiles():
        y, z, moments = x, x, None
        for _ in range(3):
            y, moments = preact_unit(
                y, norm, weights[0], norm, weights[1], moments=moments, with_moments=True
            )
            assert moments is not None and moments.partial.shape[1] > 1
            z, none = preact_unit(z, norm, weights[0], norm, weights[1])
            assert none is None
    torch.testing.assert_close(y, z)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
def test_native_path_is_the_reference(native: None, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for project, picked in ((True, None), (False, 0.6), (True, 0.6)):
        case = Case(
            shape=(3, 5, 5, 4), K=7 if project else 5, stride=1 + project, project=project,
            picked=picked, dtype=dtype, half_norm=True, half_weight=True, row_scale=picked is None,
        )  # fmt: skip
        given_ = tensors(case, "cpu")
        got = run(preact_unit, case, given_, fused=True)
        want = run(preact_unit_reference, case, given_)
        assert got.keys() == want.keys()
        for name in got:
            atol = 8 * eps * want[name].abs().max().item()
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=atol)


def test_gradients_accumulate(path: str, device: str) -> None:
    given_ = tensors(Case(shape=(2, 16, 3, 2)), device)
    leaves = [tensor_of(given_, name).clone().requires_grad_() for name in ("weight1", "weight2")]
    norm, grads = Norm(None, None, training=True), []
    for _ in range(2):
        with few_programs():
            y, _ = preact_unit(tensor_of(given_, "x"), norm, leaves[0], norm, leaves[1])
            y.backward(tensor_of(given_, "dy"))
        grads.append([leaf.grad.clone() for leaf in leaves if leaf.grad is not None])
    # The weights' gradients are views of one tensor, and must not be added to in place there.
    assert all(torch.equal(b, 2 * a) for a, b in zip(*grads, strict=True))


def test_double_backward_is_refused_in_words(device: str) -> None:
    given_ = tensors(Case(shape=(2, 16, 2, 2)), device)
    x, norm = tensor_of(given_, "x").requires_grad_(), Norm(None, None, training=True)
    with few_programs():
        y, _ = preact_unit(
            x, norm, tensor_of(given_, "weight1"), norm, tensor_of(given_, "weight2")
        )
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()
