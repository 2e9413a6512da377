"""A model of data-parallel training on more processes than were measured. Never a measurement.

An all-reduce of m bytes over p processes takes

    t(p, m) = overhead + L(p) * latency + 2 (p - 1) / p * m / bandwidth,

L(p) = 2 (p - 1) for a ring, 2 log2(p) for a tree. Overhead, latency and bandwidth are fitted to
measured points by non-negative least squares of the relative error; the form is the one that fits
better, and the other's figure stands beside it. A step takes its computing time, measured on one
process at that batch, and the part of its all-reduces that the backward pass does not hide.

Sources: Thakur, Rabenseifner and Gropp 2005; Patarasu and Yuan 2009.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]

PROCESSES = (8, 16, 32, 64, 128, 256, 512, 1024)

# Fewer sizes leave a line through latency and bandwidth nothing to be wrong by.
_FEWEST_SIZES = 3
_RESAMPLES = 100
# Of the relative residuals: beyond it the fit tells little more than the order of magnitude.
_POOR_FIT = 0.25

_STEPS: dict[str, Callable[[float], float]] = {
    "ring": lambda p: 2 * (p - 1),
    "tree": lambda p: 2 * math.log2(p),
}


class NoModel(Exception):
    """Why the model says nothing, in words."""


@dataclass(frozen=True)
class Point:
    """One measured all-reduce."""

    processes: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """What the points say of the link. Residuals are relative: model over measured, less 1."""

    form: str
    overhead_s: float
    latency_s: float
    seconds_per_byte: float
    residual_rms: float
    residual_worst: float
    n: int

    def seconds(self, processes: int, size: float) -> float:
        """An all-reduce of `size` bytes."""
        if processes == 1:
            return 0.0
        shares = 2 * (processes - 1) / processes
        return (
            self.overhead_s
            + _STEPS[self.form](processes) * self.latency_s
            + shares * size * self.seconds_per_byte
        )

    def as_dict(self) -> Row:
        """In the units of a results file."""
        return {
            "form": self.form,
            "overhead_us": 1e6 * self.overhead_s,
            "latency_us": 1e6 * self.latency_s,
            "bandwidth_gb_per_s": 1e-9 / self.seconds_per_byte,
            "residual_rms": self.residual_rms,
            "residual_worst": self.residual_worst,
            "n": self.n,
        }


@dataclass(frozen=True)
class Network:
    """The link between nodes, as the user gave it: latency of a hop, and bandwidth of a node."""

    processes_per_node: int
    latency_s: float
    bytes_per_s: float

    def seconds(self, fit: Fit, processes: int, size: float) -> float:
        """Reduce inside each node, over the nodes, and back: the node's part is as fitted."""
        if processes <= self.processes_per_node:
            return fit.seconds(processes, size)
        nodes = processes / self.processes_per_node
        between = _STEPS[fit.form](nodes) * self.latency_s
        between += 2 * (nodes - 1) / nodes * size / self.bytes_per_s
        return fit.seconds(self.processes_per_node, size) + between


def points(rows: Iterable[Row]) -> list[Point]:
    """The measured all-reduces among the rows of a results file.

    Raises:
        NoModel: there are too few to tell latency from bandwidth, or one is no finite time.
    """
    found = []
    for row in rows:
        if row.get("kind") != "all_reduce" or "median_ms" not in row:
            continue
        try:
            point = Point(int(row["processes"]), int(row["bytes"]), float(row["median_ms"]) / 1000)
        except (KeyError, TypeError, ValueError) as error:
            raise NoModel(f"an all_reduce row is not of the form expected: {row}") from error
        if not (math.isfinite(point.seconds) and point.seconds > 0 and point.bytes > 0):
            raise NoModel(
                f"an all-reduce of {point.bytes} bytes over {point.processes} processes has "
                f"{1000 * point.seconds} ms: expected a positive time; measure it again"
            )
        if point.processes > 1:
            found.append(point)
    counts = sorted({p.processes for p in found})
    sizes = {p.bytes for p in found}
    if len(counts) < 2 or any(
        len({p.bytes for p in found if p.processes == count}) < _FEWEST_SIZES for count in counts
    ):
        over = " and ".join(map(str, counts)) or "no two"
        raise NoModel(
            "the model is fitted to measured points: all-reduces over two or more process counts, "
            f"each of 2 or more processes and {_FEWEST_SIZES} or more sizes; these are of "
            f"{len(sizes)} sizes over {over} processes; run with at least --processes 1 2 4"
        )
    return found


