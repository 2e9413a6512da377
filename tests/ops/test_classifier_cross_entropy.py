"""classifier_cross_entropy against its reference in fp64: shapes, dtypes, values, corners."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops.batch_norm_relu_equality import LAYOUTS
from ops.classifier_cross_entropy_equality import (
    LEAVES,
    Case,
    check,
    few_programs,
    run,
    small_tiles,
    tensors,
)
from ops.norm_relu_conv2d_equality import VALUES, Watch, overflows, tensor_of
from tolerances import GRADCHECK_ATOL
from torch import Tensor, nn

from fastres.ops import Norm, classifier_cross_entropy
from fastres.ops.classifier_cross_entropy import (
    classifier_cross_entropy_reference,
    serves_classifier,
)

HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    with few_programs():
        yield


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Case:
    training = draw(st.booleans())
    N, H, W = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if training and N * H * W == 1:
        N = 2
    case = Case(
        shape=(N, draw(st.sampled_from([16, 32, 48])), H, W),
        classes=draw(st.sampled_from([1, 2, 10, 17])),
        smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        x_layout=draw(st.sampled_from(list(LAYOUTS))),
        dtype=draw(st.sampled_from(dtypes)),
        half_norm=draw(st.booleans()),
        half_weight=draw(st.booleans()),
        norm_weight=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        bias=draw(st.booleans()),
        training=training,
        running=not training or draw(st.booleans()),
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        moments=draw(st.booleans()),
        dloss=draw(st.sampled_from([1.0, -0.3, 0.0, 1024.0])),
        sure=draw(st.sampled_from([0.1, 1.0, 10.0])),
        values=draw(st.sampled_from(VALUES)),
        seed=draw(st.integers(0, 2**16)),
    )
    return dataclasses.replace(case, values="normal") if overflows(case) else case


@pytest.mark.parametrize("dtypes", [[torch.float32], HALF], ids=["fp32", "half"])
@given(data=st.data())
def test_equals_the_reference(device: str, dtypes: list[torch.dtype], data: st.DataObject) -> None:
    check(data.draw(cases(dtypes)), device)


@pytest.mark.parametrize("moments", [True, False], ids=["given", "taken"])
@pytest.mark.parametrize("C", [16, 48])
def test_several_tiles_chunks_partials_and_blocks(device: str, C: int, moments: bool) -> None:
    """Of pixels, samples, classes and channels; five samples in chunks of three and of one."""
    case = Case(shape=(5, C, 6, 7), classes=17, smoothing=0.1, moments=moments)
    with small_tiles():
        check(dataclasses.replace(case, values="large_mean"), device)
        check(dataclasses.replace(case, dtype=torch.float16, training=False), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_many_channels_and_classes_as_are_served(device: str, dtype: torch.dtype) -> None:
    """Tiles of their true size: moments merged by a launch of their own, a weight in blocks."""
    check(Case(shape=(2, 512, 3, 3), classes=128, dtype=dtype, moments=True), device)


def test_pools_what_would_be_stored(device: str) -> None:
    """Equal pixels, as many as a power of two, and the identity: logits is a, rounded to fp16."""
    x = torch.randn(2, 16, 1, 1, device=device).half().expand(2, 16, 4, 2)
    norm = Norm(torch.zeros(16, device=device), torch.ones(16, device=device))
    target, eye = torch.zeros(2, dtype=torch.int64, device=device), torch.eye(16, device=device)
    _, logits = classifier_cross_entropy(x, norm, eye, None, target)
    assert torch.equal(logits, logits.half().float())
    assert not torch.equal(logits, x[:, :, 0, 0].float().relu() / (1 + norm.eps) ** 0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    check(Case(shape=(2, 16, 4, 6), x_layout=layout), device)


@pytest.mark.parametrize("values", VALUES)
def test_nasty_values(values: str, device: str) -> None:
    for dtype, sure in itertools.product((torch.float32, torch.float16), (1.0, 30.0)):
        check(Case(shape=(2, 16, 5, 3), values=values, dtype=dtype, sure=sure), device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_pixel_one_sample_one_class(device: str, training: bool) -> None:
    check(Case(shape=(2 if training else 1, 16, 1, 1), classes=1, training=training), device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_empty_batch(path: str, device: str, training: bool) -> None:
    case = Case(shape=(0, 16, 4, 5), training=training)
    check(case, device)
    got = run(classifier_cross_entropy, case, tensors(case, device))
    assert got["loss"].isnan() and got["logits"].shape == (0, 10)
    assert not got["dweight"].any() and not got["dbias"].any()


def _right(path: str, device: str) -> dict[str, Any]:
    given_ = tensors(Case(), device)
    names = ("x", "weight", "bias", "target")
    norm = Norm(given_["running_mean"], given_["running_var"], training=True)
    return {"norm": norm} | {name: tensor_of(given_, name) for name in names}


@pytest.mark.parametrize("wrong", [-100, -1, 10, 2**40])
def test_a_target_that_is_none_makes_nan(path: str, device: str, wrong: int) -> None:
    """Of the loss and of every gradient, and of nothing else; the host is told nothing."""
    case = Case(smoothing=0.1)
    given_ = tensors(case, device)
    want = run(classifier_cross_entropy, case, given_)
    tensor_of(given_, "target")[1] = wrong
    got = run(classifier_cross_entropy, case, given_)
    for name, v in got.items():
        if name == "loss" or name.startswith("d"):
            assert v.isnan().any(), name
        else:
            assert torch.equal(v, want[name]), name
    assert got["dweight"].isnan().all() and got["dx"].isnan().any()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_inf_pass_as_in_pytorch(device: str, bad: float, training: bool) -> None:
    """In x, the weight and dloss, one at a time; what one of them does not reach stays clean."""
    case = Case(shape=(2, 16, 5, 4), training=training, momentum=1.0)
    for name, at in (("x", (1, 3, 2, 1)), ("weight", (4, 3)), ("bias", (2,)), ("dloss", ())):
        given_ = tensors(case, device)
        tensor_of(given_, name)[at] = bad
        got = run(classifier_cross_entropy, case, given_)
        want = run(classifier_cross_entropy_reference, case, given_)
        for result in got:
            # Whether a sum over Inf ends as Inf or as NaN follows its order.
            finite, wanted = got[result].isfinite(), want[result].isfinite()
            if name == "dloss":
                # Multiplied last, so that it meets the zeros of channels that no pixel passes, too.
                finite, wanted = finite | wanted, wanted
            assert torch.equal(finite, wanted), (name, result)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_subset_of_needed_gradients(device: str, training: bool) -> None:
    """The gradients that are asked for are bitwise those of the full backward; no others come."""
    case = Case(shape=(2, 16, 2, 3), training=training)
    given_ = tensors(case, device)
    full = run(classifier_cross_entropy, case, given_)
    for count in (0, 1, 2, len(LEAVES) - 1):
        for needs in itertools.combinations(LEAVES, count):
            got = run(classifier_cross_entropy, case, given_, needs)
            assert {n for n in got if n.startswith("d")} == {f"d{n}" for n in needs}
            for name in got:
                assert torch.equal(got[name], full[name]), f"{name} of {needs}"


class _Saved:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, t: Tensor) -> Tensor:
        self.tensors.append(t)
        return t


def test_without_gradients_nothing_is_kept_or_made(device: str) -> None:
    case = Case()
    given_, saved = tensors(case, device), _Saved()
    want = run(classifier_cross_entropy, case, given_)
    t = _right("kernels", device)
    weight = t["weight"].clone().requires_grad_()
    norm = t["norm"]._replace(weight=given_["norm_weight"], bias=given_["norm_bias"])
    with (
        torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t),
        torch.no_grad(),
        Watch("classifier_cross_entropy") as seen,
    ):
        loss, logits = classifier_cross_entropy(**(t | {"weight": weight, "norm": norm}))
    assert torch.equal(loss, want["loss"]) and torch.equal(logits, want["logits"])
    assert not saved.tensors
    assert all(out.numel() == 0 for out in seen.out[4:])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_saves_x_and_what_is_small(device: str, training: bool) -> None:
    case = Case(shape=(4, 16, 16, 16), training=training)
    given_, saved = tensors(case, device), _Saved()
    x, small = tensor_of(given_, "x"), 4 * (2 * 16 + 10) + 2 * 4 * 16 + 10 * 16 + 5 * 16
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        run(classifier_cross_entropy, case, given_)
    large = [t.data_ptr() for t in saved.tensors if t.numel() > 10 * 16]
    assert large == [x.data_ptr()]
    assert sum(t.numel() for t in saved.tensors) <= x.numel() + small


def test_two_runs_are_bitwise_the_same(device: str) -> None:
    case = Case(shape=(5, 32, 7, 5))
    given_ = tensors(case, device)
    with small_tiles():
        first, second = (run(classifier_cross_entropy, case, given_) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(path: str, device: str, momentum: float | None) -> None:
    """Three batches, with the counter of batches: as torch.nn.BatchNorm2d tracks them."""
    peer = nn.BatchNorm2d(16, momentum=momentum, device=device)
    ours = {name: v.clone() for name, v in peer.state_dict().items() if v.dim() == 1}
    count = torch.zeros((), dtype=torch.int64, device=device)
    weight, target = torch.randn(4, 16, device=device), torch.tensor([3, 0, 2], device=device)
    for step in range(3):
        x = torch.randn(3, 16, 4, 3, device=device) * 3 + step
        norm = Norm(
            ours["running_mean"], ours["running_var"], training=True, momentum=momentum,
            num_batches_tracked=count,
        )  # fmt: skip
        classifier_cross_entropy(x, norm, weight, None, target)
        peer(x)
    torch.testing.assert_close(ours["running_mean"], peer.running_mean)
    torch.testing.assert_close(ours["running_var"], peer.running_var)
    assert count == 3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_native_path_is_the_reference(native: None, dtype: torch.dtype) -> None:
    """PyTorch's own ops; and these are nn.Linear and F.cross_entropy."""
    for training, bias in itertools.product((True, False), (True, False)):
        case = Case(
            shape=(3, 5, 5, 4), classes=130, dtype=dtype, half_norm=True, half_weight=True,
            training=training, bias=bias, smoothing=0.2,
        )  # fmt: skip
        given_ = tensors(case, "cpu")
        got = run(classifier_cross_entropy, case, given_)
        want = run(classifier_cross_entropy_reference, case, given_)
        assert got.keys() == want.keys()
        for name in got:
            assert torch.equal(got[name], want[name]), name
        loss = F.cross_entropy(got["logits"], tensor_of(given_, "target"), label_smoothing=0.2)
        torch.testing.assert_close(got["loss"], loss)


