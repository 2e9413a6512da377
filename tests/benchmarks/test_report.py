"""README's figures come from files of results, and from nowhere else."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report
from _report_figures import _bandwidth, _units
from _results import FORMAT, save
from run_main import run_main

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "report.py"
README = (
    "# before\n<!-- figures: written by python benchmarks/report.py --write -->\nstale words\n"
    "<!-- end of figures -->\nafter\n"
)
HEAD: dict[str, Any] = {
    "format": FORMAT, "date": "2030-01-02T03:04:05+00:00", "gpu": None, "cpu": "Abacus, 2 cores",
    "threads": 2, "python": "3.11", "torch": "9.9", "triton": "8.8", "cuda": None, "small": False,
    "command": "python benchmarks/bench.py",
}  # fmt: skip


def timed(provider: str, ms: float, batch_size: int = 128) -> dict[str, Any]:
    return {
        "provider": provider, "batch_size": batch_size, "depth": 20, "width": 16, "n": 7,
        "median_ms": ms, "low_ms": 0.9 * ms, "high_ms": 1.1 * ms, "precision": "fp16",
        "images_per_second": 1000 * batch_size / ms, "flops": 10**9, "bytes": 10**8,
    }  # fmt: skip


def step(**head: Any) -> dict[str, Any]:
    rows = [timed("eager fp32 NCHW", 30.0), timed("compile", 10.0), timed("fused", 4.0)]
    rows += [timed(name, ms * b / 128, b) for name, ms in (("fused", 4.0),) for b in (256, 512)]
    rows.append({"provider": "fused", "batch_size": 9999, "not_measured": "out of memory"})
    roof = {"copy_gb_per_s": 4000.0, "tflops": {"fp16": 700.0}}
    grown = {
        "provider": "fused", "axis": "batch_size", "depth": 20, "width": 16, "points": 3,
        "exponent": 1.0, "sizes": [128, 256, 512],
    }  # fmt: skip
    return HEAD | {"benchmark": "step", "rows": rows, "ceilings": roof, "growth": [grown]} | head


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_main(report, "--results", folder, *flags)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    save(folder / "step.json", step())
    return folder


def test_a_figure_stands_beside_its_peers_with_n_and_hardware(results: Path) -> None:
    said = run(results).stdout
    line = next(line for line in said.splitlines() if "whole step, depth 20, batch 128 |" in line)
    assert "32,000 images/s (fused; 4 ms, 3.6 to 4.4, n = 7), 2.50 × the best peer" in line
    assert "(compile; 10 ms, 9 to 11, n = 7), 7.50 × eager fp32 NCHW [1]" in line
    assert "[1] Abacus, 2 cores, 2 threads; python 3.11, torch 9.9, triton 8.8; 2030-01-02" in said
    assert "| not measured yet |" in line  # on a GPU
    assert "batch 1024 | not measured yet | not measured yet |" in said


def test_the_newest_file_of_each_hardware_counts_and_toys_do_not(results: Path) -> None:
    gpu = {"name": "H1000"}
    faster = step(gpu=gpu, rows=[timed("eager fp32 NCHW", 3.0), timed("fused", 1.0)])
    save(results / "deep" / "gpu.json", faster)
    save(results / "old.json", step(date="2029-01-01T00:00:00+00:00", rows=[timed("fused", 9.0)]))
    save(results / "toy.json", step(date="2031-01-01T00:00:00+00:00", rows=[], small=True))
    line = next(line for line in run(results).stdout.splitlines() if "batch 128 |" in line)
    gpu_cell, cpu_cell = line.split("|")[2:4]
    assert gpu_cell.startswith(" 128,000 images/s") and cpu_cell.startswith(" 32,000 images/s")


def test_write_then_check(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    where = ("--readme", str(readme))
    stale = run(results, "--check", *where)
    assert stale.returncode == 1 and "report.py --write" in stale.stderr
    assert run(results, "--write", *where).returncode == 0
    text = readme.read_text()
    assert text.startswith("# before\n") and text.endswith("after\n") and "stale words" not in text
    assert "32,000 images/s" in text
    assert "| 9,999 |" in (results / "README.md").read_text()
    assert "out of memory" in (results / "README.md").read_text()
    plots = {p.name for p in (results / "plots").iterdir()}
    assert plots == {f"{kind}-abacus-2-cores.svg" for kind in ("step", "roofline", "growth")}
    assert all(name in text for name in plots)
    assert run(results, "--check", *where).returncode == 0
    again = {p.name: p.read_bytes() for p in (results / "plots").iterdir()}
    run(results, "--write", *where)
    assert {p.name: p.read_bytes() for p in (results / "plots").iterdir()} == again


def test_a_bad_file_is_named_and_costs_no_other(results: Path) -> None:
    (results / "torn.json").write_text('{"format": 2, "rows": [')
    save(results / "past.json", step(format=1))
    save(results / "bare.json", {"format": FORMAT, "benchmark": "step"})
    done = run(results)
    assert done.returncode == 0 and "32,000 images/s" in done.stdout
    lines = done.stderr.splitlines()
    for name, words in (("torn", "not readable"), ("past", "form 1"), ("bare", "lacks")):
        assert any(f"{name}.json" in line and words in line for line in lines), lines
    assert "Traceback" not in done.stderr


def test_rows_that_are_not_what_they_should_be_cost_their_own_figures(results: Path) -> None:
    rows = [timed(name, 1.0) for name in ("eager", "fused")]
    for row in rows:
        del row["median_ms"]
    save(results / "odd.json", step(gpu={"name": "H1000"}, rows=rows))
    done = run(results)
    assert done.returncode == 0 and "32,000 images/s" in done.stdout
    assert "left out: odd.json: KeyError('median_ms')" in done.stderr
    readme = results / "TEXT.md"
    readme.write_text(README)
    assert run(results, "--write", "--readme", str(readme)).returncode == 0
    assert "32,000 images/s" in readme.read_text()


def test_a_peer_without_a_figure_is_named(results: Path) -> None:
    late = timed("compile", 1.0) | {"not_measured": "out of time"}
    del late["images_per_second"], late["median_ms"]
    save(results / "step.json", step(rows=[timed("eager", 9.0), timed("fused", 3.0), late]))
    assert "; without compile (out of time) [1]" in run(results).stdout


def test_a_cold_start_names_what_is_missing_and_a_file_that_is_not_finished(results: Path) -> None:
    late = {"provider": "fused compile", "batch_size": 128, "depth": 20, "width": 16}
    rows = [timed("fused", 4000.0), late | {"not_measured": "out of time"}]
    save(results / "cold.json", step(benchmark="step_cold", rows=rows, finished=False))
    said = run(results).stdout
    assert (
        "fused 4.0 s (3.6 to 4.4, n = 7); without fused compile (out of time), unfinished" in said
    )


def unit(provider: str, direction: str, ms: float, **case: Any) -> dict[str, Any]:
    """A row of an op's benchmark."""
    row = {"provider": provider, "pass": direction, "timer": "events, cold L2", "dtype": "fp16"}
    times = {"median_ms": ms, "low_ms": ms, "high_ms": ms, "n": 3}
    return row | times | {"N": 1024, "C": 16, "stride": 1} | case


