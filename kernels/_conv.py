"""What the convolution kernels share: the pixels of a tile, the factors of a product, the tiling.

Activations are NHWC and dense: channel c of pixel m = (n*H + y)*W + x lies at m*C + c. A tile is
BLOCK_M pixels by a block of channels; each program takes a chunk of tiles, and leaves one partial
of whatever is summed over all pixels. Sizes of images and channels are constants of a kernel, so
that divisions cost little and masks fold; the number of samples is none.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._integers import cdiv, next_power_of_2
from ._launch import family
from ._tiles import empty_images

# Triton's interpreter multiplies bf16 wrongly (by 1e10, measured): fp32 there, of rounded values.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Programs along the pixels: as many partials as a consumer merges in its prologue. Not tuned yet.
MAX_CHUNKS = 256
# Pixels of a tile, and channels of a block on either side of a product. Not tuned yet.
BLOCK_M = 128
BLOCK_C = 64
BLOCK_P = 64
# Bytes of a weight's block that a program keeps for all of its tiles; by family, see there.
MAX_WEIGHT_BYTES = {"tcgen05": 70_000, "wgmma": 80_000, "mma": 80_000, "hip": 5_000}
# Pixels of a tile of BLOCK_C channels on one side of a product, and on both: where a kept weight
# lies in registers, so few that the warps share its columns, not the pixels.
WIDE_ROWS = {"tcgen05": (128, 64), "wgmma": (64, 64), "mma": (32, 32), "hip": (64, 64)}


@triton.jit
def tile_pixels(m_start, end, W: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pixels m_start + [0, BLOCK_M) of images of S = H*W: first, n, y, x and ok.

    first: scalar, the sample of the first pixel; n [BLOCK_M]: samples from there on; ok: < end.
    """
    m = m_start + tl.arange(0, BLOCK_M)
    first = m_start // S
    local = m - first * S
    s = local % S
    return first, local // S, s // W, s % W, m < end


@triton.jit
def samples_at(pointer, index_ptr, first, n, ok, SIZE: tl.constexpr):
    """A pointer, and offsets [BLOCK_M] from it to samples first + n of SIZE elements each.

    Past 2^31 elements the base is what moves, a scalar in 64 bits. Through an index, where every
    row has an offset of its own, these are negative where the index is: a sample that is not there.
    """
    if index_ptr is not None:
        offsets = tl.load(index_ptr + first + n, mask=ok, other=-1) * SIZE
    else:
        pointer += first.to(tl.int64) * SIZE
        offsets = n * SIZE
    return pointer, offsets


@triton.jit
def sample_numbers(index_ptr, first, n, ok):
    """The samples first + n, or through an index those that it names; -1 where not ok."""
    samples = tl.where(ok, first + n, -1)
    if index_ptr is not None:
        samples = tl.load(index_ptr + first + n, mask=ok, other=-1).to(tl.int32)
    return samples


@triton.jit
def channels_at(order_ptr, lanes, ok):
    """The channels at some places of an order int32 [K], or without one the places themselves."""
    if order_ptr is not None:
        lanes = tl.load(order_ptr + lanes, mask=ok, other=0)
    return lanes


@triton.jit
def operand(v, DTYPE: tl.constexpr):
    """A factor of a product: v rounded to the storage type, as a stored tensor would be."""
    v = v.to(DTYPE)
    if INTERPRET:
        v = v.to(tl.float32)
    return v


@triton.jit
def product(a, b, acc):
    """acc + a @ b in fp32; factors of fp32 are not cut down to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def weight_tap(weight_ptr, at, ok, stride_h, stride_w, tap: tl.constexpr, TAPS: tl.constexpr):
    """A block of the weight at one tap; at: offsets of its elements at the first."""
    at += (tap // TAPS) * stride_h + (tap % TAPS) * stride_w
    return tl.load(weight_ptr + at, mask=ok, other=0.0)


@triton.jit
def weight_taps(weight_ptr, at, ok, stride_h, stride_w, DTYPE: tl.constexpr, TAPS: tl.constexpr):
    """Every tap's block as a factor, for all tiles of a program: a tuple of TAPS * TAPS of them."""
    w0 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 0, TAPS), DTYPE)
    if TAPS == 1:
        return (w0,)
    else:
        w1 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 1, TAPS), DTYPE)
        w2 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 2, TAPS), DTYPE)
        w3 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 3, TAPS), DTYPE)
        w4 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 4, TAPS), DTYPE)
        w5 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 5, TAPS), DTYPE)
        w6 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 6, TAPS), DTYPE)
        w7 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 7, TAPS), DTYPE)
        w8 = operand(weight_tap(weight_ptr, at, ok, stride_h, stride_w, 8, TAPS), DTYPE)
        return w0, w1, w2, w3, w4, w5, w6, w7, w8


