"""What LossScaler wants of an optimizer: gradients, a place for them, and steps to skip."""

import torch
from torch import Tensor

from fastres.ops._dense import check_grads, like, overlaps, send
from fastres.optim import FusedSGD

__all__ = ["device_of", "gradients", "has_buffers", "parameters", "send", "takes_tensors"]


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Those of every group, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def device_of(grads: list[Tensor], scale: Tensor) -> torch.device:
    """The gradients' device; the scale's where there are none."""
    devices = {grad.device for grad in grads} or {scale.device}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(
            f"expected the gradients of one optimizer on one device, got {names}: give the "
            "parameters of each device an optimizer of their own"
        )
    return devices.pop()


def gradients(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients, and where each is to be unscaled to: its own place, or its master's .grad."""
    grads: list[Tensor] = []
    out: list[Tensor] = []
    params = parameters(optimizer)
    # Before any master is given a gradient to be filled.
    found = [p.grad for p in params if p.grad is not None]
    for device in {grad.device for grad in found}:
        check_grads([grad for grad in found if grad.device == device], device)
    masters = optimizer.masters() if isinstance(optimizer, FusedSGD) else params
    for p, master in zip(params, masters, strict=True):
        if p.grad is None:
            continue
        if master is not p:
            master.grad = torch.empty_like(master)
            out.append(master.grad)
        elif p.grad.dtype == torch.float16:
            raise ValueError(
                "Attempting to unscale FP16 gradients: they would underflow. Keep parameters in "
                "fp32 under autocast, or use FusedSGD, which keeps fp32 masters of fp16 parameters."
            )
        else:
            if p.grad.layout == torch.strided and overlaps(p.grad):
                p.grad = like(p.grad, p)
            out.append(p.grad)
        grads.append(p.grad)
    return grads, out


def takes_tensors(optimizer: torch.optim.Optimizer) -> bool:
    """Whether optimizer.step() itself takes the scale and found_inf, as tensors.

    PyTorch's optimizers say so when they are made fused; a state that they load may undo it.
    """
    if isinstance(optimizer, FusedSGD):
        return True
    fused = all(group.get("fused", True) for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False)


def has_buffers(optimizer: torch.optim.Optimizer) -> bool:
    """Give torch's fused SGD the momentum buffers that its first step would make uninitialised.

    Were that step skipped it would keep them so. Zeros do as well, but for dampening, which spares
    the first gradient: False then, and the step is decided on the host.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    for group in optimizer.param_groups:
        if group["momentum"] == 0:
            continue
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if p.grad is None or state.get("momentum_buffer") is not None:
                continue
            if group["dampening"] != 0:
                return False
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
    return True