def test_native_path_passes_gradcheck(native: None) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def op(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        norm = Norm(None, None, scale, training=True)
        return classifier_cross_entropy(x, norm, weight, bias, torch.tensor([1, 0]), 0.1)[0]

    args = leaf(2, 2, 3, 2), leaf(3, 2), leaf(3), leaf(2)
    assert torch.autograd.gradcheck(op, args, atol=GRADCHECK_ATOL)


def test_gradients_accumulate(path: str, device: str) -> None:
    t = _right(path, device)
    leaf = t["weight"].clone().requires_grad_()
    grads = []
    for _ in range(2):
        classifier_cross_entropy(**(t | {"weight": leaf}))[0].backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.clone())
    assert torch.equal(grads[1], 2 * grads[0])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_under_autocast(path: str, device: str, dtype: torch.dtype) -> None:
    """x goes in autocast's dtype; loss, logits and the parameters' gradients stay fp32."""
    t = _right(path, device)
    leaves = {name: t[name].clone().requires_grad_() for name in ("x", "weight", "bias")}
    with torch.autocast(device, dtype):
        loss, logits = classifier_cross_entropy(**(t | leaves))
        assert loss.dtype == logits.dtype == torch.float32
        loss.backward()
    halved = t | {"x": t["x"].to(dtype)}
    want, logits_want = classifier_cross_entropy(**halved)
    assert torch.equal(loss.detach(), want) and torch.equal(logits, logits_want)
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in leaves.values())


def test_double_backward_is_refused_in_words(device: str) -> None:
    t = _right("kernels", device)
    x = t["x"].clone().requires_grad_()
    loss, _ = classifier_cross_entropy(**(t | {"x": x}))
    (dx,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_what_the_kernels_serve_is_told_by_shape() -> None:
    assert serves_classifier(nn.Linear(64, 10)) and serves_classifier(nn.Linear(512, 128))
    assert not serves_classifier(nn.Linear(24, 10))
    assert not serves_classifier(nn.Linear(528, 10)) and not serves_classifier(nn.Linear(64, 129))
