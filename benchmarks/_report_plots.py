"""The plots of the report: bars against peers, the roofline, how time grows."""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from _report_tables import File, largest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw_all(files: list[File], folder: Path) -> list[Path]:
    """SVG files, for each file of results that a plot is made for."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    for file in files:
        for name, draw in _PLOTS.get(file.benchmark, {}).items():
            figure = Figure(figsize=(9, 4.5), layout="constrained")
            axes = figure.subplots()
            path = folder / f"{name}-{_slug(file.hardware)}.svg"
            try:
                if draw(axes, file):
                    axes.set_title(f"{axes.get_title()}\n{file.about}", fontsize=9)
                    # Nothing of when or by whom: a plot of the same figures is the same file.
                    with matplotlib.rc_context({"svg.hashsalt": "fastres"}):
                        figure.savefig(path, metadata={"Date": None})
                    drawn.append(path)
            except (LookupError, TypeError, ValueError) as error:
                print(f"left out: {file.path.name}: {error!r}, no {name} plot", file=sys.stderr)
    return drawn


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def step_bars(axes: Axes, file: File) -> bool:
    """Images/s of every provider at each size."""
    rows = [row for row in file.rows if "images_per_second" in row]
    sizes = list(dict.fromkeys((r["batch_size"], r["depth"], r["width"]) for r in rows))
    names = list(dict.fromkeys(r["provider"] for r in rows))
    for i, name in enumerate(names):
        mine = [r for r in rows if r["provider"] == name]
        place = [sizes.index((r["batch_size"], r["depth"], r["width"])) for r in mine]
        rates = [r["images_per_second"] for r in mine]
        # The slow percentile of the time is the low one of the rate.
        low = [
            rate * (1 - r["median_ms"] / r["high_ms"]) for rate, r in zip(rates, mine, strict=True)
        ]
        high = [
            rate * (r["median_ms"] / r["low_ms"] - 1) for rate, r in zip(rates, mine, strict=True)
        ]
        shifted = [x + 0.8 * (i / len(names) - 0.5) for x in place]
        axes.bar(shifted, rates, 0.8 / len(names), yerr=[low, high], label=name)
    axes.set_xticks(range(len(sizes)), [f"B {b}\ndepth {d}\nwidth {w}" for b, d, w in sizes])
    axes.set_ylabel("images/s")
    axes.set_title("Training step: median, 20th and 80th percentile")
    axes.legend(fontsize=7)
    return bool(rows)


def roofline(axes: Axes, file: File) -> bool:
    """Every step by its operations a byte and its rate, beneath the ceilings of the machine."""
    rows = [row for row in file.rows if "images_per_second" in row]
    roof = file.content.get("ceilings")
    if not rows or not roof:
        return False
    intensities = [row["flops"] / row["bytes"] for row in rows]
    span = [min(intensities) / 4, max(intensities) * 64]
    for name in dict.fromkeys(row["precision"] for row in rows):
        peak = roof["tflops"][name]
        knee = peak * 1000 / roof["copy_gb_per_s"]
        xs = sorted({span[0], min(max(knee, span[0]), span[1]), span[1]})
        ys = [min(peak, x * roof["copy_gb_per_s"] / 1000) for x in xs]
        axes.plot(xs, ys, color="black", linewidth=0.8)
        axes.annotate(f"{name} {peak:,.1f} TFLOP/s", (xs[-1], ys[-1]), ha="right", va="bottom")
    for name in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == name]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in mine],
            [row["flops"] / row["median_ms"] / 1e9 for row in mine],
            label=name,
        )
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel("FLOP per byte of the fully fused step")
    axes.set_title("Training step beneath the measured roofline")
    axes.legend(fontsize=7, loc="lower right")
    return True


def growth(axes: Axes, file: File) -> bool:
    """Time by batch size, with the exponent that was fitted."""
    fits = [
        fit for fit in file.content.get("growth", [])
        if fit["axis"] == "batch_size" and fit["points"] > 2
    ]  # fmt: skip
    for fit in fits:
        mine = {
            row["batch_size"]: row["median_ms"]
            for row in file.rows
            if "median_ms" in row
            and all(row[key] == fit[key] for key in ("provider", "depth", "width"))
        }
        label = f"{fit['provider']}: batch ^ {fit['exponent']:.2f}"
        sizes = sorted(mine)
        axes.plot(sizes, [mine[size] for size in sizes], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="ms a step")
    axes.set_title("How the training step grows with the batch")
    axes.legend(fontsize=7)
    return bool(fits)


def op_bars(axes: Axes, file: File) -> bool:
    """The largest case of each pass, by provider, beneath the bandwidth of a copy."""
    cases = largest(file.rows)
    names = list(dict.fromkeys(row["provider"] for case in cases.values() for row in case))
    for i, name in enumerate(names):
        bars = [
            (j + 0.8 * (i / len(names) - 0.5), row)
            for j, case in enumerate(cases.values())
            for row in case
            if row["provider"] == name
        ]
        rates = [row["gb_per_s"] for _, row in bars]
        low = [row["gb_per_s"] * (1 - row["median_ms"] / row["high_ms"]) for _, row in bars]
        high = [row["gb_per_s"] * (row["median_ms"] / row["low_ms"] - 1) for _, row in bars]
        axes.bar([x for x, _ in bars], rates, 0.8 / len(names), yerr=[low, high], label=name)
    if file.content.get("copy_gb_per_s"):
        axes.axhline(file.content["copy_gb_per_s"], color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(cases)), list(cases))
    axes.set_ylabel("GB/s of the fewest bytes")
    axes.set_title(f"{file.benchmark}, the largest case; the line is a copy's bandwidth")
    axes.legend(fontsize=7)
    return bool(cases)


def boost_by_unit(axes: Axes, file: File) -> bool:
    """Edge and accuracies of each unit of a growth, a line for each seed."""
    rows = [row for row in file.rows if row.get("by_unit")]
    for i, row in enumerate(rows):
        units = [unit["unit"] for unit in row["by_unit"]]
        for key, color in _ACCURACIES.items():
            label = "" if i else key.removesuffix("_accuracy")
            values = [unit[key] for unit in row["by_unit"]]
            axes.plot(units, values, color=color, marker=".", label=label)
        edges = [100 * unit["edge"] for unit in row["by_unit"]]
        axes.plot(units, edges, color="0.5", linestyle=":", label="" if i else "100 × edge γ̃")
    axes.set(xlabel="unit", ylabel="accuracy (%)", ylim=(0, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("BoostResNet: accuracy by unit, before the training end to end")
    axes.legend(fontsize=7)
    return bool(rows)


def boost_by_time(axes: Axes, file: File) -> bool:
    """Accuracies by the time of training: boosting, growth and end to end, and plain training."""
    rows = [row for row in file.rows if row.get("curve") and not row.get("by_unit")]
    seen = set()
    for row in rows:
        minutes = [point["seconds"] / 60 for point in row["curve"]]
        plain = row["provider"] == "plain"
        for key in ("train_accuracy", "test_accuracy"):
            name = f"{row['provider']}, {key.removesuffix('_accuracy')}"
            axes.plot(
                minutes, [point[key] for point in row["curve"]], "--" if plain else "-",
                color=_ACCURACIES[key], alpha=0.6 if plain else 1.0, marker=".",
                label="" if name in seen else name,
            )  # fmt: skip
            seen.add(name)
        if not plain:
            # Where the growth ends.
            axes.axvline(minutes[row["units"] - 1], color="0.7", linewidth=0.8)
    axes.set(xlabel="minutes of training", ylabel="accuracy (%)", ylim=(0, 100))
    axes.set_title("BoostResNet beside plain training for as long; the growth ends at the line")
    axes.legend(fontsize=7, loc="lower right")
    return bool(rows)


_ACCURACIES = {
    "train_accuracy": "tab:blue", "dev_accuracy": "tab:green", "test_accuracy": "tab:orange",
}  # fmt: skip
_Plot = Callable[[Axes, File], bool]
_OPS = ("augment", "batch_norm_relu", "stochastic_depth_add", "unscale", "cast", "sgd_step")
_PLOTS: dict[str, dict[str, _Plot]] = {
    "step": {"step": step_bars, "roofline": roofline, "growth": growth},
    **{op: {op: op_bars} for op in _OPS},
    "boost_training": {"boost_by_unit": boost_by_unit, "boost_by_time": boost_by_time},
}
