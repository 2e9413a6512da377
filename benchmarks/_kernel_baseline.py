"""What the compiler made of every kernel when that was last looked at, and whether it is worse now.

The baseline is a file of results with a summary for its rows, and under `builds` a line a build:
its key, and the figures that COLUMNS names.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from _occupancy import MULTIPROCESSORS
from _results import ResultsError, Row, load, results, write_whole

BASELINE = Path(__file__).parent / "results" / "kernels-baseline.json"
UPDATE = "python benchmarks/kernel_report.py --update"

KEY = ("op", "kernel", "dtype", "target", "variant")
COLUMNS = (
    "registers", "spilled", "shared", "resident_warps",
    "tensor", "loads", "loads_128", "stores", "stores_128",
)  # fmt: skip

# The portion in which both vendors hand out registers: growth within one is the compiler's whim.
REGISTERS_TOLERANCE = 8
# One more load of a coefficient among ten loads of a tensor is no vector load lost.
SHARE_TOLERANCE = 0.1


@dataclass
class Baseline:
    """Figures by name, for every build by its key, and the Triton that made them."""

    triton: str
    builds: dict[str, dict[str, int]]


def key_of(row: Row) -> str:
    return " | ".join(str(row[part]) for part in KEY)


def _parts(key: str) -> Row:
    return dict(zip(KEY, key.split(" | "), strict=True))


def figures(row: Row) -> dict[str, int]:
    return {name: row[name] for name in COLUMNS}


def read(path: Path) -> Baseline:
    """The baseline.

    Raises:
        ResultsError: there is none, or it is of another form than this version's.
    """
    if not path.exists():
        raise ResultsError(f"{path}: there is no baseline; make one with {UPDATE}")
    content = load(path)
    builds = content.get("builds")
    if content.get("columns") != list(COLUMNS) or not isinstance(builds, dict):
        raise ResultsError(
            f"{path.name}: no baseline of this version's form, whose columns are "
            f"{', '.join(COLUMNS)}; make it again with {UPDATE}"
        )
    rows = {key: dict(zip(COLUMNS, values, strict=True)) for key, values in builds.items()}
    return Baseline(content["triton"], rows)


def write(path: Path, builds: dict[str, dict[str, int]]) -> None:
    """Write the baseline, a line a build, so that a change of a kernel is a change of its lines."""
    rows = [_parts(key) | values for key, values in builds.items()]
    head = results("kernel_report", columns=list(COLUMNS), rows=summary(rows))
    lines = [
        f"  {json.dumps(key)}: {json.dumps(list(values.values()))}"
        for key, values in sorted(builds.items())
    ]
    text = json.dumps(head, indent=1).removesuffix("\n}")
    write_whole(path, text + ',\n "builds": {\n' + ",\n".join(lines) + "\n }\n}\n")


def summary(rows: Iterable[Row]) -> list[Row]:
    """A row for each target."""
    found = []
    built = [row for row in rows if "failed" not in row]
    for target in dict.fromkeys(row["target"] for row in built):
        here = [row for row in built if row["target"] == target]
        most = max(here, key=lambda row: row["registers"])
        least = min(here, key=lambda row: row["resident_warps"])
        sums = {
            name: sum(row[name] for row in here)
            for name in ("loads", "loads_128", "stores", "stores_128")
        }
        found.append({
            "target": target, "builds": len(here),
            "spilling": sum(row["spilled"] > 0 for row in here),
            "registers": most["registers"], "registers_of": most["kernel"],
            "loads_128_share": sums["loads_128"] / max(sums["loads"], 1),
            "stores_128_share": sums["stores_128"] / max(sums["stores"], 1),
            "with_tensor": sum(row["tensor"] > 0 for row in here),
            "occupancy": least["resident_warps"] / MULTIPROCESSORS[target].warps,
            "occupancy_of": least["kernel"],
            "occupancy_in": f"{least['dtype']} {least['variant']}",
        })  # fmt: skip
    return found


def stale(baseline: Baseline, rows: Iterable[Row], chosen: dict[str, list[str]]) -> list[str]:
    """Keys of what the baseline has and nothing launches any more, among what was chosen.

    chosen: the ops, dtypes and targets whose every configuration the rows are.
    """
    built = {key_of(row) for row in rows}
    return [
        key
        for key in baseline.builds
        if key not in built and all(_parts(key)[part] in values for part, values in chosen.items())
    ]


def regressions(baseline: Baseline, rows: Iterable[Row], triton: str) -> list[str]:
    """What is worse than in the baseline, a line each in words.

    With another Triton than the baseline's another compiler is at work: spills, and vector accesses
    and tensor-core instructions that are gone, count there too; how many registers, what share of
    the accesses, and which launches make one binary do not.
    """
    found = []
    same_compiler = triton == baseline.triton
    for row in rows:
        key = key_of(row)
        before = baseline.builds.get(key)
        if "failed" in row:
            found.append(f"{key}: does not build: {row['failed']}")
        elif before is not None:
            found += [f"{key}: {words}" for words in worse(before, row, same_compiler)]
        elif same_compiler:
            found.append(f"{key}: not in the baseline; add it with {UPDATE}")
        elif row["spilled"]:
            found.append(f"{key}: spills {row['spilled']} bytes a thread")
    return found


def worse(before: dict[str, int], now: dict[str, int], same_compiler: bool = True) -> list[str]:
    """In words, how one build is worse than the same build before."""
    found = []
    if now["spilled"] > before["spilled"]:
        found.append(f"spills {now['spilled']} bytes a thread, {before['spilled']} before")
    if before["tensor"] and not now["tensor"]:
        found.append(f"no tensor-core instruction, {before['tensor']} before")
    for what in ("loads", "stores"):
        wide, wide_before = now[f"{what}_128"], before[f"{what}_128"]
        share, share_before = wide / max(now[what], 1), wide_before / max(before[what], 1)
        fewer = same_compiler and share < share_before - SHARE_TOLERANCE
        if fewer or (wide_before and not wide):
            found.append(
                f"{wide} of {now[what]} global {what} of 128 bits, "
                f"{wide_before} of {before[what]} before"
            )
    registers, resident = now["registers"], now["resident_warps"]
    grown = (
        registers > before["registers"] + REGISTERS_TOLERANCE or now["shared"] > before["shared"]
    )
    if same_compiler and grown and resident < before["resident_warps"]:
        found.append(
            f"{resident} warps resident, {before['resident_warps']} before, with {registers} "
            f"registers and {now['shared']} bytes of shared memory, {before['registers']} and "
            f"{before['shared']} before"
        )
    return found
