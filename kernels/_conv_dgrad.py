"""A convolution's gradient by its input, through the ReLU before it, and BatchNorm's two sums.

    dz = conv^T(g) where the forward's ReLU let x pass;   sums of dz and of dz * (x - mean)

Least bytes moved, with e bytes an element: e for each of x, dz and g; where g is made
from a dz and h it counts twice.
"""

import torch
import triton
import triton.language as tl

from ._conv import (
    BLOCK_P,
    blocks_of,
    channels_at,
    empty_nhwc,
    merges,
    operand,
    pixels,
    product,
    sample_numbers,
    samples_at,
    tile_pixels,
    weight_tap,
    weight_taps,
)
from ._conv_gradient import Input, Output, conv_gradient, lazy_norm
from ._integers import cdiv
from ._launch import launch
from ._moments import merged_sums
from ._normalize import passes, rstd_of, scale_and_bias, unknown_zero


@triton.jit
def _dgrad_tap(
    acc, weight, g_base, h_base, row_scale_ptr, samples, g_samples, ok, at_y, at_x, zero,
    h_scale, h_slope, h_offset, k, k_ok,
    K: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, TRAINING: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + g @ weight of one tap, g at the output pixel (at_y, at_x) of every row."""
    inside = ok & (at_y >= 0) & (at_y < OH) & (at_x >= 0) & (at_x < OW)
    at = (g_samples + (at_y * OW + at_x) * K)[:, None] + k[None, :]
    g = conv_gradient(
        g_base, h_base, row_scale_ptr, samples, at, inside[:, None] & k_ok[None, :], zero,
        h_scale, h_slope, h_offset, TRAINING,
    )  # fmt: skip
    return product(operand(g, DTYPE), weight, acc)


@triton.jit
def _norm_relu_conv2d_dgrad_kernel(
    g_ptr, g_index_ptr, h_ptr, h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr,
    dh_weight_ptr, dh_bias_ptr, row_scale_ptr, order_ptr, weight_ptr,
    dshortcut_ptr, shortcut_order_ptr, shortcut_weight_ptr,
    x_ptr, x_index_ptr, mean_ptr, var_ptr, norm_weight_ptr, norm_bias_ptr, dz_ptr, partial_ptr,
    M, CHUNK, H_ROWS, H_P, eps, h_eps, scale,
    weight_stride_k, weight_stride_c, weight_stride_h, weight_stride_w,
    shortcut_weight_stride_k, shortcut_weight_stride_c,
    C: tl.constexpr, K: tl.constexpr, KEPT: tl.constexpr, SHORTCUT_KEPT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    STRIDE: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """dz [M, C] of a chunk of input pixels, C's block program_id(1), and its two partial sums.

    At stride 2 a program takes the pixels of one parity, program_id(2), which all have the same
    taps. x_index_ptr and g_index_ptr name the samples of x and of g for each sample of dz; where
    that of g is -1 no gradient comes. dshortcut, at the output of the projection, is of dz's
    samples, and adds its own through shortcut_weight.
    """
    dtype: tl.constexpr = dz_ptr.dtype.element_ty
    PAD: tl.constexpr = TAPS // 2
    OH: tl.constexpr = (H - 1) // STRIDE + 1
    OW: tl.constexpr = (W - 1) // STRIDE + 1
    ONE_BLOCK: tl.constexpr = KEPT <= BLOCK_K
    pid = tl.program_id(0)
    parity = tl.program_id(2)
    odd_y, odd_x = parity // STRIDE, parity % STRIDE
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mean = tl.load(mean_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=c_ok, other=1.0).to(tl.float32)
    z_scale, z_bias = scale_and_bias(norm_weight_ptr, norm_bias_ptr, rstd_of(var, eps), c, c_ok)
    h_scale = tl.zeros([BLOCK_K], tl.float32)
    h_slope, h_offset = h_scale, h_scale
    if h_ptr is not None and ONE_BLOCK:
        lanes = tl.arange(0, BLOCK_K)
        k = channels_at(order_ptr, lanes, lanes < KEPT)
        writes = (pid == 0) & (tl.program_id(1) == 0) & (parity == 0)
        h_scale, h_slope, h_offset = lazy_norm(
            h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr, dh_weight_ptr, dh_bias_ptr,
            k, lanes < KEPT, H_ROWS, K, H_P, h_eps, writes, TRAINING, BLOCK_P,
        )  # fmt: skip
    if KEEP:
        lanes = tl.arange(0, BLOCK_K)
        k = channels_at(order_ptr, lanes, lanes < KEPT)
        weight_ok = (lanes < KEPT)[:, None] & c_ok[None, :]
        weight_at = k[:, None] * weight_stride_k + c[None, :] * weight_stride_c
        weights = weight_taps(
            weight_ptr, weight_at, weight_ok, weight_stride_h, weight_stride_w, dtype, TAPS
        )
    zero = unknown_zero(eps, dtype)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dzx = sum_dz
    end = tl.minimum((pid + 1) * CHUNK, M)
    for m_start in tl.range(pid * CHUNK, end, BLOCK_M, num_stages=1):
        # A tile holds output pixels; at stride 2 each stands for the input pixel of its parity.
        first, n, out_y, out_x, ok = tile_pixels(m_start, end, OW, OH * OW, BLOCK_M)
        in_y, in_x = out_y * STRIDE + odd_y, out_x * STRIDE + odd_x
        if STRIDE > 1:
            ok = ok & (in_y < H) & (in_x < W)
        g_base, g_samples = samples_at(g_ptr, g_index_ptr, first, n, ok, OH * OW * K)
        h_base = h_ptr
        if h_ptr is not None:
            h_base, _ = samples_at(h_ptr, g_index_ptr, first, n, ok, OH * OW * K)
        samples = sample_numbers(g_index_ptr, first, n, ok)
        acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for k_start in tl.range(0, KEPT, BLOCK_K, num_stages=1):
            lanes = k_start + tl.arange(0, BLOCK_K)
            k_ok = lanes < KEPT
            k = channels_at(order_ptr, lanes, k_ok)
            if h_ptr is not None and not ONE_BLOCK:
                writes = (pid == 0) & (tl.program_id(1) == 0) & (parity == 0)
                h_scale, h_slope, h_offset = lazy_norm(
                    h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr, dh_weight_ptr, dh_bias_ptr,
                    k, k_ok, H_ROWS, K, H_P, h_eps, writes & (m_start == 0), TRAINING, BLOCK_P,
                )  # fmt: skip
            weight_ok = k_ok[:, None] & c_ok[None, :]
            for tap in tl.static_range(TAPS * TAPS):
                tap_y, tap_x = tap // TAPS - PAD, tap % TAPS - PAD
                # Whether a pixel of this parity meets this tap; at stride 1 every one does.
                if ((odd_y - tap_y) % STRIDE == 0) & ((odd_x - tap_x) % STRIDE == 0):
                    if KEEP:
                        weight = weights[tap]
                    else:
                        weight_at = k[:, None] * weight_stride_k + c[None, :] * weight_stride_c
                        weight = weight_tap(
                            weight_ptr, weight_at, weight_ok, weight_stride_h, weight_stride_w,
                            tap, TAPS,
                        )  # fmt: skip
                        weight = operand(weight, dtype)
                    acc = _dgrad_tap(
                        acc, weight, g_base, h_base, row_scale_ptr, samples, g_samples,
                        samples >= 0, out_y + (odd_y - tap_y) // STRIDE,
                        out_x + (odd_x - tap_x) // STRIDE, zero, h_scale, h_slope, h_offset,
                        k, k_ok, K, OH, OW, TRAINING, dtype,
                    )  # fmt: skip
        # The sum, since after a bare product an fp32 build for sm_90 spills 8 bytes.
        acc = acc * tl.cast(scale, tl.float32) + 0.0
        if dshortcut_ptr is not None:
            if parity == 0:
                base, at_samples = samples_at(dshortcut_ptr, None, first, n, ok, OH * OW * K)
                for k_start in tl.range(0, SHORTCUT_KEPT, BLOCK_K, num_stages=1):
                    lanes = k_start + tl.arange(0, BLOCK_K)
                    k_ok = lanes < SHORTCUT_KEPT
                    k = channels_at(shortcut_order_ptr, lanes, k_ok)
                    at = k[:, None] * shortcut_weight_stride_k
                    at += c[None, :] * shortcut_weight_stride_c
                    weight_ok = k_ok[:, None] & c_ok[None, :]
                    projection = tl.load(shortcut_weight_ptr + at, mask=weight_ok, other=0.0)
                    acc = _dgrad_tap(
                        acc, operand(projection, dtype), base, None, None, samples, at_samples, ok,
                        out_y, out_x, zero, h_scale, h_slope, h_offset, k, k_ok,
                        K, OH, OW, TRAINING, dtype,
                    )  # fmt: skip

        mc_ok = ok[:, None] & c_ok[None, :]
        pixel = (in_y * W + in_x) * C
        x_base, x_samples = samples_at(x_ptr, x_index_ptr, first, n, ok, H * W * C)
        at = (x_samples + pixel)[:, None] + c[None, :]
        x = tl.load(x_base + at, mask=mc_ok, other=0.0).to(tl.float32) - mean[None, :]
        kept = passes(x * z_scale[None, :] + z_bias[None, :]) & mc_ok
        dz = tl.where(kept, acc, 0.0).to(dtype)
        dz_base, dz_samples = samples_at(dz_ptr, None, first, n, ok, H * W * C)
        tl.store(dz_base + (dz_samples + pixel)[:, None] + c[None, :], dz, mask=mc_ok)
        dz = dz.to(tl.float32)
        sum_dz += tl.sum(dz, 0)
        sum_dzx += tl.sum(tl.where(mc_ok, dz * x, 0.0), 0)
    # [2, P, C], where P counts the parities, too.
    P = tl.num_programs(0) * tl.num_programs(2)
    row = pid * tl.num_programs(2) + parity
    tl.store(partial_ptr + row * C + c, sum_dz, mask=c_ok)
    tl.store(partial_ptr + (P + row) * C + c, sum_dzx, mask=c_ok)


def conv_dgrad(
    into: Input,
    out: Output,
    weight: torch.Tensor,
    stride: int,
    samples: int,
    shortcut: Output | None = None,
    shortcut_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz [samples, C, H, W], and sums [2, P, C] fp32 of dz and of dz * (x - mean).

    shortcut: what comes to the output of a 1x1 convolution of the same input, or None.
    """
    C, H, W = into.x.shape[1:]
    K, OH, OW = weight.shape[0], (H - 1) // stride + 1, (W - 1) // stride + 1
    blocks = blocks_of(out.inner, C, weight.shape[2], into.x.dtype)
    cut = pixels(samples * OH * OW, blocks.rows, stride * stride)
    dz = empty_nhwc(into.x, samples, C, H, W)
    sums = dz.new_empty(2, cut.P * stride * stride, C, dtype=torch.float32)
    projection = weight if shortcut_weight is None else shortcut_weight
    rows, partials, h_eps = out.numbers
    launch(
        _norm_relu_conv2d_dgrad_kernel, (cut.P, cdiv(C, blocks.outer), stride * stride),
        *out.tensors, out.dweight, out.dbias, out.row_scale, out.order, weight,
        *((None, None) if shortcut is None else (shortcut.g, shortcut.order)), shortcut_weight,
        into.x, into.index, *into.norm.vectors, dz, sums,
        cut.M, cut.chunk, rows, partials, into.norm.eps, h_eps, out.scale,
        *weight.stride(), *projection.stride()[:2],
        C=C, K=K, KEPT=out.inner, SHORTCUT_KEPT=0 if shortcut is None else shortcut.inner,
        H=H, W=W, TAPS=weight.shape[2], STRIDE=stride, TRAINING=out.training,
        BLOCK_M=cut.BLOCK_M, BLOCK_C=blocks.outer, BLOCK_K=blocks.inner, BLOCK_P=BLOCK_P,
        KEEP=blocks.KEEP, num_warps=blocks.num_warps,
    )  # fmt: skip
    return dz, sums if merges(C, dz.dtype) else merged_sums(sums)[:, None]
