"""What stochastic depth saves: FLOPs and time of a whole training step, beside p = 0.

    python benchmarks/bench_stochastic_depth_unit.py [--device cpu] [--small] [--json FILE]

The modes take their steps in turn, so that what slows the machine slows them all. Steps of "batch"
differ in the units that they drop: its figures are means over steps, as a run's time is.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _training_step import make_step
from torch.utils.flop_counter import FlopCounterMode

from fastres.data import split, synthetic

MODES = ("batch", "subset", "row")


def bench(device: torch.device, small: bool, rounds: int, depth: int, p: float) -> dict[str, Any]:
    """Mean time and FLOPs of a step by mode, at drop probability p for every unit."""
    batch_size, width = (16, 4) if small else (128, 16)
    data = split(synthetic(batch_size, 20)).to(device)
    fixed: dict[str, Any] = {"batch_size": batch_size, "fused": True, "drop_schedule": "uniform"}
    steps = {"p=0": make_step(device, data, fixed, None, depth=depth, width=width)}
    for mode in MODES:
        settings = fixed | {"drop_prob": p, "drop_mode": mode}
        steps[mode] = make_step(device, data, settings, None, depth=depth, width=width)
    times: dict[str, list[float]] = {name: [] for name in steps}
    flops: dict[str, list[int]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            # Counted at steps of its own: counting takes time.
            counter = FlopCounterMode(display=False)
            with counter:
                step()
            flops[name].append(counter.get_total_flops())
            start = time.perf_counter()
            float(step())
            if i > 0:
                times[name].append(time.perf_counter() - start)
    rows = []
    for name in steps:
        seconds, work = statistics.mean(times[name]), statistics.mean(flops[name])
        row = {
            "mode": name,
            "seconds": seconds,
            "median_seconds": statistics.median(times[name]),
            "gflops": work / 1e9,
            "time_ratio": seconds / statistics.mean(times["p=0"]),
            "flops_ratio": work / statistics.mean(flops["p=0"]),
        }
        rows.append(row)
        print(
            f"{name:8} {1000 * seconds:9.1f} ms a step, {row['time_ratio']:.3f} of p=0's;"
            f" {row['gflops']:8.2f} GFLOP, {row['flops_ratio']:.3f}"
        )
    return {"depth": depth, "p": p, "batch_size": batch_size, "rounds": rounds, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=30, help="steps of each mode that are timed")
    parser.add_argument("--small", action="store_true", help="toy size")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    found = bench(device, args.small, args.rounds, args.depth, args.p)
    if args.json:
        args.json.write_text(json.dumps(environment() | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
