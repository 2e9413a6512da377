"""Tiles of an activation seen as rows x channels.

An activation [N, C, H, W] is M = N*H*W rows of C channels. Row m = n*S + s (S = H*W) of channel c
lies at n*stride_n + s*stride_s + c*stride_c, so one kernel serves NCHW, NHWC and their mixtures.
A tile is [BLOCK_M, BLOCK_C] with M_AXIS = 0 where channels lie closest together (NHWC), else
[BLOCK_C, BLOCK_M] with M_AXIS = 1, so that neighbouring threads meet neighbouring elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._integers import cdiv, next_power_of_2

NUM_WARPS = 8
# Enough programs to keep the memory of a 132-SM device busy. Not tuned on a GPU yet.
MAX_PROGRAMS = 512
# Elements of a tile: 16 a thread, which with fp32 moments beside them leaves registers to spare.
TILE = 4096


@triton.jit
def tile_offsets(
    m, c, S, stride_n, stride_s, stride_c, M_AXIS: tl.constexpr, FLAT: tl.constexpr,
    index_ptr=None, end=0,
):  # fmt: skip
    """Element offsets of rows m [BLOCK_M] x channels c [BLOCK_C], rows along M_AXIS.

    FLAT says that stride_n = S*stride_s, which saves the division. With index_ptr, row m lies in
    sample index[m // S] in place of m // S, for m < end.
    """
    if index_ptr is not None:
        n = tl.load(index_ptr + m // S, mask=m < end, other=0).to(m.dtype)
        rows = n * stride_n + (m % S) * stride_s
    elif FLAT:
        rows = m * stride_s
    else:
        rows = (m // S) * stride_n + (m % S) * stride_s
    return tl.expand_dims(rows, 1 - M_AXIS) + tl.expand_dims(c * stride_c, M_AXIS)


@triton.jit
def tile_mask(m_ok, c_ok, M_AXIS: tl.constexpr):
    """Rows m_ok [BLOCK_M] x channels c_ok [BLOCK_C]."""
    return tl.expand_dims(m_ok, 1 - M_AXIS) & tl.expand_dims(c_ok, M_AXIS)


@triton.jit
def bits_offsets(
    m_start, c, M, C, M_AXIS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Offsets and mask of a tile's bytes in a bitmask, eight bits along the tile's second axis.

    M_AXIS = 0: bytes [M, ceil(C/8)]; M_AXIS = 1: bytes [C, ceil(M/8)]. m_start is a multiple of 8.
    """
    if M_AXIS == 0:
        rows = m_start + tl.arange(0, BLOCK_M)
        row_ok = rows < M
        bytes_ = tl.min(c) // 8 + tl.arange(0, BLOCK_C // 8)
        width = (C + 7) // 8
    else:
        rows = c
        row_ok = c < C
        bytes_ = m_start // 8 + tl.arange(0, BLOCK_M // 8)
        width = (M + 7) // 8
    offsets = rows[:, None] * width + bytes_[None, :]
    return offsets, row_ok[:, None] & (bytes_ < width)[None, :]


@triton.jit
def store_bits(
    mask_ptr, bits, m_start, c, M, C,
    M_AXIS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store a tile of booleans, eight to a byte."""
    offsets, ok = bits_offsets(m_start, c, M, C, M_AXIS, BLOCK_M, BLOCK_C)
    eights = tl.reshape(bits.to(tl.int32), [offsets.shape[0], offsets.shape[1], 8])
    packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
    tl.store(mask_ptr + offsets, packed.to(tl.uint8), mask=ok)


@triton.jit
def load_bits(
    mask_ptr, m_start, c, M, C,
    M_AXIS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tile of booleans that store_bits stored."""
    offsets, ok = bits_offsets(m_start, c, M, C, M_AXIS, BLOCK_M, BLOCK_C)
    packed = tl.load(mask_ptr + offsets, mask=ok, other=0).to(tl.int32)
    eights = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eights, [offsets.shape[0], offsets.shape[1] * 8]) != 0


@dataclass(frozen=True)
class Rows:
    """A tensor [N, C, H, W] as rows x channels: the strides that a kernel takes, in elements."""

    stride_n: int
    stride_s: int
    stride_c: int
    extent: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.stride_n, self.stride_s, self.stride_c


def as_rows(t: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """t and its strides as rows; a copy of t where H and W do not merge into one stride.

    Every dense NCHW or NHWC tensor, any slice of one along N or C, and any expanded tensor are
    taken as they are; a slice along H or W, or H and W exchanged, may be copied, in the memory
    format that PyTorch would give its result.
    """
    N, C, H, W = t.shape
    stride_n, stride_c, stride_h, stride_w = t.stride()
    if W == 1:
        stride_w = stride_h
    elif H > 1 and stride_h != W * stride_w:
        nhwc = 0 < stride_c <= stride_w <= stride_h
        t = t.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        stride_n, stride_c, stride_h, stride_w = t.stride()
    S, stride_s = H * W, stride_w
    # A dimension of size 1 may have any stride; give it the one that merges.
    if S == 1:
        stride_s = stride_n
    if N == 1:
        stride_n = S * stride_s
    extent = 1 + (N - 1) * stride_n + (S - 1) * stride_s + (C - 1) * stride_c
    return t, Rows(stride_n, stride_s, stride_c, extent)


def channels_fastest(rows: Rows) -> bool:
    """Whether neighbouring channels lie closer together than neighbouring rows.

    An expanded stride of 0 is no memory format of its own: NCHW then, as in PyTorch.
    """
    return 0 < rows.stride_c <= rows.stride_s


def empty_images(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> torch.Tensor:
    """Uninitialised: NHWC in memory with channels_last, else NCHW."""
    if not channels_last:
        return torch.empty(shape, dtype=dtype, device=device)
    _, C, H, W = shape
    # By strides: of a memory format Inductor makes a kernel that fills the tensor.
    return torch.empty_strided(shape, (H * W * C, 1, W * C, C), dtype=dtype, device=device)


def empty_dense(t: torch.Tensor, rows: Rows, N: int | None = None) -> torch.Tensor:
    """An uninitialised dense tensor of t's shape, NHWC in memory where t is, else NCHW.

    N: samples, where they are not as many as t's.
    """
    shape = t.shape if N is None else (N, *t.shape[1:])
    return empty_images(shape, t.dtype, t.device, channels_fastest(rows))


def bits_shape(t: torch.Tensor, rows: Rows) -> tuple[int, ...]:
    """Shape of a bitmask over t: [M, ceil(C/8)], eight channels of a row to a byte, where channels
    lie closest together, else [1, C, ceil(M/8)], eight rows of a channel to a byte.

    Its dimensions say which of the two it is: t may come back to the backward in another memory
    format than it left the forward in (save_on_cpu does that), and its strides would lie.
    """
    N, C, H, W = t.shape
    M = N * H * W
    return (M, (C + 7) // 8) if channels_fastest(rows) else (1, C, (M + 7) // 8)


@dataclass(frozen=True)
class Tiling:
    """How M rows of C channels are cut into tiles, and tiles into programs."""

    M: int
    C: int
    S: int
    BLOCK_M: int
    BLOCK_C: int
    M_AXIS: int
    FLAT: bool
    WIDE: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.M, self.C, self.S

    @property
    def constexprs(self) -> dict[str, int | bool]:
        names = ("BLOCK_M", "BLOCK_C", "M_AXIS", "FLAT", "WIDE")
        return {name: getattr(self, name) for name in names} | {"num_warps": NUM_WARPS}

    @property
    def columns(self) -> int:
        """Blocks of channels: the grid's second axis."""
        return cdiv(self.C, self.BLOCK_C)

    def chunks(self, most: int) -> tuple[int, int]:
        """Rows of a chunk, a multiple of BLOCK_M, and the number of chunks, none of them empty."""
        tiles = cdiv(self.M, self.BLOCK_M)
        tiles_each = cdiv(tiles, max(min(most, MAX_PROGRAMS // self.columns), 1))
        return tiles_each * self.BLOCK_M, cdiv(tiles, tiles_each)


def tiling(
    shape: torch.Size, x_rows: Rows, *others: Rows, bits: torch.Tensor | None = None
) -> Tiling:
    """A tiling that follows x's memory and serves every tensor of this shape that is named.

    Where there is a bitmask, it follows the order in which its bits were packed.
    """
    N, C, H, W = shape
    S = H * W
    # Narrow blocks of channels, so that few channels still make many programs.
    BLOCK_C = min(max(next_power_of_2(C), 8), 32 if C <= 128 else 64)
    every = (x_rows, *others)
    return Tiling(
        M=N * S,
        C=C,
        S=S,
        BLOCK_M=TILE // BLOCK_C,
        BLOCK_C=BLOCK_C,
        M_AXIS=0 if (channels_fastest(x_rows) if bits is None else bits.dim() == 2) else 1,
        FLAT=all(rows.stride_n == S * rows.stride_s for rows in every),
        # 64-bit offsets only where a tensor needs them: they cost registers. From 2^30 on, since
        # the end of a chunk, and the rows of the last tile, pass the last element.
        WIDE=max(N * S * C, *(rows.extent for rows in every)) >= 2**30,
    )