def test_a_unit_is_compared_where_both_directions_are_timed() -> None:
    """Half of ours is not faster than the whole of a peer's."""
    both = [
        unit(name, direction, ms)
        for name, ms in (("fastres", 1.0), ("compile", 2.0), ("eager", 9.0))
        for direction in ("forward", "backward")
    ]
    assert _units(both) == "C = 16: 2.00 × compile (2 ms)"
    assert _units(both[:1] + both[2:]) is None
    late = {"provider": "compile max-autotune", "N": 1024, "C": 16, "stride": 1, "dtype": "fp16"}
    late |= {"not_measured": "left out"}
    found = _units([*both[:3], *both[4:], late])
    assert found == "C = 16: 9.00 × eager (2 ms); without compile max-autotune (left out)"


def test_the_largest_case_is_named_and_its_first_layout_stands() -> None:
    """Both layouts move the same bytes; the product of rate and time has them in its last digit."""
    rows: list[dict[str, Any]] = []
    for layout, ours in (("NHWC", 1.0), ("NCHW", 3.0)):
        for name, ms in (("fastres", ours), ("eager", 6.0)):
            row = unit(name, "forward", ms, H=8, layout=layout, residual=True, share_of_copy=0.5)
            rows.append(row | {"gb_per_s": 0.1 * (1 + 1e-15 * len(rows)) / ms})
    found = _bandwidth(rows)
    assert found is not None and "1024×16×8×8 fp16 NHWC with residual: " in found
    assert "6.00 × the best peer (eager; " in found


def test_what_is_not_there_is_said_in_words(tmp_path: Path) -> None:
    missing = run(tmp_path / "nowhere")
    assert missing.returncode == 1 and "no such folder" in missing.stderr
    (tmp_path / "README.md").write_text("no marks")
    marks = run(tmp_path, "--write", "--readme", str(tmp_path / "README.md"))
    assert marks.returncode == 1 and "end of figures" in marks.stderr
    assert (tmp_path / "README.md").read_text() == "no marks"


def test_this_readme_says_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--check"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
