"""One step of SGD over flat buffers: unscale, weight decay, momentum, update, half-precision copy.

    g = grad / grad_scale + weight_decay * p;   m = momentum * m + g
    p -= lr * (g + momentum * m if nesterov else m);   half = p

Read from the top: the reference, the registered op, the functions. The equations are
torch.optim.SGD's, whose momentum has no factor 1 - momentum before the gradient.
Source: Sutskever et al. 2013; unscaling, masters and skipping: Micikevicius et al. 2018,
arXiv:1710.03740.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.ops._dense import check_grads, is_dense, row, send
from fastres.ops._register import kernels, register_op, takes_kernels
from fastres.ops.unscale import unscale

# Elements between the beginnings of two parameters are a multiple of this: 128-bit accesses.
ALIGNMENT = 16


class Overflow(NamedTuple):
    """What sgd_step needs to find Inf and NaN itself: made by overflow_of, for one flat buffer.

    Attributes:
        found_inf: fp32 [], written by every step.
        before: fp32 [2, elements], or [1, elements] without momentum: what a step overwrote.
        ticket: int32 [], zero between steps.
    """

    found_inf: Tensor
    before: Tensor
    ticket: Tensor


def sgd_step_reference(
    grad: Tensor,
    p: Tensor,
    m: Tensor | None,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The definition of sgd_step for one parameter: the next p and m, in p's dtype."""
    if found_inf is not None and bool(found_inf):
        return p, m
    g = grad.to(p.dtype)
    if grad_scale is not None:
        g = g / grad_scale
    if maximize:
        g = -g
    if weight_decay != 0:
        g = g + weight_decay * p
    if m is None:
        return p - lr * g, None
    m = momentum * m + g
    return p - lr * (g + momentum * m if nesterov else m), m


_CHANGED = ("param", "momentum_buffer", "half", "found", "before", "ticket")


@register_op("sgd_step", mutates_args=_CHANGED, traceable=False)
def _sgd_step(
    grads: list[Tensor | None],
    sizes: list[int],
    offsets: list[int],
    param: Tensor,
    momentum_buffer: Tensor | None,
    half: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    found: Tensor | None,
    before: Tensor | None,
    ticket: Tensor | None,
) -> None:
    """One step in place; see sgd_step. lr counts where there is no lr_tensor.

    found_inf is read, or found, before and ticket are an Overflow.
    """
    kernels("sgd_step", param).sgd_step_fwd(
        grads, sizes, offsets, param, momentum_buffer, half, lr if lr_tensor is None else lr_tensor,
        momentum, weight_decay, nesterov, maximize, grad_scale,
        found_inf if found is None else found, before, ticket,
    )  # fmt: skip


@_sgd_step.register_fake
def _(
    grads: list[Tensor | None],
    sizes: list[int],
    offsets: list[int],
    param: Tensor,
    momentum_buffer: Tensor | None,
    half: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    found: Tensor | None,
    before: Tensor | None,
    ticket: Tensor | None,
) -> None:
    return None


