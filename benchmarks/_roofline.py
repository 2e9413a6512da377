"""The least time that a machine can take for a training step: its bytes or its operations.

Bytes: a step whose every residual unit is fused moves each convolution's output about eight times
(the forward writes it and reads it twice, the backward reads it and moves its gradient), and each
parameter, its gradient and its momentum five times. Operations: PyTorch's own count for forward and
backward. Ceilings, measured in the same run: a large copy, and the better of a large matrix product
and a wide convolution, as this machine's libraries do them. A library that takes fewer operations
than a direct convolution has, by Winograd's algorithm, may pass beneath such a floor.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _timing import copy_bandwidth, time_op
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.models import ResNet

PASSES = 8
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """Bandwidth in GB/s, read plus written, and TFLOP/s by the name of the dtype."""

    copy_gb_per_s: float
    tflops: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ceilings(device: torch.device, seconds: float, small: bool = False) -> Ceilings:
    """Measure both. fp32 is without TF32, as the training program's is."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    gpu = device.type == "cuda"
    # Half precision on CPUs is for tests, not for speed.
    names = ("fp32", "fp16", "bf16") if gpu else ("fp32",)
    rates = {
        name: max(
            _product_rate(8192 if gpu else 256 if small else 1024, name, device, seconds),
            _convolution_rate(512 if gpu else 4 if small else 32, name, device, seconds),
        )
        for name in names
    }
    return Ceilings(copy_bandwidth(device, seconds), rates)


def _product_rate(size: int, name: str, device: torch.device, seconds: float) -> float:
    """TFLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(_DTYPES[name]) for _ in range(2))
    timing = time_op(partial(torch.mm, a, b, out=torch.empty_like(a)), device, seconds)
    return 2 * size**3 / timing.median_ms / 1e9


def _convolution_rate(N: int, name: str, device: torch.device, seconds: float) -> float:
    """TFLOP/s of a 3x3 convolution of 256 channels at 16x16."""
    C, H = 256, 16
    x, weight = (
        torch.randn(shape, device=device).to(_DTYPES[name], memory_format=torch.channels_last)
        for shape in ((N, C, H, H), (C, C, 3, 3))
    )
    timing = time_op(partial(F.conv2d, x, weight, padding=1), device, seconds)
    return 2 * N * H * H * C * C * 9 / timing.median_ms / 1e9


@dataclass(frozen=True)
class Work:
    """Of one training step: FLOPs, elements of all 3x3 convolutions' outputs, parameters."""

    flops: int
    conv_outputs: int
    parameters: int

    def bytes_moved(self, itemsize: int) -> int:
        return PASSES * itemsize * self.conv_outputs + 5 * 4 * self.parameters


def work(batch_size: int, depth: int, width: int, image_size: int = 32) -> Work:
    """Counted on a network that holds no memory and computes nothing."""
    outputs: list[int] = []

    def note(module: nn.Module, args: Any, y: Tensor) -> None:
        outputs.append(y[0].numel())

    with torch.device("meta"):
        model = ResNet(depth, width, fused=False)
        for module in model.modules():
            # A projection's output joins the residual sum: a fused unit keeps it on the chip.
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.register_forward_hook(note)
        with FlopCounterMode(display=False) as counter:
            # Of a sample: on the meta device a sum over none has no cost either.
            model(torch.empty(2, 3, image_size, image_size)).sum().backward()
    return Work(
        counter.get_total_flops() * batch_size // 2,
        sum(outputs) * batch_size,
        sum(p.numel() for p in model.parameters()),
    )


def roofline(what: Work, precision: str, roof: Ceilings) -> dict[str, float | int | str]:
    """Milliseconds that the step takes at the least, and which ceiling says so."""
    moved = what.bytes_moved(_DTYPES[precision].itemsize)
    bytes_ms = moved / roof.copy_gb_per_s / 1e6
    flops_ms = what.flops / roof.tflops[precision] / 1e9
    return {
        "bytes": moved,
        "flops": what.flops,
        "roofline_ms": max(bytes_ms, flops_ms),
        "bound_by": "bytes" if bytes_ms >= flops_ms else "flops",
    }
