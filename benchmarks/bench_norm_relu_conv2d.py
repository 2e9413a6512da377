"""Time BatchNorm, ReLU and a convolution as one op beside eager PyTorch and torch.compile.

    python benchmarks/bench_norm_relu_conv2d.py [--sweep full] [--device cpu] [--small]

"fastres" is the op, which keeps x alone for the backward; "eager" and "compile" are BatchNorm, ReLU
and conv2d of PyTorch's own. All of them run under autocast where the dtype is a half, on
activations in channels_last and fp32 weights, without a residual.

GB/s counts the fewest bytes: forward x twice, once for its statistics, and y; backward x and dy,
what comes to the normalised x, written and read, x once more, and dx. A provider whose result is
wrong in this run gets no speed. The convolutions of a depth-20 ResNet at batch 128 and 1024;
--sweep full adds those at stride 2, the 1x1 projections, and other widths and sizes.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _comparison import Case, Op, Work, compare, compiled, dtypes, run_program
from _sheet import Sheet
from torch import Tensor

from fastres.ops import Norm, norm_relu_conv2d
from fastres.ops.norm_relu_conv2d import norm_relu_conv2d_reference

# Stage by stage: channels, image side.
_STAGES = ((16, 32), (32, 16), (64, 8))
# Samples that are checked: in fp64 a whole batch may not fit where the op does.
_CHECKED = 64


def _applied(op: Callable[..., Tensor], stride: int, half: bool) -> Op:
    """op of x, the norm's weight and bias and the convolution's weight, under autocast if half."""

    def run(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
        norm = Norm(None, None, gamma, beta, training=True)
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=half):
            return op(x, norm, weight, None, stride)

    return run


def _gradients(y: Tensor, leaves: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, dy, retain_graph=True)


def is_right(leaves: tuple[Tensor, ...], dy: Tensor, stride: int, op: Op) -> bool:
    """Against fp64, of a few samples where there are many; the tests are the ones to be exact."""
    x, *rest = leaves
    few = (x[:_CHECKED].detach().requires_grad_(), *rest)
    dy = dy[:_CHECKED]
    y = op(*few)
    found = (y, *_gradients(y, few, dy))
    exact = tuple(t.detach().double().requires_grad_() for t in few)
    y64 = _applied(norm_relu_conv2d_reference, stride, half=False)(*exact)
    wanted = (y64, *_gradients(y64, exact, dy.double()))
    # By norms: where a ReLU's input is within rounding of 0 its gradient passes or does not.
    with torch.no_grad():
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(errors) < 50 * torch.finfo(x.dtype).eps ** 0.75


def _make(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Work:
    N, C, H, K, taps, stride = (sizes[name] for name in ("N", "C", "H", "K", "taps", "stride"))
    side = (H - 1) // stride + 1

    def activation(channels: int, side: int) -> Tensor:
        t = torch.randn(N, channels, side, side, device=device, dtype=dtype)
        return t.contiguous(memory_format=torch.channels_last)

    x, dy = activation(C, H), activation(K, side)
    weight = torch.randn(K, C, taps, taps, device=device) / (C * taps * taps) ** 0.5
    gamma, beta = 0.5 + torch.rand(C, device=device), torch.randn(C, device=device)
    weight = weight.contiguous(memory_format=torch.channels_last)
    leaves = tuple(t.requires_grad_() for t in (x, gamma, beta, weight))
    half = dtype != torch.float32

    def passes(op: Op) -> dict[str, Callable[[], Any]]:
        y = op(*leaves)
        return {"forward": partial(op, *leaves), "backward": partial(_gradients, y, leaves, dy)}

    eager = _applied(norm_relu_conv2d_reference, stride, half)
    return Work(
        {"fastres": _applied(norm_relu_conv2d, stride, half), "eager": eager, **compiled(eager)},
        partial(is_right, leaves, dy, stride),
        passes,
        {"forward": 2 * x.nbytes + dy.nbytes, "backward": 5 * x.nbytes + dy.nbytes},
    )


def _shapes(small: bool, sweep: str) -> Iterator[dict[str, int]]:
    def conv(N: int, C: int, H: int, K: int, taps: int = 3, stride: int = 1) -> dict[str, int]:
        return {"N": N, "C": C, "H": H, "K": K, "taps": taps, "stride": stride}

    if small:
        yield conv(4, 16, 8, 16)
        return
    for N in (1024, 128):
        yield from (conv(N, C, H, C) for C, H in _STAGES)
    if sweep == "full":
        for N in (1024, 128):
            for C, H in _STAGES[:2]:
                yield conv(N, C, H, 2 * C, stride=2)
                yield conv(N, C, H, 2 * C, taps=1, stride=2)
        yield from (conv(64, C, H, C) for C, H in ((64, 56), (128, 28), (256, 14), (512, 7)))


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    for dtype_name, dtype in dtypes(device).items():
        for sizes in _shapes(small, sweep):
            # x, y and their gradients, and as many again for what a provider makes on its way.
            elements = sizes["N"] * (sizes["C"] + sizes["K"]) * sizes["H"] ** 2
            yield Case(
                {"dtype": dtype_name, "layout": "NHWC", **sizes},
                4 * elements * dtype.itemsize,
                partial(_make, sizes, dtype, device),
            )


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every configuration by every provider; one row each, with the copy bandwidth beside them."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "norm_relu_conv2d", bench)


if __name__ == "__main__":
    sys.exit(main())
