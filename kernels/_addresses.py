"""Many tensors in one launch: a table of their addresses, and the blocks that they are cut into.

Every tensor is taken as the row of elements that its dense storage is, whatever its shape. The
blocks depend on sizes and dtypes alone; the table changes when a tensor moves, and only then is one
sent to the device, from pinned memory, so that nothing waits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

# Sixteen elements a thread, in 128-bit accesses. Not tuned on a GPU yet.
BLOCK = 2048
NUM_WARPS = 4
# Numbers of a block's row: its tensor, its first element, how many elements it has, and two more.
COLUMNS = tl.constexpr(5)
# Tables that are kept, of up to 8 KB at depth 20 and 49 at depth 122: gradients move between a few
# places at most.
KEPT = 64

FP32 = tl.constexpr(0)
FP16 = tl.constexpr(1)
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Pinned numbers that captured copies start from, the last slab being the one in use. A graph reads
# them, and the tables that it was captured with, at every replay: neither is ever given back.
SLAB = 1 << 17
_slabs: list[torch.Tensor] = []
_slab_used = 0
_captured: list[torch.Tensor] = []


@triton.jit
def block_row(blocks_ptr, block):
    """A block's row of the table: tensor, first element, count, and two more."""
    row = blocks_ptr + block.to(tl.int64) * COLUMNS
    count = tl.load(row + 2).to(tl.int32)
    return tl.load(row), tl.load(row + 1), count, tl.load(row + 3), tl.load(row + 4)


@triton.jit
def _load(address, start, lanes, count, dtype: tl.constexpr):
    """fp32 elements from start on; a whole block at an aligned address in accesses of 128 bits."""
    if (address % 16 == 0) & (count == lanes.shape[0]):
        pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)) + start, 16)
        x = tl.load(pointer + lanes).to(tl.float32)
    else:
        pointer = address.to(tl.pointer_type(dtype)) + start
        x = tl.load(pointer + lanes, mask=lanes < count, other=0.0).to(tl.float32)
    return x


@triton.jit
def _store(address, start, lanes, x, count, dtype: tl.constexpr):
    if (address % 16 == 0) & (count == lanes.shape[0]):
        pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)) + start, 16)
        tl.store(pointer + lanes, x.to(dtype))
    else:
        pointer = address.to(tl.pointer_type(dtype)) + start
        tl.store(pointer + lanes, x.to(dtype), mask=lanes < count)


@triton.jit
def load_elements(address, start, lanes, count, kind):
    """Elements start + lanes, for lanes < count, of the tensor at an address, in fp32; then zeros.

    kind: one of KINDS.
    """
    if kind == FP32:
        x = _load(address, start, lanes, count, tl.float32)
    elif kind == FP16:
        x = _load(address, start, lanes, count, tl.float16)
    else:
        x = _load(address, start, lanes, count, tl.bfloat16)
    return x


@triton.jit
def store_elements(address, start, lanes, x, count, kind):
    """Store where load_elements loads, rounded to the tensor's dtype."""
    if kind == FP32:
        _store(address, start, lanes, x, count, tl.float32)
    elif kind == FP16:
        _store(address, start, lanes, x, count, tl.float16)
    else:
        _store(address, start, lanes, x, count, tl.bfloat16)


def _send(numbers: Sequence[object], device: torch.device) -> torch.Tensor:
    """An int64 tensor on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64).to(device)
    if _capturing(device):
        return _send_captured(torch.tensor(numbers, dtype=torch.int64), device)
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
    return host.to(device, non_blocking=True)


def _send_captured(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same for a graph: from pinned memory that is there, since capture forbids to pin more."""
    global _slab_used
    end = _slab_used + numbers.numel()
    if not _slabs or end > SLAB:
        raise RuntimeError(
            "a CUDA graph captures this op only after a step outside of capture, and as long as "
            f"its tables fit: {end} of {SLAB if _slabs else 0} numbers"
        )
    host = _slabs[-1][_slab_used:end].view(numbers.shape).copy_(numbers)
    _slab_used = end
    _captured.append(host.to(device, non_blocking=True))
    return _captured[-1]


def _leave_room() -> None:
    """See that the next capture, which cannot pin memory, finds half a slab: many steps' tables."""
    global _slab_used
    if not _slabs or 2 * _slab_used > SLAB:
        _slabs.append(torch.empty(SLAB, dtype=torch.int64, pin_memory=True))
        _slab_used = 0


def _sender(cached: Callable[..., torch.Tensor], device: torch.device) -> Any:
    """What sends a table: kept for the next step that asks for it, outside of capture.

    What a graph's capture sends is there from its first replay on, and nobody else's.
    """
    if _capturing(device):
        return cached.__wrapped__  # type: ignore[attr-defined]  # of lru_cache
    if device.type == "cuda":
        _leave_room()
    return cached


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """Part of every key: what one stream sent may still be on its way when another reads it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def table(tensors: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """int64 [T] on the device: each tensor's address, 0 where there is none."""
    if device.type == "meta":
        return torch.empty(len(tensors), dtype=torch.int64, device=device)
    addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
    return _sender(_table, device)(addresses, device, _stream(device))


def numbers(several: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 numbers on the device, sent once: of shapes and settings, which no step changes."""
    return _sender(_numbers, device)(several, device, _stream(device))


@functools.lru_cache(KEPT)
def _numbers(several: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    return _send(several, device)


@functools.lru_cache(KEPT)
def _table(addresses: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    return _send(addresses, device)


def blocks(
    sizes: Sequence[int], fourth: Sequence[int], fifth: Sequence[int], device: torch.device
) -> torch.Tensor:
    """int64 [B, COLUMNS] on the device, BLOCK elements or fewer to a row; see block_row.

    fourth, fifth: a number for each tensor, which its rows end with.
    """
    key = tuple(sizes), tuple(fourth), tuple(fifth), BLOCK
    return _sender(_blocks, device)(*key, device, _stream(device))


@functools.lru_cache(KEPT)
def _blocks(
    sizes: tuple[int, ...],
    fourth: tuple[int, ...],
    fifth: tuple[int, ...],
    block: int,
    device: torch.device,
    stream: int,
) -> torch.Tensor:
    rows = [
        (tensor, start, min(block, size - start), a, b)
        for tensor, (size, a, b) in enumerate(zip(sizes, fourth, fifth, strict=True))
        for start in range(0, size, block)
    ]
    return _send(rows, device).view(-1, COLUMNS.value)
