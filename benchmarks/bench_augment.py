"""Time augment beside the same steps in eager PyTorch and torch.compile.

    python benchmarks/bench_augment.py [--device cpu] [--small] [--json FILE]

The peer gathers, pads, crops, mirrors and normalises the batch with PyTorch's indexing, from the
same draws. Bytes: every pixel read once as a byte, every output written once.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _timing import copy_bandwidth, speed, speed_text, time_graph, time_op
from torch import Tensor

# The CPU's path is a few PyTorch ops on any device: the strongest eager peer there is.
from fastres.ops.augment import _native as eager
from fastres.ops.augment import augment

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def bench(device: torch.device, small: bool, seconds: float) -> dict[str, Any]:
    """Every batch size and dtype by every provider; a wrong result gets no speed."""
    roof = copy_bandwidth(device, seconds)
    print(f"copy bandwidth {roof:,.0f} GB/s")
    torch.compiler.reset()
    images = torch.randint(0, 256, (200 if small else 50_000, 3, 32, 32), dtype=torch.uint8)
    images = images.to(device, memory_format=torch.channels_last)
    mean, std = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    compiled = torch.compile(eager, dynamic=False)
    rows: list[dict[str, Any]] = []
    for batch_size in (16,) if small else (128, 1024, 4096):
        index = torch.randint(len(images), (batch_size,), device=device)
        for dtype_name, dtype in _DTYPES.items():
            args = (images, index, mean, std)
            draw: Any = (0, 0, 4, True, dtype, True)  # from the seed on, in _native's order
            passes: dict[str, Callable[[], Tensor]] = {
                "fastres": partial(augment, *args, dtype=dtype),
                "eager": partial(eager, *args, *draw),
                "compile": partial(compiled, *args, *draw),
            }
            wanted = eager(*args, 0, 0, 4, True, torch.float32, True)
            for name, fn in passes.items():
                about = {"provider": name, "dtype": dtype_name, "batch_size": batch_size}
                y = fn()
                # Half a unit of the last place for the cast, and as much again for a compiler's
                # own order of the normalisation.
                if not torch.allclose(y.float(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6):
                    print(f"{about}: wrong result, no speed reported")
                    rows.append(about | {"right": False})
                    continue
                moved = y.numel() + y.nbytes
                row = about | {"right": True, **speed(time_op(fn, device, seconds), moved, roof)}
                if device.type == "cuda":
                    row["graph"] = speed(time_graph(fn, seconds), moved, roof)
                rows.append(row)
                print(f"{name:8} {dtype_name} B={batch_size:<5} {speed_text(row)}")
    return {"copy_gb_per_s": roof, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="one small batch")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing, a figure")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results = environment() | bench(torch.device(args.device), args.small, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
