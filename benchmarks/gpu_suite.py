"""All there is to know of one GPU, by one command that begins nothing more after 7.5 minutes.

python benchmarks/gpu_suite.py --out DIR --part tests  first: that all is right on it
python benchmarks/gpu_suite.py --out DIR               the step, ops, trainings, tests, profile
python benchmarks/gpu_suite.py --out DIR               again: measures what the one before left out
python benchmarks/gpu_suite.py --out DIR --full        every sweep too, without a limit of time
python benchmarks/gpu_suite.py --small --out DIR       toy sizes, on a CPU too

Each part is a program of its own, beside this one, and writes its own file of results to DIR, row
by row: a part that fails, or leaves the GPU unusable, costs no other, and whatever stops the suite,
what is measured lies there. The next call keeps it and goes on with what is missing or has failed;
--part NAME chooses. suite.json says what ran, for how long, how it ended.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _environment import environment
from _results import ResultsError, Row, load, results, save
from _timing import Clock

_HERE = Path(__file__).parent
# Seconds. Past its limit a part begins nothing more; what it has begun takes a compile at most.
_GRACE = 90.0
# A timer takes no infinity.
_LONGEST = 10.0**6
_OPS = (
    "norm_relu_conv2d",
    "stem_conv2d",
    "augment",
    "unscale",
    "update_scale",
    "cast",
    "sgd_step",
    "yellowfin",
    "meprop_linear",
    "meprop_conv2d",
    "stochastic_depth_add",
    "classifier_cross_entropy",
)


@dataclass(frozen=True)
class Part:
    """A program, its flags by size, and the seconds after which it begins nothing more."""

    program: str
    seconds: float
    usual: list[str] = field(default_factory=list)
    full: list[str] = field(default_factory=list)


def parts(folder: Path | None) -> dict[str, Part]:
    """In the order of their worth, should the time run out."""
    data = ["--folder", str(folder)] if folder else []
    some = ["--table=--quick --rows pre_activation fused everything"]
    # Quick still: train/table.py's own 200 epochs are a matter of hours.
    three = ["--table=--quick --seeds 0 1 2"]
    grown = "--boost=--precision fp16"
    briefly = f"{grown} --train-size 5000 --unit-epochs 3 --epochs 10"
    sweep = ["--sweep", "full"]
    # Peers that are autotuned compile for longer than all else takes: those are for --full.
    brief = ["--no-autotune"]
    every = {
        "step": Part("bench_step.py", 170, [], ["--sweep"]),
        "preact_unit": Part("bench_preact_unit.py", 50, brief, sweep),
        "batch_norm_relu": Part("bench_batch_norm_relu.py", 30, brief, sweep),
        "training": Part("bench_training.py", 45, [*data, *some], [*data, *three]),
        "step_cold": Part("bench_step.py", 60, ["--cold", "--repeats", "1"], ["--cold"]),
        "step_ratio": Part("bench_step.py", 10, ["--ratio", "15"], ["--ratio", "51"]),
        "tests": Part("gpu_tests.py", 200),
        "profile_step": Part("profile_step.py", 15),
    }
    every |= {op: Part(f"bench_{op}.py", 15, brief, sweep) for op in _OPS}
    every["meprop_mlp"] = Part("bench_meprop_mlp.py", 15, [], sweep)
    every["stochastic_depth_unit"] = Part(
        "bench_stochastic_depth_unit.py", 40, ["--seconds", "1"], sweep
    )
    every["host"] = Part("bench_host.py", 10)
    every["scaling"] = Part("bench_scaling.py", 15)
    every["boost"] = Part("bench_boost.py", 30, ["--seconds", "0.3"], [])
    every["boost_training"] = Part(
        "bench_boost_training.py", 60, [*data, briefly], [*data, grown, "--seeds", "0", "1", "2"]
    )
    return every


def run(command: list[str], limit: float) -> tuple[int | None, list[str]]:
    """A program's exit status, None where its time ran out, and the last lines that it printed."""
    # What Triton interprets on the host has no speed to be measured.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=env, start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        # With the processes that it has started: they would go on, and hold the GPU.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def out_of_time() -> None:
        late.set()
        end()

    timer = threading.Timer(limit, out_of_time)
    timer.start()
    lines: deque[str] = deque(maxlen=40)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            lines.append(line.rstrip())
        status = process.wait()
    finally:
        timer.cancel()
        end()
    return (None if late.is_set() else status), list(lines)


