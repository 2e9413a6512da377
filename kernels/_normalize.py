"""Normalisation and ReLU as a kernel's prologue: statistics, coefficients, and the ReLU's mask."""

import triton
import triton.language as tl

from ._moments import merge_moments


@triton.jit
def passes(z):
    """Where ReLU's gradient passes. NaN passes, as in torch.relu."""
    return (z <= 0.0) == 0


@triton.jit
def rstd_of(var, eps):
    """1 / sqrt(var + eps), each step correctly rounded: per channel, precision costs nothing."""
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def scale_and_bias(weight_ptr, bias_ptr, rstd, c, c_ok):
    """rstd * weight and bias [BLOCK_C] in fp32; 1 and 0 where there are none."""
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    bias = tl.zeros_like(rstd)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    return scale, bias


@triton.jit
def batch_stats(
    partial_ptr, mean_ptr, var_ptr, c, c_ok, M, C, P, CHUNK, writes, BLOCK_P: tl.constexpr
):
    """mean and var [BLOCK_C] fp32: merged from partials and, by who writes, stored; else loaded."""
    if partial_ptr is not None:
        mean, var = merge_moments(partial_ptr, c, c_ok, M, C, P, CHUNK, BLOCK_P)
        if writes:
            tl.store(mean_ptr + c, mean, mask=c_ok)
            tl.store(var_ptr + c, var, mask=c_ok)
    else:
        mean = tl.load(mean_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
        var = tl.load(var_ptr + c, mask=c_ok, other=1.0).to(tl.float32)
    return mean, var


@triton.jit
def normalized(x, mean, scale, bias, inside):
    """relu((x - mean) * scale + bias) of a tile in fp32, and 0 outside the image."""
    z = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    return tl.where(inside & passes(z), z, 0.0)
