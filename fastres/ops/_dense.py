"""Tensors as the rows of elements that their storage is: what kernels over many tensors take."""

from collections.abc import Sequence

import torch
from torch import Tensor

# What the kernels read and write.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_dense(t: Tensor) -> bool:
    """Whether t's elements fill a stretch of memory, each once, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def like(t: Tensor, other: Tensor) -> Tensor:
    """t if it lies in memory as `other` does, which is dense, else a copy that does."""
    if t.stride() == other.stride() or (t.is_contiguous() and other.is_contiguous()):
        return t
    size, stride = other.shape, other.stride()
    return torch.empty_strided(size, stride, dtype=t.dtype, device=t.device).copy_(t)


def overlaps(t: Tensor) -> bool:
    """Whether two elements of t are one in memory, as an expanded tensor's are."""
    if is_dense(t):
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True))


def row(t: Tensor) -> Tensor:
    """A dense tensor's storage, as one dimension."""
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def send(t: Tensor, device: torch.device) -> Tensor:
    """t on a device, waiting for nothing, unless it is the host that will read it."""
    return t.to(device, non_blocking=device.type != "cpu")


def check_grads(grads: Sequence[Tensor | None], device: torch.device) -> None:
    """Raise ValueError unless every gradient is dense (not sparse), floating and on the device."""
    for i, grad in enumerate(grads):
        if grad is None or (
            grad.dtype in DTYPES and grad.device == device and grad.layout is torch.strided
        ):
            continue
        if grad.layout != torch.strided:
            raise ValueError(
                f"grads[{i}]: expected a dense gradient, got {grad.layout}: an embedding with "
                "sparse=True makes such ones"
            )
        raise ValueError(
            f"grads[{i}]: expected one of {list(DTYPES)} on {device}, got {grad.dtype} on "
            f"{grad.device}"
        )
