"""Build every kernel ahead of time, with no GPU, and print what the compiler made of it.

    python benchmarks/kernel_report.py                  all of it, a line a build, and a summary
    python benchmarks/kernel_report.py --op cast --target sm_90
    python benchmarks/kernel_report.py --check          exit status 1 where a kernel is worse than
                                                        in results/kernels-baseline.json
    python benchmarks/kernel_report.py --update         make that the baseline, to be committed
    python benchmarks/kernel_report.py --small          one configuration a kernel and target

Registers and spilled bytes are a thread's, shared memory in bytes is a block's. Occupancy is the
warps that a multiprocessor holds at once, of those that it could, as far as registers, shared
memory and the size of a block limit it. Instructions are counted where they stand in the code:
tensor-core ones, and global loads and stores, those of 128 bits and all.

--check with another Triton than the baseline's fails for builds that do not compile, for spills,
and for vector accesses or tensor-core instructions that are gone; the rest is then only reported.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A kernel that was imported for Triton's interpreter cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)

from _kernel_baseline import (
    BASELINE,
    KEY,
    UPDATE,
    Baseline,
    figures,
    key_of,
    read,
    regressions,
    stale,
    summary,
    worse,
    write,
)
from _kernel_variants import DTYPES, OPS, Task, launch_of, tasks
from _occupancy import occupancy
from _program import aligned, finish
from _results import ResultsError, Row, failures, measured

from fastres.kernels import _aot

TRITON: str = _aot.triton.__version__


def build(task: Task) -> Row:
    """A row of the table."""
    about = {part: getattr(task, part) for part in KEY}
    return measured(about, lambda: _figures(task))


def _figures(task: Task) -> Row:
    made = asdict(_aot.build(launch_of(task), task.target))
    held = occupancy(
        task.target, made["warps"], made["registers"], made["shared"], made["scalar_registers"]
    )
    return made | {
        "resident_warps": held.warps, "most_warps": held.most, "occupancy": held.share,
        "limited_by": held.limited_by,
    }  # fmt: skip


def build_all(todo: Sequence[Task], jobs: int | None) -> list[Row]:
    print(f"{len(todo)} builds, Triton {TRITON}", file=sys.stderr, flush=True)
    if jobs == 1:
        return [build(task) for task in todo]
    rows = []
    # Triton's compiler holds threads and locks that a forked child would inherit half way.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(build, todo, chunksize=4):
            rows.append(row)
            if len(rows) % 200 == 0:
                print(f"{len(rows)} of {len(todo)} built", file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    head = ["kernel", "dtype", "variant", "target", "registers", "spilled", "shared", "occupancy"]
    head += ["limited by", "tensor", "128-bit loads", "stores", "seconds"]
    lines = [head]
    for row in rows:
        if "failed" not in row:
            lines.append(
                [str(row[name]) for name in ("kernel", "dtype", "variant", *head[3:7])]
                + [f"{row['resident_warps']}/{row['most_warps']}", row["limited_by"] or "-"]
                + [str(row["tensor"]), f"{row['loads_128']}/{row['loads']}"]
                + [f"{row['stores_128']}/{row['stores']}", f"{row['seconds']:.2f}"]
            )
    return aligned(lines, names=4)


def summary_text(row: Row) -> str:
    return (
        f"{row['target']}: {row['builds']} builds, {row['spilling']} spill; at most "
        f"{row['registers']} registers ({row['registers_of']}); "
        f"{row['loads_128_share']:.0%} of global loads and {row['stores_128_share']:.0%} of stores "
        f"are of 128 bits; {row['with_tensor']} use tensor cores; lowest occupancy "
        f"{row['occupancy']:.0%} ({row['occupancy_of']}, {row['occupancy_in']})"
    )


def check(baseline: Baseline, rows: list[Row], chosen: dict[str, list[str]] | None) -> list[str]:
    """What is worse than in the baseline, said aloud; chosen: see stale, None with --small."""
    same = TRITON == baseline.triton
    if not same:
        print(
            f"The baseline was made by Triton {baseline.triton}, this is {TRITON}: registers, "
            "occupancy and shares are not compared"
        )
    found = regressions(baseline, rows, TRITON)
    if same and chosen is not None:
        found += [
            f"{key}: in the baseline, and nothing launches it any more; see to it, then {UPDATE}"
            for key in stale(baseline, rows, chosen)
        ]
    other = [
        row
        for row in rows
        if (before := baseline.builds.get(key_of(row)))
        and "failed" not in row
        and before != figures(row)
        and not worse(before, row, same)
    ]
    if other:
        keep = f"; {UPDATE} keeps them" if same else ""
        print(f"{len(other)} builds differ from the baseline and are no worse{keep}")
    for line in found:
        print(f"worse: {line}", file=sys.stderr)
    print(f"{len(rows)} builds checked against the baseline: {len(found)} worse")
    return found


def updated(path: Path, rows: list[Row], chosen: dict[str, list[str]]) -> dict[str, Any]:
    """The builds of the file that is to be written: these, and those that were not chosen.

    Raises:
        ResultsError: not all were chosen, and the rest is another Triton's.
    """
    kept: dict[str, dict[str, int]] = {}
    everything = {"op": list(OPS), "dtype": list(DTYPES), "target": list(_aot.TARGETS)}
    if any(set(chosen[part]) < set(everything[part]) for part in chosen):
        baseline = read(path)
        if baseline.triton != TRITON:
            raise ResultsError(
                f"{path.name}: made by Triton {baseline.triton}, and this is {TRITON}: update all "
                "of it, without --op, --dtype and --target"
            )
        gone = set(stale(baseline, rows, chosen))
        kept = {key: values for key, values in baseline.builds.items() if key not in gone}
    return kept | {key_of(row): figures(row) for row in rows}


def arguments() -> argparse.Namespace:
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--target", nargs="+", choices=_aot.TARGETS, default=list(_aot.TARGETS))
    parser.add_argument("--small", action="store_true", help="one configuration a kernel, target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with the baseline")
    what.add_argument("--update", action="store_true", help="write the baseline")
    args = parser.parse_args()
    # A binary that several ops launch has the name of the first, by whichever order they are asked.
    args.op = [op for op in OPS if op in args.op]
    if args.update and args.small:
        parser.error("--update: the baseline holds every configuration; leave out --small")
    return args


def run(args: argparse.Namespace) -> int:
    chosen = {"op": args.op, "dtype": args.dtype, "target": args.target}
    # Before minutes of work, not after them.
    baseline = read(args.baseline) if args.check else None
    rows = build_all(tasks(args.op, args.dtype, args.target, args.small), args.jobs)
    if not args.check and not args.update:
        print(table(rows))
    for row in summary(rows):
        print(summary_text(row))
    failed = bool(failures(rows))
    if baseline is not None:
        failed |= bool(check(baseline, rows, None if args.small else chosen))
    if args.update and not failed:
        builds = updated(args.baseline, rows, chosen)
        write(args.baseline, builds)
        print(f"{args.baseline}: {len(builds)} builds")
    return finish("kernel_report", args, {"rows": rows}) | failed


def main() -> int:
    args = arguments()
    try:
        return run(args)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
