"""A convolution's gradient by its weight: the products of each chunk of pixels, summed up later.

    slab[p] = sum over chunk p of a^T g,   a = relu(norm(x)) made again

A fixed number of chunks, each summed in a fixed order: two runs are bitwise the same.
Least bytes moved, with e bytes an element: e for each of x and g, where g is made from a dz
and h twice, and 8 for each element of the slab, which is written and read.
"""

import torch
import triton
import triton.language as tl

from ._conv import (
    BLOCK_P,
    block_of,
    channels_at,
    operand,
    pixels,
    product,
    rows_of,
    sample_numbers,
    samples_at,
    tile_pixels,
)
from ._conv_gradient import Input, Output, conv_gradient, lazy_norm
from ._integers import cdiv
from ._launch import launch
from ._normalize import normalized, rstd_of, scale_and_bias, unknown_zero

NUM_WARPS = 4
# Programs of a launch; and channels of a block: narrow, so that a slab has few chunks. Not tuned.
PROGRAMS = 264
BLOCK_C = 32


@triton.jit
def _norm_relu_conv2d_wgrad_kernel(
    g_ptr, g_index_ptr, h_ptr, h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr, row_scale_ptr,
    order_ptr, dshortcut_ptr, shortcut_order_ptr,
    x_ptr, x_index_ptr, mean_ptr, var_ptr, norm_weight_ptr, norm_bias_ptr,
    slab_ptr, shortcut_slab_ptr,
    M, CHUNK, SHORTCUT_M, SHORTCUT_CHUNK, H_ROWS, H_P, eps, h_eps, scale, slab_stride,
    weight_stride_k, weight_stride_c, weight_stride_h, weight_stride_w,
    shortcut_weight_stride_k, shortcut_weight_stride_c,
    C: tl.constexpr, K: tl.constexpr, KEPT: tl.constexpr, SHORTCUT_KEPT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A chunk's a^T g for one row of taps, in fp32, at slab[chunk] as the weight lies in memory.

    program_id(1) is a row of taps and a block of C, program_id(2) a block of K. A lane of a is a
    tap and a channel: the taps of a row lie side by side in memory, and fill the product's rows.
    With dshortcut_ptr, at the output of a projection, one row more is the projection's, which is a
    tap in the middle: of SHORTCUT_M pixels, those of every sample of x, whatever x_index_ptr names.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PAD: tl.constexpr = TAPS // 2
    OW: tl.constexpr = (W - 1) // STRIDE + 1
    S: tl.constexpr = ((H - 1) // STRIDE + 1) * OW
    LANES: tl.constexpr = BLOCK_C if TAPS == 1 else 4 * BLOCK_C
    PROJECTS: tl.constexpr = dshortcut_ptr is not None
    SUBSET: tl.constexpr = PROJECTS and x_index_ptr is not None
    TAP_ROWS: tl.constexpr = TAPS + 1 if PROJECTS else TAPS
    pid = tl.program_id(0)
    tap_row = tl.program_id(1) % TAP_ROWS
    projection = tap_row == TAPS
    lanes = tl.arange(0, LANES)
    tap = lanes // BLOCK_C
    c = tl.program_id(1) // TAP_ROWS * BLOCK_C + lanes % BLOCK_C
    k_start = tl.program_id(2) * BLOCK_K
    places = k_start + tl.arange(0, BLOCK_K)
    c_ok, kept = (c < C) & (tap < TAPS), KEPT
    if PROJECTS:
        kept = tl.where(projection, SHORTCUT_KEPT, KEPT)
    k_ok = places < kept
    if PROJECTS and projection:
        tap_row += PAD - TAPS
        c_ok = c_ok & (tap == PAD)
        k = channels_at(shortcut_order_ptr, places, places < K)
    else:
        k = channels_at(order_ptr, places, places < K)
    mean = tl.load(mean_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=c_ok, other=1.0).to(tl.float32)
    a_scale, a_bias = scale_and_bias(norm_weight_ptr, norm_bias_ptr, rstd_of(var, eps), c, c_ok)
    h_scale = tl.zeros([BLOCK_K], tl.float32)
    h_slope, h_offset = h_scale, h_scale
    if h_ptr is not None:
        h_scale, h_slope, h_offset = lazy_norm(
            h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr, None, None,
            k, k_ok, H_ROWS, K, H_P, h_eps, False, TRAINING, BLOCK_P,
        )  # fmt: skip
    zero = unknown_zero(eps, dtype)
    acc = tl.zeros([LANES, BLOCK_K], tl.float32)
    if SUBSET:
        M, CHUNK = tl.where(projection, SHORTCUT_M, M), tl.where(projection, SHORTCUT_CHUNK, CHUNK)
    end = tl.minimum((pid + 1) * CHUNK, M)
    if KEPT < K or SHORTCUT_KEPT < K:
        # Of channels that are not kept the products are zeros.
        end = tl.where(k_start < kept, end, 0)
    for m_start in tl.range(pid * CHUNK, end, BLOCK_M, num_stages=1):
        first, n, out_y, out_x, ok = tile_pixels(m_start, end, OW, S, BLOCK_M)
        if SUBSET:
            # Before g: after it some builds spill. In 64 bits, as what an index names.
            if projection:
                x_base, x_samples = x_ptr, (first + n).to(tl.int64) * (H * W * C)
            else:
                x_base, x_samples = samples_at(x_ptr, x_index_ptr, first, n, ok, H * W * C)
        g_base, g_samples = samples_at(g_ptr, g_index_ptr, first, n, ok, S * K)
        h_base = h_ptr
        if h_ptr is not None:
            h_base, _ = samples_at(h_ptr, g_index_ptr, first, n, ok, S * K)
        samples = sample_numbers(g_index_ptr, first, n, ok)
        at = (g_samples + (out_y * OW + out_x) * K)[:, None] + k[None, :]
        g_ok = (samples >= 0)[:, None] & k_ok[None, :]
        if PROJECTS and projection:
            base, _ = samples_at(dshortcut_ptr, None, first, n, ok, S * K)
            g = operand(tl.load(base + at, mask=g_ok, other=0.0), dtype)
        else:
            g = conv_gradient(
                g_base, h_base, row_scale_ptr, samples, at, g_ok, zero,
                h_scale, h_slope, h_offset, TRAINING,
            )  # fmt: skip
            g = operand(g, dtype)
        if not SUBSET:
            x_base, x_samples = samples_at(x_ptr, x_index_ptr, first, n, ok, H * W * C)
        in_y = out_y * STRIDE + (tap_row - PAD)
        in_x = (out_x * STRIDE)[:, None] + (tap - PAD)[None, :]
        inside = (ok & (in_y >= 0) & (in_y < H))[:, None] & c_ok[None, :]
        inside = inside & (in_x >= 0) & (in_x < W)
        at = x_samples + (in_y * W + out_x * STRIDE) * C
        at = at[:, None] + ((tap - PAD) * C + c)[None, :]
        x = tl.load(x_base + at, mask=inside, other=0.0)
        a = operand(normalized(x, mean, a_scale, a_bias, inside, zero), dtype)
        acc = product(tl.trans(a), g, acc)
    row = pid.to(tl.int64) * slab_stride
    stored = c_ok[:, None] & (places < K)[None, :]
    if PROJECTS and projection:
        at = c[:, None] * shortcut_weight_stride_c + k[None, :] * shortcut_weight_stride_k
        tl.store(shortcut_slab_ptr + row + at, acc, mask=stored)
    else:
        at = (tap * weight_stride_w + c * weight_stride_c)[:, None] + k[None, :] * weight_stride_k
        dweight = acc * tl.cast(scale, tl.float32)
        tl.store(slab_ptr + row + tap_row * weight_stride_h + at, dweight, mask=stored)


def blocks(weight: torch.Tensor) -> tuple[int, int, int, int]:
    """BLOCK_C, BLOCK_K, and the programs along the grid's second and third axis."""
    K, C, taps, _ = weight.shape
    block_c, block_k = min(block_of(C), BLOCK_C), min(block_of(K), BLOCK_C)
    return block_c, block_k, taps * cdiv(C, block_c), cdiv(K, block_k)


def _rows(block_c: int, taps: int, dtype: torch.dtype) -> int:
    """Pixels of a tile, fewer for the more lanes: a tile of x takes a register an element."""
    rows = rows_of(dtype) * 16 // block_c
    return rows // 2 if dtype == torch.float32 and taps * block_c > 32 else rows


def slab_chunks(weight: torch.Tensor, M: int, dtype: torch.dtype) -> int:
    """How many chunks of a convolution's M output pixels have a product of their own in the slab.

    No more than there are tiles: a slab is written and read, whatever the batch.
    """
    block_c, _, rows, columns = blocks(weight)
    tiles = cdiv(M, _rows(block_c, weight.shape[2], dtype))
    each = cdiv(tiles, max(PROGRAMS // (rows * columns), 1))
    return cdiv(tiles, each)


def conv_wgrad(
    into: Input,
    out: Output,
    weight: torch.Tensor,
    stride: int,
    samples: int,
    slab: torch.Tensor,
    shortcut: Output | None = None,
    shortcut_weight: torch.Tensor | None = None,
    shortcut_slab: torch.Tensor | None = None,
) -> None:
    """Write slab [P, weight.numel()] fp32, each row as weight lies in memory.

    Args:
        weight: dense; samples: of the convolution.
        slab: rows may lie apart.
        shortcut, shortcut_weight, shortcut_slab: the same of a 1x1 convolution of every sample of
            the same input; or None. out and shortcut have no index then.
    """
    C, H, W = into.x.shape[1:]
    K, OH, OW = weight.shape[0], (H - 1) // stride + 1, (W - 1) // stride + 1
    block_c, block_k, rows, columns = blocks(weight)
    cut = pixels(samples * OH * OW, _rows(block_c, weight.shape[2], into.x.dtype), P=slab.shape[0])
    dy, order, every = None, None, cut
    if shortcut is not None:
        dy, order = shortcut.g, shortcut.order
        every = pixels(dy.shape[0] * OH * OW, cut.BLOCK_M, P=cut.P)
        rows += cdiv(C, block_c)
    projection = weight if shortcut_weight is None else shortcut_weight
    launch(
        _norm_relu_conv2d_wgrad_kernel, (cut.P, rows, columns),
        *out.tensors, out.row_scale, out.order, dy, order,
        into.x, into.index, *into.norm.vectors, slab, shortcut_slab,
        cut.M, cut.chunk, every.M, every.chunk, *out.numbers[:2], into.norm.eps, out.numbers[2],
        out.scale, slab.stride(0), *weight.stride(), *projection.stride()[:2],
        C=C, K=K, KEPT=out.inner, SHORTCUT_KEPT=K if shortcut is None else shortcut.inner,
        H=H, W=W, TAPS=weight.shape[2], STRIDE=stride, TRAINING=out.training,
        BLOCK_M=cut.BLOCK_M, BLOCK_C=block_c, BLOCK_K=block_k, BLOCK_P=BLOCK_P,
        num_warps=NUM_WARPS,
    )  # fmt: skip
