"""train/table.py: real runs of a few rows, and everything around them with runs made up."""

import csv
import fcntl
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import recipes
import table_runs
import torch
from config import Config
from errors import TrainError
from recipes import Setting
from table import TableConfig, asked_for, every_row, main, plan
from table_runs import Run, reason
from train.made_up_runs import make_up

FLAGS = [
    "--dataset", "synthetic", "--image-size", "8", "--train-size", "256", "--device", "cpu",
    "--depth", "8", "--quick", "--epochs", "2",
]  # fmt: skip


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def diverging(run: Setting) -> dict[str, Any]:
    """A rate that no training survives."""
    return {"lr": 1e30, "batch_size": run.batch(64)}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs whose figures are made up; the names of those that were trained."""
    trained: list[str] = []

    def train(run: Run, lock: object) -> None:
        trained.append(f"{run.recipe.name} {run.seed}")
        make_up(run)

    monkeypatch.setattr(Run, "train", train)
    return trained


def test_a_failing_row_is_reported_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real trainings: one that diverges, four emulated workers, and a growth."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(recipes, "TABLE", (diverging, recipes.everything, recipes.boostresnet))
    out = tmp_path / "table"
    assert main([*FLAGS, "--out", str(out)]) == 1
    text = (out / "table.md").read_text()
    assert capsys.readouterr().out.count(text) == 1
    rows = rows_of(out / "table.csv")
    assert rows["diverging"]["state"] == "failed" and rows["diverging"]["test_mean"] == ""
    assert "Failed: diverging, seed 0: the loss of epoch 1 is" in text and "diverged" in text
    grown, refined = rows["boostresnet (grown)"], rows["boostresnet"]
    assert grown["state"] == refined["state"] == "trained"
    assert 0 < float(grown["minutes_mean"]) < float(refined["minutes_mean"])
    held = json.loads((out / "boostresnet" / "seed-0" / "summary.json").read_text())
    assert float(grown["test_mean"]) == held["before_refinement"]["test_accuracy"]
    assert float(refined["test_mean"]) == held["test_accuracy"]
    assert (held["units"], held["epochs"], held["config"]["unit_epochs"]) == (3, 2, 1)
    done = rows["everything"]
    assert done["state"] == "trained" and done["emulated"] == "True" and done["test_sd"] == ""
    assert 0 <= float(done["test_mean"]) <= 100 and float(done["minutes_mean"]) > 0
    summary = json.loads((out / "everything" / "seed-0" / "summary.json").read_text())
    assert (summary["workers"], summary["epochs"]) == (4, 2)
    assert [kind["processes"] for kind in summary["hardware"]] == [1]
    assert summary["config"]["precision"] == "bf16" and summary["config"]["batch_size"] == 256
    assert "quick" in text and "bf16" in text and "†" in text
    assert "diverged" in (out / "diverging" / "seed-0" / "log.txt").read_text()
    drawn = (out / "table.svg").read_text()
    assert "everything†" in drawn and "diverging" not in drawn and "boostresnet (grown)" in drawn
    # Only what failed is tried again.
    tried: list[str] = []
    monkeypatch.setattr(Run, "train", lambda run, lock: tried.append(run.recipe.name))
    assert main([*FLAGS, "--out", str(out)]) == 0 and tried == ["diverging"]


def test_a_table_of_three_seeds(
    tmp_path: Path, made_up: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--train-size", "512", "--seeds", "0", "1", "2", "--out", str(tmp_path)]
    assert main([*flags, "--rows", "baseline", "fused", "four_workers"]) == 0
    # All rows of a seed come before the next seed.
    assert made_up[:4] == ["baseline 0", "four_workers 0", "fused 0", "baseline 1"]
    rows = rows_of(tmp_path / "table.csv")
    base = rows["baseline"]
    assert float(base["minutes_mean"]) == pytest.approx(2.2)
    assert float(base["minutes_sd"]) == pytest.approx(0.2)
    assert float(base["test_mean"]) == 91 and float(base["test_sd"]) == 1
    assert float(rows["fused"]["speedup"]) == pytest.approx(2.2)
    assert float(base["report_minutes"]) == 162 and rows["fused"]["report_minutes"] == ""
    text = (tmp_path / "table.md").read_text()
    assert "2.20 ± 0.20" in text and "91.0 ± 1.0" in text and "2.20 ×" in text
    assert "GTX 1080 Ti" in text and "CPU, 2 threads" in text
    with (tmp_path / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9
    # A step of the stack is missing, and the waterfall with it.
    assert {path.name for path in tmp_path.glob("*.svg")} == {"table.svg"}

    # A seed more trains that alone, and the table holds both.
    made_up.clear()
    assert main([*flags, "--rows", "baseline", "--seeds", "3"]) == 0
    assert made_up == ["baseline 3"]
    rows = rows_of(tmp_path / "table.csv")
    assert rows["baseline"]["trained"] == "4" and rows["baseline"]["state"] == "trained"
    assert rows["fused"]["trained"] == "3" and rows["fused"]["state"] == "not trained yet"
    assert "3 of 4" in (tmp_path / "table.md").read_text()


def test_the_stack_is_a_waterfall(tmp_path: Path, made_up: list[str]) -> None:
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    assert len(made_up) == 13
    drawn = (tmp_path / "waterfall.svg").read_text()
    for text in ("baseline", "+ pre-activation", "+ half precision†", "in all", "2.00 ×"):
        assert f"<!-- {text} -->" in drawn, text


def test_times_of_two_machines_are_not_compared(tmp_path: Path, made_up: list[str]) -> None:
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    path = tmp_path / "fused" / "seed-0" / "summary.json"
    path.write_text(path.read_text().replace('"CPU"', '"another"'))
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "table.csv")
    assert rows["fused"]["speedup"] == "" and rows["everything"]["speedup"] != ""
    assert not (tmp_path / "waterfall.svg").exists()
    text = (tmp_path / "table.md").read_text()
    assert "photos, on another" in text and ": fused." in text and "not compared" in text


def test_a_run_that_was_resumed_elsewhere_has_no_speedup(
    tmp_path: Path, made_up: list[str]
) -> None:
    """Begun by one process for its four workers, and ended by four: its time is of neither."""
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    for name, kinds in (("four_workers", ((1, 2), (4, 2))), ("fused", ((1, 1), (1, 2)))):
        path = tmp_path / name / "seed-0" / "summary.json"
        summary = json.loads(path.read_text())
        summary["hardware"] = [
            summary["hardware"][0] | {"processes": processes, "threads": threads}
            for processes, threads in kinds
        ]
        path.write_text(json.dumps(summary))
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "table.csv")
    assert rows["four_workers"]["emulated"] == "True" and rows["fused"]["speedup"] == ""
    text = (tmp_path / "table.md").read_text()
    assert "on CPU, 1 threads; torch 2.15: fused." in text and "not compared" in text


def test_a_sweep_has_a_plot(tmp_path: Path, made_up: list[str]) -> None:
    flags = [*FLAGS, "--train-size", "1000", "--out", str(tmp_path)]
    assert main([*flags, "--sweep", "survival"]) == 0
    assert len(made_up) == 11
    rows = rows_of(tmp_path / "table.csv")
    assert rows["survival_linear_40"]["series"] == "linear"
    assert float(rows["survival_linear_40"]["x"]) == 0.4
    assert {path.name for path in tmp_path.glob("*.svg")} == {"sweep.svg"}
    assert "report:" not in (tmp_path / "table.md").read_text()


def test_the_same_figures_give_the_same_files(tmp_path: Path, made_up: list[str]) -> None:
    flags = [*FLAGS, "--rows", "baseline", "fused", "--out", str(tmp_path)]
    assert main(flags) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert main(flags) == 0
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


@pytest.mark.parametrize(("gpus", "processes"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (8, 4)])
def test_workers_are_spread_over_the_gpus(
    gpus: int, processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = TableConfig(rows=("fused", "best", "everything"), seeds=(0,), out=tmp_path)
    four, one, half = plan(config, asked_for(config, every_row(config)), [0])
    assert one.processes == 1 and one.config.micro_batches == 1
    assert four.processes == processes and four.config.micro_batches == 4 // processes
    assert ("torch.distributed.run" in four.command()) == (processes > 1)
    assert half.config.precision == ("fp16" if gpus else "bf16")
    on_cpu = TableConfig(rows=("best",), out=tmp_path, device="cpu")
    assert plan(on_cpu, asked_for(on_cpu, every_row(on_cpu)), [0])[0].processes == 1


def test_what_one_gpu_has_trained_counts_on_four(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made_up: list[str]
) -> None:
    """Four workers are four workers; half precision is one thing in a table."""
    flags = [*FLAGS, "--device", "auto", "--out", str(tmp_path), "--half", "bf16"]
    for gpus, trained in ((1, ["four_workers 0"]), (4, [])):
        made_up.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert main([*flags, "--rows", "four_workers"]) == 0
        assert made_up == trained
    assert "†" in (tmp_path / "table.md").read_text()
    assert main([*flags, "--half", "fp16"]) == 2


def test_the_usual_table_and_the_quick_one() -> None:
    usual, quick = TableConfig(), TableConfig(quick=True)
    assert (usual.all_seeds, usual.all_epochs, usual.images) == ((0, 1, 2), 200, None)
    assert (quick.all_seeds, quick.all_epochs, quick.images) == ((0,), 4, 5000)
    assert str(usual.out_dir) == "runs/table-20" and str(quick.out_dir) == "runs/table-20-quick"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "besst"], ["--rows besst", "best"]),
        (["--seeds", "1", "1"], ["--seeds 1 1", "each once"]),
        (["--depth", "21"], ["row baseline", "--depth 21", "6n + 2"]),
        (["--sweep", "depth"], ["depth", "batch-size"]),
        (["--train-size", "32"], ["row four_workers", "--batch-size 128", "32 images"]),
        (["--dataset", "folder"], ["--data-dir"]),
        (["--image-size", "4"], ["--image-size 4"]),
        pytest.param(
            ["--device", "cuda"], ["--device cuda", "no GPU"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--dataset", "folder", "--data-dir", "nowhere", "--image-size", "8"], ["nowhere"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_any_training(
    flags: list[str], words: list[str], tmp_path: Path, made_up: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert main([*FLAGS, *flags, "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    assert all(word in said for word in words), said
    assert made_up == [] and not out.exists()


def test_a_folder_of_another_table_is_left_alone(
    tmp_path: Path, made_up: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--rows", "baseline", "--out", str(tmp_path)]
    assert main(flags) == 0
    before = (tmp_path / "table.md").read_text()
    for other in (["--epochs", "3"], ["--epochs", "3", "--rows", "fused"]):
        assert main([*flags, *other]) == 2
        said = capsys.readouterr().err
        assert "--epochs 2" in said and "--epochs 3" in said and "another --out" in said
    (tmp_path / "table.json").unlink()
    assert main([*flags, "--epochs", "3"]) == 2
    assert "row baseline has --epochs 3" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_text() == before
    (tmp_path / "baseline" / "seed-0" / "summary.json").write_text("{")
    assert main(flags) == 2
    assert "not what a run wrote" in capsys.readouterr().err


def test_two_calls_do_not_share_a_folder(
    tmp_path: Path, made_up: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even where the first was killed, and its run goes on."""
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run = subprocess.Popen(["sleep", "60"], pass_fds=[held.fileno()])
    try:
        assert main([*FLAGS, "--out", str(tmp_path)]) == 2 and made_up == []
        assert "another table.py" in capsys.readouterr().err
    finally:
        run.kill()
        run.wait()
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0 and made_up


