"""meProp's selection inside a unit: the output channels of largest sum |g|, kept ones first.

g, the gradient at the convolution's output, is no tensor: it is made here as the kernels make it
that multiply the kept channels, and summed as it is rounded for their products.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from ._conv import (
    BLOCK_P,
    block_of,
    operand,
    pixels,
    rows_of,
    sample_numbers,
    samples_at,
    tile_pixels,
)
from ._conv_gradient import Output, conv_gradient, lazy_norm
from ._integers import cdiv, next_power_of_2
from ._launch import launch
from ._moments import sum_partials
from ._normalize import unknown_zero
from .meprop import sum_key

NUM_WARPS = 4
# Channels that are compared with all at a time: their product lies in registers.
BLOCK_C = 16


@triton.jit
def _store_order(
    partial_ptr, order_ptr, K, P, kept,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """order int32 [K]: the kept channels of largest sum, ascending, then the others.

    A channel's rank is the number of channels before it: of larger sums, and of equal ones before
    it. NaN is largest.
    """
    k = tl.arange(0, BLOCK_K)
    k_ok = k < K
    key = sum_key(sum_partials(partial_ptr, k, k_ok, K, P, BLOCK_P))
    rank = tl.zeros([BLOCK_K], tl.int32)
    for c_start in range(0, K, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        other = sum_key(sum_partials(partial_ptr, c, c < K, K, P, BLOCK_P))
        # Larger keys, then lower numbers, as one integer.
        larger = ((other.to(tl.int64) << 32) - c)[None, :] > ((key.to(tl.int64) << 32) - k)[:, None]
        rank += tl.sum((larger & (c < K)[None, :]).to(tl.int32), 1)
    keep = k_ok & (rank < kept)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    dropped = k_ok & (rank >= kept)
    after = kept + tl.cumsum(dropped.to(tl.int32), 0) - 1
    tl.store(order_ptr + tl.where(keep, place, after), k, mask=k_ok)


@triton.jit(do_not_specialize=["kept"])
def _norm_relu_conv2d_select_kernel(
    g_ptr, g_index_ptr, h_ptr, h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr,
    dh_weight_ptr, dh_bias_ptr, row_scale_ptr, partial_ptr, ticket_ptr, order_ptr,
    M, CHUNK, H_ROWS, H_P, h_eps, kept,
    K: tl.constexpr, S: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    ALL_K: tl.constexpr, ALL_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [P, K] fp32: sum of |g| over each chunk of pixels; the norm's own gradients; order.

    ticket: int32, zero. The program that arrives last puts the channels in order.
    """
    pid = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    h_scale = tl.zeros([BLOCK_K], tl.float32)
    h_slope, h_offset = h_scale, h_scale
    if h_ptr is not None:
        h_scale, h_slope, h_offset = lazy_norm(
            h_partial_ptr, h_mean_ptr, h_var_ptr, h_weight_ptr, dh_weight_ptr, dh_bias_ptr,
            k, k_ok, H_ROWS, K, H_P, h_eps, pid == 0, TRAINING, BLOCK_P,
        )  # fmt: skip
    total = tl.zeros([BLOCK_K], tl.float32)
    end = tl.minimum((pid + 1) * CHUNK, M)
    for m_start in tl.range(pid * CHUNK, end, BLOCK_M, num_stages=1):
        first, n, _, s, ok = tile_pixels(m_start, end, S, S, BLOCK_M)
        g_base, g_samples = samples_at(g_ptr, g_index_ptr, first, n, ok, S * K)
        h_base = h_ptr
        if h_ptr is not None:
            h_base, _ = samples_at(h_ptr, g_index_ptr, first, n, ok, S * K)
        samples = sample_numbers(g_index_ptr, first, n, ok)
        g_ok = (samples >= 0)[:, None] & k_ok[None, :]
        g = conv_gradient(
            g_base, h_base, row_scale_ptr, samples, (g_samples + s * K)[:, None] + k[None, :],
            g_ok, unknown_zero(h_eps, g_ptr.dtype.element_ty), h_scale, h_slope, h_offset, TRAINING,
        )  # fmt: skip
        total += tl.sum(tl.abs(operand(g, g_ptr.dtype.element_ty).to(tl.float32)), 0)
    tl.store(partial_ptr + pid * K + k, total, mask=k_ok)
    # Every thread's sums are on their way before the ticket is taken; acquire and release, and the
    # last to arrive sees all of them.
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1) == tl.num_programs(0) * tl.num_programs(1) - 1:
        _store_order(partial_ptr, order_ptr, K, tl.num_programs(0), kept, ALL_K, BLOCK_C, ALL_P)


def select(out: Output, kept: int, samples: int) -> Output:
    """out with the order of its channels, the `kept` of largest sum |g| first; as it is for all.

    Writes the dweight and dbias of the norm that g comes through, if it does.
    samples: of the convolution.
    """
    _, K, OH, OW = out.g.shape
    if kept >= K:
        return out
    block = block_of(K)
    columns = cdiv(K, block)
    cut = pixels(samples * OH * OW, rows_of(out.g.dtype), columns)
    partial = out.g.new_empty(cut.P, K, dtype=torch.float32)
    everything = max(next_power_of_2(K), 16)
    order, ticket = out.g.new_empty(K, dtype=torch.int32), out.g.new_zeros((), dtype=torch.int32)
    rows, partials, eps = out.numbers
    launch(
        _norm_relu_conv2d_select_kernel, (cut.P, columns),
        *out.tensors, out.dweight, out.dbias, out.row_scale, partial, ticket, order,
        cut.M, cut.chunk, rows, partials, eps, kept,
        K=K, S=OH * OW, TRAINING=out.training,
        BLOCK_M=cut.BLOCK_M, BLOCK_K=block, BLOCK_P=BLOCK_P,
        ALL_K=everything, ALL_P=max(4096 // everything, 1), BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dataclasses.replace(out, order=order, kept=kept, dweight=None, dbias=None)
