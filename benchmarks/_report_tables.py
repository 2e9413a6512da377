"""What the files of results say, as Markdown: the headlines, and a table of each file."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _results import Row

UNMEASURED = "not measured yet"
# The timer whose rows flatter what fits the cache: no headline and no plot is made of them.
WARM = "CUDA graph, warm L2"
COLD = "events, cold L2"
_SPREAD = (
    "A time is a median of n, and the two behind it are the 20th and the 80th percentile, of "
    "three the least and the most. What stands behind ± is a standard deviation."
)
# What tells providers at one case apart.
_FIGURES = {"provider", "median_ms", "low_ms", "high_ms", "n", "gb_per_s", "share_of_copy"}


@dataclass(frozen=True)
class File:
    """One file of results, and where it lies."""

    path: Path
    content: dict[str, Any]

    @property
    def benchmark(self) -> str:
        return self.content["benchmark"]

    @property
    def rows(self) -> list[Row]:
        return self.content.get("rows", [])

    @property
    def hardware(self) -> str:
        gpu = self.content.get("gpu")
        return gpu["name"] if gpu else f"{self.content['cpu']}"

    @property
    def on_gpu(self) -> bool:
        return bool(self.content.get("gpu"))

    @property
    def about(self) -> str:
        """Hardware, versions and date, in a line."""
        c = self.content
        threads = "" if self.on_gpu else f", {c.get('threads')} threads"
        versions = [f"{name} {c[name]}" for name in ("python", "torch", "triton") if c.get(name)]
        if self.on_gpu:
            versions.append(f"CUDA {c.get('cuda')}")
        return f"{self.hardware}{threads}; {', '.join(versions)}; {c['date'][:10]}"


def newest(files: Iterable[File]) -> list[File]:
    """The last file of each benchmark on each hardware; toy sizes are not figures."""
    found: dict[tuple[str, str], File] = {}
    for file in sorted(files, key=lambda f: f.content["date"]):
        if not file.content.get("small"):
            found[file.benchmark, file.hardware] = file
    return sorted(found.values(), key=lambda f: (f.benchmark, not f.on_gpu, f.hardware))


def pick(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The first row that was measured and has these values."""
    return next(
        (
            row
            for row in rows
            if "failed" not in row
            and "not_measured" not in row
            and all(row.get(key) == value for key, value in wanted.items())
        ),
        None,
    )


def largest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Of each pass the rows, one a provider, of the case that moves the most bytes."""
    cold = [row for row in rows if "share_of_copy" in row and row["timer"] != WARM]
    found = {}
    for direction in dict.fromkeys(row["pass"] for row in cold):
        mine = [row for row in cold if row["pass"] == direction]
        # Layouts move the same bytes, give or take a product's last digit: the first one stands.
        most = max(mine, key=lambda row: float(f"{row['gb_per_s'] * row['median_ms']:.9g}"))
        case = {key: most[key] for key in most.keys() - _FIGURES}
        found[direction] = [row for row in mine if case.items() <= row.items()]
    return found


@dataclass(frozen=True)
class Headline:
    """A figure of README: from which benchmark, and how it reads its rows.

    anywhere: it is the same on every machine, and stands once.
    """

    what: str
    benchmark: str
    figure: Callable[[list[Row]], str | None]
    command: str
    anywhere: bool = False


def headlines(files: list[File], wanted: Iterable[Headline]) -> str:
    """README's table: a column for GPUs, one for CPUs, and beneath it what measured them."""
    notes: dict[str, str] = {}

    def cell(headline: Headline, on_gpu: bool) -> str:
        for file in files:
            if file.benchmark == headline.benchmark and file.on_gpu == on_gpu:
                try:
                    figure = headline.figure(file.rows)
                except (LookupError, TypeError, ValueError) as error:
                    # One file that is not what it should be costs its own figures alone.
                    print(f"left out: {file.path.name}: {error!r} in its rows", file=sys.stderr)
                    continue
                if figure is not None:
                    mark = notes.setdefault(f"{file.about}", f"[{len(notes) + 1}]")
                    unfinished = ", unfinished" if file.content.get("finished") is False else ""
                    return f"{figure}{unfinished} {mark}"
        return "needs none" if headline.anywhere and on_gpu else UNMEASURED

    lines = ["| what | on a GPU | on a CPU | command |", "|---|---|---|---|"]
    lines += [f"| {h.what} | {cell(h, True)} | {cell(h, False)} | `{h.command}` |" for h in wanted]
    told = [f"{mark} {about}  " for about, mark in notes.items()]
    return "\n".join([*lines, "", *told, *([_SPREAD] if told else [])])


def table(file: File) -> str:
    """All rows of a file, a line each; a median stands with its spread and its repeats."""
    rows = [_flat(row) for row in file.rows]
    head = list(dict.fromkeys(key for row in rows for key in row))
    body = [[_word(row.get(key)) for key in head] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def _flat(row: Row) -> Row:
    found: Row = {}
    for key, value in row.items():
        if key == "median_ms":
            found["ms"] = _timing(row)
        elif key in ("failed", "not_measured"):
            found["ms"] = UNMEASURED if value == "out of time" else value
        elif key not in ("low_ms", "high_ms", "n") and not isinstance(value, list | dict):
            found[key] = value
    return found


def _timing(row: Row) -> str:
    return f"{row['median_ms']:.4g} ({row['low_ms']:.4g} to {row['high_ms']:.4g}, n = {row['n']})"


def _word(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    # A bar would end the cell.
    return str(value).replace("|", "\\|")
