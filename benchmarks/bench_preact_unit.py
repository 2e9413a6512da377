"""Time a pre-activation unit, forward and backward, beside eager PyTorch and torch.compile.

    python benchmarks/bench_preact_unit.py [--sweep full] [--device cpu] [--small] [--json FILE]

"fastres" is the unit as one op; "layers" the same layer by layer, with batch_norm_relu and cuDNN's
convolutions; "eager" and "compile" are PyTorch's own layers. All of them run under autocast where
the dtype is a half, on activations in channels_last and fp32 weights.

GB/s counts the fewest bytes that the unit must move with its three kernels a backward (see
kernels/preact_unit.py), for every provider alike, so that a share of the copy bandwidth compares
them. A provider whose result is wrong in this run gets no speed. The stages of a depth-20 ResNet at
batch 128 and 1024; --sweep full adds the units that change the shape, and other widths and sizes.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _comparison import Case, Op, Work, compare, compiled, dtypes, run_program
from _sheet import Sheet
from torch import Tensor, nn

from fastres.models.resnet import PlainBatchNormReLU2d
from fastres.ops import PreActUnit

# Stage by stage: channels, image side.
_STAGES = ((16, 32), (32, 16), (64, 8))
# Samples that are checked: in fp64 a whole batch may not fit where the op does.
_CHECKED = 64


def bytes_moved(x: Tensor, unit: PreActUnit, backward: bool) -> int:
    """Fewest bytes: x, h, y and their gradients, as often as a kernel must read or write them."""
    N, C, H, W = x.shape
    K, stride = unit.conv1.out_channels, unit.conv1.stride[0]
    out = N * K * -(-H // stride) * -(-W // stride) * x.itemsize
    if backward:
        # dy, h, dz2; dz2, h, x, dz1; dz1, x, dx, and dy once more, for the shortcut.
        return 6 * out + 5 * x.nbytes
    # x, h; h, y, and the shortcut, which a projection writes, too.
    return x.nbytes + (4 if unit.shortcut is None else 5) * out


def make_inputs(
    N: int, C: int, H: int, stride: int, dtype: torch.dtype, device: torch.device
) -> tuple[PreActUnit, Tensor, Tensor]:
    """A unit, x and dy."""
    unit = PreActUnit(C, C * stride, stride).to(device)
    unit.to(memory_format=torch.channels_last)
    for bn in (unit.bn1, unit.bn2):
        torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
        torch.nn.init.normal_(bn.bias)
    side = (H - 1) // stride + 1

    def activation(channels: int, side: int) -> Tensor:
        t = torch.randn(N, channels, side, side, device=device, dtype=dtype)
        return t.contiguous(memory_format=torch.channels_last)

    return unit, activation(C, H).requires_grad_(), activation(C * stride, side)


class _UnderAutocast(nn.Module):
    def __init__(self, unit: Callable[..., Any], half: bool) -> None:
        super().__init__()
        self.unit, self.enabled = unit, half

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=self.enabled):
            return self.unit(x)


def providers(unit: PreActUnit, half: bool) -> dict[str, Op]:
    """By name Modules that all hold the same weights."""

    def alike(**how: Any) -> PreActUnit:
        conv = unit.conv1
        other = PreActUnit(conv.in_channels, conv.out_channels, conv.stride[0], **how)
        other.load_state_dict(unit.state_dict())
        return other.to(conv.weight.device).to(memory_format=torch.channels_last)

    plain = alike(norm_relu=PlainBatchNormReLU2d, whole=False)
    made: dict[str, Any] = {"fastres": unit, "layers": alike(whole=False), "eager": plain}
    made |= compiled(plain)
    return {name: _UnderAutocast(op, half) for name, op in made.items()}


def _gradients(y: Tensor, op: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [x, *op.parameters()], dy, retain_graph=True)


def is_right(unit: PreActUnit, x: Tensor, dy: Tensor, op: Any) -> bool:
    """Against fp64, of a few samples where there are many; the tests are the ones to be exact."""
    x, dy = x[:_CHECKED].detach().requires_grad_(), dy[:_CHECKED]
    conv = unit.conv1
    exact = PreActUnit(
        conv.in_channels, conv.out_channels, conv.stride[0], norm_relu=PlainBatchNormReLU2d,
        whole=False,
    )  # fmt: skip
    exact.load_state_dict(unit.state_dict())
    exact.to(x.device, torch.float64)
    y, x64 = op(x), x.detach().double().requires_grad_()
    found = (y, *_gradients(y, op, x, dy))
    y64 = exact(x64)
    wanted = (y64, *_gradients(y64, exact, x64, dy.double()))
    # By norms: where a ReLU's input is within rounding of 0 its gradient passes or does not.
    with torch.no_grad():
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(errors) < 50 * torch.finfo(x.dtype).eps ** 0.75


def _make(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Work:
    unit, x, dy = make_inputs(**sizes, dtype=dtype, device=device)

    def passes(op: Any) -> dict[str, Callable[[], Any]]:
        y = op(x)
        return {"forward": partial(op, x), "backward": partial(_gradients, y, op, x, dy)}

    return Work(
        providers(unit, dtype != torch.float32),
        partial(is_right, unit, x, dy),
        passes,
        {name: bytes_moved(x, unit, name == "backward") for name in ("forward", "backward")},
    )


def _shapes(small: bool, sweep: str) -> Iterator[dict[str, int]]:
    if small:
        yield {"N": 4, "C": 16, "H": 8, "stride": 1}
        return
    for N in (1024, 128):
        yield from ({"N": N, "C": C, "H": H, "stride": 1} for C, H in _STAGES)
    if sweep == "full":
        for N in (1024, 128):
            yield from ({"N": N, "C": C, "H": H, "stride": 2} for C, H in _STAGES[:2])
        for C, H in ((64, 56), (128, 28), (256, 14), (512, 7)):
            yield {"N": 64, "C": C, "H": H, "stride": 1}


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    for dtype_name, dtype in dtypes(device).items():
        for sizes in _shapes(small, sweep):
            numel = sizes["N"] * sizes["C"] * sizes["H"] ** 2
            # x, h, y, dy, dz twice, dx, and as many again for what the layers keep.
            yield Case(
                {"dtype": dtype_name, "layout": "NHWC", **sizes},
                14 * numel * dtype.itemsize,
                partial(_make, sizes, dtype, device),
            )


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every configuration by every provider; one row each, with the copy bandwidth beside them."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "preact_unit", bench)


if __name__ == "__main__":
    sys.exit(main())
