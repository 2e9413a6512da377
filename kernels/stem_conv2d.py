"""The first convolution of an image network, with its output's moments; and its weight's gradient.

    y = conv(x),   slab[p] = sum over chunk p of patch(x)^T dy

Images have few channels, so a pixel's patch is one axis: lane tap * C + c holds channel c at one of
the 3x3 taps, 0 outside the image. A tile of patches is gathered by one load and multiplied by one
product. The epilogue leaves each chunk's mean and squared deviations of y, in chunks as those of
preact_unit's own output. A fixed number of chunks, each summed in a fixed order: two runs are
bitwise the same.

Least bytes moved, with e bytes an element: e for each of x and y forward, and of x and dy backward,
and 8 for each element of the slab, which is written and read.
Source: Jung et al. 2018, arXiv:1807.01702, for the moments in the epilogue.
"""

import torch
import triton
import triton.language as tl

from ._conv import (
    as_nhwc,
    block_of,
    conv2d_shape,
    empty_nhwc,
    moments_pixels,
    operand,
    pixels,
    product,
    rows_of,
    samples_at,
    tile_pixels,
)
from ._integers import cdiv, next_power_of_2
from ._launch import launch
from ._moments import merge_tile, merged_sums


@triton.jit
def _lanes(C: tl.constexpr, LANES: tl.constexpr):
    """Of each lane of a patch its channel, the row and the column of its tap, and ok."""
    lanes = tl.arange(0, LANES)
    return lanes % C, lanes // (3 * C), lanes // C % 3, lanes < 9 * C


@triton.jit
def _weight_at(
    k, k_ok, stride_k, stride_c, stride_h, stride_w, C: tl.constexpr, LANES: tl.constexpr
):
    """Where the weight of each lane and channel k lies, offsets [LANES, BLOCK_K], and ok."""
    c, tap_y, tap_x, lanes_ok = _lanes(C, LANES)
    at = c * stride_c + tap_y * stride_h + tap_x * stride_w
    return at[:, None] + k[None, :] * stride_k, lanes_ok[:, None] & k_ok[None, :]


