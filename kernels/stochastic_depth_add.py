"""Draw which samples keep their residual branch, scale it and add it to the shortcut.

    y[n] = shortcut[n] + scale * branch[n]   where sample n is kept,   else shortcut[n]

A program writes one tile of one sample, so that whether to read the branch is one scalar decision:
of a dropped sample the branch is not read forward, nor dy backward. The draw is Philox 4x32-10 of
(seed; sample, step, stream, unit and rank): the backward draws again, and nothing is stored for it.

Least bytes moved, with e bytes an element and a share q kept: forward (2 + q)e (shortcut, y, the
kept of the branch), backward (1 + q)e (dbranch, the kept of dy; dshortcut is dy itself).
"""

import torch
import triton
import triton.language as tl

from ._integers import cdiv
from ._launch import launch
from ._tiles import Rows, as_rows, channels_fastest, empty_dense, empty_images

__all__ = [
    "draw_subset",
    "empty_dbranch",
    "empty_subset",
    "empty_y",
    "stochastic_depth_add_bwd",
    "stochastic_depth_add_fwd",
]

# DROP_STREAM of fastres.ops._philox: the CPU's path draws from the same one.
STREAM = tl.constexpr(3)
# Sixteen elements a thread. Not tuned yet.
BLOCK = 4096
NUM_WARPS = 8
# Samples that a program of the subset's kernel ranks, and that it compares them with at a time.
BLOCK_N = 32


@triton.jit
def _draw(key_ptr, n, unit, WITH_RANK: tl.constexpr):
    """31 random bits for sample n, from key [3] int64: seed, step, rank."""
    seed, step = tl.load(key_ptr), tl.load(key_ptr + 1).to(tl.uint32)
    # Compiled graphs hand over a unit of 1 as a constant.
    place = tl.zeros([], tl.int64) + unit
    if WITH_RANK:
        place += tl.load(key_ptr + 2) * 65536
    word, _, _, _ = tl.philox(seed, n.to(tl.uint32), step, STREAM, place.to(tl.uint32))
    return (word >> 1).to(tl.int32)


