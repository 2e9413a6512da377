"""benchmarks/profile_step.py as a person runs it, on a CPU."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import _results
import profile_step
import profiling
import pytest
import torch
from nvtx_log import NvtxLog
from run_main import run_main

from fastres.ops import _register

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_register, "INTERPRET", False)
    for name in profiling._LISTENERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "nvtx", NvtxLog())
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--device", "cpu", *flags])
    return profile_step.main()


@pytest.mark.parametrize("provider", ["fused", "eager"])
def test_a_trace_and_a_table(
    provider: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "figures.json"
    flags = ["--small", "--provider", provider, "--out", str(tmp_path), "--json", str(path)]
    assert run(monkeypatch, *flags) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert all("ph" in event and "name" in event for event in events)
    marked = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert {"step", "data", "forward", "stage2", "loss", "backward", "optimizer"} <= marked
    assert "batch_norm_relu" in marked
    figures = _results.load(path)
    assert figures["recorded_by"] == "torch.profiler" and figures["small"] is True
    assert (
        figures["step"]["n"] == 2 and {"forward", "forward/stage1"} <= figures["phases_ms"].keys()
    )
    rows = {row["kernel"]: row for row in figures["rows"]}
    shares = [row["share"] for row in figures["rows"]]
    assert shares == sorted(shares, reverse=True) and 0.5 < sum(shares) < 1.5
    for row in figures["rows"]:
        assert row["provider"].startswith(provider) and row["batch_size"] == 16
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["n"] == 2
    # The forward of nine convolutions: every one reads x and weight and writes y.
    conv = rows["aten::convolution"]
    assert conv["calls"] == 9 and conv["gb_per_s"] > 0
    pixels, width = 16 * 32 * 32, 4
    assert conv["bytes"] > 4 * pixels * (3 + width) + 4 * 4 * pixels * width
    said = capsys.readouterr().out
    assert "share" in said and "trace.json" in said


def test_under_nsys_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    path = tmp_path / "figures.json"
    assert run(monkeypatch, "--small", "--out", str(tmp_path), "--json", str(path)) == 0
    assert "marked for nsys: no trace here" in capsys.readouterr().out
    assert not (tmp_path / "trace.json").exists()
    assert _results.load(path)["recorded_by"] == "nsys"


def test_memory_that_runs_out_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(profile_step.Step, "__call__", runs_out)
    path = tmp_path / "figures.json"
    assert run(monkeypatch, "--small", "--out", str(tmp_path), "--json", str(path)) == 0
    (row,) = _results.load(path)["rows"]
    assert row["not_measured"] == "out of memory" and row["batch_size"] == 16


def test_as_a_program_its_help_holds_the_commands() -> None:
    done = run_main(profile_step, "--help")
    for words in (
        "--capture-range=cudaProfilerApi --capture-range-end=stop",
        '--nvtx-include "fastres@forward/',
        "--clock-control none",
    ):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--depth", "9"], "--depth 9: expected 6n + 2"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--out", "file"], "--out file: cannot be written"),
    ],
)
def test_what_does_not_fit(
    flags: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert run(monkeypatch, "--small", *flags) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_without_nvtx_or_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--small", "--device", "cuda")
    assert "--device: cuda: no GPU here" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nvtx", None)
    assert run(monkeypatch, "--small") == 1
    assert 'pip install "fastres[profile]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
