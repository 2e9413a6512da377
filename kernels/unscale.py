"""Unscale, check and measure all gradients in one launch.

    out = grad * (1 / scale);   found_inf = 1 if any grad is Inf or NaN;   norm = sqrt(sum out^2)

Gradients of any dtypes and sizes go in as a table of addresses. Every program that meets an Inf or
a NaN stores the same 1. The norm's partials, one a program, are added up in a fixed order by the
program that arrives last: an integer ticket, no float atomics.

Least bytes moved, with e bytes a gradient element and o bytes an output element: e + o, or e where
nothing is written.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import _addresses
from ._addresses import KINDS, NUM_WARPS, block_row, load_elements, store_elements
from ._launch import launch_opaque

__all__ = ["empty_findings", "unscale_fwd"]

# Partials that the last program adds at once. Not tuned on a GPU yet.
BLOCK_P = 512


@triton.jit
def _unscale_fwd_kernel(
    grads_ptr, outs_ptr, blocks_ptr, scale_ptr, found_inf_ptr, partial_ptr, ticket_ptr, norm_ptr,
    P, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One block of one gradient. outs_ptr: the outputs' addresses, or None to write nothing.

    partial [P] fp32, ticket int32 zero and norm fp32: where the norm is asked for, else None.
    """
    tensor, start, count, kind, out_kind = block_row(blocks_ptr, tl.program_id(0))
    lanes = tl.arange(0, BLOCK)
    grad = load_elements(tl.load(grads_ptr + tensor), start, lanes, count, kind)
    # Inf and NaN alone are no less than infinity; a gradient that is only large passes.
    broken = tl.where(tl.abs(grad) < float("inf"), 0, 1)
    if tl.max(broken, 0) != 0:
        tl.store(found_inf_ptr, 1.0)
    grad *= tl.div_rn(1.0, tl.load(scale_ptr))
    if outs_ptr is not None:
        store_elements(tl.load(outs_ptr + tensor), start, lanes, grad, count, out_kind)
    if norm_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(grad * grad, 0))
        # Acquire and release: the last to arrive sees every partial.
        if tl.atomic_add(ticket_ptr, 1) == P - 1:
            total = tl.zeros([BLOCK_P], tl.float32)
            for p_start in range(0, P, BLOCK_P):
                p = p_start + tl.arange(0, BLOCK_P)
                total += tl.load(partial_ptr + p, mask=p < P, other=0.0, cache_modifier=".cg")
            tl.store(norm_ptr, tl.sqrt_rn(tl.sum(total, 0)))


def empty_findings(scale: torch.Tensor, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """found_inf [], zero, and norm [], of no elements where it is not asked for."""
    return scale.new_zeros(()), scale.new_empty(() if norm else 0)


def unscale_fwd(
    grads: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    scale: torch.Tensor,
    norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """found_inf [] and norm [] fp32; writes out[i] = grads[i] / scale where there is an out.

    Args:
        grads: fp32, fp16 or bf16, dense in memory, in any order of dimensions.
        out: empty, or one tensor for each gradient, of its size and strides; may be the gradient.
        scale: fp32, one element.
    """
    found_inf, total = empty_findings(scale, norm)
    sizes = [grad.numel() for grad in grads]
    kinds = [KINDS[grad.dtype] for grad in grads]
    out_kinds = [KINDS[t.dtype] for t in out] if out else kinds
    rows = _addresses.blocks(sizes, kinds, out_kinds, scale.device)
    P = rows.shape[0]
    if P == 0:
        return found_inf, total.zero_()
    grads_table = _addresses.table(grads, scale.device)
    outs_table = _addresses.table(out, scale.device) if out else None
    partial = scale.new_empty(P) if norm else None
    ticket = scale.new_zeros((), dtype=torch.int32) if norm else None
    launch_opaque(
        _unscale_fwd_kernel, (P,),
        grads_table, outs_table, rows, scale, found_inf, partial, ticket, total if norm else None,
        P, BLOCK=_addresses.BLOCK, BLOCK_P=BLOCK_P, num_warps=NUM_WARPS,
    )  # fmt: skip
    return found_inf, total
