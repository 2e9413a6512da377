"""The plots of the table: times and accuracies beside the report's, the speedup, the sweeps."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from checkpoint import write_atomically
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from recipes import STACK
from table_files import Line, Table

_LOOKS = {"train": "tab:blue", "dev": "tab:green", "test": "tab:orange"}


def draw_plots(table: Table, out: Path) -> None:
    """SVG files in out, of what has been trained so far; those of less than that go."""
    trained = [line for line in table.lines if line.summaries]
    stack = [table.line(row.__name__) for row in STACK]
    steps = {name: line for name, line in zip(STACK.values(), stack, strict=True) if line}
    # Differences of times mean something on one machine, and when all are there.
    machines = {line.machine for line in steps.values() if line.summaries}
    whole = all(line and line.summaries for line in stack)
    whole = whole and len(machines) == 1 and None not in machines
    plots: dict[str, Callable[[Figure], None] | None] = {
        "sweep.svg": (lambda f: sweep(f, trained, table.swept)) if table.swept else None,
        "table.svg": None if table.swept else lambda f: rows(f, trained),
        "waterfall.svg": (lambda f: waterfall(f, steps)) if whole else None,
    }
    for name, draw in plots.items():
        if draw is not None and trained:
            _save(out / name, table, draw)
        else:
            (out / name).unlink(missing_ok=True)


def _save(path: Path, table: Table, draw: Callable[[Figure], None]) -> None:
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.suptitle(table.title, fontsize=10)
    # Nothing of when or by whom: a plot of the same figures is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fastres"}):
        write_atomically(
            path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None})
        )


def _label(line: Line) -> str:
    return line.name.replace("_", " ") + ("†" if line.is_emulated else "")


def _point(axes: Axes, line: Line, measure: str, y: float, **looks: Any) -> None:
    mean, sd = line.mean(measure), line.sd(measure)
    assert mean is not None  # it is trained
    axes.errorbar(mean, y, xerr=sd, fmt="o", capsize=3, **looks)


def rows(figure: Figure, lines: list[Line]) -> None:
    """Each row's time and accuracies; hollow, the report's."""
    time, accuracy = figure.subplots(1, 2, sharey=True)
    for y, line in enumerate(lines):
        told = line.recipe.reported
        _point(time, line, "minutes", y, color="0.3", label="" if y else "measured")
        for measure, color in _LOOKS.items():
            _point(accuracy, line, measure, y, color=color, label="" if y else measure)
        if told:
            hollow = {"marker": "o", "facecolors": "none", "zorder": 3}
            time.scatter(told.minutes, y, edgecolors="0.3", **hollow)
            for measure in ("train", "test"):
                color = _LOOKS[measure]
                accuracy.scatter(getattr(told, measure), y, edgecolors=color, **hollow)
    time.set_yticks(range(len(lines)), [_label(line) for line in lines])
    time.invert_yaxis()
    time.set_xscale("log")
    time.set_xlabel("minutes of training (hollow: the report's)")
    accuracy.set_xlabel("accuracy (%), mean ± sd (hollow: the report's)")
    for axes in (time, accuracy):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


def waterfall(figure: Figure, steps: dict[str, Line]) -> None:
    """What each thing takes off the baseline's time when it is added to those before it."""
    axes = figure.subplots()
    minutes = [line.mean("minutes") or 0.0 for line in steps.values()]
    first, last = minutes[0], minutes[-1]
    axes.bar(0, first, color="0.5")
    axes.text(0, first, f"{first:.2f} min", ha="center", va="bottom")
    for i, (before, after) in enumerate(itertools.pairwise(minutes), 1):
        faster = after <= before
        axes.bar(
            i, abs(before - after), bottom=min(before, after),
            color="tab:green" if faster else "tab:red",
        )  # fmt: skip
        axes.plot([i - 1.4, i + 0.4], [before, before], color="0.3", linewidth=0.8)
        axes.text(i, max(before, after), f"{before / after:.2f} ×", ha="center", va="bottom")
    axes.bar(len(steps), last, color="0.5")
    axes.text(len(steps), last, f"{last:.2f} min, {first / last:.2f} ×", ha="center", va="bottom")
    names = [name + "†" * line.is_emulated for name, line in steps.items()]
    names = [names[0], *(f"+ {name}" for name in names[1:]), "in all"]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("minutes of training, mean over the seeds")
    axes.grid(axis="y", alpha=0.3)


def sweep(figure: Figure, lines: list[Line], swept: str) -> None:
    """Test accuracy and time over what is swept, a line for each series."""
    panels = figure.subplots(1, 2)
    series = list(dict.fromkeys(line.recipe.series for line in lines if line.recipe.series))
    for name in series or [""]:
        mine = [line for line in lines if line.recipe.series in ("", name)]
        mine.sort(key=lambda line: line.recipe.x)
        for axes, measure in zip(panels, ("test", "minutes"), strict=True):
            axes.errorbar(
                [line.recipe.x for line in mine],
                [line.mean(measure) for line in mine],
                yerr=[line.sd(measure) or 0.0 for line in mine],
                marker="o", capsize=3, label=name,
            )  # fmt: skip
    xs = [line.recipe.x for line in lines]
    for axes, text in zip(panels, ("test accuracy (%)", "minutes of training"), strict=True):
        axes.set_ylabel(text)
        axes.set_xlabel(swept)
        if max(xs) > 20 * min(xs):
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        if series:
            axes.legend(fontsize=8)
