"""Time boosting a ResNet: the step of a unit beside that of the whole network; cached features.

python benchmarks/bench_boost.py                depth 20, 56 and 122; features from every place
python benchmarks/bench_boost.py --depth 20 --batch-size 1024 --cache-dir /scratch

"unit" is one step of a unit and its classifier on cached features, costs and optimizer among it;
"end to end" one of the whole network, from the images. peak_memory_bytes: weights, statistics and
the optimizer's state, and what a step takes beside them at its worst, without the data set and the
cache; feature_bytes is what the cache takes for an image there.

"cache" is a pass over features in random order, batch by batch: taken one by one, or fetched ahead
by FeatureCache.batches where they are streamed. GB/s are of the bytes that arrive. What was just
written to a file the operating system still holds in memory: "disk" is read through it.
"""

import copy
import gc
import math
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _comparison import DTYPES
from _peak_memory import nbytes, peak_memory
from _program import finish, parser
from _results import Row, WrongResult, measured
from _sheet import Sheet
from _timing import time_wall
from _training_step import set_precision_and_determinism
from boost_config import BoostConfig
from growth import Growth
from torch import Tensor
from trainer import Trainer
from unit_trainer import UnitTrainer
from workers import Workers

from fastres.boost import FeatureCache, Room, training_costs, weak_unit
from fastres.data import Splits, split, synthetic

_ALL = "all"
# Bytes of features of a pass.
_PASS = {"cpu": 2**29, "cuda": 2**31}


def kinds(depth: int) -> dict[int, str]:
    """Numbers of the units that differ: of each stage the first, which changes the shape, and the
    last. The first of all has the stem in front of it."""
    n = (depth - 2) // 6
    named = {(i + 1) * n - 1: f"last of stage {i + 1}" for i in range(3)}
    return dict(sorted((named | {i * n: f"first of stage {i + 1}" for i in range(3)}).items()))


def settings(device: torch.device, size: Row) -> BoostConfig:
    """Fused, and in half precision where that is fast."""
    return BoostConfig(
        dataset="synthetic",
        fused=True,
        precision="fp16" if device.type == "cuda" else "fp32",
        # Timed on one batch over and over, which a great rate would not survive.
        lr=1e-3,
        # The features of a batch, on the device.
        cache_device_gb=64.0,
        **size,
    )


def bench_steps(device: torch.device, sizes: list[Row], seconds: float, sheet: Sheet) -> None:
    """A row for the whole network and one for each kind of unit, at all sizes."""
    for size in sizes:
        abouts = {_ALL: {"provider": "end to end", **size, "unit": _ALL}}
        for kind in kinds(size["depth"]).values():
            abouts[kind] = {"provider": "unit", **size, "unit": kind}
        wanted = {kind: about for kind, about in abouts.items() if not sheet.known(about)}
        if not wanted:
            continue
        config = settings(device, size)
        set_precision_and_determinism(config)
        data = split(synthetic(config.batch_size, 20)).to(device)
        workers = Workers(0, 1, 0, device)

        def add(kind: str, make: Callable[[], Trainer], wanted: dict[str, Row] = wanted) -> None:
            if kind in wanted and sheet.has(10, wanted[kind], f"{kind} of {wanted[kind]}"):
                sheet.add([measured(wanted[kind], partial(_measure, make, seconds))])
                _say(sheet.last)

        add(_ALL, partial(_whole, config, workers, data))
        growth = Growth(config, workers, data)
        for number in range(config.most_units):
            if named := kinds(config.depth).get(number):
                add(named, partial(_unit, growth, number))
            part = weak_unit(growth.plan, number).to(device)
            growth.frozen.add(part.to(memory_format=growth.frozen.memory_format))
            growth.frozen.advance()


def _whole(config: BoostConfig, workers: Workers, data: Splits) -> Trainer:
    return Trainer(config.of_refinement(config.most_units), workers, data)


def _unit(growth: Growth, number: int) -> Trainer:
    """Of a copy: the growth goes on from units that are as they were."""
    part = weak_unit(copy.deepcopy(growth.plan), number)
    costs = training_costs(growth.boosting.costs())
    return UnitTrainer(growth.config.of_unit(number, 0), growth.frozen, part, costs)


def _measure(make: Callable[[], Trainer], seconds: float) -> Row:
    gc.collect()
    trainer = make()
    device, batch_size = trainer.workers.device, trainer.config.batch_size
    index = torch.arange(batch_size, device=device)
    trainer.network.train()

    def step() -> Tensor:
        return trainer.train_step(index, 0)[0]

    for _ in range(2 if device.type == "cpu" else 9):
        loss = step()
    if not math.isfinite(float(loss)):
        raise WrongResult
    timing = time_wall(step, seconds)
    state = trainer.optimizer.state.values()
    kept = [t for values in state for t in values.values() if isinstance(t, Tensor)]
    resident = nbytes([*trainer.model.state_dict().values(), *kept])
    cache = trainer._frozen.cache if isinstance(trainer, UnitTrainer) else None
    return {
        "precision": trainer.config.precision,
        "images_per_second": 1000 * batch_size / timing.median_ms,
        **timing.as_dict(),
        "peak_memory_bytes": resident + peak_memory(step, device),
        "resident_bytes": resident,
        "feature_bytes": cache.nbytes // len(cache) if cache else 0,
    }


