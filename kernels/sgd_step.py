"""SGD in one pass: unscale, weight decay, momentum, the update and the half-precision copy.

    g = grad / grad_scale + weight_decay * p;   m = momentum * m + g
    p -= lr * (g + momentum * m if nesterov else m);   half = p

Gradients lie wherever autograd put them and go in as a table of addresses; parameters, momentum and
the half copy are flat. With found_inf set nothing is written.

Nobody has seen every gradient before a launch's programs step. So where the step itself is to find
Inf and NaN, each program keeps what it overwrites, and the last to arrive puts everything back if
one of them met any: an integer ticket counts both.

Least bytes moved, with e bytes a gradient element: e + 8 (p in and out), 8 more with momentum, 2
more with a half copy, and for what is kept 4 more, or 8 with momentum.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import _addresses
from ._addresses import KINDS, NUM_WARPS, block_row, load_elements
from ._launch import launch_opaque

__all__ = ["ARRIVALS", "sgd_step_fwd"]

# The ticket counts all programs, and in multiples of this those that met an Inf or a NaN.
FOUND = tl.constexpr(1 << 15)
# Programs of a launch that may take a ticket.
ARRIVALS = FOUND.value - 1


@triton.jit
def _place(start, count, offset, lanes):
    """Where in the flat a block begins, and which lanes it has.

    Every parameter begins at a multiple of 16 elements, and so does every block. To the next
    multiple there is nobody's zero, which steps to zero: then accesses are of 128 bits.
    """
    return tl.multiple_of(offset + start, 16), lanes < (count + 15) // 16 * 16


@triton.jit
def _put_back(
    grads_ptr, blocks_ptr, param_ptr, momentum_ptr, half_ptr, before_ptr, total, P,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Undo the steps of all programs, which have left what was there in before_ptr."""
    for block in tl.range(0, P, num_stages=1):
        tensor, start, count, _, offset = block_row(blocks_ptr, tl.full((), block, tl.int32))
        if tl.load(grads_ptr + tensor) != 0:
            lanes = tl.arange(0, BLOCK)
            at, ok = _place(start, count, offset, lanes)
            # Not from a cache that other programs' stores do not reach.
            p = tl.load(before_ptr + at + lanes, mask=ok, other=0.0, cache_modifier=".cg")
            tl.store(param_ptr + at + lanes, p, mask=ok)
            if half_ptr is not None:
                tl.store(half_ptr + at + lanes, p.to(half_ptr.dtype.element_ty), mask=ok)
            if momentum_ptr is not None:
                m_ptrs = before_ptr + total + at + lanes
                m = tl.load(m_ptrs, mask=ok, other=0.0, cache_modifier=".cg")
                tl.store(momentum_ptr + at + lanes, m, mask=ok)


