"""The suite's own run of pytest: what it keeps of one that ends, and of one that is interrupted."""

import sys
from pathlib import Path

import pytest
from _sheet import Sheet
from _timing import Clock
from gpu_tests import bench, run_tests

TESTS = """
import time

def test_right():
    pass

def test_wrong():
    assert False, "off by one"

def test_slow():
    time.sleep({seconds})
"""


def command(folder: Path, seconds: float) -> list[str]:
    file = folder / "test_given.py"
    file.write_text(TESTS.format(seconds=seconds))
    # Without this project's own conftest, which takes seconds to import.
    return [sys.executable, "-m", "pytest", "-v", "-rfEs", "-c", "/dev/null", str(file)]


def test_counts_and_names_what_failed(tmp_path: Path) -> None:
    row = run_tests(command(tmp_path, 0), (0,), 60)
    assert (row["passed_tests"], row["failed_tests"], row["skipped_tests"]) == (2, 1, 0)
    assert row["failed"].startswith("exit status 1: ") and "1 failed" in row["failed"]
    assert any("FAILED" in line and "test_wrong" in line for line in row["output"])


def test_an_interrupted_run_names_what_had_failed(tmp_path: Path) -> None:
    row = run_tests(command(tmp_path, 300), (0,), 5)
    assert row["not_measured"] == "out of time" and "failed" not in row
    assert any("FAILED" in line and "test_wrong" in line for line in row["output"])


def test_what_passed_before_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"tests": name, "only_collected": True, "passed_tests": 1} for name in ("gpu", "ops")]
    found = bench(True, Sheet(Clock(0.0), earlier=rows))["rows"]
    assert found[:2] == rows
    assert found[2] == {"tests": "huge", "only_collected": True, "not_measured": "out of time"}