# Units differ in these, and need no kernel each.
@triton.jit(do_not_specialize=["threshold", "unit"])
def _stochastic_depth_add_fwd_kernel(
    branch_ptr, shortcut_ptr, key_ptr, position_ptr, y_ptr,
    C, S, size, tiles, threshold, unit, scale,
    branch_stride_n, branch_stride_s, branch_stride_c,
    shortcut_stride_n, shortcut_stride_s, shortcut_stride_c,
    ROW: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[n] = shortcut[n] + scale * branch[j] where n is kept, else shortcut[n].

    With position_ptr j = position[n], and n is kept where that is 0 or more; else j = n, and n, or
    the whole batch, is kept where its draw is threshold / 2^31 or more. y is dense, NHWC with
    CHANNELS_LAST; FLAT says that within a sample branch and shortcut lie as y does.
    """
    n, element = _place(tiles, WIDE, BLOCK)
    ok = element < size
    s, c = _split(element, C, S, CHANNELS_LAST)
    # A sample's own offset is a scalar in 64 bits, which costs no registers.
    shortcut_ptr += n.to(tl.int64) * shortcut_stride_n
    offsets = element if FLAT else s * shortcut_stride_s + c * shortcut_stride_c
    shortcut = tl.load(shortcut_ptr + offsets, mask=ok, other=0.0)
    y = shortcut.to(tl.float32)
    j = n.to(tl.int64)
    if position_ptr is not None:
        j = tl.load(position_ptr + n)
        kept = j >= 0
    else:
        kept = _draw(key_ptr, n if ROW else n * 0, unit, ROW) >= threshold
    if kept:
        offsets = element if FLAT else s * branch_stride_s + c * branch_stride_c
        branch = tl.load(branch_ptr + j * branch_stride_n + offsets, mask=ok, other=0.0)
        y += tl.cast(scale, tl.float32) * branch.to(tl.float32)
    y_ptr += n.to(tl.int64) * size
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _place(tiles, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The sample of this program, and the elements of it, of `tiles` programs a sample."""
    # One axis for both: of the others a grid has 65,535 at most.
    n, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        tile, lanes = tile.to(tl.int64), lanes.to(tl.int64)
    return n, tile * BLOCK + lanes


@triton.jit
def _split(element, C, S, CHANNELS_LAST: tl.constexpr):
    """Position and channel of an element of a sample that lies in y's order."""
    if CHANNELS_LAST:
        s, c = element // C, element % C
    else:
        s, c = element % S, element // S
    return s, c


@triton.jit(do_not_specialize=["threshold", "unit"])
def _stochastic_depth_add_bwd_kernel(
    dy_ptr, key_ptr, source_ptr, dbranch_ptr,
    C, S, size, tiles, threshold, unit, scale,
    dy_stride_n, dy_stride_s, dy_stride_c,
    ROW: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dbranch[j] = scale * dy[n] where n is kept, else 0; n = source[j] (kept if >= 0), else j."""
    j, element = _place(tiles, WIDE, BLOCK)
    ok = element < size
    n = j.to(tl.int64)
    if source_ptr is not None:
        n = tl.load(source_ptr + j)
        kept = n >= 0
    else:
        kept = _draw(key_ptr, j if ROW else j * 0, unit, ROW) >= threshold
    dbranch = tl.zeros([BLOCK], tl.float32)
    if kept:
        s, c = _split(element, C, S, CHANNELS_LAST)
        offsets = element if FLAT else s * dy_stride_s + c * dy_stride_c
        dy = tl.load(dy_ptr + n * dy_stride_n + offsets, mask=ok, other=0.0)
        dbranch = tl.cast(scale, tl.float32) * dy.to(tl.float32)
    dbranch_ptr += j.to(tl.int64) * size
    tl.store(dbranch_ptr + element, dbranch.to(dbranch_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["N", "kept", "unit"])
def _draw_subset_kernel(key_ptr, index_ptr, position_ptr, N, kept, unit, BLOCK_N: tl.constexpr):
    """index [kept], the samples of least draw, and position [N], where each lies in it or -1.

    A sample's position is the number of samples before it, by draw and then by number; counting
    them takes N / BLOCK_N blocks of comparisons and no sort.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Draw and number as one integer: by masks for either, the comparison spilled registers.
    mine = (_draw(key_ptr, n, unit, True).to(tl.int64) << 32) + n
    position = tl.zeros([BLOCK_N], tl.int32)
    for m_start in range(0, N, BLOCK_N):
        m = m_start + tl.arange(0, BLOCK_N)
        other = (_draw(key_ptr, m, unit, True).to(tl.int64) << 32) + m
        other = tl.where(m < N, other, 0x7FFFFFFFFFFFFFFF)
        position += tl.sum((other[None, :] < mine[:, None]).to(tl.int32), 1)
    taken = position < kept
    tl.store(index_ptr + position, n.to(tl.int64), mask=(n < N) & taken)
    tl.store(position_ptr + n, tl.where(taken, position, -1).to(tl.int64), mask=n < N)


def _flat(rows: Rows, C: int, S: int, channels_last: bool) -> bool:
    """Whether the samples of a tensor are dense, NHWC with channels_last, else NCHW."""
    if channels_last:
        return (rows.stride_c == 1 or C == 1) and (rows.stride_s == C or S == 1)
    return (rows.stride_s == 1 or S == 1) and (rows.stride_c == S or C == 1)


def _sizes(t: torch.Tensor) -> tuple[int, int]:
    """Channels C, and positions S = H*W."""
    _, C, H, W = t.shape
    return C, H * W


def _wide(C: int, S: int, *every: Rows) -> bool:
    """Whether an offset within a sample passes 32 bits."""
    return max(C * S, *((S - 1) * r.stride_s + (C - 1) * r.stride_c for r in every)) >= 2**30


def empty_y(shortcut: torch.Tensor) -> torch.Tensor:
    """An uninitialised y for stochastic_depth_add_fwd."""
    return empty_dense(shortcut, as_rows(shortcut)[1])


def stochastic_depth_add_fwd(
    branch: torch.Tensor,
    shortcut: torch.Tensor,
    key: torch.Tensor,
    position: torch.Tensor | None,
    threshold: int,
    scale: float,
    row: bool,
    unit: int,
) -> torch.Tensor:
    """y as shortcut.

    Args:
        branch: [N, C, H, W], or [s, C, H, W] with position; any strides.
        shortcut: [N, C, H, W], any strides.
        key: int64 [3]: seed, step, rank. Not read with position.
        position: int64 [N], each sample's place in branch or -1; None draws.
        threshold: a sample (row), or the batch, is dropped with probability threshold / 2^31.
        scale: what a kept branch is multiplied by.
        unit: what tells the draws of one unit from another's, in [0, 65536).
    """
    shortcut, shortcut_rows = as_rows(shortcut)
    y = empty_dense(shortcut, shortcut_rows)
    if y.numel() == 0:
        return y
    branch, branch_rows = as_rows(branch)
    C, S = _sizes(y)
    tiles, channels_last = cdiv(C * S, BLOCK), channels_fastest(shortcut_rows)
    launch(
        _stochastic_depth_add_fwd_kernel, (y.shape[0] * tiles,),
        branch, shortcut, key, position, y,
        C, S, C * S, tiles, threshold, unit, scale,
        *branch_rows.strides, *shortcut_rows.strides,
        ROW=row, CHANNELS_LAST=channels_last,
        FLAT=all(_flat(rows, C, S, channels_last) for rows in (branch_rows, shortcut_rows)),
        WIDE=_wide(C, S, branch_rows, shortcut_rows), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


def empty_dbranch(dy: torch.Tensor, samples: int, channels_last: bool) -> torch.Tensor:
    """An uninitialised dbranch for stochastic_depth_add_bwd."""
    return empty_images((samples, *dy.shape[1:]), dy.dtype, dy.device, channels_last)


def stochastic_depth_add_bwd(
    dy: torch.Tensor,
    key: torch.Tensor,
    source: torch.Tensor | None,
    threshold: int,
    scale: float,
    row: bool,
    unit: int,
    channels_last: bool,
) -> torch.Tensor:
    """dbranch, dense, NHWC in memory with channels_last, else NCHW.

    Args:
        dy: [N, C, H, W], any strides.
        source: int64 [s], the sample of y that each sample of branch went to or -1; None draws.
        key, threshold, scale, row, unit: as in the forward.
    """
    samples = dy.shape[0] if source is None else source.shape[0]
    dbranch = empty_dbranch(dy, samples, channels_last)
    if dbranch.numel() == 0:
        return dbranch
    dy, dy_rows = as_rows(dy)
    C, S = _sizes(dy)
    tiles = cdiv(C * S, BLOCK)
    launch(
        _stochastic_depth_add_bwd_kernel, (samples * tiles,),
        dy, key, source, dbranch,
        C, S, C * S, tiles, threshold, unit, scale, *dy_rows.strides,
        ROW=row, CHANNELS_LAST=channels_last, FLAT=_flat(dy_rows, C, S, channels_last),
        WIDE=_wide(C, S, dy_rows), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dbranch


def empty_subset(key: torch.Tensor, N: int, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised index and position for draw_subset."""
    return key.new_empty(kept), key.new_empty(N)


def draw_subset(
    key: torch.Tensor, N: int, kept: int, unit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """index int64 [kept], samples of [0, N), and position int64 [N], each one's place there or -1.

    Args:
        key: int64 [3]: seed, step, rank; unit: in [0, 65536).
        kept: 0 <= kept <= N.
    """
    index, position = empty_subset(key, N, kept)
    if N > 0:
        launch(
            _draw_subset_kernel, (cdiv(N, BLOCK_N),),
            key, index, position, N, kept, unit, BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    return index, position