def flat_offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of so many elements begins in a flat buffer, and the elements of the whole.

    Every one begins at a multiple of 16 elements.
    """
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, total


def overflow_of(param: Tensor, momentum_buffer: Tensor | None = None) -> Overflow:
    """An Overflow for the steps of a flat buffer."""
    rows = 1 if momentum_buffer is None else 2
    return Overflow(
        param.new_zeros(()),
        param.new_empty(rows, param.numel()),
        param.new_zeros((), dtype=torch.int32),
    )


def sgd_step(
    grads: Sequence[Tensor | None],
    sizes: Sequence[int],
    param: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    half: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    overflow: Overflow | None = None,
) -> None:
    """Step the parameters of a flat buffer by SGD, in place: one launch on a GPU.

    g = grad / grad_scale + weight_decay * p;   m = momentum * m + g
    p -= lr * (g + momentum * m if nesterov else m);   half = p

    A step with found_inf set leaves every buffer bitwise as it is, and nothing waits for the device
    to tell. With an overflow the step sees for itself whether a gradient is Inf or NaN, and if one
    is, puts back what it wrote: no launch goes before it then, and 4 bytes more are moved an
    element, 8 with momentum. A half copy that is put back is its parameter, rounded. A parameter
    without a gradient is left as it is. The elements between parameters, to the next multiple of
    16, must be zeros, and stay so.

    Args:
        grads: a gradient for each parameter, fp32, fp16 or bf16, dense in memory in the order of
            dimensions that the parameter has in the flat buffer; None where there is none. On a CPU
            they may be overwritten by the unscaled ones.
        sizes: elements of each parameter; flat_offsets(sizes) says where it begins.
        param: fp32, flat.
        momentum_buffer: fp32, flat, zeros at first; needed where momentum is not 0.
        lr: learning rate; a tensor of one element is read on the device.
        momentum, weight_decay, nesterov, maximize: as torch.optim.SGD's.
        half: fp16 or bf16, flat, param rounded to nearest, or None.
        grad_scale: fp32, one element, that the gradients are divided by, or None.
        found_inf: fp32, one element; anything but 0 skips the step, or None.
        overflow: of this buffer, by overflow_of(param, momentum_buffer), in found_inf's place: its
            found_inf is written, 1.0 where the step was skipped, else 0.0.
    Raises:
        ValueError: a gradient, buffer or number that does not fit.
    Source: Sutskever et al. 2013; Micikevicius et al. 2018, arXiv:1710.03740.
    """
    offsets, total = flat_offsets(sizes)
    _check(grads, sizes, total, param, momentum_buffer, half, momentum, nesterov)
    buffer = momentum_buffer if momentum != 0 else None
    if overflow is not None:
        _check_overflow(overflow, param, buffer, found_inf)
    settings = lr, momentum, weight_decay, nesterov, maximize, grad_scale
    if takes_kernels(param):
        step_flat(grads, sizes, offsets, param, buffer, half, *settings, found_inf, overflow)
        return
    if overflow is not None:
        found_inf, _ = unscale(grads, torch.ones_like(overflow.found_inf), write=False)
        overflow.found_inf.copy_(found_inf)
    # All views in one call: a parameter's part of the buffer, then what is between it and the next.
    ends = [*offsets, total][1:]
    spans = zip(sizes, offsets, ends, strict=True)
    parts = [n for size, offset, end in spans for n in (size, end - offset - size)]

    def views(flat: Tensor | None) -> list[Tensor] | None:
        return None if flat is None else list(flat.split_with_sizes(parts)[::2])

    rows = [None if grad is None else row(grad) for grad in grads]
    step_each(rows, views(param) or [], views(buffer), views(half), *settings, found_inf)


def step_flat(
    grads: Sequence[Tensor | None],
    sizes: Sequence[int],
    offsets: Sequence[int],
    param: Tensor,
    momentum_buffer: Tensor | None,
    half: Tensor | None,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    overflow: Overflow | None = None,
) -> None:
    """sgd_step for checked arguments, by the kernel."""
    device = param.device
    number, tensor = _learning_rate(lr, device)
    grad_scale, found_inf = (
        None if t is None else _scalar(t, device) for t in (grad_scale, found_inf)
    )
    torch.ops.fastres.sgd_step.default(
        grads, sizes, offsets, param, momentum_buffer, half, number, tensor, momentum,
        weight_decay, nesterov, maximize, grad_scale, found_inf, *(overflow or (None, None, None)),
    )  # fmt: skip


def step_each(
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    halves: Sequence[Tensor] | None,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """sgd_step for checked arguments, one tensor a parameter: the CPU's path.

    PyTorch's fused SGD goes by storages, as the kernel does, and so leaves shapes and strides be.
    """
    present = [i for i, grad in enumerate(grads) if grad is not None and grad.numel() > 0]
    if not present:
        return
    device = params[0].device
    if found_inf is not None:
        found_inf = _scalar(found_inf, device).ne(0).float()  # PyTorch's skips at 1 alone
    number, tensor = _learning_rate(lr, device)
    stepped = [params[i] for i in present]
    torch._fused_sgd_(
        stepped,
        [grad.float() for grad in grads if grad is not None and grad.numel() > 0],
        [] if momentum_buffers is None else [momentum_buffers[i] for i in present],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=number if tensor is None else tensor,
        dampening=0.0,
        nesterov=nesterov,
        maximize=maximize,
        is_first_step=False,
        grad_scale=None if grad_scale is None else _scalar(grad_scale, device),
        found_inf=found_inf,
    )
    if halves is not None:
        for i, made in zip(present, stepped, strict=True):
            kept, rounded = halves[i], made.to(halves[i].dtype)
            kept.copy_(rounded if found_inf is None else torch.where(found_inf != 0, kept, rounded))


def _learning_rate(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    if not isinstance(lr, Tensor):
        return lr, None
    if lr.device.type == "cpu" != device.type:
        return float(lr), None  # it is there to be read: nothing waits
    return 0.0, send(lr, device)


def _scalar(t: Tensor, device: torch.device) -> Tensor:
    return send(t, device).float()


def _check(
    grads: Sequence[Tensor | None],
    sizes: Sequence[int],
    total: int,
    param: Tensor,
    momentum_buffer: Tensor | None,
    half: Tensor | None,
    momentum: float,
    nesterov: bool,
) -> None:
    check_grads(grads, param.device)
    if len(grads) != len(sizes):
        raise ValueError(f"grads: expected one for each of {len(sizes)} sizes, got {len(grads)}")
    for i, (grad, size) in enumerate(zip(grads, sizes, strict=True)):
        if grad is not None and (grad.numel() != size or not is_dense(grad)):
            raise ValueError(
                f"grads[{i}]: expected {size} elements, dense in memory, got shape "
                f"{list(grad.shape)} of stride {grad.stride()}"
            )
    for name, flat, wanted in (
        ("param", param, (torch.float32,)),
        ("momentum_buffer", momentum_buffer, (torch.float32,)),
        ("half", half, (torch.float16, torch.bfloat16)),
    ):
        if flat is None:
            continue
        fits = flat.shape == (total,) and flat.is_contiguous() and flat.device == param.device
        if not fits or flat.dtype not in wanted:
            names = " or ".join(str(dtype) for dtype in wanted)
            raise ValueError(
                f"{name}: expected [{total}] of {names} on {param.device}, contiguous, got "
                f"{list(flat.shape)} of {flat.dtype} on {flat.device}"
            )
    if momentum != 0 and momentum_buffer is None:
        raise ValueError(f"momentum_buffer: needed where momentum is {momentum}, got None")
    if nesterov and momentum == 0:
        raise ValueError("nesterov: needs a momentum, got momentum=0")


def _check_overflow(
    overflow: Overflow, param: Tensor, momentum_buffer: Tensor | None, found_inf: Tensor | None
) -> None:
    if found_inf is not None:
        raise ValueError("found_inf: expected None with an overflow, which finds it")
    rows = 1 if momentum_buffer is None else 2
    before = overflow.before
    if before.shape[1:] != param.shape or before.shape[0] < rows or before.device != param.device:
        raise ValueError(
            f"overflow: expected what overflow_of(param, momentum_buffer) makes, before of "
            f"[{rows}, {param.numel()}] on {param.device}, got {list(before.shape)} on "
            f"{before.device}"
        )
