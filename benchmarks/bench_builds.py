"""Time the build of all kernels of a training step from a cold cache, with no GPU present.

    python benchmarks/bench_builds.py                       depth 20, fp16, fused units, for sm_90
    python benchmarks/bench_builds.py --precision bf16 fp32 --target sm_80 sm_100 gfx942
    python benchmarks/bench_builds.py --threads 1 2 --json builds.json

What train/main.py --prebuild does before its first step: a dry run collects the step's launches,
and threads build their binaries, each time with an empty cache in a process of its own. The clock
holds the dry run and the builds; imports, the model and the data, which any run has, it does not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

import torch
from _program import aligned, finish
from _results import Row, measured
from _timing import percentiles
from config import Config
from prebuild import prebuild
from trainer import Trainer
from workers import Workers, usable_cpus

from fastres.data import split, synthetic
from fastres.kernels import _aot


def build_once(about: Row) -> Row:
    """The seconds and the binaries of one step's kernels, in this process, into its cache."""
    config = Config(
        dataset="synthetic", device="cpu", fused=True, fused_units=True, depth=about["depth"],
        batch_size=about["batch_size"], precision=about["dtype"],
    )  # fmt: skip
    data = split(synthetic(about["batch_size"], 20))
    trainer = Trainer(config, Workers(0, 1, 0, torch.device("cpu")), data)
    count, seconds = prebuild(trainer, about["target"], about["threads"])
    return {"seconds": seconds, "binaries": count}


def _build(about: Row, repeats: int) -> Row:
    found = [_apart(about) for _ in range(repeats)]
    times = percentiles([1000 * row["seconds"] for row in found]).as_dict()
    return times | {"binaries": found[-1]["binaries"]}


def _apart(about: Row) -> Row:
    """build_once in a process of its own, whose cache is empty."""
    # What Triton interprets it cannot build.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--once", json.dumps(about)], capture_output=True,
            text=True, env=env | {"TRITON_CACHE_DIR": cache},
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def bench(abouts: list[Row], repeats: int) -> dict[str, Any]:
    """A row for each."""
    return {"rows": [measured(about, partial(_build, about, repeats)) for about in abouts]}


def table(rows: list[Row]) -> str:
    lines = [["target", "dtype", "depth", "threads", "binaries", "seconds", "lowest", "highest"]]
    for row in rows:
        if "median_ms" in row:
            times = [f"{row[key] / 1000:.1f}" for key in ("median_ms", "low_ms", "high_ms")]
            names = [str(row[key]) for key in ("target", "dtype", "depth", "threads", "binaries")]
            lines.append([*names, *times])
    return aligned(lines, names=2)


def main() -> int:
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=_aot.TARGETS, default=["sm_90"])
    dtypes = ("fp16", "bf16", "fp32")
    parser.add_argument("--precision", nargs="+", choices=dtypes, default=["fp16"])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[usable_cpus()])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="toy size, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--once", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once is not None:
        print(json.dumps(build_once(args.once)))
        return 0
    if args.small:
        args.depth, args.repeats = 8, 1
    abouts: list[Row] = [
        {
            "target": target, "dtype": dtype, "depth": args.depth,
            "batch_size": args.batch_size, "threads": threads,
        }
        for target in args.target
        for dtype in args.precision
        for threads in args.threads
    ]  # fmt: skip
    found = bench(abouts, args.repeats)
    print(table(found["rows"]))
    return finish("builds", args, found)


if __name__ == "__main__":
    sys.exit(main())
