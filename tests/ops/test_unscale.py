"""unscale against its reference in fp64: lists of gradients, modes, corners, errors."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gradient_lists import (
    DENSE,
    DTYPES,
    LAYOUTS,
    Gradient,
    ReadsOnTheHost,
    gradient_lists,
    make,
    small_blocks,
)
from ops.unscale_equality import check
from torch import Tensor

from fastres.ops import unscale

MODES = ["in place", "out", "check"]


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_equals_the_reference(path: str, device: str, mode: str, data: st.DataObject) -> None:
    layouts = [*DENSE, "sliced"] if mode == "in place" else list(LAYOUTS)
    gradients = data.draw(gradient_lists(layouts))
    scale = data.draw(st.sampled_from([1.0, 1024.0, 65536.0, 3.0]))
    with small_blocks("unscale") if data.draw(st.booleans(), label="small") else nullcontext():
        check(gradients, device, scale, mode)


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_one_bad_element_is_found(path: str, device: str, mode: str, data: st.DataObject) -> None:
    gradients = data.draw(gradient_lists(DENSE))
    bad = Gradient(
        data.draw(st.sampled_from([(1,), (40,), (3, 5, 7)])),
        data.draw(st.sampled_from(DTYPES)),
        values=data.draw(st.sampled_from(["nan", "inf", "-inf"])),
    )
    gradients.insert(data.draw(st.integers(0, len(gradients))), bad)
    with small_blocks("unscale") if data.draw(st.booleans(), label="small") else nullcontext():
        check(gradients, device, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_their_true_size(device: str, mode: str) -> None:
    """More than one block of one tensor, the last one in part, at an aligned address and not."""
    sizes = [(2048,), (5000,), (1,), (4096,)]
    for layout in ("dense", "offset"):
        check([Gradient(s, dtype, layout) for s in sizes for dtype in DTYPES], device, mode=mode)


def test_nothing_to_unscale(path: str, device: str) -> None:
    scale = torch.ones((), device=device)
    lists: list[list[Tensor | None]] = [[], [None], [torch.empty(0, 3, device=device), None]]
    for grads in lists:
        for write in (True, False):
            found_inf, norm = unscale(grads, scale, write=write, norm=True)
            assert norm is not None
            assert (float(found_inf), float(norm)) == (0.0, 0.0)
            assert unscale(grads, scale, write=write)[1] is None


def test_a_scale_may_have_a_dimension(path: str, device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        grads = [torch.full((3,), 2.0, dtype=dtype, device=device)]
        for write in (False, True):
            _, norm = unscale(grads, torch.full((1,), 4.0, device=device), write=write, norm=True)
            assert norm is not None and float(norm) == pytest.approx(0.5 * 3**0.5)


def test_a_small_half_gradient_survives_in_fp32(path: str, device: str) -> None:
    """What division by the scale in fp16 would flush to zero."""
    grad = torch.full((5,), 1e-3, dtype=torch.float16, device=device)
    out = torch.empty(5, device=device)
    unscale([grad], torch.tensor(65536.0, device=device), out=[out])
    assert torch.equal(out, grad.float() / 65536)
    assert float((grad / 65536).abs().max()) < 1e-7 < 1e-3 / 65536 * 10


def test_two_runs_are_bitwise_the_same(device: str) -> None:
    grads = make([Gradient((700,)), Gradient((33, 5), torch.float16)], device)
    scale = torch.tensor(3.0, device=device)
    with small_blocks("unscale"):
        norms = [unscale(grads, scale, write=False, norm=True)[1] for _ in range(2)]
    assert norms[0] is not None and norms[1] is not None
    assert torch.equal(norms[0], norms[1])


def test_the_host_never_waits(path: str, device: str) -> None:
    grads = make([Gradient((9, 3)), Gradient((4,), torch.float16, "sliced")], device)
    scale = torch.tensor(8.0, device=device)
    out: list[Tensor | None] = [torch.empty(t.shape, device=device) for t in grads if t is not None]
    with ReadsOnTheHost():
        unscale(grads, scale, out=out, norm=True)
        unscale(grads, scale, write=False)
        unscale(grads, scale)


def _wrong() -> list[tuple[dict[str, Any], str]]:
    g = torch.ones(2, 3)
    return [
        ({"grads": [g.int()]}, r"grads\[0\]: expected one of .*float32.* on cpu, got torch.int32"),
        ({"grads": [g.to(torch.complex64)]}, r"grads\[0\]: .*, got torch.complex64"),
        ({"grads": [g.double()]}, r"grads\[0\]: expected one of .*, got torch.float64"),
        ({"grads": [None, g.to("meta")]}, r"grads\[1\]: expected .* on cpu, got .* on meta"),
        ({"grads": [g.to_sparse()]}, r"grads\[0\]: expected a dense gradient, got torch.sparse"),
        ({"grads": [g[:, :1].expand(2, 3)]}, r"grads\[0\]: expected elements with memory of their"),
        ({"scale": torch.ones(2)}, r"scale: expected one element of torch.float32, got \[2\]"),
        ({"scale": torch.ones(()).half()}, r"scale: expected .*, got \[\] of torch.float16"),
        ({"out": []}, "out: expected one for each of 1 gradients, got 0"),
        ({"out": [None]}, r"out\[0\]: expected None where the gradient is None, and only there"),
        ({"out": [g.half()]}, r"out\[0\]: expected \[2, 3\] of torch.float32 .* of torch.float16"),
        ({"out": [g.T]}, r"out\[0\]: expected \[2, 3\] of torch.float32 on cpu, got \[3, 2\]"),
        ({"out": [torch.ones(2, 3)], "write": False}, "out: expected None with write=False"),
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), _wrong())
def test_wrong_input_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {"grads": [torch.ones(2, 3)], "scale": torch.ones(())}
    with pytest.raises(ValueError, match=words):
        unscale(**(right | change))


def test_opcheck(device: str) -> None:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    scale = torch.tensor(4.0, device=device)
    op = torch.ops.fastres.unscale.default
    half = torch.float16
    torch.library.opcheck(op, ([new(3, 4, dtype=half)], [new(3, 4)], [new(5)], scale, True))
    torch.library.opcheck(op, ([], [], [new(3, 4), new(2, dtype=half)], scale, False))
    torch.library.opcheck(op, ([new(3, 4), new(0)], [], [], scale, True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(device: str, backend: str) -> None:
    def step(grads: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor | None]:
        doubled = [grad * 2 for grad in grads]
        found_inf, norm = unscale(doubled, scale, norm=True)
        return doubled[0], norm

    torch._dynamo.reset()
    grads = [torch.randn(4, 3, device=device), torch.randn(7, device=device).half()]
    scale = torch.tensor(4.0, device=device)
    want, norm_want = step(grads, scale)
    got, norm = torch.compile(step, backend=backend, fullgraph=True)(grads, scale)
    assert norm is not None and norm_want is not None
    assert torch.equal(got, want) and torch.equal(norm, norm_want)


@pytest.mark.gpu
def test_no_wait_on_a_gpu() -> None:
    grads = make([Gradient((64, 64, 3, 3), torch.float16), Gradient((64,))], "cuda")
    scale = torch.tensor(8.0, device="cuda")
    unscale(grads, scale, norm=True)  # compiled
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Moved: a table is sent anew.
        moved = [None if grad is None else grad.clone() for grad in grads]
        unscale(moved, scale, norm=True)
        unscale(moved, scale, write=False)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """A table that was sent while capturing is there at every replay."""
    x = torch.randn(5000, device="cuda")
    scale = torch.tensor(4.0, device="cuda")
    unscale([x * 3], scale)  # compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = x * 3
        found_inf, _ = unscale([grad], scale)
    for factor in (1.0, 2.0, torch.inf):
        x.copy_(torch.randn_like(x) * factor)
        # Whoever allocates meanwhile does not get the graph's table.
        torch.full((64,), -1, device="cuda")
        graph.replay()
        assert float(found_inf) == float(factor == torch.inf)
        assert torch.equal(grad.nan_to_num(7.0), (x * 3 / 4).nan_to_num(7.0))
