"""How an op is compared with its peers: each checked first, then timed, a row for each figure.

A bench_<op>.py lists its cases. A case makes its tensors, names its providers, says whether one of
them is right, and counts the fewest bytes that a pass of the op must move. Whatever goes wrong is
the words of a row: for a case that does not fit the memory or the time left, a row without a
provider.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch._functorch.config
from _program import finish, parser
from _results import Row, WrongResult, measured, without_speed
from _sheet import LEFT_OUT, Sheet
from _timing import Timing, copy_bandwidth, speed, time_graph, time_op, time_wall

Op = Callable[..., Any]
Timer = Callable[[Callable[[], Any], float], Timing]

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
SWEEPS = ("stages", "full")

# CUDA graphs, which "max-autotune" adds to this, keep the outputs of a forward in memory that the
# next one overwrites, and so do not let one backward be repeated. See time_graph for theirs.
AUTOTUNE = "max-autotune-no-cudagraphs"
COMPILED = {"compile": "default", f"compile {AUTOTUNE}": AUTOTUNE}

# Seconds that the first case must have left; from then on as many as the longest case took.
_FIRST_CASE = 4.0


@dataclass(frozen=True)
class Work:
    """A case's tensors, in the closures of what is done with them.

    providers: what is compared, by name.
    check: whether a provider's results are the reference's.
    passes: what of a provider is timed, by name.
    moved: the fewest bytes of a pass; one that is not here gets no GB/s.
    host: host work counts, so that the wall clock times a GPU too.
    graph: it is timed in a CUDA graph too, of hundreds of calls.
    """

    providers: dict[str, Op]
    check: Callable[[Op], bool]
    passes: Callable[[Op], dict[str, Callable[[], Any]]]
    moved: dict[str, int] = field(default_factory=dict)
    host: bool = False
    graph: bool = True


@dataclass(frozen=True)
class Case:
    """What a case is in its rows, the least memory that it takes, and how its work is made."""

    about: Row
    nbytes: int
    make: Callable[[], Any]


def compiled(op: Op) -> dict[str, Op]:
    """op by torch.compile, by default and autotuned: two providers."""
    return {name: torch.compile(op, dynamic=False, mode=mode) for name, mode in COMPILED.items()}


def sweep_axes(base: dict[str, int], axes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """base, then base with one of its values after another in place of it, axis by axis."""
    yield base
    for axis, values in axes.items():
        yield from (base | {axis: value} for value in values if value != base[axis])


def dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """The one that trains first, in case the time runs out; halves are tested on CPUs, not fast."""
    return {"fp32": torch.float32} if device.type == "cpu" else DTYPES


def compare(
    device: torch.device, cases: Iterable[Case], seconds: float, sheet: Sheet
) -> dict[str, Any]:
    """The rows of every case, and the copy bandwidth beside them.

    seconds: of timing, a figure.
    """
    return run_cases(
        device, cases, seconds, sheet, lambda case, roof: _rows(case, device, roof, seconds, sheet)
    )


def run_cases(
    device: torch.device,
    cases: Iterable[Case],
    seconds: float,
    sheet: Sheet,
    rows_of: Callable[[Case, float], list[Row]],
) -> dict[str, Any]:
    """rows_of(case, copy bandwidth) for every case that fits the time and the memory left."""
    roof = copy_bandwidth(device, seconds)
    print(f"copy bandwidth {roof:,.0f} GB/s")
    longest = _FIRST_CASE
    # A graph is walked back more than once here, and fp32 is fp32.
    with torch._functorch.config.patch(donated_buffer=False), _exact_fp32():
        # What has failed before may fail again, and take the time of what is new.
        for case in sorted(cases, key=lambda case: sheet.has_failed(case.about)):
            if sheet.known(case.about) or not sheet.has(longest, case.about, words(case.about)):
                continue
            started = perf_counter()
            # Every case compiled for itself, as a training run would.
            torch.compiler.reset()
            free = free_memory(device)
            if free is not None and case.nbytes > free:
                sheet.add([without_speed(case.about, not_measured="out of memory")])
                continue
            torch.manual_seed(0)
            sheet.add(rows_of(case, roof))
            longest = max(longest, perf_counter() - started)
    return {"copy_gb_per_s": roof, "rows": sheet.rows}


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """No TF32, and cuDNN's best algorithm, as in the training program."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def made(case: Case) -> tuple[Any, Row]:
    """The case's work, or None and the row that says why there is none."""
    works: list[Any] = []

    def make() -> Row:
        works.append(case.make())
        return {}

    row = measured(case.about, make)
    return (works[0] if works else None), row


