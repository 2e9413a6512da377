"""Time the whole training step, from augmentation to optimizer, beside its peers.

python benchmarks/bench_step.py                 every peer, batch 128 and 1024
python benchmarks/bench_step.py --sweep         batch 64 to 4096, depth 20 to 122, width 16 and 64
python benchmarks/bench_step.py --cold          seconds to the first step, with no kernel built yet
python benchmarks/bench_step.py --ratio 15      fused over eager channels_last, interleaved

The sizes are swept one at a time, from the first that each list names; how time grows with each is
fitted and printed. Beside each time stands the roofline of that size (see _roofline.py), from the
copy bandwidth and the matrix rate of this machine, measured in the same run.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _growth import exponents
from _growth import text as growth_text
from _program import finish, parser
from _results import Row, WrongResult, is_out_of_memory, measured
from _roofline import Ceilings, ceilings, roofline, work
from _sheet import Sheet
from _timing import percentiles, time_wall
from _training_step import Step, first_update, images, make_step, needs, providers
from prebuild import prebuild
from torch import Tensor

from fastres.data import Splits, split, synthetic

_BATCH_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_DEPTHS = (20, 56, 110, 122)
_WIDTHS = (16, 64)
_SETTLED = "first step after"
# As train/main.py --prebuild begins.
_PREBUILT = ", prebuilt"
# Seconds that a network's first step may take, by torch.compile's mode.
_FIRST = {None: 10, "default": 40, "reduce-overhead": 40, "max-autotune": 120}


def bench(
    device: torch.device, sizes: list[Row], seconds: float, sheet: Sheet, only: str = ""
) -> dict[str, Any]:
    """Every provider at all sizes; a row each, and how time grows where two sizes or more tell.

    sizes: batch_size, depth and width of each. only: a part of the providers' names.
    """
    roof = ceilings(device, min(seconds, 0.5), small=seconds < 0.05)
    rates = ", ".join(f"{name} {rate:,.1f} TFLOP/s" for name, rate in roof.tflops.items())
    print(f"ceilings: copy {roof.copy_gb_per_s:,.0f} GB/s, {rates}", flush=True)
    largest = max(size["batch_size"] for size in sizes)
    data = split(synthetic(images(largest, device), 20)).to(device)
    wanted: dict[str, Tensor | None] = {}
    for name, mode, size in _in_order(device, sizes, sheet):
        settings = providers(device)[name][0]
        about = {"provider": name, "compiled": mode, **size}
        if only not in name or sheet.known(about):
            continue
        words = _words(size)
        if not sheet.has(_FIRST[mode], about, f"{name} {words}"):
            continue
        if words not in wanted:
            wanted[words] = _wanted(device, data, size)
        sized = settings | {"batch_size": size["batch_size"]}
        want = wanted[words]
        measure = partial(_measure, device, data, sized, mode, size, seconds, roof, want)
        sheet.add([measured(about, measure)])
        if "median_ms" in sheet.last:
            print(_text(sheet.last), flush=True)
    rows = sheet.rows
    growth = exponents(rows)
    for line in growth:
        print(growth_text(line))
    return {"ceilings": roof.as_dict(), "rows": rows, "growth": growth}


def _in_order(
    device: torch.device, sizes: list[Row], sheet: Sheet
) -> list[tuple[str, str | None, Row]]:
    """What is to be measured: what compiles longest, and then what has failed before, at the end.

    So no size goes without ours and the plain peers for a compiler's sake.
    """
    every = [(name, mode, s) for s in sizes for name, (_, mode) in providers(device).items()]

    def late(one: tuple[str, str | None, Row]) -> tuple[bool, int]:
        name, mode, size = one
        return sheet.has_failed({"provider": name, "compiled": mode, **size}), _FIRST[mode]

    return sorted(every, key=late)


def _measure(
    device: torch.device,
    data: Splits,
    settings: dict[str, Any],
    mode: str | None,
    size: Row,
    seconds: float,
    roof: Ceilings,
    wanted: Tensor | None,
) -> Row:
    torch.compiler.reset()
    _free(device)
    depth, width = size["depth"], size["width"]
    step = make_step(device, data, settings, mode, depth=depth, width=width)
    started = time.perf_counter()
    # Forward, backward and optimizer at once; NaN is not within any bound.
    update = first_update(step)
    precision = settings.get("precision", "fp32")
    if wanted is not None and not _is_the_update(update, wanted, precision):
        raise WrongResult
    for _ in range(2 if device.type == "cpu" else 9):
        loss = step()
    last = float(loss)
    warmup = time.perf_counter() - started
    timing = time_wall(step, seconds)
    least = roofline(work(size["batch_size"], depth, width), precision, roof)
    return {
        "precision": precision,
        "images_per_second": 1000 * size["batch_size"] / timing.median_ms,
        **timing.as_dict(),
        **least,
        "share_of_roofline": float(least["roofline_ms"]) / timing.median_ms,
        **_needs(step),
        "warmup_seconds": warmup,
        "checked": wanted is not None,
        "loss": last,
    }


def _needs(step: Step) -> Row:
    """What the step needs; a profiler that fails costs no time that was measured."""
    found = measured({}, partial(needs, step))
    missing = found.get("failed") or found.get("not_measured")
    return {"needs_failed": missing} if missing else found


def _wanted(device: torch.device, data: Splits, size: Row) -> Tensor | None:
    """The first update of the plain model in fp32; None where its memory runs out."""
    _free(device)
    settings = {"batch_size": size["batch_size"], "channels_last": False}
    try:
        step = make_step(device, data, settings, None, depth=size["depth"], width=size["width"])
        return first_update(step)
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise


def _is_the_update(update: Tensor, wanted: Tensor, precision: str) -> bool:
    """Whether two first updates are one but for rounding, which a deep network makes much of.

    Signs of ReLU's inputs flip: in fp32 the difference was 2 % of the norm at depth 56, in fp16
    34 %. A direction that is wrong is at right angles, a step that is not taken has no norm.
    """
    if precision == "fp32":
        return bool((update - wanted).norm() < 0.2 * wanted.norm())
    along = float(torch.nn.functional.cosine_similarity(update, wanted, dim=0))
    return along > 0.5 and 0.5 < float(update.norm() / wanted.norm()) < 2


def _free(device: torch.device) -> None:
    """What the case before has left would be counted, or be missing, in the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _words(size: Row) -> str:
    return " ".join(f"{name} {value}" for name, value in size.items())


