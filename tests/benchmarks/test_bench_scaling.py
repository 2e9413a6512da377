"""The scaling benchmark at toy size: real gloo processes, one that is killed, and flags."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bench_scaling
import pytest
import torch
from _scaling_group import measure
from _scaling_worker import Part, Run
from run_main import run_main

from fastres.models import ResNet


def run(*flags: object) -> "subprocess.CompletedProcess[str]":
    with pytest.MonkeyPatch.context() as patch:
        # In the processes that it starts; they would take minutes over a step.
        patch.delenv("TRITON_INTERPRET", raising=False)
        return run_main(bench_scaling, *flags)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    out = tmp_path_factory.mktemp("scaling") / "scaling.json"
    flags = ["--device", "cpu", "--backend", "gloo", "--small", "--seconds", "0.01"]
    done = run(*flags, "--processes", "1", "2", "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout, out


def test_every_figure_is_there(saved: tuple[dict, str, Path]) -> None:
    content, said, _ = saved
    assert content["benchmark"] == "scaling" and content["cpu"] and content["date"]
    assert "says nothing about GPUs" in said.replace("\n", " ")
    rows = content["rows"]
    assert not any("failed" in row or "not_measured" in row for row in rows)
    for row in rows:
        assert row["n"] >= 5 and 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
    steps = [row for row in rows if row["kind"] == "step"]
    assert {(row["scaling"], row["processes"]) for row in steps} == {
        ("strong", 1), ("weak", 1), ("one process", 1), ("strong", 2), ("weak", 2)
    }  # fmt: skip
    for row in steps:
        assert row["global_batch"] == row["processes"] * row["batch_per_process"]
        rate = 1000 * row["global_batch"] / row["median_ms"]
        assert row["images_per_second"] == pytest.approx(rate)
    first = {row["scaling"]: row for row in steps if row["processes"] == 1}
    for row in (row for row in steps if row["processes"] == 2):
        ideal = 2 * first[row["scaling"]]["images_per_second"]
        assert row["efficiency"] == pytest.approx(row["images_per_second"] / ideal)
    sizes = [row["bytes"] for row in rows if row["kind"] == "all_reduce"]
    assert sizes == sorted(set(sizes)) and sizes[0] == 4 and sizes[-1] == 2**18


def test_communication_is_told_apart(saved: tuple[dict, str, Path]) -> None:
    shared = [row for row in saved[0]["rows"] if "exposed_ms" in row]
    assert {row["kind"] for row in shared} == {"step", "buckets"}
    assert len({(r["bucket_cap_mb"], r["static_graph"]) for r in shared}) == 3
    for row in shared:
        assert row["communication_ms"] > 0 and row["step_unreduced_ms"] > 0
        assert row["communication_share"] < 1
        # The processes of a loaded machine can hide all of it in the spread, and then say so.
        assert row["communication_share"] > 0 or "not told from the spread" in row["note"]
        # Every gradient once, in fp32.
        assert sum(row["bucket_bytes"]) == 4 * sum(p.numel() for p in ResNet(8, 4).parameters())


def main(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str, str]:
    """The program in this process, for flags that start no others: status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", *flags])
    status = bench_scaling.main()
    return (status, *capsys.readouterr())


def test_two_processes_are_too_few_for_the_model(
    saved: tuple[dict, str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    content, _, out = saved
    assert "fitted to measured points" in content["model"]["refused"]
    assert not any(row["kind"] == "model" for row in content["rows"])
    status, said, _ = main(["--model-from", str(out)], monkeypatch, capsys)
    assert status == 0 and "no model: " in said and "images/s" not in said


def test_the_model_of_a_file(
    saved: tuple[dict, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    content = json.loads(saved[2].read_text())
    # As if three processes had been timed too, and taken longer.
    more = [row for row in content["rows"] if row["kind"] == "all_reduce"]
    for i, row in enumerate(more):
        row["median_ms"] = 0.1 + 0.001 * 4 ** max(i - 4, 0)
        slower = row | {"processes": 3, "median_ms": 1.3 * row["median_ms"]}
        content["rows"].append(slower)
    source, out = tmp_path / "three.json", tmp_path / "model.json"
    source.write_text(json.dumps(content))
    flags = ["--inter-node-latency", "5", "--inter-node-bandwidth", "25", "--json", str(out)]
    status, text, _ = main(["--model-from", str(source), *flags], monkeypatch, capsys)
    assert status == 0
    about, *said = text.splitlines()
    assert about.startswith("measured ") and all(line.startswith("model") for line in said)
    assert "of gloo on one CPU host, not a measurement" in said[0]
    found = json.loads(out.read_text())
    assert found["measured_on"]["date"] == content["date"]
    assert all(row["model"] is True for row in found["rows"])
    assert {row["processes"] for row in found["rows"] if "step_ms" in row} >= {8, 1024}


def test_a_process_that_is_killed_costs_its_part_alone() -> None:
    sizes = (4, 64, 1024)
    parts = [Part(({"kind": "all_reduce", "processes": 2, "bytes": size},)) for size in sizes]

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while len(multiprocessing.active_children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        last = max(multiprocessing.active_children(), key=lambda child: child.pid or 0)
        assert last.pid
        os.kill(last.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    rows = measure(Run("cpu", "gloo", {}, seconds=0.01, timeout=120), 2, parts)
    killer.join()
    assert [row["bytes"] for row in rows] == list(sizes)
    assert "SIGKILL" in rows[0]["failed"] and "median_ms" not in rows[0]
    assert all(row["median_ms"] > 0 for row in rows[1:])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "form None"),
        ('{"format": 1}', "form 1, and form"),
        ("not JSON", "not readable as JSON"),
        (
            '{"format": 2, "benchmark": "bench_cast", "date": "", "torch": "", "cpu": "",'
            '"rows": []}',
            "results of bench_cast",
        ),
    ],
)
def test_a_file_of_another_form(
    content: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "other.json"
    path.write_text(content)
    assert refused(["--model-from", str(path)], monkeypatch, capsys).count(words) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cpu", "--backend", "nccl"], "--backend nccl: works on GPUs"),
        (["--device", "cpu", "--processes", "0"], "--processes 0: expected 1 or more"),
        (["--device", "cpu", "--batch-size", "-1"], "--batch-size -1: expected 1 or more"),
        (["--device", "cpu", "--depth", "21"], "--depth 21: expected 6n + 2"),
        (["--device", "cpu", "--seconds", "nan"], "--seconds nan: expected more than 0"),
        (["--inter-node-latency", "5"], "expected both, in us and GB/s"),
    ],
)
def test_flags_that_cannot_be(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert words in refused(flags, monkeypatch, capsys)


def refused(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> str:
    """The one line that the program says to these flags."""
    status, said, error = main(flags, monkeypatch, capsys)
    assert status == 2 and said == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.gpu
def test_more_processes_than_gpus_and_nccl(tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    done = run("--small", "--processes", str(gpus + 1))
    assert done.returncode == 2 and f"more than the {gpus} GPU(s)" in done.stderr
    out = tmp_path / "scaling.json"
    done = run("--small", "--seconds", "0.05", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    if gpus == 1:
        assert any("needs 2 GPUs" in row.get("not_measured", "") for row in rows)
    else:
        assert any(row["kind"] == "all_reduce" and row["bus_gb_per_s"] > 0 for row in rows)
    assert any(row["kind"] == "step" and row["images_per_second"] > 0 for row in rows)