@triton.jit
def _sgd_step_fwd_kernel(
    grads_ptr, blocks_ptr, param_ptr, momentum_ptr, half_ptr, grad_scale_ptr, found_inf_ptr, lr_ptr,
    before_ptr, ticket_ptr,
    lr, momentum, weight_decay, total, P,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one parameter; the fifth number of its row is where in the flat it begins.

    With before [2, total] fp32 ([1, total] without momentum) and ticket int32, zero before and
    after: found_inf is not read but written.
    """
    tensor, start, count, kind, offset = block_row(blocks_ptr, tl.program_id(0))
    address = tl.load(grads_ptr + tensor)
    # A parameter without a gradient stays as it is, weight decay and all.
    steps = address != 0
    found = tl.full((), 0, tl.int32)
    if ticket_ptr is None and found_inf_ptr is not None:
        steps = steps & (tl.load(found_inf_ptr) == 0.0)
    if steps:
        inverse = 1.0
        if grad_scale_ptr is not None:
            # First, since a division is a call, which would spill what it finds in registers.
            inverse = tl.div_rn(1.0, tl.load(grad_scale_ptr))
        lanes = tl.arange(0, BLOCK)
        g = load_elements(address, start, lanes, count, kind)
        if ticket_ptr is not None:
            # Inf and NaN alone are no less than infinity; a gradient that is only large passes.
            found = tl.max(tl.where(tl.abs(g) < float("inf"), 0, 1), 0)
        if grad_scale_ptr is not None:
            g *= inverse
        if MAXIMIZE:
            g = -g
        flat, ok = _place(start, count, offset, lanes)
        p = tl.load(param_ptr + flat + lanes, mask=ok, other=0.0)
        if before_ptr is not None:
            tl.store(before_ptr + flat + lanes, p, mask=ok)
        if DECAY:
            g += weight_decay * p
        if momentum_ptr is not None:
            m = tl.load(momentum_ptr + flat + lanes, mask=ok, other=0.0)
            if before_ptr is not None:
                tl.store(before_ptr + total + flat + lanes, m, mask=ok)
            m = momentum * m + g
            tl.store(momentum_ptr + flat + lanes, m, mask=ok)
            if NESTEROV:
                g += momentum * m
            else:
                g = m
        if lr_ptr is not None:
            p -= tl.load(lr_ptr).to(tl.float32) * g
        else:
            p -= lr * g
        tl.store(param_ptr + flat + lanes, p, mask=ok)
        if half_ptr is not None:
            tl.store(half_ptr + flat + lanes, p.to(half_ptr.dtype.element_ty), mask=ok)
    if ticket_ptr is not None:
        # Every thread's stores are on their way before the ticket is taken; acquire and release,
        # and the last to arrive comes after all of them.
        tl.debug_barrier()
        arrival = found * FOUND + 1
        arrived = tl.atomic_add(ticket_ptr, arrival) + arrival
        if arrived % FOUND == P:
            overflowed = arrived >= FOUND
            tl.store(found_inf_ptr, tl.where(overflowed, 1.0, 0.0))
            tl.store(ticket_ptr, 0)
            if overflowed:
                _put_back(
                    grads_ptr, blocks_ptr, param_ptr, momentum_ptr, half_ptr, before_ptr, total, P,
                    BLOCK,
                )  # fmt: skip


def sgd_step_fwd(
    grads: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    offsets: Sequence[int],
    param: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    half: torch.Tensor | None,
    lr: float | torch.Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    before: torch.Tensor | None = None,
    ticket: torch.Tensor | None = None,
) -> None:
    """Step param, momentum_buffer and half in place.

    Args:
        grads: fp32, fp16 or bf16, dense in memory; None where a parameter has none.
        sizes, offsets: elements of each parameter, and where in the flat it begins, a multiple of
            16 elements.
        param, momentum_buffer: flat, fp32; half: flat, fp16 or bf16. momentum_buffer None: no
            momentum.
        lr, grad_scale, found_inf: one element each where they are tensors, the last two fp32.
        before: fp32, [2, elements of param], or [1, ...] without momentum: found_inf is written.
        ticket: int32 [], zero; with before.
    """
    kinds = [0 if grad is None else KINDS[grad.dtype] for grad in grads]
    rows = _addresses.blocks(sizes, kinds, offsets, param.device)
    P = rows.shape[0]
    if P == 0 or all(grad is None for grad in grads):
        if before is not None and found_inf is not None:
            found_inf.zero_()
        return
    if before is not None and P > ARRIVALS:
        raise ValueError(f"before: expected {ARRIVALS} blocks or fewer, got {P}: give found_inf")
    as_tensor = isinstance(lr, torch.Tensor)
    launch_opaque(
        _sgd_step_fwd_kernel, (P,),
        _addresses.table(grads, param.device), rows, param, momentum_buffer, half,
        grad_scale, found_inf, lr if as_tensor else None, before, ticket,
        0.0 if as_tensor else float(lr), float(momentum), float(weight_decay), param.numel(), P,
        DECAY=weight_decay != 0, NESTEROV=nesterov, MAXIMIZE=maximize,
        BLOCK=_addresses.BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
