"""Parameters and gradients of every kind, the same each time, for the optimizers' tests."""

from typing import Any

import torch
from torch import Tensor, nn

SHAPES = [(4, 3, 3, 3), (8,), (5, 7), (2, 4, 1, 1), (), (0, 3), (33,)]


def parameters(device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Any]:
    """One of each shape; the 4-dimensional ones in channels_last, the matrix transposed."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in SHAPES:
        v = torch.randn(shape, generator=generator).to(device, dtype)
        if v.dim() == 4:
            v = v.contiguous(memory_format=torch.channels_last)
        elif v.dim() == 2 and v.numel() > 0:
            v = v.T.contiguous().T
        found.append(nn.Parameter(v))
    return found


def set_grads(params: list[Any], step: int, missing: int | None = None, scale: float = 1.0) -> None:
    """The same random gradients for any list of these parameters, in strides of their own."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.device) * scale
        p.grad = None if i == missing else grad.to(p.dtype)


def squares(p: Any) -> Any:
    """A closure as optimizers take it: the sum of p's squares, and its gradient."""

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    return closure


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and all state, copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return [t.detach().clone() for t in (*params, *tensors)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bitwise: -0.0 is not 0.0."""
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(x.signbit(), y.signbit())
        for x, y in zip(a, b, strict=True)
    )


def run(optimizer: torch.optim.Optimizer, params: list[Any], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()