def is_finished(path: Path, small: bool) -> bool:
    """Whether a part's file holds all that there is to measure at that size."""
    if not path.exists():
        return False
    try:
        content = load(path)
    except ResultsError as error:
        print(f"{error}: measured again", flush=True)
        return False
    open_rows = [
        row
        for row in content.get("rows", [])
        if "failed" in row or row.get("not_measured") == "out of time"
    ]
    return content.get("small") == small and content.get("finished", False) and not open_rows


def main() -> int:
    head, _, rest = (__doc__ or "").partition("\n")
    p = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="(benchmarks/results/DATE-GPU)")
    p.add_argument("--small", action="store_true", help="toy sizes, on a CPU too")
    p.add_argument("--full", action="store_true", help="every sweep")
    p.add_argument("--folder", type=Path, help="class folders with train/ and test/ to train on")
    p.add_argument("--part", nargs="+", metavar="NAME", help="only these")
    p.add_argument("--minutes", type=float, help="begin nothing after these (7.5; --full: none)")
    args = p.parse_args()
    every = parts(args.folder and args.folder.resolve())
    unknown = set(args.part or ()) - set(every)
    if unknown:
        p.error(f"--part {' '.join(sorted(unknown))}: expected some of {' '.join(every)}")
    if not args.small and not torch.cuda.is_available():
        print("error: no GPU here; --small shows the suite on a CPU", file=sys.stderr)
        return 1
    # Asked to end, or left by its terminal, it ends the part that is running too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    out = args.out or _HERE / "results" / _name(args.small)
    clock = Clock(args.minutes or (float("inf") if args.full else 7.5))
    return measure_all(every, args.part, out, args.small, args.full, clock)


def measure_all(
    every: dict[str, Part], only: list[str] | None, out: Path, small: bool, full: bool, clock: Clock
) -> int:
    """Run the parts; the exit status, 1 where one failed."""
    ran = _ran_before(out)
    failures: list[str] = []
    for name, part in every.items():
        if only and name not in only:
            continue
        sweeps = full and part.full != part.usual
        path = out / f"{name}{'-full' if sweeps else ''}.json"
        if is_finished(path, small):
            print(f"--- {name}: in {path} already", flush=True)
            continue
        if not clock.has(10, name):
            ran.setdefault(name, {"part": name, "not_measured": "out of time"})
            continue
        print(f"--- {name}", flush=True)
        # A part that is asked for alone has all of the time.
        limit = clock.left(float("inf") if full or only == [name] else part.seconds)
        command = [sys.executable, "-u", str(_HERE / part.program), "--json", str(path), "--go-on"]
        command += [*part.usual, "--small"] if small else part.full if full else part.usual
        command += [] if limit == float("inf") else ["--minutes", f"{limit / 60:.3f}"]
        start = time.monotonic()
        status, lines = run(command, min(limit + _GRACE, _LONGEST))
        seconds = time.monotonic() - start
        ended: Row = {"part": name, "exit_status": status, "seconds": seconds}
        if status != 0:
            end = "took too long" if status is None else f"exit status {status}"
            failures.append(f"{name}: {end}: {lines[-1] if lines else ''}")
            ended |= {"failed": end, "output": lines}
        ran[name] = ended
        _save(out, small, full, ran)
    _save(out, small, full, ran)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    print(f"results lie in {out}")
    return int(bool(failures))


def _ran_before(out: Path) -> dict[str, Row]:
    """What suite.json of an earlier run says, by part."""
    try:
        return {row["part"]: row for row in load(out / "suite.json")["rows"]}
    except (ResultsError, KeyError):
        return {}


def _save(out: Path, small: bool, full: bool, ran: dict[str, Row]) -> None:
    rows = list(ran.values())
    save(out / "suite.json", results("gpu_suite", _device(), small=small, full=full, rows=rows))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _name(small: bool) -> str:
    about = environment()
    device = (about["gpu"] or {"name": "cpu"})["name"].lower().replace(" ", "-")
    stamp = about["date"][:16].replace(":", "").replace("T", "-")
    return f"{stamp}-{device}{'-small' if small else ''}"


if __name__ == "__main__":
    sys.exit(main())
