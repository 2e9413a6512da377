"""The model of many processes: what it finds in points, and when it says nothing."""

from typing import Any

import numpy as np
import pytest
from _scaling_model import PROCESSES, Network, NoModel, Row, fit, lines, points, predict

SIZES = [4**i for i in range(1, 15)]
LATENCY, PER_BYTE, OVERHEAD = 4e-6, 1 / 200e9, 9e-6


def all_reduces(
    counts: tuple[int, ...] = (2, 4, 8), form: str = "ring", noise: float = 0.05
) -> list[Row]:
    """Points of a known link, each off by a few percent."""
    random = np.random.default_rng(1)
    rows: list[Row] = []
    for p in counts:
        for size in SIZES:
            steps = 2 * (p - 1) if form == "ring" else 2 * np.log2(p)
            seconds = OVERHEAD + steps * LATENCY + 2 * (p - 1) / p * size * PER_BYTE
            seconds *= 1 + noise * random.uniform(-1, 1)
            rows.append(
                {"kind": "all_reduce", "processes": p, "bytes": size, "median_ms": 1000 * seconds}
            )
    return rows


def steps(exposed: tuple[float, float, float] = (0.04, 0.05, 0.06)) -> list[Row]:
    """Steps of one process at each share of 1024 images, and of two and four.

    exposed: milliseconds that 0.1 ms of all-reduces add: low, median, high.
    """
    rows: list[Row] = []
    for share in (1024, *(1024 // p for p in PROCESSES)):
        row = {"kind": "step", "processes": 1, "batch_per_process": share}
        row |= {"global_batch": share, "median_ms": 1.0 + share / 100}
        rows.append(row | {"scaling": "strong" if share == 1024 else "one process"})
    rows.append(rows[0] | {"scaling": "weak"})
    for p in (2, 4):
        row = {"kind": "step", "scaling": "weak", "processes": p, "batch_per_process": 1024}
        row |= {"global_batch": 1024 * p, "median_ms": 12.0, "bucket_bytes": [2**20, 2**16]}
        low, median, high = exposed
        row |= {"exposed_low_ms": low, "exposed_ms": median, "exposed_high_ms": high}
        rows.append(row | {"communication_ms": 0.1})
    return rows


@pytest.mark.parametrize("form", ["ring", "tree"])
def test_the_fit_finds_the_link(form: str) -> None:
    found = fit(points(all_reduces(form=form)))
    assert found.form == form
    # Points off by up to 5 %, 14 to a count: each coefficient is found to well within a fifth.
    assert found.latency_s == pytest.approx(LATENCY, rel=0.2)
    assert found.overhead_s == pytest.approx(OVERHEAD, rel=0.2)
    assert found.seconds_per_byte == pytest.approx(PER_BYTE, rel=0.2)
    assert 0 < found.residual_rms <= found.residual_worst < 0.1
    assert found.n == 3 * len(SIZES)


def test_no_coefficient_is_below_zero() -> None:
    rows = all_reduces(noise=0.0)
    for row in rows:  # as if more processes were faster
        row["median_ms"] /= row["processes"]
    found = fit(points(rows))
    assert min(found.overhead_s, found.latency_s, found.seconds_per_byte) >= 0
    assert found.residual_rms > 0.1  # and the fit says how badly that fits


def test_an_all_reduce_grows_with_processes_and_bytes() -> None:
    found = fit(points(all_reduces()))
    times = [[found.seconds(p, size) for size in SIZES] for p in (1, 2, *PROCESSES)]
    assert (np.diff(times, axis=0) > 0).all() and (np.diff(times[1:], axis=1) > 0).all()
    assert times[0] == [0.0] * len(SIZES)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "fitted to measured points"),
        (all_reduces((2,)), "--processes 1 2 4"),
        (all_reduces((1, 2)), "--processes 1 2 4"),
        ([r for r in all_reduces() if r["bytes"] < 20], "3 or more sizes"),
        ([r | {"median_ms": float("nan")} for r in all_reduces()], "expected a positive time"),
        ([r | {"median_ms": float("inf")} for r in all_reduces()], "expected a positive time"),
        ([r | {"median_ms": 0.0} for r in all_reduces()], "expected a positive time"),
        ([r | {"median_ms": None} for r in all_reduces()], "not of the form"),
        ([r | {"median_ms": 1.0 / r["bytes"]} for r in all_reduces()], "tell no bandwidth"),
        (all_reduces(), "steps of one process and of two or more"),
    ],
)
def test_it_says_nothing_without_points(rows: list[Row], words: str) -> None:
    given = rows if "steps of one" in words else rows + steps()
    with pytest.raises(NoModel, match=words):
        predict(given, "GPUs")


