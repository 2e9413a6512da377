"""A convolution's backward from one reading of its gradient: by the input and by the weight.

    dz = conv^T(g) where the forward's ReLU let x pass,   slab[p] = sum over chunk p of a^T g

Both multiply what lies around an input pixel: dz by the weight's taps, the weight's gradient by
that pixel's own a = relu(norm(x)). So where the weight's gradient fits into registers, at stride 1
and few channels, a kernel leaves both; elsewhere dgrad and wgrad do.

Least bytes moved, with e bytes an element: e for each of x, dz and g, where g is made from a dz and
h twice, and 8 for each element of the slab.
"""

import torch
import triton
import triton.language as tl

from ._conv import (
    BLOCK_P,
    block_of,
    empty_nhwc,
    operand,
    pixels,
    product,
    sample_numbers,
    samples_at,
    tile_pixels,
)
from ._conv_dgrad import conv_dgrad
from ._conv_gradient import Input, Output, conv_gradient, lazy_norm
from ._conv_wgrad import conv_wgrad, slab_chunks
from ._integers import cdiv
from ._launch import family, launch
from ._normalize import passes, rstd_of, scale_and_bias, unknown_zero

# Channels on either side, by family, see there: registers hold three rows of taps' products, each
# of four times as many lanes as channels. fp32 takes twice as many. More spills.
FUSED_CHANNELS = {"tcgen05": 32, "wgmma": 32, "mma": 32, "hip": 16}
FUSED_DTYPES = (torch.float16, torch.bfloat16)
# Of a launch: each program has a product of its own in the slab. Not tuned yet, as BLOCK_M.
WARPS = 1056
BLOCK_M = 32


