"""The gradients that the benchmarks of loss scaling and of the optimizer step work on."""

import torch
from torch import Tensor

from fastres.models.resnet import ResNet


def shapes(depth: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a CIFAR ResNet."""
    return [tuple(p.shape) for p in ResNet(depth).parameters()]


def gradients(depth: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """One tensor for each parameter: vectors in fp32, all else in dtype."""
    return [
        torch.randn(shape, device=device).to(dtype if len(shape) > 1 else torch.float32)
        for shape in shapes(depth)
    ]