def bench_cache(
    device: torch.device, batch_size: int, small: bool, seconds: float, folder: Path, sheet: Sheet
) -> None:
    """A row for each place of features, and one for each that streams them, fetched ahead."""
    C, H = (4, 8) if small else (16, 32)
    dtype = "fp16" if device.type == "cuda" else "fp32"
    count = 64 if small else _PASS[device.type] // (C * H * H * DTYPES[dtype].itemsize)
    rooms = {"host": Room(0, 2**62), "disk": Room(0, 0, folder)}
    if device.type == "cuda":
        rooms = {"device": Room(2**62, 0)} | rooms
    shape = (count, C, H, H)
    for place, room in rooms.items():
        about = {
            "provider": "cache", "place": place, "dtype": dtype, "N": count, "C": C, "H": H,
            "batch_size": batch_size,
        }  # fmt: skip
        abouts = {ahead: about | {"ahead": ahead} for ahead in (False, True)}
        wanted = {ahead: row for ahead, row in abouts.items() if not sheet.known(row)}
        made: list[FeatureCache] = []  # for both, when it is first needed

        def cache(room: Room = room, made: list[FeatureCache] = made) -> FeatureCache:
            if not made:
                made.append(_filled(shape, DTYPES[dtype], device, room))
            return made[0]

        for ahead, row in wanted.items():
            # What computes there is never fetched ahead.
            streams = place == "disk" or (place == "host" and device.type == "cuda")
            if (ahead and not streams) or not sheet.has(10, row, f"features from {place}"):
                continue
            sheet.add([measured(row, partial(_passes, cache, ahead, batch_size, seconds))])
            _say(sheet.last)


def _filled(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, room: Room
) -> FeatureCache:
    cache = FeatureCache(shape, dtype, device, room)
    # As costly to move as any others, and quickly drawn.
    some = torch.randn(min(500, shape[0]), *shape[1:], device=device)
    for first in range(0, shape[0], len(some)):
        cache.put(first, some[: shape[0] - first])
    return cache


def _passes(cache: Callable[[], FeatureCache], ahead: bool, batch_size: int, seconds: float) -> Row:
    features = cache()
    order = torch.randperm(len(features), device=features.device)
    indices = list(order.split(batch_size))
    for index, x in zip(indices[:3], features.batches(indices[:3]), strict=True):
        if not torch.equal(x, features.take(index)):
            raise WrongResult

    def once() -> None:
        # Each batch is gone before the next one comes.
        deque(features.batches(indices) if ahead else map(features.take, indices), maxlen=0)

    timing = time_wall(once, seconds)
    return {
        **timing.as_dict(),
        "images_per_second": 1000 * len(features) / timing.median_ms,
        "gb_per_s": features.nbytes / timing.median_ms / 1e6,
    }


def _say(row: Row) -> None:
    if "median_ms" not in row:
        return
    if row["provider"] == "cache":
        name, sizes = f"features from {row['place']}", f"{row['gb_per_s']:.2f} GB/s"
        name += ", fetched ahead" if row["ahead"] else ""
    else:
        name = f"depth {row['depth']} batch {row['batch_size']}: {row['unit']}"
        sizes = f"peak {row['peak_memory_bytes'] / 2**20:,.1f} MiB"
    print(
        f"{name:45} {row['median_ms']:9.3f} ms [{row['low_ms']:.3f}, {row['high_ms']:.3f}] "
        f"n={row['n']} {row['images_per_second']:11,.0f} images/s  {sizes}",
        flush=True,
    )


def main() -> int:
    p = parser(__doc__, seconds=1.0)
    p.add_argument("--batch-size", type=int, help="(128)")
    p.add_argument("--depth", type=int, nargs="+", help="(20 56 122)")
    p.add_argument("--width", type=int, help="channels of the first stage (16)")
    p.add_argument("--cache-dir", type=Path, help="where features on disk go (a temporary folder)")
    args = p.parse_args()
    size = {"batch_size": args.batch_size or (8 if args.small else 128)}
    size["width"] = args.width or (4 if args.small else 16)
    depths = args.depth or ([14] if args.small else [20, 56, 122])
    seconds = 0.01 if args.small else args.seconds
    sheet = Sheet.open("boost", args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.cache_dir or Path(scratch)
        bench_cache(args.device, size["batch_size"], args.small, seconds, folder, sheet)
        bench_steps(args.device, [{"depth": d, **size} for d in depths], seconds, sheet)
    found: dict[str, Any] = {"rows": sheet.rows}
    return finish("boost", args, found)


if __name__ == "__main__":
    sys.exit(main())