def fit(measured: Sequence[Point], form: str | None = None) -> Fit:
    """The link that fits the points best, in one form or in the better one.

    Raises:
        NoModel: the points show no bandwidth.
    """
    if form is None:
        return min((fit(measured, name) for name in _STEPS), key=lambda f: f.residual_rms)
    seconds = np.array([p.seconds for p in measured])
    columns = np.array(
        [
            (1.0, _STEPS[form](p.processes), 2 * (p.processes - 1) / p.processes * p.bytes)
            for p in measured
        ]
    )
    found = _non_negative(columns / seconds[:, None], np.ones(len(measured)))
    if not found[2] > 0:
        raise NoModel(
            "the measured all-reduces grow no slower with their size, so they tell no bandwidth: "
            "measure larger messages, on a machine that does nothing else"
        )
    residuals = columns @ found / seconds - 1
    overhead, latency, per_byte = map(float, found)
    rms, worst = float(np.sqrt(np.mean(residuals**2))), float(np.abs(residuals).max())
    return Fit(form, overhead, latency, per_byte, rms, worst, len(measured))


def _non_negative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with no coefficient below 0: the best of every choice of columns."""
    # Bytes and counts differ by ten decades.
    scale = np.linalg.norm(columns, axis=0)
    columns = columns / scale
    best, least = np.zeros(columns.shape[1]), float(np.inf)
    for size in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), size)):
            found = np.linalg.lstsq(columns[:, chosen], target, rcond=None)[0]
            error = float(np.sum((columns[:, chosen] @ found - target) ** 2))
            if (found >= 0).all() and error < least:
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = found
    return best / scale


def _resampled(measured: Sequence[Point], form: str) -> list[Fit]:
    """Fits to points drawn anew within each process count: how far noise moves the fit."""
    random = np.random.default_rng(0)
    groups: dict[int, list[Point]] = {}
    for point in measured:
        groups.setdefault(point.processes, []).append(point)
    fits = []
    for _ in range(_RESAMPLES):
        drawn = [g[i] for g in groups.values() for i in random.integers(len(g), size=len(g))]
        try:
            fits.append(fit(drawn, form))
        except NoModel:  # a draw of small messages alone
            continue
    return fits


def predict(rows: Sequence[Row], of: str, network: Network | None = None) -> dict[str, Any]:
    """Steps of 8 to 1024 processes, strong and weak, from the rows of one run.

    of: what computes and communicates, for every line that the model says.
    Returns rows, the fit, and the assumptions in words.
    Raises:
        NoModel: the rows do not hold what the model is fitted to.
    """
    measured = points(rows)
    best = fit(measured)
    other = fit(measured, next(form for form in _STEPS if form != best.form))
    fits = _resampled(measured, best.form) or [best]
    steps = [row for row in rows if row.get("kind") == "step" and "median_ms" in row]
    try:
        compute = {r["batch_per_process"]: r["median_ms"] for r in steps if r["processes"] == 1}
        shared = [row for row in steps if row["processes"] > 1 and row.get("bucket_bytes")]
        batches = {
            scaling: sorted({r[batch] for r in rows if r.get("scaling") == scaling})
            for scaling, batch in (("strong", "global_batch"), ("weak", "batch_per_process"))
        }
        buckets = shared[-1]["bucket_bytes"] if shared else []
        ratios = [_exposed(row) for row in shared]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise NoModel(f"the step rows are not of the form expected: {error!r}") from error
    if not compute or not shared:
        raise NoModel(
            "the model is fitted to measured points: steps of one process and of two or more; "
            "these rows have none of the one or of the other; run with at least --processes 1 2 4"
        )
    exposed_share = float(np.median(ratios))

    def reduce_ms(link: Fit, processes: int) -> float:
        if network is None:
            return 1000 * sum(link.seconds(processes, size) for size in buckets)
        return 1000 * sum(network.seconds(link, processes, size) for size in buckets)

    said: list[Row] = []
    wanted = [(scaling, batch) for scaling, each in batches.items() for batch in each]
    for (scaling, batch), processes in itertools.product(wanted, PROCESSES):
        share, total_batch = (
            (batch // processes, batch) if scaling == "strong" else (batch, batch * processes)
        )
        about: Row = {
            "kind": "model", "model": True, "of": of, "provider": "fastres", "scaling": scaling,
            "processes": processes, "global_batch": total_batch,
        }  # fmt: skip
        if total_batch % processes:
            said.append(about | {"not_measured": f"{total_batch} images do not share out evenly"})
            continue
        about["batch_per_process"] = share
        if network and processes > network.processes_per_node:
            if processes % network.processes_per_node:
                said.append(about | {"not_measured": "the last node would not be full"})
                continue
            about["between_nodes"] = "given, not measured"
        if share not in compute or batch not in compute:
            said.append(about | {"not_measured": "one process was not timed at this batch"})
            continue
        total = reduce_ms(best, processes)
        step = compute[share] + exposed_share * total
        spread = [compute[share] + exposed_share * reduce_ms(f, processes) for f in fits]
        ideal = compute[batch] / processes if scaling == "strong" else compute[batch]
        said.append(
            about
            | {
                "step_ms": step,
                "step_low_ms": float(np.percentile(spread, 20)),
                "step_high_ms": float(np.percentile(spread, 80)),
                "step_nothing_hidden_ms": compute[share] + total,
                "step_other_form_ms": compute[share] + exposed_share * reduce_ms(other, processes),
                "compute_ms": compute[share],
                "communication_ms": total,
                "communication_share": 1 - compute[share] / step,
                "images_per_second": 1000 * share * processes / step,
                "efficiency": ideal / step,
            }
        )
    return {
        "of": of, "fit": best.as_dict(), "other_form": other.as_dict(),
        "exposed_share": exposed_share, "bucket_bytes": buckets, "rows": said,
        "assumptions": _assumptions(
            best, other, exposed_share, len(ratios), network,
            any(row.get("oversubscribed") for row in rows),
        ),
    }  # fmt: skip


def _exposed(row: Row) -> float:
    """The share of a step's all-reduces that its backward pass does not hide, 0 to 1.

    Where that is not told from nothing, it is the most that the spread of the steps leaves room
    for. What is added beyond the all-reduces' own time is the wait for a slower process.
    """
    added = row["exposed_ms"] if row["exposed_low_ms"] > 0 else row["exposed_high_ms"]
    return min(max(float(added / row["communication_ms"]), 0.0), 1.0)


def _assumptions(
    best: Fit,
    other: Fit,
    exposed_share: float,
    steps: int,
    network: Network | None,
    oversubscribed: bool,
) -> list[str]:
    found = best.as_dict()
    lines = [
        f"all-reduce as a {best.form}: {found['overhead_us']:.1f} us + "
        f"{'2 (p - 1)' if best.form == 'ring' else '2 log2(p)'} x {found['latency_us']:.2f} us + "
        f"2 (p - 1) / p x bytes / {found['bandwidth_gb_per_s']:.2f} GB/s",
        f"fitted to {best.n} measured points: model over measured off by "
        f"{best.residual_rms:.0%} rms, {best.residual_worst:.0%} at worst "
        f"(as a {other.form}: {other.residual_rms:.0%})",
        f"{exposed_share:.0%} of the all-reduces' own time adds to the step: the median of "
        f"{steps} measured steps of 2 or more processes, and no more than their spread rules out; "
        "taken to hold at every number",
        "a process computes as long as it did alone, with all that it had to itself then",
        "no stragglers, no failures, no other traffic",
    ]
    if network is None:
        lines.append("one kind of link, as measured: no slower network between nodes")
    else:
        lines.append(
            f"nodes of {network.processes_per_node}, and between them {1e6 * network.latency_s:g} "
            f"us and {network.bytes_per_s / 1e9:g} GB/s a node: given, not measured"
        )
    if best.residual_rms > _POOR_FIT:
        lines.append("a poor fit: no figure below is better than it; measure on a quieter machine")
    if oversubscribed:
        lines.append("points were measured with more processes than cores, which took turns")
    lines.append("low and high: the fit to resampled points; not the doubt in the assumptions")
    return lines


def lines(model: dict[str, Any]) -> list[str]:
    """What to print: every line says that it is a model."""
    said = [f"model of {model['of']}, not a measurement"]
    said += [f"model, fitted or assumed: {line}" for line in model["assumptions"]]
    for row in model["rows"]:
        share = row.get("batch_per_process", "-")
        head = f"model  {row['scaling']:6} {row['processes']:4} x {share:<4}"
        if "not_measured" in row:
            said.append(f"{head}: no figure, {row['not_measured']}")
            continue
        said.append(
            f"{head}: {row['step_ms']:9.3f} ms [{row['step_low_ms']:.3f}, "
            f"{row['step_high_ms']:.3f}] {row['images_per_second']:12,.0f} images/s, efficiency "
            f"{row['efficiency']:4.0%}, communication {row['communication_share']:4.0%}"
        )
    return said
