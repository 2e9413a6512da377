"""BatchNorm, an optional residual add, and ReLU, forward and backward.

    z = (x - mean) * (rstd * weight) + bias + residual,   y = max(z, 0)

Two kernels a direction. The first reduces each of P chunks of rows to per-channel partials; the
second merges the partials in its prologue (P * BLOCK_C is bounded, so that this stays a few tens of
KB from L2) and streams the rows. No atomics: the order of every sum is fixed by the shape.

Least bytes moved in training, with e bytes an element: forward 3e (x twice, y), backward 5e (dy and
x twice, dx); a residual adds e each way and, for the ReLU's mask, a bit forward and two backward.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._moments import (
    BLOCK_P,
    MAX_CHUNKS,
    moments,
    sum_partials,
    update_every_running,
    update_running,
    update_two_running,
)
from ._normalize import batch_stats, passes, rstd_of, scale_and_bias
from ._tiles import (
    MAX_PROGRAMS,
    as_rows,
    bits_shape,
    empty_dense,
    load_bits,
    store_bits,
    tile_mask,
    tile_offsets,
    tiling,
)

__all__ = [
    "batch_norm_relu_bwd",
    "batch_norm_relu_fwd",
    "empty_grads",
    "empty_outputs",
    "update_every_running",
    "update_running",
    "update_two_running",
]


@triton.jit
def _expand(v, M_AXIS: tl.constexpr):
    """A per-channel vector laid across a tile."""
    return tl.expand_dims(v, M_AXIS)


@triton.jit
def _batch_norm_relu_fwd_kernel(
    x_ptr, index_ptr, residual_ptr, weight_ptr, bias_ptr, partial_ptr, mean_ptr, var_ptr,
    y_ptr, mask_ptr,
    M, C, S, CHUNK, P, P_CHUNK, eps,
    x_stride_n, x_stride_s, x_stride_c,
    residual_stride_n, residual_stride_s, residual_stride_c,
    y_stride_n, y_stride_s, y_stride_c,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    M_AXIS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) * (rstd * weight) + bias + residual).

    With partials (training) merges them and stores mean and var; without (eval) loads the two.
    With mask_ptr stores a bit an element, set where the gradient passes. With index_ptr x is
    x[index], gathered as it is read.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mean, var = batch_stats(
        partial_ptr, mean_ptr, var_ptr, c, c_ok, M, C, P, P_CHUNK, tl.program_id(0) == 0, BLOCK_P
    )
    scale, bias = scale_and_bias(weight_ptr, bias_ptr, rstd_of(var, eps), c, c_ok)
    mean, scale, bias = _expand(mean, M_AXIS), _expand(scale, M_AXIS), _expand(bias, M_AXIS)

    start, lanes = tl.program_id(0) * CHUNK, tl.arange(0, BLOCK_M)
    if WIDE:
        start = tl.program_id(0).to(tl.int64) * CHUNK
        lanes, c = lanes.to(tl.int64), c.to(tl.int64)
    end = tl.minimum(start + CHUNK, M)
    for m_start in range(start, end, BLOCK_M):
        m = m_start + lanes
        ok = tile_mask(m < end, c_ok, M_AXIS)
        x_offsets = tile_offsets(
            m, c, S, x_stride_n, x_stride_s, x_stride_c, M_AXIS, FLAT, index_ptr, end
        )
        x = tl.load(x_ptr + x_offsets, mask=ok, other=0.0).to(tl.float32)
        z = (x - mean) * scale + bias
        if residual_ptr is not None:
            residual_offsets = tile_offsets(
                m, c, S, residual_stride_n, residual_stride_s, residual_stride_c, M_AXIS, FLAT
            )
            z += tl.load(residual_ptr + residual_offsets, mask=ok, other=0.0).to(tl.float32)
        if RELU:
            kept = passes(z)
            z = tl.where(kept, z, 0.0)
            if mask_ptr is not None:
                store_bits(mask_ptr, kept, m_start, c, M, C, M_AXIS, BLOCK_M, BLOCK_C)
        y_offsets = tile_offsets(m, c, S, y_stride_n, y_stride_s, y_stride_c, M_AXIS, FLAT)
        tl.store(y_ptr + y_offsets, z.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _batch_norm_relu_sums_bwd_kernel(
    dy_ptr, x_ptr, index_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, mask_ptr, partial_ptr,
    M, C, S, CHUNK, eps,
    dy_stride_n, dy_stride_s, dy_stride_c,
    x_stride_n, x_stride_s, x_stride_c,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    M_AXIS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """partial [2, P, C] fp32: sum of dz and sum of dz * (x - mean) over each chunk of rows."""
    pid, P = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mean = tl.load(mean_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=c_ok, other=1.0).to(tl.float32)
    scale, bias = scale_and_bias(weight_ptr, bias_ptr, rstd_of(var, eps), c, c_ok)
    mean, scale, bias = _expand(mean, M_AXIS), _expand(scale, M_AXIS), _expand(bias, M_AXIS)

    start, lanes, c_wide = pid * CHUNK, tl.arange(0, BLOCK_M), c
    if WIDE:
        start, lanes, c_wide = pid.to(tl.int64) * CHUNK, lanes.to(tl.int64), c.to(tl.int64)
    end = tl.minimum(start + CHUNK, M)
    if M_AXIS == 0:
        sum_dz = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    else:
        sum_dz = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    sum_dzx = sum_dz
    for m_start in range(start, end, BLOCK_M):
        m = m_start + lanes
        ok = tile_mask(m < end, c_ok, M_AXIS)
        x_offsets = tile_offsets(
            m, c_wide, S, x_stride_n, x_stride_s, x_stride_c, M_AXIS, FLAT, index_ptr, end
        )
        dy_offsets = tile_offsets(m, c_wide, S, dy_stride_n, dy_stride_s, dy_stride_c, M_AXIS, FLAT)
        x = tl.load(x_ptr + x_offsets, mask=ok, other=0.0).to(tl.float32) - mean
        dz = tl.load(dy_ptr + dy_offsets, mask=ok, other=0.0).to(tl.float32)
        if RELU:
            if mask_ptr is not None:
                kept = load_bits(mask_ptr, m_start, c_wide, M, C, M_AXIS, BLOCK_M, BLOCK_C)
            else:
                kept = passes(x * scale + bias)
            dz = tl.where(kept, dz, 0.0)
        sum_dz += dz
        sum_dzx += tl.where(ok, dz * x, 0.0)
    tl.store(partial_ptr + pid * C + c, tl.sum(sum_dz, M_AXIS), mask=c_ok)
    tl.store(partial_ptr + (P + pid) * C + c, tl.sum(sum_dzx, M_AXIS), mask=c_ok)


@triton.jit
def _batch_norm_relu_bwd_kernel(
    dy_ptr, x_ptr, index_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, mask_ptr, partial_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    M, C, S, CHUNK, P, eps,
    dy_stride_n, dy_stride_s, dy_stride_c,
    x_stride_n, x_stride_s, x_stride_c,
    dx_stride_n, dx_stride_s, dx_stride_c,
    RELU: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    M_AXIS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx = weight * rstd * (dz - sum(dz) / M - (x - mean) * rstd^2 * sum(dz * (x - mean)) / M).

    In eval mode the two sums are no part of dx. dresidual = dz, with dx's strides; dweight =
    rstd * sum(dz * (x - mean)); dbias = sum(dz). Each is written where its pointer is given. With
    index_ptr x and dx are x[index] and dx[index], and there is no residual.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mean = tl.load(mean_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=c_ok, other=1.0).to(tl.float32)
    rstd = rstd_of(var, eps)
    scale, bias = scale_and_bias(weight_ptr, bias_ptr, rstd, c, c_ok)
    mean_dz = tl.zeros_like(scale)
    slope = mean_dz
    if partial_ptr is not None:
        sum_dz = sum_partials(partial_ptr, c, c_ok, C, P, BLOCK_P)
        sum_dzx = sum_partials(partial_ptr + P * C, c, c_ok, C, P, BLOCK_P)
        if tl.program_id(0) == 0:
            if dweight_ptr is not None:
                dweight = (sum_dzx * rstd).to(dweight_ptr.dtype.element_ty)
                tl.store(dweight_ptr + c, dweight, mask=c_ok)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + c, sum_dz.to(dbias_ptr.dtype.element_ty), mask=c_ok)
        if TRAINING:
            mean_dz = sum_dz / M
            slope = rstd * rstd * (sum_dzx / M)
    mean, scale, bias = _expand(mean, M_AXIS), _expand(scale, M_AXIS), _expand(bias, M_AXIS)
    mean_dz, slope = _expand(mean_dz, M_AXIS), _expand(slope, M_AXIS)

    start, lanes = tl.program_id(0) * CHUNK, tl.arange(0, BLOCK_M)
    if WIDE:
        start = tl.program_id(0).to(tl.int64) * CHUNK
        lanes, c = lanes.to(tl.int64), c.to(tl.int64)
    end = tl.minimum(start + CHUNK, M)
    for m_start in range(start, end, BLOCK_M):
        m = m_start + lanes
        ok = tile_mask(m < end, c_ok, M_AXIS)
        dy_offsets = tile_offsets(m, c, S, dy_stride_n, dy_stride_s, dy_stride_c, M_AXIS, FLAT)
        dx_offsets = tile_offsets(
            m, c, S, dx_stride_n, dx_stride_s, dx_stride_c, M_AXIS, FLAT, index_ptr, end
        )
        dz = tl.load(dy_ptr + dy_offsets, mask=ok, other=0.0).to(tl.float32)
        x_offsets = tile_offsets(
            m, c, S, x_stride_n, x_stride_s, x_stride_c, M_AXIS, FLAT, index_ptr, end
        )
        x = tl.load(x_ptr + x_offsets, mask=ok, other=0.0).to(tl.float32) - mean
        if RELU:
            if mask_ptr is not None:
                kept = load_bits(mask_ptr, m_start, c, M, C, M_AXIS, BLOCK_M, BLOCK_C)
            else:
                kept = passes(x * scale + bias)
            dz = tl.where(kept, dz, 0.0)
        if dresidual_ptr is not None:
            dresidual = dz.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + dx_offsets, dresidual, mask=ok)
        if dx_ptr is not None:
            # In eval mode x has no part in dx, and a NaN or Inf in x must not either.
            dx = scale * (dz - mean_dz - x * slope) if TRAINING else scale * dz
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=ok)


def empty_outputs(
    x: torch.Tensor, index: torch.Tensor | None, training: bool, masked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean, var and mask for batch_norm_relu_fwd; those that it will not write are empty."""
    rows = as_rows(x)[1]
    stats = x.new_empty(x.shape[1] if training else 0, dtype=torch.float32)
    mask = x.new_empty(bits_shape(x, rows) if masked else 0, dtype=torch.uint8)
    y = empty_dense(x, rows, None if index is None else index.shape[0])
    return y, stats, torch.empty_like(stats), mask