def wanted(
    providers: Mapping[str, Op], about: Row, sheet: Sheet
) -> tuple[dict[str, Op], list[Row]]:
    """The providers to compare, and a row for each that the command line leaves out."""
    out = [] if sheet.autotunes else [name for name in providers if AUTOTUNE in name]
    rows = [{"provider": name} | about | {"not_measured": LEFT_OUT} for name in out]
    return {name: op for name, op in providers.items() if name not in out}, rows


def _rows(case: Case, device: torch.device, roof: float, seconds: float, sheet: Sheet) -> list[Row]:
    work, row = made(case)
    if work is None:
        return [row]
    providers, rows = wanted(work.providers, case.about, sheet)
    for name, op in providers.items():
        rows += _provider_rows({"provider": name} | case.about, work, op, device, roof, seconds)
    return rows


def _provider_rows(
    about: Row, work: Work, op: Op, device: torch.device, roof: float, seconds: float
) -> list[Row]:
    passes: dict[str, Callable[[], Any]] = {}

    def check() -> Row:
        torch.manual_seed(1)  # one provider's draws are the next one's
        if not work.check(op):
            raise WrongResult
        passes.update(work.passes(op))
        return {}

    row = measured(about, check)
    if not passes:
        return [row]
    rows: list[Row] = []
    for name, fn in passes.items():
        for timer, time in _timers(device, name, work).items():
            timed = partial(_timed, fn, time, seconds, work.moved.get(name), roof)
            row = measured(about | {"pass": name, "timer": timer}, timed)
            rows.append(row)
            if "median_ms" in row:
                print(row_text(row), flush=True)
    return rows


def _timed(
    fn: Callable[[], Any], time: Timer, seconds: float, moved: int | None, roof: float
) -> Row:
    return speed(time(fn, seconds), moved, roof)


def _timers(device: torch.device, name: str, work: Work) -> dict[str, Timer]:
    """Timers by what they are called in a row."""
    if device.type != "cuda" or work.host:
        return {"wall clock": time_wall}
    events: dict[str, Timer] = {
        "events, cold L2": lambda fn, seconds: time_op(fn, device, seconds),
    }
    # The forward that a backward walks back ran on another stream than the captured one.
    graph = work.graph and name != "backward"
    return events | ({"CUDA graph, warm L2": time_graph} if graph else {})


_FIGURES = frozenset(
    "median_ms low_ms high_ms mean_ms n gb_per_s share_of_copy gflop speedup time_ratio flops_ratio"
    .split()
)  # fmt: skip


def words(about: Row) -> str:
    """What a row is about, without its figures."""
    return " ".join(
        str(value) if key in ("dtype", "layout", "pass") else f"{key}={value}"
        for key, value in about.items()
        if key not in (*_FIGURES, "provider", "timer")
    )


def row_text(row: Row) -> str:
    text = (
        f"{row['provider']:10} {words(row)}  {row['median_ms']:.4f} ms "
        f"[{row['low_ms']:.4f}, {row['high_ms']:.4f}] n={row['n']}"
    )
    if "gb_per_s" in row:
        text += f" {row['gb_per_s']:.1f} GB/s {row['share_of_copy']:.0%}"
    if "gflop" in row:
        text += f" {row['gflop']:.3f} GFLOP"
    for name in ("speedup", "time_ratio", "flops_ratio"):
        if name in row:
            text += f" {name} {row[name]:.2f}"
    return f"{text} ({row['timer']})"


def free_memory(device: torch.device) -> int | None:
    """Bytes that a case may take, once what the last one left is given back; None if unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            sizes = dict(line.split()[:2] for line in file)
        # Linux kills who takes too much memory, instead of refusing it: a case leaves half.
        return 1024 * int(sizes["MemAvailable:"]) // 2
    except (OSError, KeyError, ValueError):  # not Linux
        return None


def run_program(
    doc: str | None,
    benchmark: str,
    bench: Callable[[torch.device, bool, float, str, Sheet], dict[str, Any]],
    seconds: float = 0.05,
) -> int:
    """The command line of an op's benchmark; the exit status."""
    options = parser(doc, seconds)
    options.add_argument(
        "--sweep", choices=SWEEPS, default="stages",
        help="shapes of the ResNet's stages, or every axis around one base shape",
    )  # fmt: skip
    options.add_argument(
        "--no-autotune", action="store_true",
        help="without the peers of max-autotune, which compile for most of a minute a case",
    )  # fmt: skip
    args = options.parse_args()
    sheet = Sheet.open(benchmark, args)
    sheet.autotunes = not args.no_autotune
    found = bench(args.device, args.small, args.seconds, args.sweep, sheet)
    return finish(benchmark, args, {"sweep": args.sweep} | found)
