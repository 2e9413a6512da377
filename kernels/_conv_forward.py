"""BatchNorm and ReLU as a convolution's prologue; residual add and moments as its epilogue.

    a = relu((x - mean) * (rstd * norm_weight) + norm_bias),   y = residual + scale * conv(a)

a lives in registers alone: it is made from x at each tap, is zero outside the image after the ReLU,
and is rounded to the storage type before the product, as the tensor that it replaces would be. The
epilogue leaves each chunk's mean and squared deviations of y, which the next BatchNorm merges.

Least bytes moved, with e bytes an element: e for each of x, y and the residual.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._conv import (
    BLOCK_P,
    Pixels,
    blocks_of,
    conv2d_shape,
    empty_nhwc,
    operand,
    pixels,
    product,
    samples_at,
    tile_pixels,
    weight_tap,
    weight_taps,
)
from ._integers import cdiv
from ._launch import launch
from ._moments import Moments, Stats, merge_tile
from ._normalize import batch_stats, normalized, rstd_of, scale_and_bias, unknown_zero


@triton.jit
def _norm_relu_conv2d_fwd_kernel(
    x_ptr, index_ptr, partial_ptr, mean_ptr, var_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_ptr, shortcut_weight_ptr, residual_ptr, row_scale_ptr,
    y_ptr, shortcut_ptr, y_partial_ptr,
    M, CHUNK, ROWS, P, P_CHUNK, eps, scale,
    weight_stride_k, weight_stride_c, weight_stride_h, weight_stride_w,
    shortcut_weight_stride_k, shortcut_weight_stride_c,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y [M, K] of a chunk of pixels, from K's block program_id(1).

    With partial_ptr merges the moments of x, of ROWS pixels, and stores mean and var; without loads
    the two. index_ptr names the sample of x for each sample of y, or -1: there y = residual. Also
    shortcut = 1x1 conv(a) with shortcut_weight_ptr, and y's moments with y_partial_ptr.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    PAD: tl.constexpr = TAPS // 2
    OW: tl.constexpr = (W - 1) // STRIDE + 1
    S: tl.constexpr = ((H - 1) // STRIDE + 1) * OW
    ONE_BLOCK: tl.constexpr = C <= BLOCK_C
    pid = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    if ONE_BLOCK:
        c = tl.arange(0, BLOCK_C)
        writes = (pid == 0) & (tl.program_id(1) == 0)
        mean, var = batch_stats(
            partial_ptr, mean_ptr, var_ptr, c, c < C, ROWS, C, P, P_CHUNK, writes, BLOCK_P
        )
        a_scale, a_bias = scale_and_bias(
            norm_weight_ptr, norm_bias_ptr, rstd_of(var, eps), c, c < C
        )
    if KEEP:
        c = tl.arange(0, BLOCK_C)
        ck_ok = (c < C)[:, None] & k_ok[None, :]
        weight_at = k[None, :] * weight_stride_k + c[:, None] * weight_stride_c
        weights = weight_taps(
            weight_ptr, weight_at, ck_ok, weight_stride_h, weight_stride_w, dtype, TAPS
        )
    outside = unknown_zero(eps, dtype)
    y_mean = tl.zeros([BLOCK_K], tl.float32)
    y_m2 = y_mean
    seen = 0.0
    end = tl.minimum((pid + 1) * CHUNK, M)
    for m_start in tl.range(pid * CHUNK, end, BLOCK_M, num_stages=1):
        first, n, out_y, out_x, ok = tile_pixels(m_start, end, OW, S, BLOCK_M)
        x_base, x_samples = samples_at(x_ptr, index_ptr, first, n, ok, H * W * C)
        there = ok if index_ptr is None else x_samples >= 0
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        projected = acc
        for c_start in tl.range(0, C, BLOCK_C, num_stages=1):
            c = c_start + tl.arange(0, BLOCK_C)
            c_ok = c < C
            if not ONE_BLOCK:
                mean, var = batch_stats(
                    None, mean_ptr, var_ptr, c, c_ok, ROWS, C, P, P_CHUNK, False, BLOCK_P
                )
                a_scale, a_bias = scale_and_bias(
                    norm_weight_ptr, norm_bias_ptr, rstd_of(var, eps), c, c_ok
                )
            for tap in tl.static_range(TAPS * TAPS):
                in_y = out_y * STRIDE + (tap // TAPS - PAD)
                in_x = out_x * STRIDE + (tap % TAPS - PAD)
                inside = there & (in_y >= 0) & (in_y < H) & (in_x >= 0) & (in_x < W)
                inside = inside[:, None] & c_ok[None, :]
                at = (x_samples + (in_y * W + in_x) * C)[:, None] + c[None, :]
                x = tl.load(x_base + at, mask=inside, other=0.0)
                a = operand(normalized(x, mean, a_scale, a_bias, inside, outside), dtype)
                ck_ok = c_ok[:, None] & k_ok[None, :]
                if KEEP:
                    weight = weights[tap]
                else:
                    weight_at = k[None, :] * weight_stride_k + c[:, None] * weight_stride_c
                    weight = weight_tap(
                        weight_ptr, weight_at, ck_ok, weight_stride_h, weight_stride_w, tap, TAPS
                    )
                    weight = operand(weight, dtype)
                acc = product(a, weight, acc)
                if shortcut_weight_ptr is not None and tap == TAPS * PAD + PAD:
                    at = k[None, :] * shortcut_weight_stride_k
                    at += c[:, None] * shortcut_weight_stride_c
                    weight = tl.load(shortcut_weight_ptr + at, mask=ck_ok, other=0.0)
                    projected = product(a, operand(weight, dtype), projected)

        mk_ok = ok[:, None] & k_ok[None, :]
        m = m_start + tl.arange(0, BLOCK_M)
        # The chunk moves in 64 bits, and rows within it in 32.
        base = (pid * CHUNK).to(tl.int64) * K
        at = (m - pid * CHUNK)[:, None] * K + k[None, :]
        if shortcut_ptr is not None:
            tl.store(shortcut_ptr + base + at, projected.to(dtype), mask=mk_ok)
        y = acc * tl.cast(scale, tl.float32)
        if row_scale_ptr is not None:
            y *= tl.load(row_scale_ptr + first + n, mask=ok, other=0.0)[:, None]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + base + at, mask=mk_ok, other=0.0).to(tl.float32)
        y = y.to(dtype)
        tl.store(y_ptr + base + at, y, mask=mk_ok)
        if y_partial_ptr is not None:
            count = tl.minimum(end - m_start, BLOCK_M)
            y_mean, y_m2, seen = merge_tile(y, mk_ok, count, y_mean, y_m2, seen)
    if y_partial_ptr is not None:
        chunks = tl.num_programs(0)
        tl.store(y_partial_ptr + pid * K + k, y_mean, mask=k_ok)
        tl.store(y_partial_ptr + (chunks + pid) * K + k, y_m2, mask=k_ok)


def conv_pixels(shape: Sequence[int], weight: torch.Tensor, dtype: torch.dtype) -> Pixels:
    """How the pixels of a convolution's output [N, K, OH, OW] are cut."""
    N, K, OH, OW = shape
    return pixels(N * OH * OW, blocks_of(weight.shape[1], K, weight.shape[2], dtype).rows)


