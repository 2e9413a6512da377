"""Time the whole training step, from augmentation to optimizer, beside its peers.

    python benchmarks/bench_step.py                      every peer, batch 128 and 1024
    python benchmarks/bench_step.py --ratio 15           fused over eager channels_last, interleaved

Every provider takes the same data path and optimizer; they differ in the network and in how
PyTorch runs it. On a GPU the mixed-precision ones use fp16 with loss scaling.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _timing import Clock, time_wall

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from config import Config  # noqa: E402  # found by the line above
from trainer import Trainer, set_precision_and_determinism  # noqa: E402  # as above
from workers import Workers  # noqa: E402  # as above

from fastres.data import Splits, split, synthetic  # noqa: E402  # as above


def providers(device: torch.device) -> dict[str, tuple[dict[str, Any], str | None]]:
    """Settings of the run, and torch.compile's mode, by name; the report's baseline first."""
    half = "fp16" if device.type == "cuda" else "fp32"  # halves are 10 times slower on a CPU
    amp: dict[str, Any] = {"precision": half}
    every: dict[str, tuple[dict[str, Any], str | None]] = {
        "eager fp32 NCHW": ({"channels_last": False}, None),
        f"eager {half} channels_last": (amp, None),
        f"compile {half} channels_last": (amp, "default"),
        f"fused {half} channels_last": (amp | {"fused": True}, None),
        f"fused compile {half} channels_last": (amp | {"fused": True}, "default"),
    }
    if device.type == "cuda":
        every[f"compile reduce-overhead {half} channels_last"] = (amp, "reduce-overhead")
        every[f"fused compile reduce-overhead {half} channels_last"] = (
            amp | {"fused": True}, "reduce-overhead",
        )  # fmt: skip
    return every


def make_step(
    device: torch.device, data: Splits, settings: dict[str, Any], mode: str | None, **model: Any
) -> Callable[[], Any]:
    """The training steps of a run with these settings, one a call, on the same images each time."""
    config = Config(dataset="synthetic", **settings, **model)
    set_precision_and_determinism(config)
    trainer = Trainer(config, Workers(0, 1, 0, device), data)
    if mode is not None:
        trainer.model.compile(mode=mode, dynamic=False)
    trainer.network.train()
    index = torch.arange(config.batch_size, device=device)
    number = itertools.count()

    def step() -> Any:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        loss, _ = trainer.train_step(index, next(number))
        return loss

    return step


def bench(
    device: torch.device, batch_sizes: list[int], seconds: float, clock: Clock, **model: Any
) -> list[dict[str, Any]]:
    """Images/s of every provider at every batch size, with what the peers reach beside it."""
    data = split(synthetic(max(batch_sizes), 20)).to(device)
    rows: list[dict[str, Any]] = []
    for batch_size in batch_sizes:
        for name, (settings, mode) in providers(device).items():
            # A cold compile of the whole network is what takes long.
            if not clock.has(60 if mode else 10, f"batch {batch_size} {name}"):
                rows.append({"provider": name, "batch_size": batch_size, "skipped": "out of time"})
                continue
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            step = make_step(device, data, settings | {"batch_size": batch_size}, mode, **model)
            started = time.perf_counter()
            for _ in range(3 if device.type == "cpu" else 10):
                loss = step()
            first = time.perf_counter() - started
            timing = time_wall(step, seconds)
            rate = 1000 * batch_size / timing.median_ms
            row = {
                "provider": name, "batch_size": batch_size, "images_per_second": rate,
                **timing.as_dict(), "warmup_seconds": first, "loss": float(loss),
            }  # fmt: skip
            if device.type == "cuda":
                row["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            rows.append(row)
            print(
                f"batch {batch_size:<5} {name:45} {rate:12,.0f} images/s "
                f"{timing.median_ms:9.3f} ms [{timing.low_ms:.3f}, {timing.high_ms:.3f}]",
                flush=True,
            )
    return rows


def ratio(device: torch.device, pairs: int, batch_size: int, **model: Any) -> dict[str, Any]:
    """How many times faster the fused step is than eager channels_last, step by step in turn."""
    data = split(synthetic(batch_size, 20)).to(device)
    every = providers(device)
    names = [n for n in every if n.startswith(("eager", "fused")) and "channels_last" in n][:2]
    steps = [
        make_step(device, data, every[n][0] | {"batch_size": batch_size}, None, **model)
        for n in names
    ]
    for step in steps * 2:
        step()

    def seconds(step: Callable[[], Any]) -> float:
        start = time.perf_counter()
        float(step())
        return time.perf_counter() - start

    ratios = []
    for i in range(pairs):
        # The order alternates, so that what slows the machine slows both sides.
        times = {j: seconds(steps[j]) for j in ((0, 1) if i % 2 else (1, 0))}
        ratios.append(times[0] / times[1])
    result = {
        "peer": names[0], "fused": names[1], "batch_size": batch_size, "pairs": pairs,
        "median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
    }  # fmt: skip
    print(
        f"{names[1]} over {names[0]}, batch {batch_size}: {result['median']:.3f} x "
        f"(median of {pairs} interleaved steps; {result['lowest']:.3f} to {result['highest']:.3f})"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, a figure")
    parser.add_argument("--ratio", type=int, metavar="PAIRS", help="only the interleaved ratio")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    model = {"depth": args.depth, "width": args.width}
    results = environment() | model
    if args.ratio:
        results["ratio"] = ratio(device, args.ratio, args.batch_size[0], **model)
    else:
        results["rows"] = bench(device, args.batch_size, args.seconds, Clock(), **model)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