def test_what_failed_is_no_point() -> None:
    rows = all_reduces()
    lost = [{k: v for k, v in r.items() if k != "median_ms"} | {"failed": "x"} for r in rows]
    assert points(rows + lost) == points(rows)


def model(**how: Any) -> dict[str, Any]:
    return predict(all_reduces() + steps(), "toy processes", **how)


def test_every_row_and_line_says_that_it_is_a_model() -> None:
    found = model()
    assert len(found["rows"]) == 2 * len(PROCESSES)
    for row in found["rows"]:
        assert row["kind"] == "model" and row["model"] is True and row["of"] == "toy processes"
        assert "median_ms" not in row  # whoever looks for measurements finds none
    said = lines(found)
    assert len(said) == 1 + len(found["assumptions"]) + len(found["rows"])
    assert all(line.startswith("model") for line in said)
    assert "GPU" not in "\n".join(said)
    words = "\n".join(found["assumptions"])
    for word in ("42 measured points", "one kind of link", "no stragglers", "50%", "tree:"):
        assert word in words


def test_doubts_are_said() -> None:
    assert not any("poor fit" in line or "took turns" in line for line in model()["assumptions"])
    rows = [row | {"oversubscribed": True} for row in all_reduces(noise=0.9)]
    words = "\n".join(predict(rows + steps(), "toy processes")["assumptions"])
    assert "poor fit" in words and "took turns" in words


def test_steps_add_up() -> None:
    rows = model()["rows"]
    link = fit(points(all_reduces()))
    for row in rows:
        wanted = 1000 * sum(link.seconds(row["processes"], size) for size in (2**20, 2**16))
        assert row["communication_ms"] == pytest.approx(wanted)
        # Half of the measured all-reduces added to the step.
        assert row["step_ms"] == pytest.approx(row["compute_ms"] + 0.5 * wanted)
        assert row["step_low_ms"] <= row["step_high_ms"] < row["step_nothing_hidden_ms"]
        assert 0 < row["efficiency"] <= 1 and 0 < row["communication_share"] < 1
    for scaling in ("strong", "weak"):
        of = [row for row in rows if row["scaling"] == scaling]
        assert [row["processes"] for row in of] == list(PROCESSES)
        assert (np.diff([row["efficiency"] for row in of]) < 0).all()
        each = [row["global_batch"] / row["batch_per_process"] for row in of]
        assert each == list(PROCESSES)


@pytest.mark.parametrize(
    ("exposed", "share"),
    [
        ((0.02, 0.03, 0.05), 0.3),
        ((-0.01, 0.005, 0.02), 0.2),  # not told from nothing: as much as there is room for
        ((-0.03, -0.02, -0.01), 0.0),
        ((-50.0, -20.0, 30.0), 1.0),
        ((0.4, 0.5, 0.6), 1.0),  # a wait for the slower process
    ],
)
def test_what_is_hidden_is_read_with_care(
    exposed: tuple[float, float, float], share: float
) -> None:
    found = predict(all_reduces() + steps(exposed), "GPUs")
    assert found["exposed_share"] == pytest.approx(share)


def test_batches_that_one_process_was_not_timed_at_get_no_figure() -> None:
    rows = [r for r in steps() if r["batch_per_process"] != 1]
    found = predict(all_reduces() + rows, "GPUs")["rows"]
    last = [r for r in found if r["scaling"] == "strong" and r["processes"] == 1024]
    assert "step_ms" not in last[0] and "not timed" in last[0]["not_measured"]
    rows = [r | {"global_batch": 1000} if r["scaling"] == "strong" else r for r in steps()]
    found = predict(all_reduces() + rows, "GPUs")["rows"]
    uneven = [r for r in found if r["scaling"] == "strong" and r["processes"] == 16]
    assert "do not share out" in uneven[0]["not_measured"]


def test_a_network_between_nodes_is_given_and_said_to_be() -> None:
    alone, joined = model(), model(network=Network(8, 20e-6, 25e9))
    assert any("given, not measured" in line for line in joined["assumptions"])
    for a, b in zip(alone["rows"], joined["rows"], strict=True):
        if a["processes"] == 8:  # one node
            assert a["step_ms"] == b["step_ms"] and "between_nodes" not in b
        else:
            assert b["between_nodes"] == "given, not measured"
    slow = model(network=Network(8, 20e-6, 1e9))
    for a, b in zip(joined["rows"], slow["rows"], strict=True):
        assert b["step_ms"] > a["step_ms"] or a["processes"] == 8
    odd = model(network=Network(3, 20e-6, 25e9))["rows"]
    assert all("last node" in row["not_measured"] for row in odd)