def conv_forward(
    x: torch.Tensor,
    index: torch.Tensor | None,
    stats: Stats,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    shortcut_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    scale: float,
    stride: int,
    eps: float,
    with_moments: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Moments | None]:
    """y, shortcut and y's moments.

    Args:
        x: [N, C, H, W], dense in NHWC.
        index: int64, contiguous: for each sample of y the sample of x, or -1; None: x's own.
        stats: of x, or of those samples of it that BatchNorm sees.
        norm_weight, norm_bias: [C] or None.
        weight: [K, C, 3, 3] or [K, C, 1, 1], any strides; shortcut_weight: [K, C, 1, 1] or None.
        residual: as y, dense in NHWC, or None.
        row_scale: fp32, one for each sample of y, a factor of scale; or None.
    """
    samples = x.shape[0] if index is None else index.shape[0]
    shape = conv2d_shape(x, weight, stride, samples)
    C, H, W = x.shape[1:]
    K = weight.shape[0]
    blocks = blocks_of(C, K, weight.shape[2], x.dtype)
    cut = conv_pixels(shape, weight, x.dtype)
    y = empty_nhwc(x, *shape)
    shortcut = None if shortcut_weight is None else torch.empty_like(y)
    y_moments = None
    if with_moments:
        partial = x.new_empty(2, cut.P, K, dtype=torch.float32)
        y_moments = Moments(partial, cut.chunk, cut.M)
    launch(
        _norm_relu_conv2d_fwd_kernel, (cut.P, cdiv(K, blocks.outer)),
        x, index, stats.partial, stats.mean, stats.var, norm_weight, norm_bias,
        weight, shortcut_weight, residual, row_scale,
        y, shortcut, None if y_moments is None else y_moments.partial,
        cut.M, cut.chunk, stats.rows, stats.P, stats.chunk, eps, scale,
        *weight.stride(), *(weight if shortcut_weight is None else shortcut_weight).stride()[:2],
        C=C, K=K, H=H, W=W, TAPS=weight.shape[2], STRIDE=stride,
        BLOCK_M=cut.BLOCK_M, BLOCK_C=blocks.inner, BLOCK_K=blocks.outer, BLOCK_P=BLOCK_P,
        KEEP=blocks.KEEP, num_warps=blocks.num_warps,
    )  # fmt: skip
    return y, shortcut, y_moments
