"""Per-channel moments of an activation: partials by chunk, merged in a fixed order, and tracked."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _addresses
from ._integers import cdiv
from ._launch import launch, launch_opaque
from ._tiles import Rows, Tiling, tile_mask, tile_offsets

# So few partials (64 KB for 32 channels, from L2) that each program merges them. Not tuned yet.
MAX_CHUNKS = 256
BLOCK_P = 64
UPDATE_BLOCK_C = 256
MERGE_BLOCK_C = 64


@triton.jit
def merge_lanes(mean, m2, rows, count, axis: tl.constexpr):
    """Moments over an axis of lanes that each saw `rows` values; count = sum of rows.

    The mean is taken twice, the second time about the first: a mean far larger than the spread
    then loses nothing. Weights come before squares, so that a lane without rows adds 0, not 0*inf.
    """
    weight = rows / count
    center = tl.sum(mean * weight, axis)
    center += tl.sum((mean - tl.expand_dims(center, axis)) * weight, axis)
    spread = mean - tl.expand_dims(center, axis)
    return center, tl.sum(m2 + spread * (rows * spread), axis)


@triton.jit
def merge_moments(partial_ptr, c, c_ok, M, C, P, CHUNK, BLOCK_P: tl.constexpr):
    """Mean and biased variance [BLOCK_C] from the moments of P chunks (Chan et al. 1983).

    partial_ptr: [2, P, C] fp32, each chunk's mean and its sum of squared deviations.
    """
    mean = tl.zeros_like(c).to(tl.float32)
    m2 = tl.zeros_like(c).to(tl.float32)
    count = 0.0
    for p_start in range(0, P, BLOCK_P):
        p = p_start + tl.arange(0, BLOCK_P)
        ok = (p < P)[:, None] & c_ok[None, :]
        # In 64 bits: CHUNK * p passes 2^31 where M does.
        rows = tl.minimum(tl.maximum(M - p.to(tl.int64) * CHUNK, 0), CHUNK).to(tl.float32)[:, None]
        offsets = p[:, None] * C + c[None, :]
        chunk_mean = tl.load(partial_ptr + offsets, mask=ok, other=0.0)
        chunk_m2 = tl.load(partial_ptr + P * C + offsets, mask=ok, other=0.0)
        block_count = tl.sum(rows)
        block_mean, block_m2 = merge_lanes(chunk_mean, chunk_m2, rows, block_count, 0)
        total = count + block_count
        delta = block_mean - mean
        mean += delta * (block_count / total)
        m2 += block_m2 + delta * (delta * (count * block_count / total))
        count = total
    return mean, m2 / count


@triton.jit
def merge_tile(v, ok, count, mean, m2, seen):
    """A chunk's moments [BLOCK_C], of `seen` rows, with those of a tile of `count` rows merged in.

    v [BLOCK_M, BLOCK_C]: as it is stored, which is what the next layer sees. Also returns how many
    rows these are.
    """
    # About the tile's own mean, and then merged (Chan et al. 1983).
    v = v.to(tl.float32)
    count = count.to(tl.float32)
    tile_mean = tl.sum(tl.where(ok, v, 0.0), 0) / count
    spread = tl.where(ok, v - tile_mean[None, :], 0.0)
    total = seen + count
    delta = tile_mean - mean
    mean += delta * (count / total)
    m2 += tl.sum(spread * spread, 0) + delta * (delta * (seen * count / total))
    return mean, m2, total


@triton.jit
def sum_partials(partial_ptr, c, c_ok, C, P, BLOCK_P: tl.constexpr):
    """Sum over P of a [P, C] fp32 slab, for channels c [BLOCK_C], in a fixed order."""
    total = tl.zeros_like(c).to(tl.float32)
    for p_start in range(0, P, BLOCK_P):
        p = p_start + tl.arange(0, BLOCK_P)
        ok = (p < P)[:, None] & c_ok[None, :]
        total += tl.sum(tl.load(partial_ptr + p[:, None] * C + c[None, :], mask=ok, other=0.0), 0)
    return total


@triton.jit
def _moments_kernel(
    x_ptr, index_ptr, partial_ptr, M, C, S, CHUNK,
    x_stride_n, x_stride_s, x_stride_c,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    M_AXIS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """partial [2, P, C] fp32: mean and sum of squared deviations of each chunk of x's rows.

    With index_ptr the rows are those of the samples that it names.
    """
    pid, P = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    start, lanes, c_wide = pid * CHUNK, tl.arange(0, BLOCK_M), c
    if WIDE:
        start, lanes, c_wide = pid.to(tl.int64) * CHUNK, lanes.to(tl.int64), c.to(tl.int64)
    end = tl.minimum(start + CHUNK, M)
    if M_AXIS == 0:
        mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    else:
        mean = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    m2 = mean
    seen = 0.0
    # Welford's update in each lane of the tile by itself: nothing crosses threads in the loop.
    for m_start in range(start, end, BLOCK_M):
        m = m_start + lanes
        ok = tile_mask(m < end, c_ok, M_AXIS)
        offsets = tile_offsets(
            m, c_wide, S, x_stride_n, x_stride_s, x_stride_c, M_AXIS, FLAT, index_ptr, end
        )
        x = tl.load(x_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
        seen += 1.0
        delta = tl.where(ok, x - mean, 0.0)
        mean += delta * (1.0 / seen)
        m2 += delta * (x - mean)
    # Then the lanes are merged: lane i saw every BLOCK_M-th row from start + i on.
    rows = tl.maximum((end - start - lanes + BLOCK_M - 1) // BLOCK_M, 0).to(tl.float32)
    count = (end - start).to(tl.float32)
    mean_c, m2_c = merge_lanes(mean, m2, tl.expand_dims(rows, 1 - M_AXIS), count, M_AXIS)
    tl.store(partial_ptr + pid * C + c, mean_c, mask=c_ok)
    tl.store(partial_ptr + (P + pid) * C + c, m2_c, mask=c_ok)


@triton.jit
def _move_running(
    running_mean_ptr, running_var_ptr, num_batches_tracked_ptr, mean_ptr, var_ptr,
    C, momentum, count, BLOCK_C: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """running += factor * (batch - running), factor = momentum or 1 / num_batches_tracked.

    The variance becomes unbiased by count / (count - 1). One program does all channels.
    """
    correction = count / (count - 1)
    factor = tl.cast(momentum, tl.float32)
    if num_batches_tracked_ptr is not None:
        batches = tl.load(num_batches_tracked_ptr) + 1
        if CUMULATIVE:
            factor = 1.0 / batches.to(tl.float32)
        tl.debug_barrier()  # each warp loads the counter, and one stores: none loads it afterwards
        tl.store(num_batches_tracked_ptr, batches)
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        ok = c < C
        mean = tl.load(mean_ptr + c, mask=ok, other=0.0)
        var = tl.load(var_ptr + c, mask=ok, other=0.0) * correction
        # The form with two products, as in PyTorch: an infinite statistic stays infinite, not NaN.
        running = tl.load(running_mean_ptr + c, mask=ok, other=0.0).to(tl.float32)
        running = (1.0 - factor) * running + factor * mean
        tl.store(running_mean_ptr + c, running.to(running_mean_ptr.dtype.element_ty), mask=ok)
        running = tl.load(running_var_ptr + c, mask=ok, other=0.0).to(tl.float32)
        running = (1.0 - factor) * running + factor * var
        tl.store(running_var_ptr + c, running.to(running_var_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _update_running_kernel(
    running_mean_ptr, running_var_ptr, num_batches_tracked_ptr, mean_ptr, var_ptr,
    C, momentum, count, BLOCK_C: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """One BatchNorm's running statistics."""
    _move_running(
        running_mean_ptr, running_var_ptr, num_batches_tracked_ptr, mean_ptr, var_ptr,
        C, momentum, count, BLOCK_C, CUMULATIVE,
    )  # fmt: skip


