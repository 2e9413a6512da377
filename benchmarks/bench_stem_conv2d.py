"""Time a network's first convolution and its output's moments beside eager and torch.compile.

    python benchmarks/bench_stem_conv2d.py [--sweep full] [--device cpu] [--small] [--json FILE]

Forward is y with its mean and variance by channel, which the BatchNorm that follows wants:
"fastres" leaves them by chunks, for that BatchNorm's kernel to merge; the others take them by
torch.var_mean, as does "fastres" on a CPU, where it is PyTorch's own convolution. Backward is the
weight's gradient alone: images need none. The weight is in fp32, and rounded to x's dtype by each.

GB/s counts the fewest bytes: forward x and y, backward x and dy, each once. A provider whose result
is wrong in this run gets no speed. The stem of a ResNet at batch 128 and 1024, images in NHWC;
--sweep full adds NCHW, more outputs and larger images.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _comparison import LAYOUTS, Case, Op, Work, compare, compiled, dtypes, run_program
from _sheet import Sheet
from torch import Tensor

from fastres.ops import stem_conv2d
from fastres.ops.stem_conv2d import stem_conv2d_reference

# Samples that are checked: in fp64 a whole batch may not fit where the op does.
_CHECKED = 64


def fastres(x: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
    y, moments = stem_conv2d(x, weight, True)
    return y, torch.var_mean(y.detach(), (0, 2, 3)) if moments is None else moments


def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
    y = stem_conv2d_reference(x, weight)
    return y, torch.var_mean(y.detach(), (0, 2, 3))


def _gradient(y: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    return torch.autograd.grad(y, weight, dy, retain_graph=True)[0]


def is_right(x: Tensor, weight: Tensor, dy: Tensor, op: Op) -> bool:
    """Against fp64, of a few samples where there are many; the tests are the ones to be exact."""
    x, dy = x[:_CHECKED], dy[:_CHECKED]
    y, _ = op(x, weight)
    found = (y, _gradient(y, weight, dy))
    weight64 = weight.detach().double().requires_grad_()
    y64 = stem_conv2d_reference(x.double(), weight64)
    wanted = (y64, _gradient(y64, weight64, dy.double()))
    with torch.no_grad():
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(errors) < 50 * torch.finfo(x.dtype).eps ** 0.75


def _make(sizes: dict[str, int], layout: str, dtype: torch.dtype, device: torch.device) -> Work:
    N, C, H, K = (sizes[name] for name in "NCHK")

    def image(channels: int, fmt: torch.memory_format) -> Tensor:
        t = torch.randn(N, channels, H, H, device=device, dtype=dtype)
        return t.contiguous(memory_format=fmt)

    x, dy = image(C, LAYOUTS[layout]), image(K, LAYOUTS["NHWC"])
    weight = (torch.randn(K, C, 3, 3, device=device) / 5).requires_grad_()

    def passes(op: Op) -> dict[str, Callable[[], Any]]:
        y, _ = op(x, weight)
        return {"forward": partial(op, x, weight), "backward": partial(_gradient, y, weight, dy)}

    moved = x.nbytes + dy.nbytes
    return Work(
        {"fastres": fastres, "eager": eager, **compiled(eager)},
        partial(is_right, x, weight, dy),
        passes,
        {"forward": moved, "backward": moved},
    )


def _shapes(small: bool, sweep: str) -> Iterator[tuple[str, dict[str, int]]]:
    if small:
        yield "NHWC", {"N": 4, "C": 3, "H": 8, "K": 16}
        return
    for N in (1024, 128):
        yield "NHWC", {"N": N, "C": 3, "H": 32, "K": 16}
    if sweep == "full":
        for N in (1024, 128):
            yield "NCHW", {"N": N, "C": 3, "H": 32, "K": 16}
            yield "NHWC", {"N": N, "C": 1, "H": 28, "K": 16}
            yield from (("NHWC", {"N": N, "C": 3, "H": 32, "K": K}) for K in (64, 128))
        yield "NHWC", {"N": 128, "C": 3, "H": 224, "K": 64}


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    for dtype_name, dtype in dtypes(device).items():
        for layout, sizes in _shapes(small, sweep):
            # x, y and dy, and as many again for what a provider makes on its way.
            nbytes = 2 * sizes["N"] * (sizes["C"] + 2 * sizes["K"]) * sizes["H"] ** 2
            yield Case(
                {"dtype": dtype_name, "layout": layout, **sizes},
                nbytes * dtype.itemsize,
                partial(_make, sizes, layout, dtype, device),
            )


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every configuration by every provider; one row each, with the copy bandwidth beside them."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "stem_conv2d", bench)


if __name__ == "__main__":
    sys.exit(main())