def _text(row: Row) -> str:
    saved = row.get("saved_bytes")
    saves = "" if saved is None else f", saves {saved / 2**20:,.1f} MiB"
    text = (
        f"B={row['batch_size']:<5} depth={row['depth']:<4} width={row['width']:<3} "
        f"{row['provider']:45} {row['images_per_second']:11,.0f} images/s "
        f"{row['median_ms']:9.3f} ms [{row['low_ms']:.3f}, {row['high_ms']:.3f}] "
        f"{row['share_of_roofline']:6.1%} of roofline{saves}"
    )
    if "peak_memory_bytes" in row:
        peak = row["peak_memory_bytes"] / 2**20
        text += f", peak {peak:,.0f} MiB, host {row['host_ms']:.3f} ms"
    if "kernels" in row:
        text += f", {row['kernels']} kernels by {row['launches']} launches"
    if not row["checked"]:
        text += ", unchecked: the plain model in fp32 has no room"
    return text


def swept(batch_sizes: list[int], depths: list[int], widths: list[int]) -> list[Row]:
    """Each list in turn, the others at their first."""
    points = [(b, depths[0], widths[0]) for b in batch_sizes]
    points += [(batch_sizes[0], d, widths[0]) for d in depths]
    points += [(batch_sizes[0], depths[0], w) for w in widths]
    return [{"batch_size": b, "depth": d, "width": w} for b, d, w in dict.fromkeys(points)]


def cold(
    device: torch.device, size: Row, repeats: int, sheet: Sheet, only: str = ""
) -> dict[str, Any]:
    """Seconds from a process's start to its first finished step, every kernel still to be built."""
    modes = {name: mode for name, (_, mode) in providers(device).items()}
    if device.type == "cuda":
        # First, should the time run out: it is how train/main.py starts.
        units: dict[str, str | None] = {n + _PREBUILT: None for n in modes if "fused units" in n}
        modes = units | modes
    for name, mode in modes.items():
        about = {"provider": name, "compiled": mode, **size}
        if only not in name or sheet.known(about):
            continue
        if not sheet.has(repeats * 2 * _FIRST[mode], about, f"cold start of {name}"):
            continue
        limit = sheet.clock.left(600 * repeats) / repeats
        sheet.add([measured(about, partial(_cold_starts, device, size, name, repeats, limit))])
        if "median_ms" in sheet.last:
            seconds = sheet.last["median_ms"] / 1000
            print(f"{name:45} first step after {seconds:.1f} s (n = {repeats})", flush=True)
    return {"rows": sheet.rows}


def _cold_starts(device: torch.device, size: Row, provider: str, repeats: int, limit: float) -> Row:
    starts = [1000 * _cold_start(device, size, provider, limit) for _ in range(repeats)]
    return percentiles(starts).as_dict()


def _cold_start(device: torch.device, size: Row, provider: str, limit: float) -> float:
    flags = [f for key, value in size.items() for f in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, str(Path(__file__)), "--first-step", provider, *flags]
    command += ["--device", str(device)]
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as errors:
        places = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
        env = os.environ | {place: f"{empty}/{place}" for place in places}
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout is not None
        settled = any(line.startswith(_SETTLED) for line in process.stdout)
        seconds = time.perf_counter() - start
        process.wait()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if not settled:
        raise RuntimeError(said[-1] if said else f"no step was finished in {limit:.0f} s")
    return seconds


