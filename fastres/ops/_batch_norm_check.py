"""What batch_norm_relu takes: the checks of its inputs, in words for those who call it."""

import torch
from torch import Tensor

from fastres.ops._register import takes_kernels

# What the per-channel tensors may be, by x's dtype.
_PARAMETER_DTYPES = {
    torch.float32: (torch.float32,),
    torch.float16: (torch.float32, torch.float16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
}


def check_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    residual: Tensor | None,
    index: Tensor | None = None,
) -> None:
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) != 4:
        raise ValueError(f"x: expected [N, C, H, W], got shape {list(shape)}")
    wanted = _PARAMETER_DTYPES.get(dtype)
    if wanted is None or (dtype == torch.float64 and takes_kernels(x)):
        allowed = [torch.float32, torch.float16, torch.bfloat16]
        if not takes_kernels(x):
            allowed.append(torch.float64)
        raise ValueError(f"x: expected one of {allowed} on {device}, got {dtype}")
    if residual is not None and (
        residual.shape != shape or residual.dtype != dtype or residual.device != device
    ):
        raise ValueError(
            f"residual: expected x's {list(shape)}, {dtype} on {device}, "
            f"got {list(residual.shape)}, {residual.dtype} on {residual.device}"
        )
    N = shape[0]
    if index is not None:
        if residual is not None:
            raise ValueError("residual and index: expected one of the two at most, got both")
        if index.dim() != 1 or index.dtype != torch.int64 or index.device != device:
            raise ValueError(
                f"index: expected [s] in torch.int64 on {device}, got {list(index.shape)} in "
                f"{index.dtype} on {index.device}"
            )
        N = index.shape[0]
    check_vectors(shape[1], dtype, device, running_mean, running_var, weight, bias, training)
    check_values([N, *shape[1:]], training)


def check_values(shape: list[int], training: bool, name: str = "x") -> None:
    """Raise ValueError where one value of a channel has no variance; shape: [N, C, H, W]."""
    if training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(
            f"{name}: expected more than 1 value per channel in training, got shape {shape}"
        )


def check_eps(eps: float, training: bool) -> None:
    """Raise ValueError, as F.batch_norm does, where a batch without variance divides by zero."""
    if training and not eps > 0:
        raise ValueError(f"eps: expected a positive number in training, got {eps}")


def check_vectors(
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> None:
    """Raise ValueError unless a BatchNorm's tensors fit an activation of a dtype on a device."""
    wanted = _PARAMETER_DTYPES[dtype]
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither, got one")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var: needed where training=False, got None")
    for name, v in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if v is None:
            continue
        if v.shape != (channels,) or v.device != device:
            raise ValueError(
                f"{name}: expected [{channels}] on {device}, got {list(v.shape)} on {v.device}"
            )
        if v.dtype not in wanted:
            names = " or ".join(str(dtype) for dtype in wanted)
            raise ValueError(f"{name}: expected {names}, got {v.dtype}")
        if not v.is_contiguous() and v is not weight and v is not bias:
            raise ValueError(f"{name}: expected contiguous, got stride {v.stride()}")
