"""What the table's runs came to: means and spreads by row, as CSV and Markdown."""

import csv
import io
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import write_atomically
from recipes import Recipe
from table_runs import Run

# What is shown of a run, by its name in the summary; times in minutes, accuracies in %.
MEASURES = {
    "minutes": "training_seconds",
    "train": "train_accuracy",
    "dev": "dev_accuracy",
    "test": "test_accuracy",
}
# When a run of train/boost.py is shown beside its end: before its training end to end.
GROWN = "grown"
# Steps over which YellowFin's learning rate rises: 10 windows of 20 gradients, its defaults.
_SLOW_START = 200


@dataclass(frozen=True)
class Line:
    """A row: what its finished runs measured, and why others failed, by seed.

    when: at which point of its runs, if not at their end.
    """

    recipe: Recipe
    runs: int
    summaries: dict[int, dict[str, Any]]
    failures: dict[int, str]
    when: str = ""

    @property
    def name(self) -> str:
        return self.recipe.name + (f" ({self.when})" if self.when else "")

    @property
    def about(self) -> str:
        return self.recipe.about if not self.when else f"The next row, when it is {self.when}"

    def values(self, measure: str) -> list[float]:
        per = 60 if measure == "minutes" else 1
        return [summary[MEASURES[measure]] / per for summary in self.summaries.values()]

    def mean(self, measure: str) -> float | None:
        return statistics.mean(self.values(measure)) if self.summaries else None

    def sd(self, measure: str) -> float | None:
        """The sample's standard deviation; None of fewer than two."""
        return statistics.stdev(self.values(measure)) if len(self.summaries) > 1 else None

    @property
    def workers(self) -> int:
        return self.recipe.changes.get("micro_batches", 1)

    @property
    def is_emulated(self) -> bool:
        """Whether its time is that of several workers in turn."""
        return any(_is_emulated(summary) for summary in self.summaries.values())

    @property
    def machine(self) -> str | None:
        """What all of its runs were trained on, and with; None of several."""
        machines = {m for summary in self.summaries.values() for m in _machines(summary)}
        return machines.pop() if len(machines) == 1 else None

    @property
    def state(self) -> str:
        if len(self.summaries) == self.runs:
            return "trained"
        return "failed" if self.failures else "not trained yet"


@dataclass(frozen=True)
class Table:
    """The table, or what is swept."""

    title: str
    swept: str
    notes: list[str]
    lines: list[Line]

    @classmethod
    def read(
        cls, title: str, quick: bool, sweep: str | None, recipes: list[Recipe], runs: list[Run]
    ) -> "Table":
        """From what the runs have left in their folders."""
        lines: list[Line] = []
        for recipe in recipes:
            mine = [run for run in runs if run.recipe is recipe]
            summaries = {run.seed: summary for run in mine if (summary := run.summary())}
            failures = {run.seed: why for run in mine if (why := run.failure())}
            if recipe.program == "boost.py":
                before = {seed: before_refinement(s) for seed, s in summaries.items()}
                lines.append(Line(recipe, len(mine), before, failures, when=GROWN))
            lines.append(Line(recipe, len(mine), summaries, failures))
        return cls(title, (sweep or "").replace("-", " "), _notes(quick, lines), lines)

    def line(self, name: str) -> Line | None:
        return next((line for line in self.lines if line.name == name), None)

    def speedup(self, line: Line) -> float | None:
        """Of the baseline's time over a row's; None where they are of different machines."""
        base = self.line("baseline")
        if base is None or base.machine is None or base.machine != line.machine:
            return None
        before, after = base.mean("minutes"), line.mean("minutes")
        return before / after if before and after else None

    def markdown(self) -> str:
        header = ["row", "what", "seeds", "time (min)", "speedup"]
        header += ["train (%)", "dev (%)", "test (%)"]
        reported = any(line.recipe.reported for line in self.lines)
        header += ["report: time (min)", "train (%)", "test (%)"] if reported else []
        rows = []
        for line in self.lines:
            speedup = self.speedup(line)
            cells = [line.name, line.about, _seeds(line)]
            time, *accuracies = (_cell(line, measure) for measure in MEASURES)
            cells.append(time + ("†" if line.is_emulated else ""))
            cells.append("–" if speedup is None else f"{speedup:.2f} ×")
            cells += accuracies
            told = line.recipe.reported
            if reported and told:
                cells += [f"{told.minutes:.0f}", f"{told.train:.1f}", f"{told.test:.1f}"]
            elif reported:
                cells += ["–"] * 3
            rows.append(cells)
        text = [f"# {self.title}", "", *_aligned([header, *rows]), ""]
        return "\n".join([*text, *(f"{note}  " for note in self.notes)]).rstrip() + "\n"


