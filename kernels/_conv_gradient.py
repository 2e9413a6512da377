"""The gradient at a convolution's output, and what a convolution's backward goes by.

It is dy times the residual branch's scale; or the backward of the BatchNorm that follows, which
nobody stores: made from its dz and its input h wherever it is read, zero outside the image after
that, not before.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._moments import Stats, sum_partials
from ._normalize import rstd_of, scale_and_bias


@triton.jit
def lazy_norm(
    partial_ptr, mean_ptr, var_ptr, weight_ptr, dweight_ptr, dbias_ptr, k, k_ok, ROWS, K, P, eps,
    writes, TRAINING: tl.constexpr, BLOCK_P: tl.constexpr, factor_ptr=None,
):  # fmt: skip
    """scale, slope and offset of BatchNorm's backward g = scale * dz + slope * h + offset.

    partial_ptr: [2, P, K], sums of dz and of dz * (h - mean). In evaluation slope and offset are
    0. By who writes also dweight and dbias. factor_ptr: a scalar, a factor of the sums.
    """
    mean = tl.load(mean_ptr + k, mask=k_ok, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + k, mask=k_ok, other=1.0).to(tl.float32)
    rstd = rstd_of(var, eps)
    scale, _ = scale_and_bias(weight_ptr, None, rstd, k, k_ok)
    sum_dz = sum_partials(partial_ptr, k, k_ok, K, P, BLOCK_P)
    sum_dzh = sum_partials(partial_ptr + P * K, k, k_ok, K, P, BLOCK_P)
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
        sum_dz *= factor
        sum_dzh *= factor
    if writes:
        if dweight_ptr is not None:
            dweight = (sum_dzh * rstd).to(dweight_ptr.dtype.element_ty)
            tl.store(dweight_ptr + k, dweight, mask=k_ok)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + k, sum_dz.to(dbias_ptr.dtype.element_ty), mask=k_ok)
    slope = tl.zeros_like(scale)
    offset = slope
    if TRAINING:
        slope = -scale * (rstd * rstd * (sum_dzh / ROWS))
        # Not centred: what slope * h loses to a large mean is of a correction, not of dz.
        offset = -scale * (sum_dz / ROWS) - slope * mean
    return scale, slope, offset


@triton.jit
def conv_gradient(
    g_base, h_base, row_scale_ptr, samples, at, ok, zero, scale, slope, offset,
    TRAINING: tl.constexpr,
):  # fmt: skip
    """g [BLOCK_M, BLOCK_K] at element offsets `at`, 0 where not ok, both of g's shape.

    With h_base from dz at g_base, in fp32; else dy as it is stored, or times row_scale[samples] in
    fp32: a factor that all have is left to the product's own epilogue. zero: unknown_zero's.
    """
    g = tl.load(g_base + at, mask=ok, other=0.0)
    if h_base is not None:
        g = g.to(tl.float32) * scale[None, :]
        if TRAINING:
            h = tl.load(h_base + at, mask=ok, other=0.0).to(tl.float32)
            g += h * slope[None, :] + offset[None, :]
        g = tl.where(ok, g, zero)
    elif row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + samples, mask=samples >= 0, other=0.0)
        g = g.to(tl.float32) * row_scale[:, None]
    return g


@dataclass(frozen=True)
class Norm:
    """A BatchNorm: of an input x [N, C, H, W], or of the samples that index names.

    Args:
        stats: its mean and var, merged already; rows: pixels that they were taken over.
        weight, bias: [C] or None.
        training: whether the statistics are the batch's, and so part of the gradient.
    """

    stats: Stats
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    training: bool

    @property
    def vectors(self) -> tuple[torch.Tensor | None, ...]:
        return self.stats.mean, self.stats.var, self.weight, self.bias


@dataclass(frozen=True)
class Input:
    """A convolution's input, before normalisation; index: its samples, -1 for none, or None."""

    x: torch.Tensor
    index: torch.Tensor | None
    norm: Norm


@dataclass(frozen=True)
class Output:
    """What comes to a convolution's output.

    Args:
        g: dy, or dz of the BatchNorm that follows.
        index: int64, the sample of g for each of the convolution's, or -1; None: its own.
        scale, row_scale: factors of dy, row_scale fp32 [samples of g] or None.
        norm, h, sums: with dz the BatchNorm, its input, and [2, P, K] fp32, sums of dz and of
            dz * (h - mean).
        dweight, dbias: that BatchNorm's, written by the dgrad, or with an order by select.
        order: int32 [K], channels of g by size, of which the first `kept` are multiplied; or None.
    """

    g: torch.Tensor
    index: torch.Tensor | None = None
    scale: float = 1.0
    row_scale: torch.Tensor | None = None
    norm: Norm | None = None
    h: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    dweight: torch.Tensor | None = None
    dbias: torch.Tensor | None = None
    order: torch.Tensor | None = None
    kept: int = 0

    @property
    def inner(self) -> int:
        """Channels that are multiplied."""
        return self.g.shape[1] if self.order is None else self.kept

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        mean, var, weight, _ = (None,) * 4 if self.norm is None else self.norm.vectors
        return self.g, self.index, self.h, self.sums, mean, var, weight

    @property
    def numbers(self) -> tuple[int, int, float]:
        """Rows and partials of the norm, and its eps."""
        if self.norm is None or self.sums is None:
            return 0, 0, 0.0
        return self.norm.stats.rows, self.sums.shape[1], self.norm.eps

    @property
    def training(self) -> bool:
        return self.norm is not None and self.norm.training
