"""train/table.py: real runs of a few rows, and everything around them with runs made up."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import recipes
import table_runs
import torch
from config import Config
from errors import TrainError
from recipes import Setting
from table import TableConfig, main, plan
from table import recipes as chosen
from table_runs import Run
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

    def train(run: Run) -> None:
        trained.append(f"{run.recipe.name} {run.seed}")
        make_up(run)

    monkeypatch.setattr(Run, "train", train)
    return trained


def test_a_failing_row_is_reported_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real trainings: one that diverges, then four emulated workers."""
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
    assert rows["boostresnet"]["state"] == "left open"
    done = rows["everything"]
    assert done["state"] == "trained" and done["emulated"] == "True" and done["test_sd"] == ""
    assert 0 <= float(done["test_mean"]) <= 100 and float(done["minutes_mean"]) > 0
    summary = json.loads((out / "everything" / "seed-0" / "summary.json").read_text())
    assert (summary["processes"], summary["workers"], summary["epochs"]) == (1, 4, 2)
    assert summary["config"]["precision"] == "bf16" and summary["config"]["batch_size"] == 256
    assert "quick" in text and "bf16" in text and "†" in text
    assert "diverged" in (out / "diverging" / "seed-0" / "log.txt").read_text()
    # What has no run yet has no figure in a plot either.
    assert "everything" in (out / "table.svg").read_text()

    # Only what failed is tried again, from its checkpoint.
    monkeypatch.setattr(
        Run, "train", lambda run: pytest.fail(f"{run.recipe.name} is trained again")
        if run.recipe.name != "diverging" else None,
    )  # fmt: skip
    assert main([*FLAGS, "--out", str(out)]) == 1


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
    assert main([*flags[:-2], "3", *flags[-2:], "--rows", "baseline", "fused"]) == 0
    assert made_up == ["baseline 3", "fused 3"]
    assert rows_of(tmp_path / "table.csv")["baseline"]["trained"] == "4"


def test_the_stack_is_a_waterfall(tmp_path: Path, made_up: list[str]) -> None:
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    assert len(made_up) == 12
    drawn = (tmp_path / "waterfall.svg").read_text()
    for text in ("baseline", "+ pre-activation", "+ half precision†", "in all", "2.00 ×"):
        assert f"<!-- {text} -->" in drawn, text


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
    four, one, half = plan(config, chosen(config))
    assert one.processes == 1 and one.config.micro_batches == 1
    assert four.processes == processes and four.config.micro_batches == 4 // processes
    assert ("torch.distributed.run" in four.command()) == (processes > 1)
    assert half.config.precision == ("fp16" if gpus else "bf16")
    on_cpu = TableConfig(rows=("best",), seeds=(0,), out=tmp_path, device="cpu")
    assert plan(on_cpu, chosen(on_cpu))[0].processes == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "besst"], ["--rows besst", "best"]),
        (["--rows", "boostresnet"], ["left open"]),
        (["--seeds", "1", "1"], ["--seeds 1 1", "each once"]),
        (["--depth", "21"], ["row baseline", "--depth 21", "6n + 2"]),
        (["--sweep", "depth"], ["depth", "batch-size"]),
        (["--train-size", "32"], ["row four_workers", "--batch-size 128", "32 training images"]),
        (["--dataset", "folder"], ["--data-dir"]),
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
    assert main([*flags, "--epochs", "3"]) == 2
    said = capsys.readouterr().err
    assert "--epochs 2" in said and "--epochs 3" in said and "another --out" in said
    assert (tmp_path / "table.md").read_text() == before
    (tmp_path / "baseline" / "seed-0" / "summary.json").write_text("{")
    assert main(flags) == 2
    assert "not what a run wrote" in capsys.readouterr().err


def test_a_run_that_dies_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an error of its own: what it said last stands for it."""
    recipe = next(r for r in recipes.table(Setting(2, "bf16")) if r.name == "fused")
    run = Run(recipe, 0, 1, {"out": tmp_path / "run", "fused": True})
    dies = "print('half way', flush=True); import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(Run, "command", lambda self: [table_runs.sys.executable, "-c", dies])
    run.train()
    assert run.failure() == "exit status -9: half way" and run.summary() is None
    assert "half way" in capsys.readouterr().out
    monkeypatch.setattr(Run, "command", lambda self: [table_runs.sys.executable, "-c", ""])
    run.train()
    assert run.failure() is None


def test_settings_that_do_not_fit_name_the_row(tmp_path: Path) -> None:
    recipe = recipes.Recipe("odd", "Odd", {})
    with pytest.raises(TrainError, match="row odd: --batch-size 30: not a multiple of 4"):
        Run(recipe, 0, 2, {"batch_size": 30, "micro_batches": 2, "out": tmp_path})
    assert Run(recipe, 0, 2, {"batch_size": 32, "micro_batches": 2}).config == Config(
        batch_size=32, micro_batches=2
    )