@triton.jit
def _update_two_running_kernel(
    running_mean1_ptr, running_var1_ptr, num_batches_tracked1_ptr, mean1_ptr, var1_ptr,
    running_mean2_ptr, running_var2_ptr, num_batches_tracked2_ptr, mean2_ptr, var2_ptr,
    C1, C2, momentum1, momentum2, count1, count2,
    BLOCK_C: tl.constexpr, CUMULATIVE1: tl.constexpr, CUMULATIVE2: tl.constexpr,
):  # fmt: skip
    """Two BatchNorms', a program each."""
    if tl.program_id(0) == 0:
        _move_running(
            running_mean1_ptr, running_var1_ptr, num_batches_tracked1_ptr, mean1_ptr, var1_ptr,
            C1, momentum1, count1, BLOCK_C, CUMULATIVE1,
        )  # fmt: skip
    else:
        _move_running(
            running_mean2_ptr, running_var2_ptr, num_batches_tracked2_ptr, mean2_ptr, var2_ptr,
            C2, momentum2, count2, BLOCK_C, CUMULATIVE2,
        )  # fmt: skip


@triton.jit
def _update_every_running_kernel(
    addresses_ptr, numbers_ptr, applies_ptr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Many BatchNorms', a program each; where applies_ptr holds false none.

    addresses: of the running mean and var, the counter (0: none), mean and var; numbers: C, count,
    and the momentum's bits as fp32, below 0 for a cumulative average. Statistics are fp32.
    """
    addresses = addresses_ptr + tl.program_id(0) * 5
    numbers = numbers_ptr + tl.program_id(0) * 3
    applies = True
    if applies_ptr is not None:
        applies = tl.load(applies_ptr) != 0
    if applies:
        fp32: tl.constexpr = tl.pointer_type(tl.float32)
        running_mean_ptr = tl.load(addresses).to(fp32)
        running_var_ptr = tl.load(addresses + 1).to(fp32)
        mean_ptr, var_ptr = tl.load(addresses + 3).to(fp32), tl.load(addresses + 4).to(fp32)
        C, count = tl.load(numbers).to(tl.int32), tl.load(numbers + 1)
        factor = tl.load(numbers + 2).to(tl.int32).to(tl.float32, bitcast=True)
        counter = tl.load(addresses + 2)
        if counter != 0:
            counter_ptr = counter.to(tl.pointer_type(tl.int64))
            batches = tl.load(counter_ptr) + 1
            if factor < 0:
                factor = 1.0 / batches.to(tl.float32)
            tl.debug_barrier()  # as in _move_running
            tl.store(counter_ptr, batches)
        _move_running(
            running_mean_ptr, running_var_ptr, None, mean_ptr, var_ptr, C, factor, count, BLOCK_C,
            False,
        )  # fmt: skip


@triton.jit
def _merge_moments_kernel(
    partial_ptr, mean_ptr, var_ptr, M, C, P, CHUNK, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """mean and biased var [C] fp32, for consumers that do not merge the partials themselves."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mean, var = merge_moments(partial_ptr, c, c_ok, M, C, P, CHUNK, BLOCK_P)
    tl.store(mean_ptr + c, mean, mask=c_ok)
    tl.store(var_ptr + c, var, mask=c_ok)


@triton.jit
def _sum_partials_kernel(partial_ptr, sums_ptr, C, P, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """sums [B, C] from partial [B, P, C] fp32."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    batch = tl.program_id(1)
    total = sum_partials(partial_ptr + batch * P * C, c, c_ok, C, P, BLOCK_P)
    tl.store(sums_ptr + batch * C + c, total.to(sums_ptr.dtype.element_ty), mask=c_ok)


def merged_sums(partial: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
    """[B, C] from partial [B, P, C] fp32, in a fixed order.

    sums: where they go, B * C elements of any dtype one after the other in memory; None: [B, C].
    """
    B, P, C = partial.shape
    sums = partial.new_empty(B, C) if sums is None else sums
    launch(
        _sum_partials_kernel, (cdiv(C, MERGE_BLOCK_C), B),
        partial, sums, C, P, BLOCK_P=BLOCK_P, BLOCK_C=MERGE_BLOCK_C, num_warps=4,
    )  # fmt: skip
    return sums


@dataclass(frozen=True)
class Moments:
    """An activation's moments as its producer left them.

    Args:
        partial: [2, P, C] fp32, of each chunk of rows the mean and the sum of squared deviations.
        chunk: rows of a chunk, of `rows` altogether.
    """

    partial: torch.Tensor
    chunk: int
    rows: int


@dataclass(frozen=True)
class Stats:
    """What a kernel normalises by: mean and var [C], and where they are merged from, if they are.

    With partial the kernel merges, and writes mean and var; without it reads the two.
    """

    mean: torch.Tensor
    var: torch.Tensor
    partial: torch.Tensor | None = None
    chunk: int = 0
    rows: int = 0

    @property
    def P(self) -> int:
        return 0 if self.partial is None else self.partial.shape[1]

    @property
    def arguments(self) -> tuple[object, ...]:
        return self.rows, self.P, self.chunk


def stats_of(moments: Moments, merges: bool) -> Stats:
    """merges: whether the consumer merges; else a launch of its own does."""
    partial = moments.partial
    _, P, C = partial.shape
    mean, var = partial.new_empty(C), partial.new_empty(C)
    if merges:
        return Stats(mean, var, partial, moments.chunk, moments.rows)
    launch(
        _merge_moments_kernel, (cdiv(C, MERGE_BLOCK_C),),
        partial, mean, var, moments.rows, C, P, moments.chunk,
        BLOCK_P=BLOCK_P, BLOCK_C=MERGE_BLOCK_C, num_warps=4,
    )  # fmt: skip
    return Stats(mean, var, rows=moments.rows)


def moments(
    x: torch.Tensor, index: torch.Tensor | None, rows: Rows, tiles: Tiling
) -> tuple[torch.Tensor, int, int]:
    """partial [2, P, C] fp32, P and the rows of a chunk, for merge_moments.

    x: as rows says; with index the samples x[index], which tiles then count.
    """
    chunk, P = tiles.chunks(MAX_CHUNKS)
    partial = x.new_empty(2, P, tiles.C, dtype=torch.float32)
    launch(
        _moments_kernel, (P, tiles.columns),
        x, index, partial, *tiles.sizes, chunk, *rows.strides, **tiles.constexprs,
    )  # fmt: skip
    return partial, P, chunk


def update_running(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    num_batches_tracked: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float | None,
    count: int,
) -> None:
    """Move the running statistics [C] toward the batch's, in place.

    momentum None takes the cumulative average, which needs num_batches_tracked. count: the values
    that each of mean and (biased) var [C] fp32 was taken over.
    """
    launch(
        _update_running_kernel, (1,),
        running_mean, running_var, num_batches_tracked, mean, var,
        mean.numel(), 0.0 if momentum is None else momentum, count,
        BLOCK_C=UPDATE_BLOCK_C, CUMULATIVE=momentum is None, num_warps=4,
    )  # fmt: skip


def update_two_running(
    running1: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    running2: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    batch1: tuple[torch.Tensor, torch.Tensor],
    batch2: tuple[torch.Tensor, torch.Tensor],
    momentum: tuple[float | None, float | None],
    count: tuple[int, int],
) -> None:
    """update_running of two BatchNorms in one launch: means, variances and counters of each."""
    momentum1, momentum2 = (0.0 if m is None else m for m in momentum)
    launch(
        _update_two_running_kernel, (2,),
        *running1, *batch1, *running2, *batch2,
        batch1[0].numel(), batch2[0].numel(), momentum1, momentum2, *count,
        BLOCK_C=UPDATE_BLOCK_C, CUMULATIVE1=momentum[0] is None, CUMULATIVE2=momentum[1] is None,
        num_warps=4,
    )  # fmt: skip


def update_every_running(
    tensors: Sequence[torch.Tensor | None],
    momentum: Sequence[float | None],
    count: Sequence[int],
    applies: torch.Tensor | None,
) -> None:
    """update_running of many BatchNorms in one launch, each once, unless `applies` holds false.

    Args:
        tensors: of each the running mean and var, the counter or None, mean and var, one after the
            other; all statistics fp32, contiguous.
        momentum, count: of each.
        applies: bool, one element, or None: they do.
    """
    bits = [struct.unpack("<i", struct.pack("<f", -1.0 if m is None else m))[0] for m in momentum]
    sizes = [0 if t is None else t.numel() for t in tensors[::5]]
    numbers = tuple(n for row in zip(sizes, count, bits, strict=True) for n in row)
    device = next(t.device for t in tensors if t is not None)
    launch_opaque(
        _update_every_running_kernel, (len(sizes),),
        _addresses.table(tensors, device), _addresses.numbers(numbers, device), applies,
        BLOCK_C=UPDATE_BLOCK_C, num_warps=4,
    )  # fmt: skip
