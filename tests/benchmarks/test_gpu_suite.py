"""The suite goes on where it stopped, and what is finished is never lost."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import torch
from _results import Row, results
from _timing import Clock
from gpu_suite import Part, measure_all, parts
from run_main import run_main

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu_suite.py"
# A part's program: it writes its file, and notes that it ran. PyTorch would take it seconds.
GOOD = """
import json, sys
from pathlib import Path
path = Path(sys.argv[sys.argv.index("--json") + 1])
path.parent.mkdir(exist_ok=True)
path.write_text(json.dumps({head} | {{"benchmark": path.stem, "small": "--small" in sys.argv}}))
with open({log!r}, "a") as log:
    log.write(path.stem + "\\n")
"""


class Programs:
    """Stand-ins for the benchmarks, and what of them has run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.out = folder, folder / "log", folder / "out"

    def good(self, name: str, *rows: Row) -> Part:
        head = results(name, finished=True, rows=rows)
        return self.program(name, GOOD.format(head=head, log=str(self.log)))

    def program(self, name: str, text: str, seconds: float = 30) -> Part:
        (self.folder / f"{name}.py").write_text(text)
        return Part(f"{name}.py", seconds)

    def ran(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def suite(self, every: dict[str, Part], only: list[str] | None = None, **how: Any) -> int:
        return measure_all(every, only, self.out, True, False, how.get("clock", Clock()))

    def rows(self) -> dict[str, Any]:
        return {r["part"]: r for r in json.loads((self.out / "suite.json").read_text())["rows"]}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    monkeypatch.setattr(gpu_suite, "_HERE", tmp_path)
    return Programs(tmp_path)


def test_a_part_that_fails_costs_no_other(
    programs: Programs, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = programs.program("broken", "raise SystemExit('no such thing')")
    every = {"a": programs.good("a"), "broken": broken, "b": programs.good("b")}
    assert programs.suite(every) == 1
    assert programs.ran() == ["a", "b"]
    assert programs.rows()["broken"]["failed"] == "exit status 1"
    assert "failed: broken: exit status 1: no such thing" in capfd.readouterr().err


def test_finished_parts_are_kept_and_the_rest_goes_on(programs: Programs) -> None:
    left: Row = {"provider": "x", "not_measured": "out of time"}
    every = {"a": programs.good("a"), "late": programs.good("late", left), "b": programs.good("b")}
    assert programs.suite(every, clock=Clock(minutes=0)) == 0
    assert programs.ran() == [] and programs.rows()["a"]["not_measured"] == "out of time"
    programs.suite(every)
    programs.suite(every)
    assert programs.ran() == ["a", "late", "b", "late"]
    programs.suite(every, only=["late", "b"])
    assert programs.ran()[4:] == ["late"]
    assert set(programs.rows()) == {"a", "late", "b"}


def test_what_failed_or_was_cut_off_is_run_again_and_full_is_another_size(
    programs: Programs,
) -> None:
    every = {"bad": programs.good("bad", {"provider": "x", "failed": "wrong result"})}
    every["a"] = Part(programs.good("a").program, 30, [], ["--sweep"])
    programs.suite(every)
    programs.suite(every)
    assert programs.ran() == ["bad", "a", "bad"]
    assert measure_all(every, ["a"], programs.out, True, True, Clock()) == 0
    assert programs.ran()[3:] == ["a-full"]
    content = json.loads((programs.out / "a.json").read_text())
    (programs.out / "a.json").write_text(json.dumps(content | {"finished": False}))
    programs.suite(every, only=["a"])
    assert programs.ran()[4:] == ["a"]


def test_a_file_of_another_version_or_torn_is_measured_again(
    programs: Programs, capfd: pytest.CaptureFixture[str]
) -> None:
    every = {"a": programs.good("a"), "b": programs.good("b")}
    programs.out.mkdir()
    (programs.out / "a.json").write_text('{"format": 1}')
    (programs.out / "b.json").write_text("{")
    assert programs.suite(every) == 0 and programs.ran() == ["a", "b"]
    said = capfd.readouterr().out
    assert "a.json: has results of form 1" in said and "b.json: not readable" in said


def test_a_part_that_hangs_is_ended_with_its_children(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "_GRACE", 2.0)
    hanging = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(programs.folder / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    every = {"hanging": programs.program("hanging", hanging, seconds=3), "a": programs.good("a")}
    start = time.monotonic()
    assert programs.suite(every) == 1
    assert time.monotonic() - start < 60 and programs.ran() == ["a"]
    assert programs.rows()["hanging"]["failed"] == "took too long"
    pid = int((programs.folder / "pid").read_text())
    status = Path(f"/proc/{pid}/status")
    # Ended, or waiting for its new parent to notice.
    assert not status.exists() or "zombie" in status.read_text()


def test_killed_in_the_middle_it_has_what_was_finished(tmp_path: Path) -> None:
    """The real suite, killed as soon as its first part is done."""
    command = [sys.executable, str(PROGRAM), "--small", "--out", str(tmp_path)]
    command += ["--part", "yellowfin", "scaling"]  # neither compiles
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / "yellowfin.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = json.loads((tmp_path / "yellowfin.json").read_text())
    assert content["benchmark"] == "yellowfin" and content["rows"]
    for key in ("date", "cpu", "python", "torch", "triton", "fastres", "gpu", "cuda", "command"):
        assert key in content


def test_every_part_is_a_program_that_takes_the_suites_flags() -> None:
    shared = (ROOT / "benchmarks" / "_comparison.py").read_text()
    shared += (ROOT / "benchmarks" / "_program.py").read_text()
    for name, part in parts(Path("images")).items():
        text = (ROOT / "benchmarks" / part.program).read_text()
        assert "parser(__doc__" in text or "run_program(__doc__" in text, name
        for flag in ["--json", "--small", "--minutes", "--go-on", *part.usual, *part.full]:
            given = flag.partition("=")[0]
            assert not flag.startswith("--") or f'"{given}"' in text + shared, (name, flag)


def test_an_unknown_part_is_named() -> None:
    done = run_main(gpu_suite, "--small", "--part", "keras")
    assert done.returncode == 2 and "--part keras" in done.stderr and "cast" in done.stderr


def test_without_a_gpu_the_full_suite_refuses() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_main(gpu_suite)
    assert done.returncode == 1 and "no GPU here" in done.stderr
