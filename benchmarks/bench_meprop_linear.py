"""Time meprop_linear's backward, its selection included, beside the dense backward.

    python benchmarks/bench_meprop_linear.py [--sweep full] [--device cpu] [--small] [--json FILE]

Dense backwards, eager and compiled, and sparse ones take turns, so that a machine's moods meet them
all; speedup is over the fastest dense one. FLOPs are what PyTorch counts in the backward's
products; GB/s are those of the selection alone, of reading dy once (for "row" also writing what is
kept). --sweep full takes one base shape and changes the features and the batch size one at a time.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _comparison import Case, dtypes, run_program, sweep_axes
from _meprop_ratios import PASSES, Layer, gradient, time_ratios
from _sheet import Sheet
from torch import Tensor

from fastres.ops import meprop_linear
from fastres.ops.meprop_linear import meprop_linear_reference

_BASE = {"N": 512, "features": 1024}
_AXES = {"features": (256, 1024, 4096, 8192), "N": (32, 128, 512, 1024, 4096)}


def _make(N: int, features: int, dtype: torch.dtype, device: torch.device) -> Layer:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return Layer(
        x=tensor(N, features).requires_grad_(),
        weight=(tensor(features, features) / features**0.5).requires_grad_(),
        bias=tensor(features).requires_grad_(),
        dy=gradient(N, features, device=device, dtype=dtype),
        width={"unified": features, "row": features},
        dense=F.linear,
        op=meprop_linear,
        reference=meprop_linear_reference,
    )


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    sizes = [{"N": 512, "features": 1024}, {"N": 512, "features": 4096}]
    if small:
        sizes = [{"N": 16, "features": 64}]
    elif sweep == "full":
        sizes = list(sweep_axes(_BASE, _AXES))
    for name, dtype in dtypes(device).items():
        for size in sizes:
            N, features = size["N"], size["features"]
            about = {"dtype": name, "N": N, "in": features, "out": features}
            # weight and its gradient; x, its gradient and dy, and a y for each pass.
            nbytes = (2 * features + (3 + PASSES) * N) * features * dtype.itemsize
            yield Case(about, nbytes, partial(_make, N, features, dtype, device))


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every size, dtype and mode at every ratio; a wrong gradient gets no speed."""
    return time_ratios(device, _cases(device, small, sweep), small, seconds, sheet)


def main() -> int:
    return run_program(__doc__, "meprop_linear", bench, seconds=0.5)


if __name__ == "__main__":
    sys.exit(main())
