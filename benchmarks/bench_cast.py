"""Time cast, fp32 masters to half weights, beside PyTorch's copy_.

    python benchmarks/bench_cast.py [--device cpu] [--small] [--json FILE]

Bytes: every element read once and written once.
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

from fastres.ops import cast

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def bench(device: torch.device, small: bool, seconds: float) -> dict[str, Any]:
    """Every size and dtype by every provider; a wrong result gets no speed."""
    roof = copy_bandwidth(device, seconds)
    print(f"copy bandwidth {roof:,.0f} GB/s")
    rows: list[dict[str, Any]] = []
    # The parameters of the networks of depth 20 and 122, and more than a cache holds.
    for numel in (272_480,) if small else (272_480, 1_930_000, 2**26):
        source = torch.randn(numel, device=device)
        for dtype_name, dtype in _DTYPES.items():
            out = torch.empty(numel, dtype=dtype, device=device)
            providers: dict[str, Callable[[], Tensor]] = {
                "fastres": partial(cast, source, out),
                "torch": partial(out.copy_, source),
            }
            for name, fn in providers.items():
                about = {"provider": name, "dtype": dtype_name, "numel": numel}
                out.fill_(torch.nan)
                if not torch.equal(fn(), source.to(dtype)):
                    print(f"{about}: wrong result, no speed reported")
                    rows.append(about | {"right": False})
                    continue
                moved = source.nbytes + out.nbytes
                row = about | {"right": True, **speed(time_op(fn, device, seconds), moved, roof)}
                if device.type == "cuda":
                    row["graph"] = speed(time_graph(fn, seconds), moved, roof)
                rows.append(row)
                print(f"{name:8} {dtype_name} numel={numel:<9} {speed_text(row)}")
    return {"copy_gb_per_s": roof, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="one small size")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing, a figure")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results = environment() | bench(torch.device(args.device), args.small, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
