"""cast against PyTorch's own: dtypes, sizes, layouts, rounding, errors, a broken kernel."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gradient_lists import DENSE, DTYPES, LAYOUTS, small_blocks
from ops.kernel_mutants import take
from tolerances import store_error, store_floor
from torch import Tensor

from fastres.ops import cast
from fastres.ops.cast import cast_reference


def check(source: Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError unless cast rounds source to dtype, all of it and nothing beside it."""
    room = torch.full((source.numel() + 64,), 7.0, dtype=dtype, device=source.device)
    out = room[32:-32].as_strided(source.shape, source.stride(), 32)
    assert cast(source, out) is out
    want = cast_reference(source, dtype)
    if store_error(dtype) == torch.finfo(dtype).eps:  # Triton's interpreter truncates to bf16
        size = want.double().abs().nan_to_num(0.0, posinf=0.0)
        off = (out.double() - source.double()).abs()
        allowed = store_error(dtype) * size + store_floor(dtype)
        right = (off <= allowed) | (out == want) | (out.isnan() & want.isnan())
    else:
        right = (out == want) | (out.isnan() & want.isnan())
    if not bool(right.all()):
        raise AssertionError(f"out is off in {int((~right).sum())} elements")
    if not bool((room[:32] == 7.0).all() and (room[-32:] == 7.0).all()):
        raise AssertionError("out is off: something beside it was written")


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_equals_the_reference(
    path: str, device: str, dtype: torch.dtype, target: torch.dtype, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    v = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    v = v * data.draw(st.sampled_from([1.0, 1e4, 1e-6]))
    with small_blocks("cast"):
        check(LAYOUTS[data.draw(st.sampled_from(DENSE))](v.to(device, dtype)), target)


def test_rounds_to_nearest(path: str, device: str) -> None:
    """Ties to even, overflow to infinity, underflow to zero, NaN and Inf."""
    one, ulp = 1.0, 2.0**-10
    values = [one + ulp / 2, one + 3 * ulp / 2, one + ulp / 2 + 2**-20, 65519.0, 65520.0, -65520.0]
    values += [2.0**-25, 2.0**-24, 3 * 2.0**-26, torch.nan, torch.inf, -torch.inf, 0.0, -0.0]
    source = torch.tensor(values, device=device)
    out = cast(source, torch.empty(len(values), dtype=torch.float16, device=device))
    want = [one, one + 2 * ulp, one + ulp, 65504.0, torch.inf, -torch.inf, 0.0, 2.0**-24, 2.0**-24]
    assert out[:9].tolist() == want
    assert bool(out[9].isnan()) and out[10:].tolist() == [torch.inf, -torch.inf, 0.0, -0.0]
    assert str(out[-1].item()) == "-0.0"


def test_a_parameter_is_cast_outside_of_any_graph(path: str, device: str) -> None:
    master = torch.nn.Parameter(torch.ones(4, device=device))
    for half in (
        torch.zeros(4, dtype=torch.float16, device=device),
        torch.nn.Parameter(torch.zeros(4, dtype=torch.float16, device=device)),
    ):
        cast(master, half)
        assert half.grad_fn is None and half.tolist() == [1.0] * 4


def test_blocks_of_their_true_size(device: str) -> None:
    for numel in (0, 1, 2048, 2049, 5000):
        check(torch.randn(numel, device=device), torch.float16)


def test_opcheck(device: str) -> None:
    source = torch.randn(3, 5, device=device)
    op = torch.ops.fastres.cast.default
    for out in (source.half(), source.clone(), source.bfloat16()):
        torch.library.opcheck(op, (source, out))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(device: str, backend: str) -> None:
    def step(source: Tensor) -> Tensor:
        return cast(source * 2, torch.empty_like(source, dtype=torch.float16)) + 1

    torch._dynamo.reset()
    source = torch.randn(50, device=device)
    got = torch.compile(step, backend=backend, fullgraph=True)(source)
    assert torch.equal(got, step(source))


def _wrong() -> list[tuple[dict[str, Any], str]]:
    v = torch.ones(2, 3)
    return [
        ({"source": v.int()}, "source: expected one of .*float32.*, got torch.int32"),
        ({"source": v.double()}, "source: expected one of .*, got torch.float64"),
        ({"out": v.long()}, "out: expected one of .*, got torch.int64"),
        ({"out": torch.ones(3, 2)}, r"out: expected source's \[2, 3\] on cpu, got \[3, 2\] on cpu"),
        ({"out": v.to("meta")}, r"out: expected source's \[2, 3\] on cpu, got \[2, 3\] on meta"),
        ({"out": torch.ones(3, 2).T}, r"out: expected source's strides \(3, 1\), got \(1, 2\)"),
        (
            {"source": torch.ones(2, 6)[:, ::2], "out": torch.ones(2, 6)[:, 1::2]},
            r"source: expected dense in memory, got stride \(6, 2\)",
        ),
    ]


@pytest.mark.parametrize(("change", "words"), _wrong())
def test_wrong_input_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {"source": torch.ones(2, 3), "out": torch.ones(2, 3).half()}
    with pytest.raises(ValueError, match=words):
        cast(**(right | change))


MUTANTS = {
    "leaves the last element": ("lanes < tl.minimum(M - start", "lanes < tl.minimum(M - 1 - start"),
    "writes past the end": ("lanes < tl.minimum(M - start", "lanes < tl.minimum(M + 1 - start"),
    "writes the first block everywhere": ("x_ptr + start + lanes", "x_ptr + lanes"),
    "forgets the last block": ("cdiv(M, BLOCK)", "max(M // BLOCK, 1)"),
    "rounds on its way": (".to(tl.float32)", ".to(tl.float16).to(tl.float32)"),
}


@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_a_mutant_fails(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "cast", *(MUTANTS[name] if name else ()))
    monkeypatch.setattr(importlib.import_module("copied.kernels.cast"), "BLOCK", 16)
    source = torch.randn(37, device=device)
    if name is None:
        check(source, torch.float32)
        return
    with pytest.raises(AssertionError, match="out is off"):
        check(source, torch.float32)


@pytest.mark.gpu
@pytest.mark.huge(20)  # 2^31 elements in fp16 twice, and room
def test_past_2_to_the_31_elements() -> None:
    source = torch.randn(2**31 + 5, device="cuda", dtype=torch.float16)
    out = cast(source, torch.empty_like(source))
    assert torch.equal(out[-9:], source[-9:]) and torch.equal(out[:9], source[:9])
