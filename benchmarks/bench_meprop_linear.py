"""Time meprop_linear's backward, its selection included, beside the dense backward.

    python benchmarks/bench_meprop_linear.py [--device cpu] [--small] [--json FILE]

Dense and sparse backward take turns, so that a machine's moods meet both. FLOPs are what PyTorch
counts in the backward's products; GB/s are those of the selection alone, of reading dy once (for
"row" also writing what is kept).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _environment import environment
from _meprop_ratios import DTYPES, RATIOS, Case, gradient, time_ratios
from torch import Tensor

from fastres.ops import meprop_linear
from fastres.ops.meprop_linear import meprop_linear_reference


def bench(device: torch.device, small: bool, seconds: float) -> dict[str, Any]:
    """Every size, dtype and mode at every ratio; a wrong gradient gets no speed."""
    sizes = [(16, 64, 64)] if small else [(512, 1024, 1024), (512, 4096, 4096)]
    names = ["fp32"] if device.type == "cpu" else list(DTYPES)
    rows: list[dict[str, Any]] = []
    for dtype in names:
        for N, size, out in sizes:

            def tensor(*shape: int, dtype: str = dtype) -> Tensor:
                return torch.randn(*shape, device=device, dtype=DTYPES[dtype])

            case = Case(
                about={"dtype": dtype, "N": N, "in": size, "out": out},
                x=tensor(N, size).requires_grad_(),
                weight=(tensor(out, size) / size**0.5).requires_grad_(),
                bias=tensor(out).requires_grad_(),
                dy=gradient(N, out, device=device, dtype=DTYPES[dtype]),
                width={"unified": out, "row": out},
                dense=F.linear,
                op=meprop_linear,
                reference=meprop_linear_reference,
            )
            rows += time_ratios(case, RATIOS, device, seconds)
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="one small layer")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing, a ratio")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results = environment() | bench(torch.device(args.device), args.small, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
