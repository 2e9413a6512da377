"""Steps for the tests of LossScaler, with an overflow where one is wanted."""

from typing import Any

import torch
from torch import nn


def parameters(device: str) -> list[Any]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in ((3, 4), (5,))]


def backward(scaler: Any, params: list[Any], step: int, overflow: bool = False) -> None:
    """Gradients of a loss of the parameters, scaled; with an Inf among them on overflow."""
    torch.manual_seed(step)
    for p in params:
        p.grad = None
    loss = sum((p * torch.randn_like(p)).sum() for p in params)
    scaler.scale(loss).backward()
    if overflow:
        params[-1].grad[1] = torch.inf


def train(scaler: Any, optimizer: Any, params: list[Any], pattern: list[bool]) -> list[float]:
    """The scale after each step; True in the pattern overflows."""
    scales = []
    for step, overflow in enumerate(pattern):
        backward(scaler, params, step, overflow)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales
