"""Time meprop_conv2d's backward, its selection included, beside the dense backward.

    python benchmarks/bench_meprop_conv2d.py [--sweep full] [--device cpu] [--small] [--json FILE]

Convolutions are 3x3, of C to C channels. Dense backwards, eager and compiled, and sparse ones take
turns, so that a machine's moods meet them all; speedup is over the fastest dense one. FLOPs are
what PyTorch counts in the backward's products; GB/s are those of the selection alone, of reading dy
once (for "row" also writing what is kept). --sweep full takes one base shape and changes C, the
image's side and the batch size one at a time; past 512 channels the images shrink as well.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _comparison import LAYOUTS, Case, dtypes, run_program, sweep_axes
from _meprop_ratios import PASSES, Layer, gradient, time_ratios
from _sheet import Sheet
from torch import Tensor

from fastres.ops import meprop_conv2d
from fastres.ops.meprop_conv2d import meprop_conv2d_reference

_BASE = {"N": 128, "C": 64, "H": 28}
_AXES = {
    "C": (16, 32, 64, 128, 256, 512),
    "H": (8, 14, 28, 56),
    "N": (32, 128, 512, 1024, 4096),
}
# Of the base shape's images a backward of 512 channels is a second's work already. Where a network
# has more channels it has smaller images: these are about as much work.
_WIDE = ({"N": 128, "C": 1024, "H": 14}, {"N": 128, "C": 2048, "H": 8})


def _make(
    N: int, C: int, H: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Layer:
    def tensor(*shape: int) -> Tensor:
        v = torch.randn(*shape, device=device, dtype=dtype)
        return v.contiguous(memory_format=layout) if v.dim() == 4 else v

    return Layer(
        x=tensor(N, C, H, H).requires_grad_(),
        weight=(tensor(C, C, 3, 3) / (9 * C) ** 0.5).requires_grad_(),
        bias=tensor(C).requires_grad_(),
        dy=gradient(N, C, H, H, device=device, dtype=dtype).contiguous(memory_format=layout),
        width={"unified": C, "row": C * H * H},
        dense=_dense,
        op=partial(meprop_conv2d, padding=1),
        reference=_reference,
    )


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def _reference(x: Tensor, weight: Tensor, bias: Tensor, k: int, mode: str) -> Tensor:
    return meprop_conv2d_reference(x, weight, bias, 1, 1, 1, 1, k, mode)


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    sizes = [{"N": 128, "C": 16, "H": 32}, {"N": 128, "C": 64, "H": 8}]
    sizes += [{"N": 32, "C": 256, "H": 16}]
    if small:
        sizes = [{"N": 4, "C": 8, "H": 8}]
    elif sweep == "full":
        sizes = [*sweep_axes(_BASE, _AXES), *_WIDE]
    for name, dtype in dtypes(device).items():
        for layout_name, layout in LAYOUTS.items():
            for size in sizes:
                # x, its gradient and dy, and a y for each pass.
                numel = size["N"] * size["C"] * size["H"] ** 2
                yield Case(
                    {"dtype": name, "layout": layout_name, **size},
                    (3 + PASSES) * numel * dtype.itemsize,
                    partial(_make, **size, dtype=dtype, layout=layout, device=device),
                )
            if small:
                break


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every size, dtype, layout and mode at every ratio; a wrong gradient gets no speed."""
    return time_ratios(device, _cases(device, small, sweep), small, seconds, sheet)


def main() -> int:
    return run_program(__doc__, "meprop_conv2d", bench, seconds=0.5)


if __name__ == "__main__":
    sys.exit(main())
