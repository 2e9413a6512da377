"""The benchmark of boosting: a unit's step and memory, and the features' way to it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_boost
import pytest
import torch
from _peak_memory import nbytes, peak_memory
from _report_figures import HEADLINES
from _sheet import Sheet
from _timing import Clock
from run_main import run_main

from fastres.boost import FeatureCache
from fastres.ops import _register

CPU = torch.device("cpu")
KINDS = [f"{end} of stage {i}" for i in (1, 2, 3) for end in ("first", "last")]


@pytest.fixture(autouse=True)
def _as_the_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_register, "INTERPRET", False)
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)  # at toy size more of them wait for each other
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    return run_main(bench_boost, "--device", "cpu", "--small", *flags)


def test_peak_memory_is_exact() -> None:
    def call() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        c = torch.empty(100)
        del b, c

    assert peak_memory(call, CPU) == 6000
    # What is given back at once counts while it is there; what stays counts to the end.
    assert peak_memory(lambda: (torch.empty(10), torch.empty(20).clone()), CPU) == 40 + 80 + 80


def test_memory_that_is_shared_counts_once() -> None:
    a = torch.empty(100)
    assert nbytes([a, a[:50], a.view(10, 10), torch.empty(5)]) == 420


def test_the_units_that_differ() -> None:
    assert list(bench_boost.kinds(20)) == [0, 2, 3, 5, 6, 8]
    assert list(bench_boost.kinds(122)) == [0, 19, 20, 39, 40, 59]
    assert list(bench_boost.kinds(20).values()) == KINDS
    assert list(bench_boost.kinds(8).values()) == [f"first of stage {i}" for i in (1, 2, 3)]


def test_a_row_for_each_unit_and_each_place(tmp_path: Path) -> None:
    out = tmp_path / "boost.json"
    done = run("--json", out, "--cache-dir", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "cache").iterdir())
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["n"] >= 3
    features = {(row["place"], row["ahead"]) for row in rows if row["provider"] == "cache"}
    assert features == {("host", False), ("disk", False), ("disk", True)}
    for row in rows[:3]:
        assert row["gb_per_s"] == pytest.approx(row["images_per_second"] * 4 * 64 * 4 / 1e9)
    steps = {row["unit"]: row for row in rows if row["provider"] != "cache"}
    assert list(steps) == ["all", *KINDS]
    # What enters a unit of width 4 at 8x8 pixels and so on, in fp32; the first reads images.
    assert [row["feature_bytes"] for row in steps.values()] == [
        0, 0, 4 * 32 * 32 * 4, 4 * 32 * 32 * 4, 8 * 16 * 16 * 4, 8 * 16 * 16 * 4, 16 * 8 * 8 * 4,
    ]  # fmt: skip
    whole = steps.pop("all")
    for row in steps.values():
        assert row["resident_bytes"] < row["peak_memory_bytes"] < whole["peak_memory_bytes"]
        assert row["resident_bytes"] < whole["resident_bytes"]
    # Weights, statistics and momentum, gradients beside them at the least.
    assert whole["peak_memory_bytes"] > 1.3 * whole["resident_bytes"]
    # Nothing is left to measure.
    again = run("--json", out, "--go-on", "--minutes", "0")
    assert again.returncode == 0 and json.loads(out.read_text())["rows"] == rows


def test_what_no_longer_fits_the_time_is_named(tmp_path: Path) -> None:
    sheet = Sheet(Clock(0.0))
    bench_boost.bench_cache(CPU, 8, True, 0.01, tmp_path, sheet)
    bench_boost.bench_steps(CPU, [{"depth": 8, "width": 4, "batch_size": 8}], 0.01, sheet)
    assert len(sheet.rows) == 3 + 4
    assert all(row["not_measured"] == "out of time" for row in sheet.rows)


def test_features_that_are_not_those_get_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch = FeatureCache._fetch
    monkeypatch.setattr(
        FeatureCache, "_fetch", lambda self, index, copies: fetch(self, index.flip(0), copies)
    )
    sheet = Sheet()
    bench_boost.bench_cache(CPU, 8, True, 0.01, tmp_path, sheet)
    failed = [(row["place"], row["ahead"]) for row in sheet.rows if "failed" in row]
    assert failed == [("disk", False), ("disk", True)]


def test_headlines_of_the_units_and_the_cache() -> None:
    timed = {"median_ms": 10.0, "low_ms": 9.0, "high_ms": 11.0, "n": 5}
    size = {"depth": 56, "batch_size": 128, "width": 16}
    rows = [{"provider": "end to end", **size, **timed, "peak_memory_bytes": 50 * 10**6}]
    rows += [
        {"provider": "unit", **size, **timed, "median_ms": ms, "peak_memory_bytes": mb * 10**6}
        for ms, mb in ((0.5, 3), (1.25, 7))
    ]
    features = {"provider": "cache", **timed, "gb_per_s": 2.0, "images_per_second": 31250.0}
    rows += [features | {"place": "disk", "ahead": ahead} for ahead in (False, True)]
    found = [h.figure(rows) for h in HEADLINES if h.benchmark == "boost"]
    assert found[0] is None and found[2] is None
    assert found[1] == (
        "0.5 to 1.25 ms of 10 and 3 to 7 MB of 50 (10 ms, 9 to 11, n = 5)"
    )  # fmt: skip
    assert str(found[3]).startswith(
        "disk, from the page cache: 2.00 GB/s, 31,250 images/s (10 ms, 9 to 11, n = 5); "
    )
    assert "cache, fetched ahead: 2.00 GB/s" in str(found[3])


@pytest.mark.gpu
def test_on_a_gpu_every_place_is_timed(tmp_path: Path) -> None:
    device, sheet = torch.device("cuda"), Sheet()
    bench_boost.bench_cache(device, 8, True, 0.01, tmp_path, sheet)
    bench_boost.bench_steps(device, [{"depth": 8, "width": 4, "batch_size": 8}], 0.01, sheet)
    assert not [row for row in sheet.rows if "failed" in row or "not_measured" in row]
    features = {(row["place"], row["ahead"]) for row in sheet.rows if row["provider"] == "cache"}
    assert features == {("device", False)} | {
        (place, ahead) for place in ("host", "disk") for ahead in (False, True)
    }
