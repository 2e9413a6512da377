"""Undo the loss scale in all gradients at once, see whether any is Inf or NaN, and measure them.

    out = grad / scale;   found_inf = any grad is Inf or NaN;   norm = sqrt(sum out^2)

Read from the top: the reference, the registered op, the function.
Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.ops._dense import check_grads, is_dense, like, overlaps
from fastres.ops._register import kernels, register_op, takes_kernels


def unscale_reference(
    grads: Sequence[Tensor], scale: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The definition of unscale: the unscaled gradients, found_inf and their norm."""
    out = [grad.to(scale.dtype) * (1.0 / scale) for grad in grads]
    found_inf = torch.stack([~grad.isfinite().all() for grad in grads]).any()
    norm = torch.stack([t.square().sum() for t in out]).sum().sqrt()
    return out, found_inf.to(scale.dtype), norm


@register_op("unscale", mutates_args=("out", "in_place"), traceable=False)
def _unscale(
    grads: list[Tensor], out: list[Tensor], in_place: list[Tensor], scale: Tensor, norm: bool
) -> tuple[Tensor, Tensor]:
    """found_inf and norm. out[i] = grads[i] / scale, or grads are only read where out is empty;
    in_place are gradients that are overwritten."""
    written = [*out, *in_place]
    return kernels("unscale", scale).unscale_fwd([*grads, *in_place], written, scale, norm)


@_unscale.register_fake
def _(
    grads: list[Tensor], out: list[Tensor], in_place: list[Tensor], scale: Tensor, norm: bool
) -> tuple[Tensor, Tensor]:
    return scale.new_empty(()), scale.new_empty(() if norm else 0)


def unscale(
    grads: Sequence[Tensor | None],
    scale: Tensor,
    *,
    out: Sequence[Tensor | None] | None = None,
    write: bool = True,
    norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Divide gradients by the loss scale and see whether any is Inf or NaN: one launch on a GPU.

    out = grad / scale

    Nothing waits for the device: what is found stays there, in tensors.

    Args:
        grads: any shapes, fp32, fp16 or bf16 in any mixture, all on one device; None is passed
            over. One that is not dense in memory is copied first.
        scale: fp32, one element, on the gradients' device.
        out: where the results go, one for each gradient (None for None), of its shape: fp32
            masters of half-precision gradients, or the gradient itself. None: in place.
        write: False only looks at the gradients, and takes no out.
        norm: whether to measure the unscaled gradients.
    Returns:
        found_inf: fp32 [], 1.0 if an element of grads is Inf or NaN, else 0.0.
        norm: fp32 [], the L2 norm of all unscaled gradients together, or None without norm=True.
    Raises:
        ValueError: a gradient that is sparse, not floating or elsewhere; a scale or an out that
            does not fit; a gradient in place whose elements share memory.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    """
    _check(grads, scale, out, write)
    read, outs, in_place = _divide(grads, out, write)
    if not takes_kernels(scale):
        return _native(read, outs, in_place, scale, norm)
    # The kernel takes storages as rows of elements: a gradient with gaps, or in another order than
    # its output, goes in as a copy, and one that is overwritten comes back from it.
    if outs:
        work = [out_ if is_dense(out_) else torch.empty_like(out_) for out_ in outs]
        read = [like(grad, w) for grad, w in zip(read, work, strict=True)]
    else:
        work = []
        read = [grad if is_dense(grad) else grad.contiguous() for grad in read]
    inner = [grad if is_dense(grad) else grad.contiguous() for grad in in_place]
    found_inf, total = torch.ops.fastres.unscale.default(read, work, inner, scale, norm)
    for target, made in zip((*outs, *in_place), (*work, *inner), strict=True):
        if made is not target:
            target.copy_(made)
    return found_inf, total if norm else None


def _divide(
    grads: Sequence[Tensor | None], out: Sequence[Tensor | None] | None, write: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients to read, where these go (nowhere: none), and gradients to overwrite."""
    if not write:
        return [grad for grad in grads if grad is not None], [], []
    if out is None:
        return [], [], [grad for grad in grads if grad is not None]
    read: list[Tensor] = []
    outs: list[Tensor] = []
    in_place: list[Tensor] = []
    for grad, target in zip(grads, out, strict=True):
        if grad is None or target is None:
            continue
        if grad is target:
            in_place.append(grad)
        else:
            read.append(grad)
            outs.append(target)
    return read, outs, in_place


def _native(
    read: list[Tensor], out: list[Tensor], in_place: list[Tensor], scale: Tensor, norm: bool
) -> tuple[Tensor, Tensor | None]:
    """The CPU's path: PyTorch's own op that unscales and checks, in place."""
    inverse = scale.double().reciprocal().float()
    if out:
        torch._foreach_copy_(out, read)
    written, read = [*out, *in_place], [] if out else read
    # A half-precision gradient is measured before it is rounded in its place.
    halves = read + [grad for grad in in_place if grad.dtype != torch.float32]
    norms = [v * inverse.reshape(()) for v in _norms(halves)] if norm else []
    found_inf = scale.new_zeros(())
    if read:
        # Times 1, a gradient stays what it is; only one whose elements share memory is copied.
        checked = [grad.contiguous() if overlaps(grad) else grad for grad in read]
        one = torch.ones_like(scale)
        torch._amp_foreach_non_finite_check_and_unscale_(checked, found_inf, one)
    if written:
        torch._amp_foreach_non_finite_check_and_unscale_(written, found_inf, inverse)
    if not norm:
        return found_inf, None
    norms += _norms([t for t in written if t.dtype == torch.float32])
    return found_inf, torch.stack([scale.new_zeros(()), *norms]).norm()


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32)) if tensors else []


def _check(
    grads: Sequence[Tensor | None], scale: Tensor, out: Sequence[Tensor | None] | None, write: bool
) -> None:
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(
            f"scale: expected one element of torch.float32, got {list(scale.shape)} of "
            f"{scale.dtype}"
        )
    check_grads(grads, scale.device)
    if out is None:
        if write:
            for i, grad in enumerate(grads):
                if grad is not None and overlaps(grad):
                    raise ValueError(
                        f"grads[{i}]: expected elements with memory of their own, since they are "
                        f"overwritten, got stride {grad.stride()}: give an out"
                    )
        return
    if not write:
        raise ValueError("out: expected None with write=False, got tensors")
    if len(out) != len(grads):
        raise ValueError(f"out: expected one for each of {len(grads)} gradients, got {len(out)}")
    for i, (grad, target) in enumerate(zip(grads, out, strict=True)):
        if grad is target:
            continue
        if grad is None or target is None:
            raise ValueError(f"out[{i}]: expected None where the gradient is None, and only there")
        if (
            target.dtype != torch.float32
            or target.shape != grad.shape
            or target.device != grad.device
        ):
            raise ValueError(
                f"out[{i}]: expected {list(grad.shape)} of torch.float32 on {grad.device}, got "
                f"{list(target.shape)} of {target.dtype} on {target.device}"
            )
