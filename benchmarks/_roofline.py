"""The least time that a machine can take for a training step: its bytes or its operations.

Bytes: a step whose every residual unit is fused moves each convolution's output about eight times
(the forward writes it and reads it twice, the backward reads it and moves its gradient), and each
parameter, its gradient and its momentum five times. Operations: PyTorch's own count for forward and
backward. Ceilings: a large copy and a large matrix product, measured in the same run.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
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
    torch.backends.cuda.matmul.allow_tf32 = False
    size = 8192 if device.type == "cuda" else 256 if small else 1024
    # Half precision on CPUs is for tests, not for speed.
    names = ("fp32", "fp16", "bf16") if device.type == "cuda" else ("fp32",)
    tflops = {}
    for name in names:
        a, b = (torch.randn(size, size, device=device).to(_DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        timing = time_op(partial(torch.mm, a, b, out=out), device, seconds)
        tflops[name] = 2 * size**3 / timing.median_ms / 1e9
    return Ceilings(copy_bandwidth(device, seconds), tflops)


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
