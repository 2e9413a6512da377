"""The end of a unit's backward: BatchNorm's, the shortcut's gradient, and the sums of the slabs.

    dx = dy + scale * dz + slope * x + offset;   dweight = sum over p of slab[p]

Least bytes moved, with e bytes an element: e for each of dz, x, dx and, with a shortcut, dy.
"""

import torch
import triton
import triton.language as tl

from ._conv import BLOCK_P, block_of, pixels, rows_of, samples_at, tile_pixels
from ._conv_gradient import Norm, lazy_norm
from ._integers import cdiv
from ._launch import launch
from ._moments import sum_partials

NUM_WARPS = 4
# Elements of the weights' gradients that a program sums up. Not tuned yet.
BLOCK = 64
# Channels of dx's blocks: sums are merged by every program. Not tuned yet.
BLOCK_C = 32


@triton.jit
def _norm_relu_conv2d_dx_kernel(
    dy_ptr, dz_ptr, index_ptr, x_ptr, partial_ptr, mean_ptr, var_ptr, norm_weight_ptr,
    dx_ptr, dnorm_weight_ptr, dnorm_bias_ptr, slab_ptr, dweight_ptr,
    M, CHUNK, ROWS, P, eps, programs, size, chunks,
    C: tl.constexpr, S: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx by the first `programs` programs, and dweight [size] by the others.

    index_ptr names the sample of dz for each sample of x, or -1: there dx = dy. slab: [chunks,
    size] fp32.
    """
    pid = tl.program_id(0)
    if pid < programs:
        columns: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        chunk = pid // columns
        c = pid % columns * BLOCK_C + tl.arange(0, BLOCK_C)
        c_ok = c < C
        scale, slope, offset = lazy_norm(
            partial_ptr, mean_ptr, var_ptr, norm_weight_ptr, dnorm_weight_ptr, dnorm_bias_ptr,
            c, c_ok, ROWS, C, P, eps, chunk == 0, TRAINING, BLOCK_P,
        )  # fmt: skip
        end = tl.minimum((chunk + 1) * CHUNK, M)
        for m_start in tl.range(chunk * CHUNK, end, BLOCK_M, num_stages=1):
            first, n, _, s, ok = tile_pixels(m_start, end, S, S, BLOCK_M)
            moved = first.to(tl.int64) * (S * C)
            at = (n * (S * C) + s * C)[:, None] + c[None, :]
            mc_ok = ok[:, None] & c_ok[None, :]
            dz_base, dz_samples = samples_at(dz_ptr, index_ptr, first, n, ok, S * C)
            dz_ok = mc_ok if index_ptr is None else mc_ok & (dz_samples >= 0)[:, None]
            dz_at = (dz_samples + s * C)[:, None] + c[None, :]
            dx = tl.load(dz_base + dz_at, mask=dz_ok, other=0.0).to(tl.float32)
            dx *= scale[None, :]
            if TRAINING:
                x = tl.load(x_ptr + moved + at, mask=dz_ok, other=0.0).to(tl.float32)
                dx += x * slope[None, :] + offset[None, :]
            dx = tl.where(dz_ok, dx, 0.0)
            if dy_ptr is not None:
                dx += tl.load(dy_ptr + moved + at, mask=mc_ok, other=0.0).to(tl.float32)
            tl.store(dx_ptr + moved + at, dx.to(dx_ptr.dtype.element_ty), mask=mc_ok)
    else:
        t = (pid - programs) * BLOCK + tl.arange(0, BLOCK)
        total = sum_partials(slab_ptr, t, t < size, size, chunks, BLOCK_P)
        tl.store(dweight_ptr + t, total.to(dweight_ptr.dtype.element_ty), mask=t < size)


def conv_dx(
    dy: torch.Tensor | None,
    dz: torch.Tensor,
    index: torch.Tensor | None,
    x: torch.Tensor,
    norm: Norm,
    sums: torch.Tensor,
    dnorm_weight: torch.Tensor | None,
    dnorm_bias: torch.Tensor | None,
    slab: torch.Tensor,
    dweight: torch.Tensor,
) -> torch.Tensor:
    """dx; writes dnorm_weight and dnorm_bias [C], where given, and dweight [T] from slab [P, T].

    dy: the shortcut's gradient, or None. index: int64 [N], the sample of dz for each of x, or -1;
    None: its own. sums: [2, P, C] fp32 of dz and of dz * (x - mean).
    """
    N, C, H, W = x.shape
    block_c = min(block_of(C), BLOCK_C)
    columns = cdiv(C, block_c)
    cut = pixels(N * H * W, rows_of(x.dtype), columns)
    dx = torch.empty_like(x)
    mean, var, weight, _ = norm.vectors
    chunks, size = slab.shape
    launch(
        _norm_relu_conv2d_dx_kernel, (cut.P * columns + cdiv(size, BLOCK),),
        dy, dz, index, x, sums, mean, var, weight, dx, dnorm_weight, dnorm_bias, slab, dweight,
        cut.M, cut.chunk, norm.stats.rows, sums.shape[1], norm.eps, cut.P * columns, size, chunks,
        C=C, S=H * W, TRAINING=norm.training,
        BLOCK_M=cut.BLOCK_M, BLOCK_C=block_c, BLOCK_P=BLOCK_P, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx
