"""Units for the tests of StochasticDepthUnit, and steps that drop them or keep them."""

from typing import Any

import torch
from torch import Tensor, nn

from fastres.ops import BatchNormReLU2d, StepGenerator, StochasticDepthUnit, UnitGenerator


class Counting(nn.Conv2d):
    """A convolution that notes how many samples it was given."""

    def __init__(self, channels: int, device: str) -> None:
        super().__init__(channels, channels, 1, device=device)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return super().forward(x)


def branch_of(device: str, channels: int = 3) -> Any:
    return nn.Sequential(BatchNormReLU2d(channels, device=device), Counting(channels, device))


def in_pytorch(branch: Any) -> Any:
    """The same in PyTorch's own modules, with the same numbers."""
    device, channels = branch[1].weight.device, branch[1].in_channels
    norm = nn.BatchNorm2d(channels, device=device)
    norm.load_state_dict(branch[0].state_dict())
    conv = nn.Conv2d(channels, channels, 1, device=device)
    conv.load_state_dict(branch[1].state_dict())
    return nn.Sequential(norm, nn.ReLU(), conv)


def unit_of(
    device: str, mode: Any, p: float = 0.5, seed: int = 0, **options: Any
) -> tuple[Any, StepGenerator, UnitGenerator]:
    steps = StepGenerator(seed)
    generator = steps.unit(p)
    return (
        StochasticDepthUnit(branch_of(device), p, mode, generator=generator, **options),
        steps,
        generator,
    )


def skip_to(steps: StepGenerator, generator: UnitGenerator, dropped: bool) -> None:
    """The first step that drops the batch, or keeps it."""
    for step in range(64):
        steps.set_step(step)
        if generator.dropped == dropped:
            return
    raise AssertionError("64 draws alike")


def input_of(device: str, N: int = 6, fmt: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(N, 3, 2, 4, device=device).contiguous(memory_format=fmt).requires_grad_()


def grads(y: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *module.parameters()], torch.linspace(
        -1, 1, y.numel(), device=y.device).view(y.shape)))  # fmt: skip
