"""meprop_linear and MePropLinear on both paths: the fp64 reference, and the corners."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops.meprop_equality import DTYPES, MODES, NAMES, VALUES, check, drawn, run
from tolerances import GRADCHECK_ATOL
from torch import Tensor, nn

from fastres.ops import MePropLinear, _register, meprop_linear
from fastres.ops._meprop import count_kept
from fastres.ops.meprop_linear import meprop_linear_reference


def _tensors(
    shape: tuple[int, ...], out: int, dtype: torch.dtype, device: str, values: str = "grid",
    bias: bool = True, seed: int = 0,
) -> tuple[dict[str, Tensor | None], Tensor]:  # fmt: skip
    """The op's tensors, and dy."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*size: int, values: str = "grid") -> Tensor:
        return drawn(size, values, generator).to(device, dtype)

    given_ = {"x": tensor(*shape), "weight": tensor(out, shape[-1])}
    return (
        given_ | {"bias": tensor(out) if bias else None},
        tensor(*shape[:-1], out, values=values),
    )


def _reference(k: int, mode: str) -> Callable[..., Tensor]:
    return lambda x, weight, bias: meprop_linear_reference(x, weight, bias, k, mode)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda v: v,
    "transposed": lambda v: v.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda v: torch.stack([v, v.new_full((), torch.nan).expand_as(v)], -1)[..., 0],
    "expanded_rows": lambda v: v[:1].expand_as(v),
    "expanded_columns": lambda v: v[..., :1].expand_as(v),
    "expanded": lambda v: v.new_ones(()).expand_as(v),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_equals_the_reference(
    path: str, mode: str, dtype: torch.dtype, device: str, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, 5), max_size=2), label="rows")
    size, out = data.draw(st.integers(1, 9), label="in"), data.draw(st.integers(1, 20), label="out")
    k = data.draw(st.one_of(st.just(1), st.just(out), st.integers(1, out)), label="k")
    given_, dy = _tensors(
        (*rows, size), out, dtype, device,
        values=data.draw(st.sampled_from(VALUES), label="values"),
        bias=data.draw(st.booleans(), label="bias"),
        seed=data.draw(st.integers(0, 2**16), label="seed"),
    )  # fmt: skip
    if dy.dim() > 1 and dy.numel():
        dy = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)), label="dy")](dy)
    if given_["x"] is not None and given_["x"].dim() > 1 and given_["x"].numel():
        given_["x"] = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)), label="x")](given_["x"])
    check(partial(meprop_linear, k=k, mode=mode), _reference(k, mode), given_, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layouts_of_dy_and_x(path: str, mode: str, layout: str, device: str) -> None:
    op, reference = partial(meprop_linear, k=3, mode=mode), _reference(3, mode)
    for shape in ((6, 5), (2, 3, 5)):
        given_, dy = _tensors(shape, 8, torch.float32, device)
        check(op, reference, given_, LAYOUTS[layout](dy))
        for name in ("x", "weight"):
            if (v := given_[name]) is not None:
                check(op, reference, given_ | {name: LAYOUTS[layout](v)}, dy)


@pytest.mark.parametrize("mode", MODES)
def test_ratio_1_and_k_of_all_are_the_dense_backward_to_the_bit(
    path: str, mode: str, device: str
) -> None:
    given_, dy = _tensors((7, 33), 17, torch.float32, device)
    want = run(F.linear, given_, dy)
    for share in ({"ratio": 1.0}, {"ratio": 1}, {"k": 17}, {"ratio": 0.99}):
        got = run(partial(meprop_linear, mode=mode, **share), given_, dy)
        assert all(torch.equal(got[name], want[name]) for name in want), share


@pytest.mark.parametrize("mode", MODES)
def test_forward_and_bias_gradient_are_pytorchs_to_the_bit(
    path: str, mode: str, device: str
) -> None:
    given_, dy = _tensors((50, 33), 17, torch.float32, device)
    got = run(partial(meprop_linear, k=2, mode=mode), given_, dy)
    want = run(F.linear, given_, dy)
    assert torch.equal(got["y"], want["y"]) and torch.equal(got["bias"], want["bias"])
    assert not torch.equal(got["x"], want["x"])
    weight = got["weight"]
    assert weight.layout == torch.strided and weight.is_contiguous()
    if mode == "unified":
        assert int((weight != 0).any(1).sum()) == 2


@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_needed_gradients(path: str, mode: str, device: str) -> None:
    given_, dy = _tensors((4, 5), 6, torch.float32, device)
    op = partial(meprop_linear, k=2, mode=mode)
    full = run(op, given_, dy)
    for count in range(len(NAMES)):
        for needs in itertools.combinations(NAMES, count):
            got = run(op, given_, dy, needs)
            assert got.keys() == {"y", *needs}
            assert all(torch.equal(got[name], full[name]) for name in got), needs


def test_a_frozen_weight_keeps_no_x(device: str) -> None:
    given_, _ = _tensors((4, 5), 6, torch.float32, device)
    x, weight = given_["x"], given_["weight"]
    assert x is not None and weight is not None
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        meprop_linear(x.requires_grad_(), weight, k=2)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", MODES)
def test_nan_and_inf_in_dy_are_kept(path: str, mode: str, bad: float, device: str) -> None:
    given_, dy = _tensors((4, 5), 6, torch.float32, device)
    dy[1, 4] = bad
    got = run(partial(meprop_linear, k=1, mode=mode), given_, dy)
    assert not got["weight"][4].isfinite().any()
    assert not got["x"][1].isfinite().any() and got["x"][[0, 2, 3]].isfinite().all()
    assert got["bias"][[0, 1, 2, 3, 5]].isfinite().all() and not got["bias"][4].isfinite()
    if mode == "unified":
        assert (got["weight"][[0, 1, 2, 3, 5]] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_are_bitwise_the_same(path: str, mode: str, device: str) -> None:
    given_, dy = _tensors((40, 30), 50, torch.float32, device)
    first, second = (run(partial(meprop_linear, k=9, mode=mode), given_, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_native_path_passes_gradcheck_where_the_rest_is_zero(native: None) -> None:
    """Where the loss weighs k columns alone the sparse backward is the true one; in fp64."""
    x, weight = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((5, 4), (7, 4)))
    weigh = torch.zeros(7, dtype=torch.float64)
    weigh[[1, 5]] = torch.tensor([2.0, -3.0], dtype=torch.float64)
    for mode in MODES:
        assert torch.autograd.gradcheck(
            lambda x, weight, mode=mode: meprop_linear(x, weight, k=2, mode=mode) * weigh,
            (x, weight), atol=GRADCHECK_ATOL,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_autocast(path: str, mode: str, dtype: torch.dtype, device: str) -> None:
    """y in autocast's dtype and gradients in the parameters', as of the same op without it."""
    given_, dy = _tensors((6, 5), 8, torch.float32, device)
    op = partial(meprop_linear, k=3, mode=mode)

    def under_autocast(*args: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return op(*args)

    def cast(*args: Tensor) -> Tensor:
        return op(*(v.to(dtype) for v in args))

    got, want = run(under_autocast, given_, dy.to(dtype)), run(cast, given_, dy.to(dtype))
    assert got["y"].dtype == dtype and got["weight"].dtype == torch.float32
    assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.autocast(device, dtype=dtype):
        # A backward that runs under it (a compiled one does) keeps its forward's dtype.
        inside = run(cast, given_, dy.to(dtype))
    assert all(torch.equal(inside[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("ratio", "width", "kept"),
    [(0.5, 5, 3), (0.5, 6, 3), (0.1, 4, 1), (1e-9, 9, 1), (1.0, 9, 9), (1 / 16, 4096, 256)],
)
def test_a_ratio_is_rounded_half_up_and_keeps_one(ratio: float, width: int, kept: int) -> None:
    assert count_kept(None, ratio, width, "") == kept


def test_the_module_is_nn_linears_in_all_but_the_backward(path: str, device: str) -> None:
    peer = nn.Linear(5, 8, device=device)
    ours = MePropLinear(5, 8, ratio=0.25, mode="row", device=device)
    ours.load_state_dict(peer.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in peer.named_parameters()]
    assert repr(ours) == repr(peer).replace("Linear(", "MePropLinear(").replace(
        "bias=True", "bias=True, ratio=0.25, mode='row'"
    )
    x, dy = torch.randn(6, 5, device=device), torch.randn(6, 8, device=device)

    def grads(module: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(module(x), list(module.parameters()), dy))

    def same(ours: nn.Module, peer: nn.Module) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(grads(ours), grads(peer), strict=True)]

    assert torch.equal(ours(x), peer(x)) and same(ours, peer) == [False, True]
    ours.dense = True
    assert same(ours, peer) == [True, True] and repr(ours).endswith(", mode='row', dense)")
    ours.dense = False
    assert same(ours, peer) == [False, True]
    ours.ratio = 1.0
    assert same(ours, peer) == [True, True]
    ours.ratio, ours.k, ours.mode = None, 2, "unified"
    assert same(ours, peer) == [False, True]
    assert same(ours.eval(), peer.eval()) == [True, True]
    with torch.no_grad():
        assert torch.equal(ours.train()(x), peer(x))
    assert MePropLinear(5, 8, bias=False, dtype=torch.float16, k=1).weight.dtype == torch.float16


def test_row_refuses_a_double_backward_in_words(device: str) -> None:
    x = torch.randn(2, 3, device=device, requires_grad=True)
    y = meprop_linear(x, torch.randn(4, 3, device=device), k=2, mode="row")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def _wrong() -> Iterator[tuple[dict[str, Any], str]]:
    x, weight, bias = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)
    yield {"ratio": None}, "k and ratio: expected one of the two, got neither"
    yield {"k": 2}, "k and ratio: expected one of the two, got k=2 and ratio=0.5"
    for ratio in (0, -0.5, 1.01, float("nan")):
        yield {"ratio": ratio}, f"ratio: expected 0 < ratio <= 1, got {ratio}"
    yield {"ratio": None, "k": 5}, "k: expected 1 <= k <= 4, the out features, got 5"
    for k in (0, -1, 2.0):
        yield {"ratio": None, "k": k}, f"k: expected an integer of at least 1, got {k}"
    yield {"mode": "column"}, r"mode: expected one of \('unified', 'row'\), got 'column'"
    yield {"x": x.int()}, r"x: expected one of .*float32.* on cpu, got torch.int32"
    yield {"x": x.double()}, r"x: expected one of .* on cpu, got torch.float64"
    yield {"x": x[:, :2]}, r"x: expected \[..., 3\] for weight's \[4, 3\], got shape \[2, 2\]"
    yield {"x": torch.zeros(())}, r"x: expected \[..., 3\] .* got shape \[\]"
    yield {"weight": torch.zeros(4)}, r"weight: expected \[out, in\], got shape \[4\]"
    yield {"weight": weight.half()}, "weight: expected x's torch.float32 on cpu, got torch.float16"
    yield {"weight": weight.to("meta")}, "weight: expected x's .* on cpu, got .* on meta"
    for wrong in (bias[:3], bias.half(), bias.to("meta")):
        yield {"bias": wrong}, rf"bias: expected \[4\] in x's .*, got \[{len(wrong)}\] in "


@pytest.mark.parametrize(("change", "words"), list(_wrong()))
def test_wrong_input_is_refused_in_words(
    change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also where a GPU is: on CPU tensors these are the kernels' own demands.
    monkeypatch.setattr(_register, "INTERPRET", True)
    right: dict[str, Any] = {
        "x": torch.zeros(2, 3),
        "weight": torch.zeros(4, 3),
        "bias": torch.zeros(4),
    }
    with pytest.raises(ValueError, match=words):
        meprop_linear(**(right | {"ratio": 0.5} | change))


@pytest.mark.parametrize(
    ("share", "words"),
    [({}, "got neither"), ({"k": 9}, "1 <= k <= 8"), ({"ratio": 2.0}, "0 < ratio <= 1")],
)
def test_the_module_refuses_at_construction(share: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MePropLinear(5, 8, **share)
