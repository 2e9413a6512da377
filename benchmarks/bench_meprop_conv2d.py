"""Time meprop_conv2d's backward, its selection included, beside the dense backward.

    python benchmarks/bench_meprop_conv2d.py [--device cpu] [--small] [--json FILE]

Convolutions are 3x3, of C to C channels. Dense and sparse backward take turns, so that a machine's
moods meet both. FLOPs are what PyTorch counts in the backward's products; GB/s are those of the
selection alone, of reading dy once (for "row" also writing what is kept).
"""

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _environment import environment
from _meprop_ratios import DTYPES, RATIOS, Case, gradient, time_ratios
from torch import Tensor

from fastres.ops import meprop_conv2d
from fastres.ops.meprop_conv2d import meprop_conv2d_reference

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def bench(device: torch.device, small: bool, seconds: float) -> dict[str, Any]:
    """Every size, dtype, layout and mode at every ratio; a wrong gradient gets no speed."""
    sizes = [(4, 8, 8)] if small else [(128, 64, 8), (32, 256, 16)]
    names = ["fp32"] if device.type == "cpu" else list(DTYPES)
    rows: list[dict[str, Any]] = []
    for dtype, (N, C, H), layout in itertools.product(names, sizes, FORMATS):

        def tensor(*shape: int, dtype: str = dtype, layout: str = layout) -> Tensor:
            v = torch.randn(*shape, device=device, dtype=DTYPES[dtype])
            return v.contiguous(memory_format=FORMATS[layout]) if v.dim() == 4 else v

        case = Case(
            about={"dtype": dtype, "layout": layout, "N": N, "C": C, "H": H},
            x=tensor(N, C, H, H).requires_grad_(),
            weight=(tensor(C, C, 3, 3) / (9 * C) ** 0.5).requires_grad_(),
            bias=tensor(C).requires_grad_(),
            dy=gradient(N, C, H, H, device=device, dtype=DTYPES[dtype]).contiguous(
                memory_format=FORMATS[layout]
            ),
            width={"unified": C, "row": C * H * H},
            dense=partial(F.conv2d, padding=1),
            op=partial(meprop_conv2d, padding=1),
            reference=_reference,
        )
        rows += time_ratios(case, RATIOS, device, seconds)
    return {"rows": rows}


def _reference(x: Tensor, weight: Tensor, bias: Tensor, k: int, mode: str) -> Tensor:
    return meprop_conv2d_reference(x, weight, bias, 1, 1, 1, 1, k, mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="one small convolution")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing, a ratio")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results = environment() | bench(torch.device(args.device), args.small, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
