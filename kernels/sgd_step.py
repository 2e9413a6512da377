"""SGD in one pass: unscale, weight decay, momentum, the update and the half-precision copy.

    g = grad / grad_scale + weight_decay * p;   m = momentum * m + g
    p -= lr * (g + momentum * m if nesterov else m);   half = p

Gradients lie wherever autograd put them and go in as a table of addresses; parameters, momentum and
the half copy are flat. With found_inf set nothing is written.

Least bytes moved, with e bytes a gradient element: e + 8 (p in and out), 8 more with momentum, 2
more with a half copy.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import _addresses
from ._addresses import KINDS, NUM_WARPS, block_row, load_elements
from ._launch import launch_opaque

__all__ = ["sgd_step_fwd"]


@triton.jit
def _sgd_step_fwd_kernel(
    grads_ptr, blocks_ptr, param_ptr, momentum_ptr, half_ptr, grad_scale_ptr, found_inf_ptr, lr_ptr,
    lr, momentum, weight_decay,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one parameter; the fifth number of its row is where in the flat it begins."""
    tensor, start, count, kind, offset = block_row(blocks_ptr)
    address = tl.load(grads_ptr + tensor)
    # A parameter without a gradient stays as it is, weight decay and all.
    steps = address != 0
    if found_inf_ptr is not None:
        steps = steps & (tl.load(found_inf_ptr) == 0.0)
    if steps:
        lanes = tl.arange(0, BLOCK)
        g = load_elements(address, start, lanes, count, kind)
        if grad_scale_ptr is not None:
            g *= tl.div_rn(1.0, tl.load(grad_scale_ptr))
        if MAXIMIZE:
            g = -g
        # Every parameter begins at a multiple of 16 elements, and so does every block. To the next
        # multiple there is nobody's zero, which steps to zero: then accesses are of 128 bits.
        ok = lanes < (count + 15) // 16 * 16
        flat = tl.multiple_of(offset + start, 16)
        p = tl.load(param_ptr + flat + lanes, mask=ok, other=0.0)
        if DECAY:
            g += weight_decay * p
        if momentum_ptr is not None:
            m = momentum * tl.load(momentum_ptr + flat + lanes, mask=ok, other=0.0) + g
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
) -> None:
    """Step param, momentum_buffer and half in place.

    Args:
        grads: fp32, fp16 or bf16, dense in memory; None where a parameter has none.
        sizes, offsets: elements of each parameter, and where in the flat it begins, a multiple of
            16 elements.
        param, momentum_buffer: flat, fp32; half: flat, fp16 or bf16. momentum_buffer None: no
            momentum.
        lr, grad_scale, found_inf: one element each where they are tensors, the last two fp32.
    """
    if all(grad is None for grad in grads):
        return
    kinds = [0 if grad is None else KINDS[grad.dtype] for grad in grads]
    rows = _addresses.blocks(sizes, kinds, offsets, param.device)
    if rows.shape[0] == 0:
        return
    as_tensor = isinstance(lr, torch.Tensor)
    launch_opaque(
        _sgd_step_fwd_kernel, (rows.shape[0],),
        _addresses.table(grads, param.device), rows, param, momentum_buffer, half,
        grad_scale, found_inf, lr if as_tensor else None,
        0.0 if as_tensor else float(lr), float(momentum), float(weight_decay),
        DECAY=weight_decay != 0, NESTEROV=nesterov, MAXIMIZE=maximize,
        BLOCK=_addresses.BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
