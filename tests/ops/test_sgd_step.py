"""sgd_step against its reference in fp64: settings, lists of gradients, skipping, errors."""

import importlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gradient_lists import (
    DENSE,
    DTYPES,
    Gradient,
    ReadsOnTheHost,
    gradient_lists,
    small_blocks,
)
from ops.sgd_step_equality import Case, buffers, check, run
from torch import Tensor

from fastres.ops import _register, flat_offsets, sgd_step, unscale
from fastres.ops.sgd_step import overflow_of


@st.composite
def cases(draw: st.DrawFn) -> Case:
    momentum = draw(st.sampled_from([0.0, 0.9, 0.5]))
    finds = draw(st.booleans())
    return Case(
        gradients=draw(gradient_lists(DENSE)),
        lr=draw(st.sampled_from([0.1, 1.0, 0.0, 1e-3])),
        lr_on_device=draw(st.booleans()),
        momentum=momentum,
        weight_decay=draw(st.sampled_from([0.0, 1e-4, 0.5])),
        nesterov=momentum != 0 and draw(st.booleans()),
        maximize=draw(st.booleans()),
        half=draw(st.sampled_from([None, torch.float16, torch.bfloat16])),
        grad_scale=draw(st.sampled_from([None, 1.0, 1024.0, 3.0])),
        found_inf=None if finds else draw(st.sampled_from([None, 0.0, 0.0, 1.0, 2.0])),
        finds=finds,
    )


@given(data=st.data())
def test_equals_the_reference(path: str, device: str, data: st.DataObject) -> None:
    for _ in range(3):
        case = data.draw(cases())
        with small_blocks("sgd_step") if data.draw(st.booleans()) else nullcontext():
            check(case, device)


@pytest.mark.parametrize("values", ["nan", "inf", "-inf"])
def test_nan_and_inf_pass_as_in_pytorch(path: str, device: str, values: str) -> None:
    """Nobody looks but found_inf: a step that is not skipped takes what it is given."""
    gradients = [Gradient((7,), values=values), Gradient((20,))]
    check(Case(gradients, weight_decay=0.1, nesterov=True), device)
    # With no weight decay an infinite parameter stays infinite: 0 * inf would be NaN.
    t = buffers(Case([Gradient((7,))], momentum=0.0), device)
    t["param"][2] = torch.inf
    run(Case([Gradient((7,))], momentum=0.0), t)
    assert t["param"][2] == torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_their_true_size(device: str, dtype: torch.dtype) -> None:
    gradients = [Gradient(s, dtype, "dense") for s in ((2048,), (5000,), (1,))]
    gradients += [Gradient((4096,), dtype, "offset")]
    check(Case(gradients, weight_decay=0.1, half=torch.float16, grad_scale=8.0), device)


def test_a_skipped_step_writes_nothing_at_all(path: str, device: str) -> None:
    """Bitwise, NaN and minus zero and all."""
    for found_inf in (1.0, torch.tensor(1.0)):
        case = Case([Gradient((40,)), Gradient((3,))], half=torch.float16, weight_decay=0.1)
        t = buffers(case, device)
        for name in ("param", "momentum_buffer", "half"):
            t[name][:3] = torch.tensor([torch.nan, -0.0, torch.inf])
        before = {n: t[n].view(torch.uint8).clone() for n in ("param", "momentum_buffer", "half")}
        run(Case(case.gradients, half=case.half, weight_decay=0.1, found_inf=float(found_inf)), t)
        for name, kept in before.items():
            assert torch.equal(t[name].view(torch.uint8), kept), name


