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
    # A number from Python, as in every kernel here, is cast: before 2.15 Inductor types it fp64.
    return tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))


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
def unknown_zero(v, DTYPE: tl.constexpr):
    """0.0, of a finite scalar v, for a mask over fp32 numbers that are then rounded to DTYPE.

    Of a constant the compiler knows that it can be selected after the rounding as well, and does:
    it takes apart what it rounded in pairs, selects one half at a time, and packs them anew.
    """
    if DTYPE == tl.float32:
        return 0.0
    else:
        v = tl.cast(v, tl.float32)
        return v - v


@triton.jit
def normalized(x, mean, scale, bias, inside, outside):
    """relu((x - mean) * scale + bias) of a tile in fp32; outside of the image `outside`, a zero."""
    z = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    # In this order the rounding to a half that follows on a GPU is the ReLU, too.
    return tl.maximum(tl.where(inside, z, outside), 0.0, propagate_nan=tl.PropagateNan.ALL)