@triton.jit
def _tap_row(
    acc, dweight, a, weight, g_base, h_base, row_scale_ptr, samples, at, ok, zero,
    h_scale, h_slope, h_offset, TRAINING: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + g @ weight and dweight + a^T @ g, of a row of taps that lie side by side in g."""
    g = conv_gradient(
        g_base, h_base, row_scale_ptr, samples, at, ok, zero,
        h_scale, h_slope, h_offset, TRAINING,
    )  # fmt: skip
    g = operand(g, DTYPE)
    return product(g, weight, acc), product(a, g, dweight)


@triton.jit
def _norm_relu_conv2d_bwd_kernel(
    g_ptr, g_index_ptr, h_ptr, h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr,
    dh_weight_ptr, dh_bias_ptr, row_scale_ptr, weight_ptr,
    x_ptr, x_index_ptr, mean_ptr, var_ptr, norm_weight_ptr, norm_bias_ptr,
    dz_ptr, partial_ptr, slab_ptr,
    M, CHUNK, H_ROWS, H_P, eps, h_eps, scale, slab_stride,
    weight_stride_k, weight_stride_c, weight_stride_h, weight_stride_w,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dz [M, C] of a chunk of pixels, its two partial sums, and the chunk's a^T g at slab[chunk].

    Of a 3x3 convolution of stride 1. A lane of g is a tap of a row and a channel: lane j * BLOCK_K
    + k reads pixel x - 1 + j, which met the tap 2 - j; the fourth j is none.
    """
    dtype: tl.constexpr = dz_ptr.dtype.element_ty
    LANES: tl.constexpr = 4 * BLOCK_K
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    c_ok = c < C
    mean = tl.load(mean_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=c_ok, other=1.0).to(tl.float32)
    z_scale, z_bias = scale_and_bias(norm_weight_ptr, norm_bias_ptr, rstd_of(var, eps), c, c_ok)
    lanes = tl.arange(0, LANES)
    j, k = lanes // BLOCK_K, lanes % BLOCK_K
    k_ok = (j < 3) & (k < K)
    h_scale = tl.zeros([LANES], tl.float32)
    h_slope, h_offset = h_scale, h_scale
    if h_ptr is not None:
        h_scale, h_slope, h_offset = lazy_norm(
            h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr, dh_weight_ptr, dh_bias_ptr,
            k, k_ok, H_ROWS, K, H_P, h_eps, pid == 0, TRAINING, BLOCK_P,
        )  # fmt: skip
    weight_at = k * weight_stride_k + (2 - j) * weight_stride_w
    weight_at = weight_at[:, None] + c[None, :] * weight_stride_c
    weight_ok = k_ok[:, None] & c_ok[None, :]
    weight_ptrs = weight_ptr + weight_at
    weight0 = operand(tl.load(weight_ptrs, mask=weight_ok, other=0.0), dtype)
    weight_ptrs += weight_stride_h
    weight1 = operand(tl.load(weight_ptrs, mask=weight_ok, other=0.0), dtype)
    weight_ptrs += weight_stride_h
    weight2 = operand(tl.load(weight_ptrs, mask=weight_ok, other=0.0), dtype)
    zero = unknown_zero(eps, dtype)
    scale = tl.cast(scale, tl.float32)
    dweight0 = tl.zeros([BLOCK_C, LANES], tl.float32)
    dweight1, dweight2 = dweight0, dweight0
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dzx = sum_dz
    end = tl.minimum((pid + 1) * CHUNK, M)
    for m_start in tl.range(pid * CHUNK, end, BLOCK_M, num_stages=1):
        first, n, y, x, ok = tile_pixels(m_start, end, W, H * W, BLOCK_M)
        mc_ok = ok[:, None] & c_ok[None, :]
        pixel = (y * W + x) * C
        x_base, x_samples = samples_at(x_ptr, x_index_ptr, first, n, ok, H * W * C)
        v = tl.load(x_base + (x_samples + pixel)[:, None] + c[None, :], mask=mc_ok, other=0.0)
        v = v.to(tl.float32) - mean[None, :]
        z = v * z_scale[None, :] + z_bias[None, :]
        kept = passes(z) & mc_ok
        a = tl.trans(operand(tl.where(kept, z, zero), dtype))
        g_base, g_samples = samples_at(g_ptr, g_index_ptr, first, n, ok, H * W * K)
        h_base = h_ptr
        if h_ptr is not None:
            h_base, _ = samples_at(h_ptr, g_index_ptr, first, n, ok, H * W * K)
        samples = sample_numbers(g_index_ptr, first, n, ok)
        g_x = x[:, None] + (j - 1)[None, :]
        g_ok = (samples >= 0)[:, None] & k_ok[None, :] & (g_x >= 0) & (g_x < W)
        at = (g_samples + (y * W + x) * K)[:, None] + ((j - 1) * K + k)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        # The row of taps 0 met the row of pixels below.
        acc, dweight0 = _tap_row(
            acc, dweight0, a, weight0, g_base, h_base, row_scale_ptr, samples, at + W * K,
            g_ok & (y < H - 1)[:, None], zero, h_scale, h_slope, h_offset, TRAINING, dtype,
        )  # fmt: skip
        acc, dweight1 = _tap_row(
            acc, dweight1, a, weight1, g_base, h_base, row_scale_ptr, samples, at,
            g_ok, zero, h_scale, h_slope, h_offset, TRAINING, dtype,
        )  # fmt: skip
        acc, dweight2 = _tap_row(
            acc, dweight2, a, weight2, g_base, h_base, row_scale_ptr, samples, at - W * K,
            g_ok & (y > 0)[:, None], zero, h_scale, h_slope, h_offset, TRAINING, dtype,
        )  # fmt: skip

        acc *= scale
        dz = tl.where(kept, acc, zero).to(dtype)
        dz_base, dz_samples = samples_at(dz_ptr, None, first, n, ok, H * W * C)
        tl.store(dz_base + (dz_samples + pixel)[:, None] + c[None, :], dz, mask=mc_ok)
        dz = dz.to(tl.float32)
        sum_dz += tl.sum(dz, 0)
        sum_dzx += tl.sum(tl.where(mc_ok, dz * v, 0.0), 0)
    P = tl.num_programs(0)
    tl.store(partial_ptr + pid * C + c, sum_dz, mask=c_ok)
    tl.store(partial_ptr + (P + pid) * C + c, sum_dzx, mask=c_ok)
    slab_ptrs = slab_ptr + pid.to(tl.int64) * slab_stride + tl.trans(weight_at)
    slab_ok = tl.trans(weight_ok)
    tl.store(slab_ptrs, dweight0 * scale, mask=slab_ok)
    tl.store(slab_ptrs + weight_stride_h, dweight1 * scale, mask=slab_ok)
    tl.store(slab_ptrs + 2 * weight_stride_h, dweight2 * scale, mask=slab_ok)


def fuses(weight: torch.Tensor, stride: int, kept: int, dtype: torch.dtype) -> bool:
    """Whether one kernel leaves both gradients, `kept` output channels being multiplied.

    dtype: of the activations.
    """
    K, C, taps, _ = weight.shape
    fits = dtype in FUSED_DTYPES and max(C, K) <= FUSED_CHANNELS[family()]
    return taps == 3 and stride == 1 and kept == K and fits


def _num_warps(weight: torch.Tensor) -> int:
    return 8 if max(weight.shape[:2]) > 16 else 4


def chunks(weight: torch.Tensor, stride: int, kept: int, M: int, dtype: torch.dtype) -> int:
    """How many chunks of a convolution's M output pixels have a product of their own in a slab."""
    if not fuses(weight, stride, kept, dtype):
        return slab_chunks(weight, M, dtype)
    tiles = cdiv(M, BLOCK_M)
    each = cdiv(tiles, WARPS // _num_warps(weight))
    return cdiv(tiles, each)


def conv_backward(
    into: Input,
    out: Output,
    weight: torch.Tensor,
    stride: int,
    samples: int,
    slab: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What conv_dgrad returns, and slab written as conv_wgrad does."""
    if not fuses(weight, stride, out.inner, into.x.dtype):
        conv_wgrad(into, out, weight, stride, samples, slab)
        return conv_dgrad(into, out, weight, stride, samples)
    C, H, W = into.x.shape[1:]
    K = weight.shape[0]
    cut = pixels(samples * H * W, BLOCK_M, P=slab.shape[0])
    dz = empty_nhwc(into.x, samples, C, H, W)
    sums = dz.new_empty(2, cut.P, C, dtype=torch.float32)
    rows, partials, h_eps = out.numbers
    launch(
        _norm_relu_conv2d_bwd_kernel, (cut.P,),
        *out.tensors, out.dweight, out.dbias, out.row_scale, weight,
        into.x, into.index, *into.norm.vectors, dz, sums, slab,
        cut.M, cut.chunk, rows, partials, into.norm.eps, h_eps, out.scale,
        slab.stride(0), *weight.stride(),
        C=C, K=K, H=H, W=W, TRAINING=out.training,
        BLOCK_M=cut.BLOCK_M, BLOCK_C=block_of(C), BLOCK_K=block_of(K), BLOCK_P=BLOCK_P,
        num_warps=_num_warps(weight),
    )  # fmt: skip
    return dz, sums
