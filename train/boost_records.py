"""What a growth shows of its units: a line and a plot."""

from pathlib import Path

from checkpoint import write_atomically
from records import Record

GROWTH, REFINED = "growth.png", "refined"


def unit_line(record: Record, units: int) -> str:
    parts = [f"unit {record['unit']:>{len(str(units))}}/{units}"]
    parts += [f"{name} {record[name]:.4f}" for name in ("edge", "gamma", "alpha")]
    parts += [f"{name} {record[f'{name}_accuracy']:.2f} %" for name in ("train", "dev", "test")]
    return "  ".join([*parts, f"bound {record['bound']:.3f}", f"{record['seconds']:.1f} s"])


def draw_growth(path: Path, records: list[Record], title: str) -> None:
    """Edge by unit, and under it the errors with the theorem's bound, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    units = [record["unit"] for record in records]
    edges = [record["edge"] for record in records]
    top.plot(units, edges, marker=".", label="edge γ̃, on the costs of its unit")
    gammas = [record["gamma"] for record in records]
    top.plot(units, gammas, marker=".", color="0.5", linestyle=":", label="γ")
    top.set(ylabel="edge", title=title)
    top.axhline(0.0, color="0.7", linewidth=0.8)
    for name, style in (("train", "-"), ("dev", "--"), ("test", "-")):
        values = [record[f"{name}_accuracy"] for record in records]
        bottom.plot(units, values, style, marker=".", label=f"{name} accuracy")
    least = [100.0 * (1.0 - record["bound"]) for record in records]
    bottom.plot(units, least, color="0.5", linestyle=":", label="1 − exp(−½ Σ γ²)")
    bottom.set(xlabel="unit", ylabel="accuracy (%)", ylim=(0, 100))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
