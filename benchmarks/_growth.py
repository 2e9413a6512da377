"""How time grows with a size: the exponent of a power law, fitted on logarithms of both."""

import math
from collections.abc import Iterable

import numpy as np
from _results import Row

AXES = ("batch_size", "depth", "width")


def exponents(rows: Iterable[Row]) -> list[Row]:
    """For each provider and axis with other sizes alike: time = factor * size ** exponent.

    r2 is the share of the variance, of the logarithms, that the law explains; of two points it is 1
    and says nothing, which n shows.
    """
    timed = [row for row in rows if "median_ms" in row]
    lines: dict[tuple[str, str, tuple[tuple[str, int], ...]], dict[int, float]] = {}
    for row in timed:
        for axis in AXES:
            others = tuple((other, row[other]) for other in AXES if other != axis)
            line = lines.setdefault((row["provider"], axis, others), {})
            line[row[axis]] = row["median_ms"]
    found: list[Row] = []
    for (provider, axis, others), line in lines.items():
        if len(line) < 2:
            continue
        sizes, times = np.array(sorted(line)), np.array([line[size] for size in sorted(line)])
        x, y = np.log(sizes), np.log(times)
        exponent, intercept = np.polyfit(x, y, 1)
        spread = float(((y - y.mean()) ** 2).sum())
        rest = float(((y - exponent * x - intercept) ** 2).sum())
        found.append(
            {
                "provider": provider,
                "axis": axis,
                **dict(others),
                "sizes": [int(size) for size in sizes],
                "exponent": float(exponent),
                "factor_ms": math.exp(float(intercept)),
                "r2": 1 - rest / spread if spread > 0 else 1.0,
                "points": len(line),
            }
        )
    return found


def text(row: Row) -> str:
    fixed = ", ".join(f"{axis} {row[axis]}" for axis in AXES if axis in row)
    fit = f", r2 {row['r2']:.3f}" if row["points"] > 2 else ""
    return (
        f"{row['provider']:45} time grows with {row['axis']} ^ {row['exponent']:.2f} "
        f"({fixed}; {row['points']} sizes, {row['sizes'][0]} to {row['sizes'][-1]}{fit})"
    )