def batch_norm_relu_fwd(
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean, var, mask. With `running` = (mean, var) normalises by these, else by the batch's.

    Args:
        x: [N, C, H, W]; residual: the same shape and dtype, any strides.
        index: int64 [s] contiguous, the samples of x to take, or None for all; then no residual.
        weight, bias, running: [C] each.
    Returns:
        y as x, of s samples where there is an index; mean and var [C] fp32 (var biased; both empty
        with `running`); mask: uint8, one bit an element in the shape of bits_shape, where there is
        a residual and a ReLU, else empty.
    """
    training = running is None
    x, x_rows = as_rows(x)
    y, mean, var, mask = empty_outputs(x, index, training, residual is not None and relu)
    if y.numel() == 0:
        mean.zero_()
        var.zero_()
        return y, mean, var, mask
    y_rows, residual_rows = as_rows(y)[1], x_rows
    if residual is not None:
        residual, residual_rows = as_rows(residual)
    tiles = tiling(y.shape, x_rows, residual_rows, y_rows)
    partial, P, p_chunk = moments(x, index, x_rows, tiles) if running is None else (None, 0, 0)
    chunk, programs = tiles.chunks(MAX_PROGRAMS)
    launch(
        _batch_norm_relu_fwd_kernel, (programs, tiles.columns),
        x, index, residual, weight, bias, partial, *(running or (mean, var)), y,
        mask if mask.numel() else None,
        *tiles.sizes, chunk, P, p_chunk, eps,
        *x_rows.strides, *residual_rows.strides, *y_rows.strides,
        RELU=relu, BLOCK_P=BLOCK_P, **tiles.constexprs,
    )  # fmt: skip
    return y, mean, var, mask


def empty_grads(
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias, dresidual for batch_norm_relu_bwd; those not needed are empty.

    With an index dx is zero already: its kernel writes the samples that index names.
    """
    needs_dx, needs_dweight, needs_dbias, needs_dresidual = needs
    rows = as_rows(x)[1]
    dx = empty_dense(x, rows) if needs_dx else x.new_empty(0)
    return (
        dx if index is None else dx.zero_(),
        torch.empty_like(weight) if needs_dweight and weight is not None else x.new_empty(0),
        torch.empty_like(bias) if needs_dbias and bias is not None else x.new_empty(0),
        empty_dense(x, rows) if needs_dresidual else x.new_empty(0),
    )


def batch_norm_relu_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    mask: torch.Tensor,
    eps: float,
    relu: bool,
    training: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias, dresidual; `needs` says which, the others are empty.

    Args:
        dy: as the forward's y, any strides; x, index, weight, bias: as given to the forward.
        mean, var: [C], the statistics that the forward normalised by.
        mask: the forward's, or empty where it made none.
    """
    needs_dx, needs_dweight, needs_dbias, needs_dresidual = needs
    needs_dweight = needs_dweight and weight is not None
    needs_dbias = needs_dbias and bias is not None
    x, x_rows = as_rows(x)
    dx, dweight, dbias, dresidual = empty_grads(x, index, weight, bias, needs)
    if dy.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    dy, dy_rows = as_rows(dy)
    streams = needs_dx or needs_dresidual
    dx_rows = as_rows(dx if needs_dx else dresidual)[1] if streams else x_rows
    bits = mask if mask.numel() else None
    tiles = tiling(dy.shape, x_rows, dy_rows, dx_rows, bits=bits)
    partial, P = None, 0
    if needs_dweight or needs_dbias or (needs_dx and training):
        chunk, P = tiles.chunks(MAX_CHUNKS)
        partial = x.new_empty(2, P, tiles.C, dtype=torch.float32)
        launch(
            _batch_norm_relu_sums_bwd_kernel, (P, tiles.columns),
            dy, x, index, weight, bias, mean, var, bits, partial, *tiles.sizes, chunk, eps,
            *dy_rows.strides, *x_rows.strides, RELU=relu, **tiles.constexprs,
        )  # fmt: skip
    # For the parameters' gradients alone there is nothing to stream: one program a column merges.
    chunk, programs = tiles.chunks(MAX_PROGRAMS) if streams else (0, 1)
    launch(
        _batch_norm_relu_bwd_kernel, (programs, tiles.columns),
        dy, x, index, weight, bias, mean, var, bits, partial,
        dx if needs_dx else None, dresidual if needs_dresidual else None,
        dweight if needs_dweight else None, dbias if needs_dbias else None,
        *tiles.sizes, chunk, P, eps, *dy_rows.strides, *x_rows.strides, *dx_rows.strides,
        RELU=relu, TRAINING=training, BLOCK_P=BLOCK_P, **tiles.constexprs,
    )  # fmt: skip
    return dx, dweight, dbias, dresidual
