"""meProp's selections: the k largest |dy| of each example, or the k channels of largest sum |dy|.

A number's key is its integer bits without the sign, which order as |dy| does; every NaN has one key
above infinity's. The k-th largest key is found digit by digit, eight bits at a time: a histogram of
the digit among the keys that agree so far, in integers, so that nothing depends on an order. Where
more keys equal it than may be kept, the same search over the indices finds the last one kept.

Least bytes moved, with e bytes an element: e for channels (dy once), 2e for rows (dy and the
result; a row is read again for each digit, two of fp16 and four of fp32, from the cache).
"""

import torch
import triton
import triton.language as tl

from ._integers import next_power_of_2
from ._launch import launch
from ._moments import MAX_CHUNKS, merged_sums
from ._tiles import (
    as_rows,
    channels_fastest,
    empty_dense,
    tile_mask,
    tile_offsets,
    tiling,
)

__all__ = ["empty_index", "empty_selected", "select_channels", "select_row"]

# Four elements a thread: with eight, the masks of a block's digits spill on gfx942. Not tuned yet.
BLOCK = 1024


@triton.jit
def _key(v, INFINITY: tl.constexpr):
    """int32 that orders as |v|, all NaNs alike and largest. INFINITY: the bits of v's infinity."""
    if INFINITY > 0xFFFF:
        bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = v.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return tl.minimum(bits, INFINITY + 1)


@triton.jit
def sum_key(v):
    """_key of fp32 sums."""
    return _key(v, 0x7F800000)


