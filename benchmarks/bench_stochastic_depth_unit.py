"""What stochastic depth saves: FLOPs and time of a whole training step, beside p = 0.

    python benchmarks/bench_stochastic_depth_unit.py [--sweep full] [--device cpu] [--small]
                                                     [--json FILE]

The modes take their steps in turn, so that what slows the machine slows them all. "eager" is the
plain model in PyTorch's own ops at p = 0; bench_step.py has a whole step's other peers. Steps of
"batch" differ in the units that they drop: time_ratio and flops_ratio are of means over steps, as a
run's time is, and beside fastres at p = 0. --sweep stages takes depths 56 and 110, batch 128 and
p = 0.5; --sweep full changes one of the three at a time.
"""

import math
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from time import perf_counter
from typing import Any

import torch
from _comparison import Case, made, row_text, run_cases, run_program
from _results import Row, WrongResult, measured
from _sheet import Sheet
from _timing import percentiles
from _training_step import make_step
from torch.utils.flop_counter import FlopCounterMode

from fastres.data import split, synthetic

MODES = ("batch", "subset", "row")
# "batch" steps differ by the draw: of fewer the mean says little.
_LEAST_STEPS = 15


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    width = 4 if small else 16
    settings = [(56, 128, 0.5), (110, 128, 0.5)]
    if small:
        settings = [(8, 16, 0.5)]
    elif sweep == "full":
        settings += (
            [(20, 128, 0.5)]
            + [(56, N, 0.5) for N in (32, 512, 2048)]
            + [(56, 128, p) for p in (0.2, 0.8)]
        )
    for depth, N, p in settings:
        about = {"dtype": "fp32", "layout": "NHWC", "depth": depth, "width": width, "N": N, "p": p}
        # What three stages of convolutions write, of which a backward needs nearly all.
        nbytes = 4 * N * (depth - 2) // 3 * width * (32**2 + 2 * 16**2 + 4 * 8**2)
        yield Case(about, nbytes, partial(_make, device, depth, width, N, p))


def _make(
    device: torch.device, depth: int, width: int, N: int, p: float
) -> dict[tuple[str, str, float], Any]:
    """Training steps by provider, mode and p."""
    data = split(synthetic(N, 20)).to(device)
    fixed: dict[str, Any] = {"batch_size": N, "drop_schedule": "uniform"}
    settings: dict[tuple[str, str, float], dict[str, Any]] = {
        ("eager", "none", 0.0): {"fused": False},
        ("fastres", "none", 0.0): {"fused": True},
    }
    for mode in MODES:
        settings["fastres", mode, p] = {"fused": True, "drop_prob": p, "drop_mode": mode}
    return {
        key: make_step(device, data, fixed | chosen, None, depth=depth, width=width)
        for key, chosen in settings.items()
    }


def _rows(case: Case, seconds: float) -> list[Row]:
    steps, row = made(case)
    if steps is None:
        return [row]
    rows: list[Row] = []
    abouts: dict[tuple[str, str, float], Row] = {}
    first: dict[tuple[str, str, float], float] = {}

    def check(key: tuple[str, str, float]) -> Row:
        first[key] = float(steps[key]())
        # One model and one batch: the plain and the fused step have one loss.
        peer = first.get(("eager", "none", 0.0), first[key]) if key[2] == 0 else first[key]
        if not (math.isfinite(first[key]) and math.isclose(first[key], peer, rel_tol=1e-3)):
            raise WrongResult
        return {}

    for key in list(steps):
        provider, mode, p = key
        about = {"provider": provider} | case.about | {"mode": mode, "p": p, "pass": "step"}
        row = measured(about, partial(check, key))
        if set(row) == set(about):
            abouts[key] = about | {"timer": "wall clock"}
        else:
            rows.append(row)
            del steps[key]

    times: dict[tuple[str, str, float], list[float]] = {key: [] for key in steps}
    gflop: dict[tuple[str, str, float], list[float]] = {key: [] for key in steps}

    def time() -> Row:
        end = perf_counter() + 2 * seconds * len(steps)
        done = 0
        while steps and (done < _LEAST_STEPS or perf_counter() < end):
            for key, step in steps.items():
                # Counted at steps of its own: counting takes time.
                with FlopCounterMode(display=False) as counter:
                    float(step())  # over before the clock starts
                gflop[key].append(counter.get_total_flops() / 1e9)
                start = perf_counter()
                float(step())
                times[key].append(1000 * (perf_counter() - start))
            done += 1
        return {"steps": done}

    row = measured(case.about | {"pass": "step"}, time)
    if "steps" not in row:
        return [*rows, row]
    full = ("fastres", "none", 0.0)
    for key, about in abouts.items():
        row = about | percentiles(times[key]).as_dict()
        row |= {"mean_ms": statistics.mean(times[key]), "gflop": statistics.mean(gflop[key])}
        if full in abouts:
            row["time_ratio"] = row["mean_ms"] / statistics.mean(times[full])
            row["flops_ratio"] = row["gflop"] / statistics.mean(gflop[full])
        rows.append(row)
        print(row_text(row), flush=True)
    return rows


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Time and FLOPs of a step by mode, with the same drop probability for every unit."""
    cases = _cases(device, small, sweep)
    return run_cases(device, cases, seconds, sheet, lambda case, _: _rows(case, seconds))


def main() -> int:
    return run_program(__doc__, "stochastic_depth_unit", bench, seconds=10.0)


if __name__ == "__main__":
    sys.exit(main())