@dataclass(frozen=True)
class Pixels:
    """How M pixels are cut into tiles, and these into chunks."""

    M: int
    BLOCK_M: int
    chunk: int
    P: int


def pixels(M: int, block: int, columns: int = 1, P: int | None = None) -> Pixels:
    """Chunks of as many tiles of `block` pixels each, at most MAX_CHUNKS programs of them.

    columns: programs beside one another on the same pixels. P: how many chunks, some then empty.
    """
    tiles = cdiv(M, block)
    if P is not None:
        return Pixels(M, block, cdiv(tiles, P) * block, P)
    each = cdiv(tiles, max(MAX_CHUNKS // columns, 1))
    return Pixels(M, block, each * block, cdiv(tiles, each))


def rows_of(dtype: torch.dtype) -> int:
    """Pixels of a tile: fp32 takes twice the registers."""
    return BLOCK_M // 2 if dtype == torch.float32 else BLOCK_M


@dataclass(frozen=True)
class Blocks:
    """Channels on either side of a product, pixels of a tile, and whether the weight is kept."""

    inner: int
    outer: int
    rows: int
    KEEP: bool
    num_warps: int


def blocks_of(inner: int, outer: int, taps: int, dtype: torch.dtype) -> Blocks:
    """For products over `inner` channels to `outer` ones: what spills nowhere. Not tuned yet."""
    # fp32 is multiplied without tensor cores, its factors in registers.
    most = BLOCK_C // 4 if dtype == torch.float32 else BLOCK_C
    inner_block, outer_block = block_of(inner, most), block_of(outer, most)
    if inner > inner_block > 16:
        # Coefficients of every block are loaded anew, and live beside the products.
        inner_block //= 2
    widest = max(inner_block, outer_block)
    nbytes = taps * taps * inner_block * outer_block * dtype.itemsize
    keeps = inner <= inner_block and nbytes <= MAX_WEIGHT_BYTES[family()]
    rows = rows_of(dtype)
    if widest == BLOCK_C:
        rows = WIDE_ROWS[family()][inner_block == outer_block]
    elif widest > 16:
        rows //= 2
    wide = widest == most or family() == "mma"
    return Blocks(inner_block, outer_block, rows, keeps, 8 if wide else 4)


def merges(C: int, dtype: torch.dtype) -> bool:
    """Whether a kernel that reads C channels merges their partials itself: all are one block."""
    return C <= blocks_of(C, C, 3, dtype).inner


def moments_pixels(shape: Sequence[int], dtype: torch.dtype) -> Pixels:
    """How the pixels of an activation [N, K, H, W] are cut whose moments its producer leaves."""
    N, K, H, W = shape
    return pixels(N * H * W, blocks_of(K, K, 3, dtype).rows)


def block_of(C: int, most: int = BLOCK_C) -> int:
    """Channels of a block, a power of two and at least 16, as tensor cores want it."""
    return min(max(next_power_of_2(C), 16), most)


def as_nhwc(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it, dense in NHWC."""
    return t.contiguous(memory_format=torch.channels_last)


def empty_nhwc(t: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised, of t's dtype and device, NHWC."""
    return empty_images(shape, t.dtype, t.device, channels_last=True)


def conv2d_shape(x: torch.Tensor, weight: torch.Tensor, stride: int, samples: int) -> list[int]:
    """[samples, K, OH, OW] of a convolution that keeps the size at stride 1."""
    return [samples, weight.shape[0], *((size - 1) // stride + 1 for size in x.shape[2:])]
