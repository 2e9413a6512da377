"""The form of a file of results: written whole, refused in words, failures told."""

import json
import os
import sys
from pathlib import Path

import _results
import pytest
import torch
from _program import finish, parser
from _results import (
    FORMAT,
    ResultsError,
    WrongResult,
    failures,
    load,
    measured,
    results,
    save,
)


def test_what_is_saved_is_loaded_with_what_it_ran_on(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    rows = [{"provider": "fastres", "median_ms": 1.0, "n": 3}]
    save(path, results("op", small=True, rows=rows))
    found = load(path)
    assert found["rows"] == rows and found["small"] is True and found["benchmark"] == "op"
    assert found["format"] == FORMAT and found["torch"] == torch.__version__
    assert os.stat(path).st_mode & 0o777 == 0o644


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    save(path, {"old": 1})
    with pytest.raises(TypeError):
        save(path, {"of no JSON": object()})
    assert json.loads(path.read_text()) == {"old": 1}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_results.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 1, "rows": []}', "form 1, and form 2 is read here; measure it again"),
        ('{"rows": []}', "form None"),
        ("[1, 2]", "form None"),
        ("{", "not readable as JSON"),
        ('{"format": 2, "benchmark": "op"}', "lacks cpu, date, torch"),
    ],
)
def test_a_file_of_another_form_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=f"other.json: .*{words}"):
        load(path)


def test_a_missing_file_and_one_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="not readable"):
        load(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="not readable"):
        load(tmp_path / "bytes.json")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), {"not_measured": "out of memory"}),
        (MemoryError(), {"not_measured": "out of memory"}),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
            {"not_measured": "out of memory"},
        ),
        (WrongResult(), {"failed": "wrong result"}),
        (ValueError("first line\nsecond"), {"failed": "ValueError: first line"}),
        (ValueError(), {"failed": "ValueError: "}),
    ],
)
def test_what_cannot_be_measured_is_said_in_its_row(error: Exception, why: dict) -> None:
    def measure() -> dict:
        raise error

    assert measured({"provider": "eager"}, measure) == {"provider": "eager"} | why


def test_a_run_that_is_stopped_stops() -> None:
    def measure() -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured({}, measure)


def test_failures_are_of_one_provider_or_of_all() -> None:
    rows = [
        {"provider": "fastres", "N": 1, "failed": "wrong result"},
        {"provider": "eager", "N": 2, "failed": "ValueError: x"},
        {"provider": "fastres", "N": 3, "not_measured": "out of memory"},
        {"provider": "fastres", "N": 4, "median_ms": 1.0},
    ]
    assert failures(rows) == [
        "provider=fastres N=1 failed=wrong result",
        "provider=eager N=2 failed=ValueError: x",
    ]
    assert failures(rows, "fastres") == ["provider=fastres N=1 failed=wrong result"]


def test_the_exit_status_tells_of_a_failed_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parser("What it does.").parse_args(["--json", str(tmp_path / "out.json")])
    assert finish("op", args, {"rows": [{"N": 1, "not_measured": "out of time"}]}) == 0
    assert finish("op", args, {"rows": [{"N": 1, "failed": "wrong result"}]}) == 1
    assert "failed: N=1" in capsys.readouterr().err
    assert load(tmp_path / "out.json")["rows"][0]["failed"] == "wrong result"


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda"])
def test_a_device_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="2"):
        parser("What it does.").parse_args(["--device", device])
    error = capsys.readouterr().err
    assert ("no GPU here" if device == "cuda" else "expected cpu or cuda") in error


def test_a_command_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one among flags that are handed on together."""
    flags = ["--folder", "/home/me/images", "--table=--rows a --out /var/x/runs", "--json", "a/b"]
    monkeypatch.setattr(sys, "argv", ["/opt/benchmarks/bench.py", *flags])
    command = results("x")["command"]
    assert command == (
        "python benchmarks/bench.py --folder images '--table=--rows a --out runs' --json a/b"
    )