def before_refinement(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary of train/boost.py as it was before the training end to end."""
    grown = {"epochs": 0, "training_seconds": summary["growth_seconds"]}
    return summary | summary["before_refinement"] | grown


def _notes(quick: bool, lines: list[Line]) -> list[str]:
    notes = []
    if quick:
        notes.append(
            "quick: a trial of every row. So few images and steps show that all of it learns, not "
            "what it is worth; batches are a quarter of those that the rows are named for."
        )
    of: dict[str, list[str]] = {}
    for line in lines:
        for machine in sorted({m for s in line.summaries.values() for m in _machines(s)}):
            of.setdefault(machine, []).append(line.name)
    for machine, names in of.items():
        notes.append(f"Trained on {machine}" + (f": {', '.join(names)}." if len(of) > 1 else "."))
    if len(of) > 1:
        notes.append("Times on different machines are not compared: those rows have no speedup.")
    summaries = [s for line in lines for s in line.summaries.values()]
    if any(s["config"]["precision"] == "bf16" for s in summaries):
        notes.append("Half precision is bf16 here.")
    if any(line.is_emulated for line in lines):
        notes.append(
            "† workers emulated by micro-batches: fewer processes took them in turn, and the time "
            "is that of all of them."
        )
    for summary in summaries:
        config = summary["config"]
        steps = config["epochs"] * (summary["train_images"] // config["batch_size"])
        if config["optimizer"] == "yellowfin" and steps < 10 * _SLOW_START:
            notes.append(
                f"YellowFin's learning rate rises over its first {_SLOW_START} steps, more than a "
                f"tenth of the {steps} that this run has: it is not done justice."
            )
            break
    if any(line.recipe.reported for line in lines):
        notes.append("The report's figures are of depth 122, 200 epochs, on GTX 1080 Ti.")
    notes.append("Time is that of the training steps, without evaluation.")
    if any(line.when and line.summaries for line in lines):
        notes.append(
            "Of a growth by boosting it is that of its steps, of the edges over the training set "
            "and of the cached features; of the row beneath, the training end to end as well."
        )
    for line in lines:
        if not line.when:
            notes += [f"Failed: {line.name}, seed {s}: {w}" for s, w in line.failures.items()]
    return notes


def _hardware(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What computed the run, in turn; a summary was of one machine at first."""
    return summary.get("hardware", [summary])


def _is_emulated(summary: dict[str, Any]) -> bool:
    """Whether a part of the run, at the least, took several workers in turn."""
    return any(kind["processes"] < summary["workers"] for kind in _hardware(summary))


def _machines(summary: dict[str, Any]) -> set[str]:
    """What the run was trained on, and with; several where it was resumed elsewhere."""
    found = set()
    for kind in _hardware(summary):
        threads = f", {kind['threads']} threads" if kind["device"] == "cpu" else ""
        found.add(f"{summary['data']}, on {kind['device_name']}{threads}; torch {kind['torch']}")
    return found


def _seeds(line: Line) -> str:
    done = len(line.summaries)
    return "–" if not line.runs else f"{done}" if done == line.runs else f"{done} of {line.runs}"


def _cell(line: Line, measure: str) -> str:
    mean, sd = line.mean(measure), line.sd(measure)
    if mean is None:
        return line.state
    digits = 2 if measure == "minutes" else 1
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _aligned(rows: list[list[str]]) -> list[str]:
    """A Markdown table that reads well as it stands."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]


def write_files(table: Table, out: Path) -> None:
    """table.md; table.csv, a line a row; runs.csv, a line a run."""
    means: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for line in table.lines:
        told = line.recipe.reported
        about = {"table": table.title, "row": line.name, "workers": line.workers}
        about |= {"series": line.recipe.series, "x": line.recipe.x} if table.swept else {}
        spread = {
            f"{measure}_{what}": value
            for measure in MEASURES
            for what, value in (("mean", line.mean(measure)), ("sd", line.sd(measure)))
        }
        means.append(
            about
            | {"state": line.state, "runs": line.runs, "trained": len(line.summaries)}
            | {"emulated": line.is_emulated, "speedup": table.speedup(line)}
            | spread
            | {f"report_{m}": getattr(told, m, None) for m in ("minutes", "train", "test")}
        )
        for seed in sorted(line.summaries.keys() | line.failures.keys()):
            summary = line.summaries.get(seed, {})
            kinds = _hardware(summary) if summary else []
            # A run of several machines in turn has none to name.
            summary = (kinds[0] if len(kinds) == 1 else {}) | summary
            runs.append(
                about
                | {"seed": seed, "failure": line.failures.get(seed)}
                | {key: summary.get(key) for key in _KEPT}
                | {key: summary.get("config", {}).get(key) for key in _SETTINGS}
            )
    _write_csv(out / "table.csv", means)
    _write_csv(out / "runs.csv", runs)
    text = table.markdown().encode()
    write_atomically(out / "table.md", lambda file: file.write(text))


_KEPT = (
    "epochs", "units", "training_seconds", "wall_seconds", "train_accuracy", "dev_accuracy",
    "test_accuracy", "processes", "device_name", "threads", "torch", "data",
)  # fmt: skip
_SETTINGS = ("depth", "train_size", "batch_size", "precision", "fused")


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