@triton.jit
def _patches(
    x_ptr, m_start, end, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, NHWC: tl.constexpr,
    BLOCK_M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The patches [BLOCK_M, LANES] around pixels from m_start on; x is dense in NHWC or NCHW."""
    STRIDE_C: tl.constexpr = 1 if NHWC else H * W
    STRIDE_W: tl.constexpr = C if NHWC else 1
    first, n, y, x, ok = tile_pixels(m_start, end, W, H * W, BLOCK_M)
    base, samples = samples_at(x_ptr, None, first, n, ok, C * H * W)
    c, tap_y, tap_x, lanes_ok = _lanes(C, LANES)
    in_y = y[:, None] + (tap_y - 1)[None, :]
    in_x = x[:, None] + (tap_x - 1)[None, :]
    inside = ok[:, None] & lanes_ok[None, :]
    inside = inside & (in_y >= 0) & (in_y < H) & (in_x >= 0) & (in_x < W)
    at = (samples + (y * W + x) * STRIDE_W)[:, None]
    at += (c * STRIDE_C + ((tap_y - 1) * W + tap_x - 1) * STRIDE_W)[None, :]
    return tl.load(base + at, mask=inside, other=0.0)


@triton.jit
def _stem_conv2d_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, partial_ptr, M, CHUNK,
    weight_stride_k, weight_stride_c, weight_stride_h, weight_stride_w,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, NHWC: tl.constexpr,
    LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, K] of a chunk of pixels, from K's block program_id(1); its moments with partial_ptr."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pid = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    weight_at, weight_ok = _weight_at(
        k, k_ok, weight_stride_k, weight_stride_c, weight_stride_h, weight_stride_w, C, LANES
    )
    weight = operand(tl.load(weight_ptr + weight_at, mask=weight_ok, other=0.0), dtype)
    mean = tl.zeros([BLOCK_K], tl.float32)
    m2 = mean
    seen = 0.0
    end = tl.minimum((pid + 1) * CHUNK, M)
    for m_start in tl.range(pid * CHUNK, end, BLOCK_M, num_stages=1):
        a = operand(_patches(x_ptr, m_start, end, C, H, W, NHWC, BLOCK_M, LANES), dtype)
        y = product(a, weight, tl.zeros([BLOCK_M, BLOCK_K], tl.float32)).to(dtype)
        m = m_start + tl.arange(0, BLOCK_M)
        mk_ok = (m < end)[:, None] & k_ok[None, :]
        # The chunk moves in 64 bits, and rows within it in 32.
        base = (pid * CHUNK).to(tl.int64) * K
        at = (m - pid * CHUNK)[:, None] * K + k[None, :]
        tl.store(y_ptr + base + at, y, mask=mk_ok)
        if partial_ptr is not None:
            count = tl.minimum(end - m_start, BLOCK_M)
            mean, m2, seen = merge_tile(y, mk_ok, count, mean, m2, seen)
    if partial_ptr is not None:
        chunks = tl.num_programs(0)
        tl.store(partial_ptr + pid * K + k, mean, mask=k_ok)
        tl.store(partial_ptr + (chunks + pid) * K + k, m2, mask=k_ok)


@triton.jit
def _stem_conv2d_wgrad_kernel(
    dy_ptr, x_ptr, slab_ptr, M, CHUNK, slab_stride,
    weight_stride_k, weight_stride_c, weight_stride_h, weight_stride_w,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, NHWC: tl.constexpr,
    LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A chunk's patch^T dy of K's block program_id(1), in fp32, at slab[chunk] as the weight lies
    in memory."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    acc = tl.zeros([LANES, BLOCK_K], tl.float32)
    end = tl.minimum((pid + 1) * CHUNK, M)
    for m_start in tl.range(pid * CHUNK, end, BLOCK_M, num_stages=1):
        a = operand(_patches(x_ptr, m_start, end, C, H, W, NHWC, BLOCK_M, LANES), dtype)
        m = m_start + tl.arange(0, BLOCK_M)
        base = dy_ptr + (pid * CHUNK).to(tl.int64) * K
        at = (m - pid * CHUNK)[:, None] * K + k[None, :]
        dy = tl.load(base + at, mask=(m < end)[:, None] & k_ok[None, :], other=0.0)
        acc = product(tl.trans(a), operand(dy, dtype), acc)
    weight_at, weight_ok = _weight_at(
        k, k_ok, weight_stride_k, weight_stride_c, weight_stride_h, weight_stride_w, C, LANES
    )
    row = pid.to(tl.int64) * slab_stride
    tl.store(slab_ptr + row + weight_at, acc, mask=weight_ok)


def empty_outputs(
    x: torch.Tensor, weight: torch.Tensor, with_moments: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stem_conv2d_fwd returns, uninitialised."""
    shape = conv2d_shape(x, weight, 1, x.shape[0])
    y, P = empty_nhwc(x, *shape), moments_pixels(shape, x.dtype).P
    partial = (2, P, shape[1]) if with_moments else (0,)
    return y, x.new_empty(partial, dtype=torch.float32)


def _lane_count(C: int) -> int:
    return max(next_power_of_2(9 * C), 16)


def _rows(weight: torch.Tensor, dtype: torch.dtype) -> int:
    """Pixels of a tile, fewer for the more lanes: a tile takes a register an element."""
    K, C = weight.shape[:2]
    return rows_of(dtype) * 32 // max(_lane_count(C), block_of(K), 32)


def _constants(x: torch.Tensor, weight: torch.Tensor) -> dict[str, int | bool]:
    K, C, H, W = *weight.shape[:2], *x.shape[2:]
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    lanes = _lane_count(C)
    return {"C": C, "K": K, "H": H, "W": W, "NHWC": nhwc, "LANES": lanes, "BLOCK_K": block_of(K)}


def stem_conv2d_fwd(
    x: torch.Tensor, weight: torch.Tensor, with_moments: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [N, K, H, W], NHWC, and the partial [2, P, K] of its moments, empty without with_moments.

    Args:
        x: [N, C, H, W], C from 1 to 4, dense in NHWC or NCHW.
        weight: [K, C, 3, 3], any strides.
    """
    y, partial = empty_outputs(x, weight, with_moments)
    cut, K = moments_pixels(y.shape, y.dtype), weight.shape[0]
    rows = min(cut.BLOCK_M, _rows(weight, x.dtype))
    # The partials' number limits that of the programs, and loads take their time: eight warps where
    # the tile is large enough.
    large = rows * max(_lane_count(weight.shape[1]), block_of(K)) >= 4096
    launch(
        _stem_conv2d_fwd_kernel, (cut.P, cdiv(K, block_of(K))),
        x, weight, y, partial if with_moments else None, cut.M, cut.chunk, *weight.stride(),
        **_constants(x, weight), BLOCK_M=rows, num_warps=8 if large else 4,
    )  # fmt: skip
    return y, partial


def stem_conv2d_bwd(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dweight in weight's dtype, laid out as weight, which is dense; dy: as y, any strides."""
    N, K, H, W = dy.shape
    columns = cdiv(K, block_of(K))
    cut = pixels(N * H * W, _rows(weight, x.dtype), columns)
    slab = dy.new_empty(cut.P, weight.numel(), dtype=torch.float32)
    launch(
        _stem_conv2d_wgrad_kernel, (cut.P, columns),
        as_nhwc(dy), x, slab, cut.M, cut.chunk, slab.stride(0), *weight.stride(),
        **_constants(x, weight), BLOCK_M=cut.BLOCK_M, num_warps=8 if block_of(K) > 32 else 4,
    )  # fmt: skip
    dweight = torch.empty_like(weight)
    merged_sums(slab[None], dweight)
    return dweight
