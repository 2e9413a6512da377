"""What counts as worse, what the baseline must be, and how many warps fit."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from _kernel_baseline import BASELINE, COLUMNS, Baseline, key_of, read, regressions, stale, worse
from _kernel_baseline import write as write_baseline
from _occupancy import MULTIPROCESSORS, occupancy
from _results import ResultsError, load
from run_main import run_main

ROOT = Path(__file__).parents[2]

BUILD = dict(zip(COLUMNS, (64, 0, 256, 32, 0, 10, 8, 4, 4), strict=True))
ROW: dict[str, Any] = BUILD | {
    "op": "cast", "kernel": "_cast_fwd_kernel", "dtype": "fp16", "target": "sm_90",
    "variant": "fp32 to fp16, M=8",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spilled": 4}, "spills 4 bytes a thread, 0 before"),
        ({"loads_128": 0}, "0 of 10 global loads of 128 bits, 8 of 10 before"),
        ({"loads": 20}, "8 of 20 global loads of 128 bits, 8 of 10 before"),
        ({"stores": 5, "stores_128": 3}, "3 of 5 global stores of 128 bits, 4 of 4 before"),
        ({"registers": 80, "resident_warps": 24}, "24 warps resident, 32 before, with 80 reg"),
        ({"shared": 90_000, "resident_warps": 16}, "16 warps resident, 32 before"),
        # Within one portion of registers, without a loss, or for the better: no regression.
        ({"registers": 72, "resident_warps": 24}, None),
        ({"registers": 80}, None),
        ({"loads": 11}, None),
        ({"registers": 40, "resident_warps": 48, "loads": 8, "tensor": 9}, None),
    ],
)
def test_what_is_worse(change: dict[str, int], words: str | None) -> None:
    found = worse(BUILD, BUILD | change)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_another_compiler_is_held_to_less() -> None:
    baseline = Baseline("3.9.0", {key_of(ROW): BUILD})
    lost = ROW | {"registers": 255, "resident_warps": 8, "loads": 40}
    assert len(regressions(baseline, [lost], "3.9.0")) == 2
    assert regressions(baseline, [lost], "3.6.0") == []
    (line,) = regressions(baseline, [lost | {"loads_128": 0}], "3.6.0")
    assert "0 of 40 global loads" in line
    (line,) = regressions(baseline, [lost | {"spilled": 8}], "3.6.0")
    assert "spills 8 bytes" in line
    # Launches that make one binary under one version may make two under another.
    unknown = ROW | {"variant": "another"}
    assert regressions(baseline, [unknown], "3.6.0") == []
    (line,) = regressions(baseline, [unknown | {"spilled": 8}], "3.6.0")
    assert "spills 8 bytes" in line


def test_what_does_not_build_is_unknown_or_gone() -> None:
    baseline = Baseline("3.9.0", {key_of(ROW): BUILD})
    about = {name: value for name, value in ROW.items() if name not in BUILD}
    (line,) = regressions(baseline, [about | {"failed": "CompilationError: no"}], "3.9.0")
    assert line == f"{key_of(ROW)}: does not build: CompilationError: no"
    (line,) = regressions(baseline, [ROW | {"dtype": "bf16"}], "3.9.0")
    assert "not in the baseline" in line and "--update" in line
    chosen = {"op": ["cast"], "dtype": ["fp16"], "target": ["sm_90"]}
    assert stale(baseline, [], chosen) == [key_of(ROW)]
    assert stale(baseline, [ROW], chosen) == []
    assert stale(baseline, [], chosen | {"target": ["sm_80"]}) == []


def test_the_baseline_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    other = key_of(ROW | {"target": "sm_80", "kernel": "_other_kernel"})
    builds = {key_of(ROW): BUILD, other: BUILD | {"loads_128": 10, "spilled": 4}}
    write_baseline(path, builds)
    assert read(path).builds == builds
    first, second = load(path)["rows"]
    assert (first["target"], first["spilling"], first["loads_128_share"]) == ("sm_90", 0, 0.8)
    assert (second["target"], second["spilling"], second["loads_128_share"]) == ("sm_80", 1, 1)
    assert first["occupancy"] == 0.5 and second["occupancy_of"] == "_other_kernel"
    # A line a build, so that a commit shows which changed.
    assert sum(key_of(ROW) in line for line in path.read_text().splitlines()) == 1


def test_a_baseline_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    with pytest.raises(ResultsError, match="there is no baseline; make one with .*--update"):
        read(path)
    path.write_text(BASELINE.read_text().replace('"registers"', '"regs"', 1))
    with pytest.raises(ResultsError, match="no baseline of this version's form.*--update"):
        read(path)
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(ResultsError, match="form 1"):
        read(path)


def test_the_committed_baseline_is_whole() -> None:
    baseline = read(BASELINE)
    assert {key.split(" | ")[3] for key in baseline.builds} == set(MULTIPROCESSORS)
    assert {key.split(" | ")[2] for key in baseline.builds} == {"fp16", "fp32", "bf16"}
    assert not [key for key, build in baseline.builds.items() if build["spilled"]]


@pytest.mark.parametrize(
    ("target", "warps", "registers", "scalars", "shared", "resident", "limited_by"),
    [
        ("sm_80", 8, 32, 0, 0, 64, ""),
        ("sm_80", 8, 33, 0, 0, 48, "registers"),
        ("sm_80", 4, 255, 0, 0, 8, "registers"),
        # 164 KB less one for each block.
        ("sm_80", 4, 32, 0, 81 * 1024, 8, "shared memory"),
        ("sm_80", 4, 32, 0, 81 * 1024 + 1, 4, "shared memory"),
        ("sm_90", 1, 32, 0, 0, 32, "blocks"),
        ("sm_90", 12, 32, 0, 0, 60, "threads"),
        ("gfx942", 8, 64, 80, 0, 32, ""),
        ("gfx942", 8, 65, 80, 0, 24, "registers"),
        # As LLVM says in its listings: 8, 7 and 6 waves a scheduler.
        ("gfx942", 4, 62, 81, 0, 28, "scalar registers"),
        ("gfx942", 4, 58, 98, 0, 24, "scalar registers"),
        ("gfx942", 1, 24, 40, 0, 32, ""),
        ("gfx942", 4, 24, 40, 32 * 1024, 8, "shared memory"),
    ],
)
def test_occupancy(
    target: str,
    warps: int,
    registers: int,
    scalars: int,
    shared: int,
    resident: int,
    limited_by: str,
) -> None:
    held = occupancy(target, warps, registers, shared, scalars)
    assert (held.warps, held.limited_by) == (resident, limited_by)
    assert held.share == resident / MULTIPROCESSORS[target].warps


def test_check_fails_and_update_mends(tmp_path: Path) -> None:
    """The program, on one kernel and target: a baseline that was better, then one that is this."""
    if read(BASELINE).triton != version("triton"):
        pytest.skip("the committed baseline is another Triton's")
    path = tmp_path / "baseline.json"
    builds = {
        key: values for key, values in read(BASELINE).builds.items() if key.startswith("unscale")
    }
    one = next(key for key in builds if "| sm_90 |" in key)
    builds[one] = builds[one] | {"loads_128": builds[one]["loads"]}
    gone = f"{one} and more"
    builds[gone] = builds[one]
    # What was not chosen stays as it is.
    other = {key: values for key, values in builds.items() if "| sm_80 |" in key}
    write_baseline(path, builds)
    # One process for both, which no test has made one of interpreted kernels.
    program = (
        "import os, sys\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]\n"
        "import kernel_report\n"
        "flags = sys.argv\n"
        "for what in ('--check', '--update'):\n"
        "    sys.argv = [*flags, what]\n"
        "    print('status', what, kernel_report.main())\n"
    )
    flags = ["--op", "unscale", "--target", "sm_90", "--baseline", str(path), "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=300
    )
    said = done.stdout.splitlines()
    assert "status --check 1" in said and "status --update 0" in said, done.stdout + done.stderr
    assert len(lines := [x for x in done.stderr.splitlines() if x.startswith("worse: ")]) == 2
    assert f"{one}: " in lines[0] and "global loads of 128 bits" in lines[0]
    assert f"{gone}: in the baseline, and nothing launches it" in lines[1]
    after = read(path).builds
    assert gone not in after and after[one] == read(BASELINE).builds[one]
    assert {key: after[key] for key in other} == other


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--check", "--baseline", "none.json"], "there is no baseline"),
        (["--op", "convolve"], "invalid choice: 'convolve'"),
        (["--small", "--update"], "every configuration"),
    ],
)
def test_errors_are_words(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kernel_report

    monkeypatch.chdir(tmp_path)
    done = run_main(kernel_report, *flags)
    assert done.returncode == 2 and words in done.stderr