def first_step(device: torch.device, provider: str, size: Row) -> None:
    """One step in a process of its own; its parent holds the clock."""
    settings, mode = providers(device)[provider.removesuffix(_PREBUILT)]
    data = split(synthetic(images(size["batch_size"], device), 20)).to(device)
    settings = settings | {"batch_size": size["batch_size"]}
    step = make_step(device, data, settings, mode, depth=size["depth"], width=size["width"])
    if provider.endswith(_PREBUILT):
        prebuild(step.trainer)
    print(f"{_SETTLED} this, loss {float(step()):.3f}", flush=True)


def ratio(device: torch.device, pairs: int, size: Row) -> dict[str, Any]:
    """How many times faster the fused step is than eager channels_last, step by step in turn."""
    every = providers(device)
    names = [n for n in every if n.startswith(("eager", "fused")) and "channels_last" in n][:2]
    about = {"provider": names[1], "peer": names[0], **size}
    row = measured(about, partial(_in_turn, device, pairs, size, names))
    if "median" in row:
        print(
            f"{names[1]} over {names[0]}, {_words(size)}: {row['median']:.3f} x (median of {pairs} "
            f"interleaved steps; {row['lowest']:.3f} to {row['highest']:.3f})"
        )
    return {"rows": [row]}


def _in_turn(device: torch.device, pairs: int, size: Row, names: list[str]) -> Row:
    data = split(synthetic(images(size["batch_size"], device), 20)).to(device)
    every = providers(device)
    model = {"depth": size["depth"], "width": size["width"]}
    steps = [
        make_step(device, data, every[n][0] | {"batch_size": size["batch_size"]}, None, **model)
        for n in names
    ]
    for step in steps * 2:
        step()

    def seconds(step: Step) -> float:
        start = time.perf_counter()
        float(step())
        return time.perf_counter() - start

    ratios = []
    for i in range(pairs):
        # The order alternates, so that what slows the machine slows both sides.
        times = {j: seconds(steps[j]) for j in ((0, 1) if i % 2 else (1, 0))}
        ratios.append(times[0] / times[1])
    low, high = min(ratios), max(ratios)
    return {"n": pairs, "median": statistics.median(ratios), "lowest": low, "highest": high}


def main() -> int:
    p = parser(__doc__, seconds=1.0)
    p.add_argument("--batch-size", type=int, nargs="+")
    p.add_argument("--depth", type=int, nargs="+")
    p.add_argument("--width", type=int, nargs="+")
    p.add_argument(
        "--provider", default="", metavar="WORD", help="only those with this in the name"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--sweep", action="store_true", help="all batch sizes, depths and widths")
    what.add_argument("--cold", action="store_true", help="only seconds to the first step")
    p.add_argument("--repeats", type=int, default=3, help="of a cold start (3)")
    what.add_argument(
        "--ratio", type=int, metavar="PAIRS", help="only the interleaved ratio; no --go-on"
    )
    what.add_argument("--first-step", metavar="PROVIDER", help=argparse.SUPPRESS)
    args = p.parse_args()
    if not any(args.provider in name for name in providers(args.device)):
        names = ", ".join(repr(name) for name in providers(args.device))
        p.error(f"--provider {args.provider!r}: none of {names} has it")
    sizes = swept(*_lists(args))
    if args.first_step:
        first_step(args.device, args.first_step, sizes[0])
        return 0
    if args.ratio:
        return finish("step_ratio", args, ratio(args.device, args.ratio, sizes[0]))
    if args.cold:
        sheet = Sheet.open("step_cold", args)
        found = cold(args.device, sizes[0], args.repeats, sheet, args.provider)
        return finish("step_cold", args, found)
    seconds = 0.01 if args.small else args.seconds
    found = bench(args.device, sizes, seconds, Sheet.open("step", args), args.provider)
    return finish("step", args, found)


def _lists(args: argparse.Namespace) -> tuple[list[int], list[int], list[int]]:
    """Batch sizes, depths and widths: those that were given, and the fitting rest."""
    if args.small:
        rest: tuple[list[int], list[int], list[int]] = ([8, 16], [8], [4])
    elif args.sweep:
        # The report's batch is where the others are swept from.
        first = [128, *(b for b in _BATCH_SIZES if b != 128)]
        rest = (first, list(_DEPTHS), list(_WIDTHS))
    else:
        rest = ([128] if args.cold or args.ratio else [128, 1024], [20], [16])
    return args.batch_size or rest[0], args.depth or rest[1], args.width or rest[2]


if __name__ == "__main__":
    sys.exit(main())