@triton.jit
def _element(p, C, S, stride_s, stride_c, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr):
    """Offset of the p-th element of an example, in the order that memory has it.

    FLAT says that the inner stride reaches across the whole example, which saves the division.
    """
    if CHANNELS_LAST:
        offsets = p * stride_c if FLAT else (p // C) * stride_s + (p % C) * stride_c
    else:
        offsets = p * stride_s if FLAT else (p // S) * stride_c + (p % S) * stride_s
    return offsets


@triton.jit
def _index(p, C, S, CHANNELS_LAST: tl.constexpr):
    """The p-th element's index in (C, H, W) order, by which ties are broken."""
    return (p % C) * S + p // C if CHANNELS_LAST else p


@triton.jit
def _kth_largest(
    row_ptr, k, C, S, stride_s, stride_c, tied,
    DIGITS: tl.constexpr, INFINITY: tl.constexpr, BY_INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The k-th largest key of a row, how many of its equals are among the k, and how many exist.

    BY_INDEX searches among the elements whose key is `tied`, by C*S - 1 - index in place of keys.
    """
    found = tl.zeros([], tl.int32)
    equal = tl.zeros([], tl.int32)
    wanted = equal + k
    digits = tl.arange(0, 256)
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        lanes = lanes.to(tl.int64)
    for done in range(0, DIGITS):
        shift = 8 * (DIGITS - 1 - done)
        counts = tl.zeros([256], tl.int32)
        for start in range(0, C * S, BLOCK):
            p = start + lanes
            ok = p < C * S
            offsets = _element(p, C, S, stride_s, stride_c, CHANNELS_LAST, FLAT)
            key = _key(tl.load(row_ptr + offsets, mask=ok, other=0.0), INFINITY)
            if BY_INDEX:
                ok = ok & (key == tied)
                key = (C * S - 1 - _index(p, C, S, CHANNELS_LAST)).to(tl.int32)
            key = key >> shift
            counts += tl.histogram(key & 255, 256, mask=ok & ((key >> 8) == found))
        # How many have this digit or a larger one: the digit sought is the last that has enough.
        reach = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.sum((reach >= wanted).to(tl.int32), 0) - 1
        equal = tl.sum(tl.where(digits == digit, counts, 0), 0)
        wanted -= tl.sum(tl.where(digits == digit, reach - counts, 0), 0)
        found = (found << 8) | digit
    return found, wanted, equal


@triton.jit
def _kept(
    row_ptr, k, C, S, stride_s, stride_c,
    INFINITY: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The k-th largest key of a row, and the last index at which an element equal to it is kept."""
    DIGITS: tl.constexpr = 4 if INFINITY > 0xFFFF else 2
    threshold, ties, equal = _kth_largest(
        row_ptr, k, C, S, stride_s, stride_c, 0,
        DIGITS, INFINITY, False, CHANNELS_LAST, FLAT, WIDE, BLOCK,
    )  # fmt: skip
    last = tl.zeros([], tl.int32) + (C * S - 1)
    if equal > ties:
        from_end, _, _ = _kth_largest(
            row_ptr, ties, C, S, stride_s, stride_c, threshold,
            4, INFINITY, True, CHANNELS_LAST, FLAT, WIDE, BLOCK,
        )  # fmt: skip
        last -= from_end
    return threshold, last


@triton.jit(do_not_specialize=["k"])
def _meprop_row_kernel(
    dy_ptr, selected_ptr, k, C, S,
    dy_stride_n, dy_stride_s, dy_stride_c,
    INFINITY: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """selected = dy where it is among the k largest of its example, else 0. One program a row.

    selected is dense, in the order that CHANNELS_LAST names.
    """
    n = tl.program_id(0).to(tl.int64)
    row_ptr = dy_ptr + n * dy_stride_n
    threshold, last = _kept(
        row_ptr, k, C, S, dy_stride_s, dy_stride_c,
        INFINITY, CHANNELS_LAST, FLAT, WIDE, BLOCK,
    )  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        lanes = lanes.to(tl.int64)
    selected_ptr += n * (C * S)
    for start in range(0, C * S, BLOCK):
        p = start + lanes
        ok = p < C * S
        offsets = _element(p, C, S, dy_stride_s, dy_stride_c, CHANNELS_LAST, FLAT)
        dy = tl.load(row_ptr + offsets, mask=ok, other=0.0)
        key = _key(dy, INFINITY)
        keep = key > threshold
        keep = keep | ((key == threshold) & (_index(p, C, S, CHANNELS_LAST) <= last))
        tl.store(selected_ptr + p, tl.where(keep, dy, 0.0), mask=ok)


@triton.jit
def _meprop_sums_kernel(
    dy_ptr, partial_ptr, M, C, S, CHUNK,
    dy_stride_n, dy_stride_s, dy_stride_c,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    M_AXIS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """partial [P, C] fp32: sum of |dy| over each chunk of rows."""
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    start, lanes, c_wide = pid * CHUNK, tl.arange(0, BLOCK_M), c
    if WIDE:
        start, lanes, c_wide = pid.to(tl.int64) * CHUNK, lanes.to(tl.int64), c.to(tl.int64)
    end = tl.minimum(start + CHUNK, M)
    if M_AXIS == 0:
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    else:
        total = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for m_start in range(start, end, BLOCK_M):
        m = m_start + lanes
        ok = tile_mask(m < end, c_ok, M_AXIS)
        offsets = tile_offsets(m, c_wide, S, dy_stride_n, dy_stride_s, dy_stride_c, M_AXIS, FLAT)
        total += tl.abs(tl.load(dy_ptr + offsets, mask=ok, other=0.0).to(tl.float32))
    tl.store(partial_ptr + pid * C + c, tl.sum(total, M_AXIS), mask=c_ok)


@triton.jit(do_not_specialize=["k"])
def _meprop_channels_kernel(sums_ptr, index_ptr, k, C, INFINITY: tl.constexpr, BLOCK: tl.constexpr):
    """index int64 [k]: where sums [C] fp32 has its k largest, ascending. One program."""
    threshold, last = _kept(sums_ptr, k, C, 1, 1, 1, INFINITY, False, True, False, BLOCK)
    before = tl.zeros([], tl.int32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        ok = c < C
        key = _key(tl.load(sums_ptr + c, mask=ok, other=0.0), INFINITY)
        keep = ok & ((key > threshold) | ((key == threshold) & (c <= last)))
        place = before + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(index_ptr + place, c.to(tl.int64), mask=keep & (place < k))
        before += tl.sum(keep.to(tl.int32), 0)


def _infinity(dtype: torch.dtype) -> int:
    return {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}[dtype]


def _block(length: int) -> dict[str, int]:
    """BLOCK for rows of this length, and warps for four elements a thread."""
    block = min(max(next_power_of_2(length), 256), BLOCK)
    return {"BLOCK": block, "num_warps": max(block // 128, 1)}


def empty_selected(dy: torch.Tensor) -> torch.Tensor:
    """What select_row writes: dy's shape, dense, NHWC in memory where dy is, else NCHW."""
    return empty_dense(dy, as_rows(dy)[1])


def empty_index(dy: torch.Tensor, k: int) -> torch.Tensor:
    """What select_channels writes."""
    return dy.new_empty(k, dtype=torch.int64)


def select_row(dy: torch.Tensor, k: int) -> torch.Tensor:
    """dy with all but the k largest |dy| of each example set to 0.

    Args:
        dy: [N, C, H, W], any strides, fewer than 2^31 elements an example; 1 <= k <= C*H*W.
    """
    dy, rows = as_rows(dy)
    selected = empty_dense(dy, rows)
    N, C, S = dy.shape[0], dy.shape[1], dy.shape[2] * dy.shape[3]
    if dy.numel() == 0:
        return selected
    channels_last = channels_fastest(rows)
    if channels_last:
        flat = S == 1 or rows.stride_s == C * rows.stride_c
    else:
        flat = C == 1 or rows.stride_c == S * rows.stride_s
    reach = (S - 1) * rows.stride_s + (C - 1) * rows.stride_c
    launch(
        _meprop_row_kernel, (N,),
        dy, selected, k, C, S, *rows.strides,
        INFINITY=_infinity(dy.dtype), CHANNELS_LAST=channels_last, FLAT=flat,
        # From 2^30 on, since the last block passes the last element.
        WIDE=max(C * S, reach) >= 2**30,
        **_block(C * S),
    )  # fmt: skip
    return selected


def select_channels(dy: torch.Tensor, k: int) -> torch.Tensor:
    """index int64 [k]: the k channels of largest sum |dy|, ascending; the lowest of equals.

    Args:
        dy: [N, C, H, W], any strides; 1 <= k <= C.
    """
    if dy.numel() == 0:
        return torch.arange(k, device=dy.device)
    dy, rows = as_rows(dy)
    index = empty_index(dy, k)
    tiles = tiling(dy.shape, rows)
    chunk, P = tiles.chunks(MAX_CHUNKS)
    partial = dy.new_empty(P, tiles.C, dtype=torch.float32)
    launch(
        _meprop_sums_kernel, (P, tiles.columns),
        dy, partial, *tiles.sizes, chunk, *rows.strides, **tiles.constexprs,
    )  # fmt: skip
    sums = partial[0] if P == 1 else merged_sums(partial[None])[0]
    launch(
        _meprop_channels_kernel, (1,),
        sums, index, k, tiles.C, INFINITY=_infinity(torch.float32), **_block(tiles.C),
    )  # fmt: skip
    return index