def run_of(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int = 1
) -> Run:
    """A run whose program is another one."""
    (tmp_path / "main.py").write_text(program)
    monkeypatch.setattr(table_runs, "_PROGRAMS", tmp_path)
    recipe = next(r for r in recipes.table_rows(Setting(2, "bf16")) if r.name == "fused")
    settings = {"out": tmp_path / "run", "batch_size": 128, "fused": True}
    return Run(recipe, 0, processes, settings)


def test_a_run_that_dies_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an error of its own: what it said last stands for it."""
    dies = "print('half way', flush=True); import os; os.kill(os.getpid(), 9)"
    run = run_of(dies, tmp_path, monkeypatch)
    assert run.train() == run.failure() == "exit status -9: half way" and run.summary() is None
    assert "half way" in capsys.readouterr().out
    run = run_of("", tmp_path, monkeypatch)
    assert run.train() == run.failure() == "it ended without a summary"
    # A run that was finished when it died is finished.
    make_up(run)
    assert run.train() is None and run.failure() is None
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("--- ") == 3 and "half way" in log
    (tmp_path / "run" / "log.txt").unlink()
    (tmp_path / "run" / "log.txt").mkdir()
    assert "log.txt" in str(run.train())


def test_what_a_process_raised_is_told_and_not_what_torchrun_adds() -> None:
    lines = [
        "Traceback (most recent call last):",
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB",
        "E1123 03:29 torch/distributed/elastic: failed (exitcode: 1) local_rank: 1",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "Root Cause (first observed failure):", "  exitcode  : 1", "=====",
    ]  # fmt: skip
    assert reason(lines) == "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
    assert reason(["on the way", "====", ""]) == "on the way"
    assert reason([]) == "nothing was printed"


def test_an_interrupted_run_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's processes are in sessions of their own: killing it would leave them behind."""
    program = (
        "import os, time\n"
        f"open({str(tmp_path)!r} + '/pid-' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "print('there', flush=True)\n"
        "time.sleep(120)\n"
    )
    run = run_of(program, tmp_path, monkeypatch, processes=2)

    def both_there(line: str, **_: object) -> None:
        if len(list(tmp_path.glob("pid-*"))) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", both_there)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    for path in tmp_path.glob("pid-*"):
        status = Path(f"/proc/{path.read_text()}/status")
        # Ended, or waiting for its new parent to notice.
        assert not status.exists() or "zombie" in status.read_text()


def test_settings_that_do_not_fit_name_the_row(tmp_path: Path) -> None:
    recipe = recipes.Recipe("odd", "Odd", {})
    with pytest.raises(TrainError, match="row odd: --batch-size 30: not a multiple of 4"):
        Run(recipe, 0, 2, {"batch_size": 30, "micro_batches": 2, "out": tmp_path})
    assert Run(recipe, 0, 2, {"batch_size": 32, "micro_batches": 2}).config == Config(
        batch_size=32, micro_batches=2
    )
