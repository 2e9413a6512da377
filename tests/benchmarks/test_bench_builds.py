"""The build of a step's kernels: rows, threads, and a build that fails."""

import json
from pathlib import Path

import bench_builds
import pytest
from _report_figures import HEADLINES
from run_main import run_main


def test_rows_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([3.0, 2.0, 7.0])
    monkeypatch.setattr(
        bench_builds, "_apart", lambda about: {"seconds": next(seconds), "binaries": 34}
    )
    about = {"target": "sm_90", "dtype": "fp16", "depth": 20, "batch_size": 128, "threads": 2}
    rows = bench_builds.bench([about], 3)["rows"]
    assert rows[0] | about == rows[0] and rows[0]["binaries"] == 34
    assert [rows[0][key] for key in ("median_ms", "low_ms", "high_ms", "n")] == [
        3000, pytest.approx(2000, rel=0.2), pytest.approx(7000, rel=0.2), 3,
    ]  # fmt: skip
    assert bench_builds.table(rows).splitlines()[1].split()[:6] == [
        "sm_90", "fp16", "20", "2", "34", "3.0",
    ]  # fmt: skip
    (headline,) = [headline for headline in HEADLINES if headline.benchmark == "builds"]
    assert (headline.figure(rows) or "").startswith("sm_90, fp16: 34 binaries in 3.0 s")


def test_a_build_that_fails_is_a_row(tmp_path: Path) -> None:
    """In earnest: no step has a batch of no images, and the process says so."""
    out = tmp_path / "builds.json"
    done = run_main(bench_builds, "--small", "--batch-size", "0", "--json", out)
    assert done.returncode == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert "failed" in row and "median_ms" not in row