@pytest.mark.skipif(not _register.INTERPRET, reason="kernels are compiled here")
def test_opaque_ops_launch_without_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run: wrap_triton traces every launch outside a triton_op."""
    launching: Any = importlib.import_module("fastres.kernels._launch")
    monkeypatch.setattr(launching, "InterpretedFunction", type(None))
    monkeypatch.setattr(launching, "wrap_triton", None)
    check(Case([Gradient((40,))]), "cpu")
    unscale([torch.ones(3)], torch.ones(()), norm=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("values", ["nan", "inf", "-inf"])
def test_a_step_that_overflowed_is_put_back(
    path: str, device: str, values: str, momentum: float
) -> None:
    """Bitwise, whichever program meets it, of buffers with NaN and minus zero in them."""
    shapes: list[tuple[int, ...]] = [(40,), (3, 7), (33,)]
    for broken in range(len(shapes)):
        gradients = [Gradient(shape) for shape in shapes] + [Gradient((5,), None)]
        gradients[broken] = Gradient(shapes[broken], torch.float16, values=values)
        case = Case(gradients, momentum=momentum, half=torch.float16, grad_scale=8.0, finds=True)
        t = buffers(case, device)
        held = {name: v for name, v in t.items() if isinstance(v, Tensor)}
        for flat in held.values():
            flat[:3] = torch.tensor([torch.nan, -0.0, torch.inf])
        before = {name: flat.view(torch.uint8).clone() for name, flat in held.items()}
        with small_blocks("sgd_step"):
            run(case, t)
        for name, kept in before.items():
            assert torch.equal(held[name].view(torch.uint8), kept), (name, broken)


def test_after_an_overflow_steps_are_taken_again(device: str) -> None:
    """The ticket is zero again, whatever the step before it came to."""
    param, momentum = torch.ones(16, device=device), torch.zeros(16, device=device)
    overflow = overflow_of(param, momentum)
    kept: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "overflow": overflow}
    for value, want, found in ((torch.inf, 1.0, 1.0), (1.0, 0.5, 0.0), (torch.nan, 0.5, 1.0)):
        sgd_step([torch.full((4,), value, device=device)], [4], param, momentum, **kept)
        assert param[:4].tolist() == [want] * 4
        assert float(overflow.found_inf) == found
        assert int(overflow.ticket) == 0
    sgd_step([None], [4], param, momentum, **kept)
    assert float(overflow.found_inf) == 0.0


def test_flat_offsets() -> None:
    assert flat_offsets([]) == ([], 0)
    assert flat_offsets([1, 16, 0, 17, 3]) == ([0, 16, 32, 32, 64], 80)


def test_the_host_never_waits(path: str, device: str) -> None:
    case = Case([Gradient((40,)), Gradient((3,), None)], half=torch.float16, lr_on_device=True)
    t = buffers(case, device)
    with ReadsOnTheHost():
        run(Case(case.gradients, lr_on_device=True, grad_scale=2.0, found_inf=0.0), t)
        overflow = overflow_of(t["param"], t["momentum_buffer"])
        momentum = t["momentum_buffer"]
        sgd_step(
            t["grads"], t["sizes"], t["param"], momentum, lr=0.1, momentum=0.9, overflow=overflow
        )


def test_two_runs_are_bitwise_the_same(device: str) -> None:
    case = Case([Gradient((40,), torch.float16), Gradient((3, 9))], weight_decay=0.1, nesterov=True)
    first, second = buffers(case, device), buffers(case, device)
    run(case, first)
    run(case, second)
    assert torch.equal(first["param"], second["param"])


def _wrong() -> list[tuple[dict[str, Any], str]]:
    flat, g = torch.zeros(16), torch.ones(2, 3)
    return [
        ({"grads": [g.int()]}, r"grads\[0\]: expected one of .*, got torch.int32"),
        ({"grads": [g.to_sparse()]}, r"grads\[0\]: expected a dense gradient"),
        ({"grads": [g[:, :2]]}, r"grads\[0\]: expected 6 elements, dense in memory, got shape"),
        ({"grads": [torch.ones(2, 6)[:, ::2]]}, r"grads\[0\]: expected 6 .* of stride \(6, 2\)"),
        ({"grads": []}, "grads: expected one for each of 1 sizes, got 0"),
        ({"param": torch.zeros(6)}, r"param: expected \[16\] of torch.float32 .*, got \[6\]"),
        ({"param": flat.half()}, r"param: expected .*, got \[16\] of torch.float16"),
        ({"momentum_buffer": flat[:6]}, r"momentum_buffer: expected \[16\] of torch.float32"),
        ({"half": flat}, r"half: expected \[16\] of torch.float16 or torch.bfloat16"),
        ({"momentum_buffer": None}, "momentum_buffer: needed where momentum is 0.9, got None"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov: needs a momentum, got momentum=0"),
        (
            {"overflow": overflow_of(flat)},
            r"overflow: .* before of \[2, 16\] on cpu, got \[1, 16\]",
        ),
        ({"overflow": overflow_of(flat, flat), "found_inf": flat[0]}, "found_inf: expected None"),
    ]


@pytest.mark.parametrize(("change", "words"), _wrong())
def test_wrong_input_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {
        "grads": [torch.ones(2, 3)],
        "sizes": [6],
        "param": torch.zeros(16),
        "momentum_buffer": torch.zeros(16),
        "lr": 0.1,
        "momentum": 0.9,
    }
    with pytest.raises(ValueError, match=words):
        sgd_step(**(right | change))


def test_opcheck(device: str) -> None:
    def flat(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(64, device=device).to(dtype)

    one = torch.ones((), device=device)
    pair = flat(), flat()
    sizes, offsets = [6, 0, 40], [0, 16, 16]
    grads = [torch.randn(2, 3, device=device), None, torch.randn(40, device=device).half()]
    op = torch.ops.fastres.sgd_step.default
    none = (None, None, None)
    guarded = (flat(), flat(torch.float16), 0.0, one, 0.9, 1e-4, True, False, one, one - 1, *none)
    finds = (flat(), None, 0.1, None, 0.9, 0.0, False, False, one, None, *overflow_of(*pair))
    plain = (None, None, 0.1, None, 0.0, 0.0, False, True, None, None, *none)
    for rest in (guarded, finds, plain):
        torch.library.opcheck(op, (grads, sizes, offsets, flat(), *rest))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(device: str, backend: str) -> None:
    def step(grad: Tensor, param: Tensor, momentum_buffer: Tensor, found_inf: Tensor) -> Tensor:
        sgd_step(
            [grad * 2], [20], param, momentum_buffer, lr=0.1, momentum=0.9, found_inf=found_inf
        )
        return param + 1

    torch._dynamo.reset()
    results = []
    for fn in (step, torch.compile(step, backend=backend, fullgraph=True)):
        torch.manual_seed(0)
        t = [torch.randn(n, device=device) for n in (20, 32, 32)]
        t[1][20:] = 0
        results.append((fn(t[0], t[1], t[2], torch.zeros((), device=device)), *t))
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))
