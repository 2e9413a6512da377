"""The comparison at equal time, of runs that are made up."""

import sys
from pathlib import Path
from typing import Any

import pytest
import records
import report
from _report_figures import as_long
from _results import load, save
from bench_boost_training import main
from run_main import run_main
from table_runs import Run
from train.made_up_runs import make_up

FLAGS = ["--device", "cpu", "--boost", "--train-size 512 --depth 8 --unit-epochs 3 --epochs 7"]


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_boost_training.py", *FLAGS, *flags])
    return main()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs whose figures are made up: a minute of boosting, 20 seconds an epoch else."""
    runs: list[Run] = []

    def train(run: Run) -> str | None:
        runs.append(run)
        if run.recipe.name == "plain" and run.seed == 1:
            return "the loss of epoch 1 is nan"
        make_up(run)
        return None

    monkeypatch.setattr(Run, "train", train)
    return runs


def test_plain_training_takes_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Run]
) -> None:
    path = tmp_path / "figures.json"
    assert run(monkeypatch, "--json", str(path), "--plain=--lr 0.2", "--seeds", "0", "1") == 1
    boost, trial, plain = (run.config.as_dict() for run in trained[:3])
    assert (boost["unit_epochs"], boost["epochs"], boost["eval_every"]) == (3, 7, 1)
    # A minute at 20 seconds an epoch; the trial has three.
    assert (trial["epochs"], plain["epochs"], plain["lr"]) == (3, 3, 0.2)
    alike = ("train_size", "depth", "fused", "schedule", "batch_size", "seed", "dataset")
    assert [plain[key] for key in alike] == [boost[key] for key in alike]
    assert plain["schedule"] == "cosine" and not plain["zero_init"] and boost["zero_init"]
    content = load(path)
    rows: list[dict[str, Any]] = content["rows"]
    assert [(row["provider"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (0, 1) for name in ("boosting (grown)", "boosting", "plain")
    ]
    grown, refined, plainly = rows[:3]
    assert "the loss of epoch 1 is nan" in rows[5]["failed"]
    assert len(grown["by_unit"]) == 9 and grown["by_unit"][0]["edge"] == 0.4
    assert (grown["training_seconds"], refined["training_seconds"]) == (20, 60)
    assert [round(p["seconds"]) for p in refined["curve"]][-2:] == [20, 60]
    assert plainly["curve"] == [
        {"seconds": pytest.approx(60), **dict.fromkeys(grown["curve"][0].keys() - {"seconds"}, 90)}
    ]
    assert "--unit-epochs 3" in grown["flags"] and "--seed" not in grown["flags"]
    assert as_long(rows) == (
        "boosting (grown): train 80.0 ± 0.0 %, test 80.0 ± 0.0 % in 0.3 ± 0.0 min; "
        "boosting: train 99.0 ± 0.0 %, test 90.5 ± 0.7 % in 1.0 ± 0.0 min; "
        "plain: train 99.0 %, test 90.0 % in 1.0 min (512 images, n = 2)"
    )
    # What is measured is kept, what failed is tried again, and another growth is refused.
    trained.clear()
    assert run(monkeypatch, "--json", str(path), "--plain=--lr 0.2", "--seeds", "0", "1",
               "--go-on") == 1  # fmt: skip
    assert [(r.recipe.name, r.out.name) for r in trained] == [("plain", "plain-trial-1")]
    folder = tmp_path / "results"
    save(folder / "boost_training.json", content | {"small": False})
    readme = tmp_path / "README.md"
    readme.write_text(f"{report._BEGIN}\n{report._END}\n")
    assert run_main(report, "--results", folder, "--readme", readme, "--write").returncode == 0
    drawn = {p.name.partition("-")[0]: p.read_text() for p in (folder / "plots").iterdir()}
    assert set(drawn) == {"boost_by_unit", "boost_by_time"}
    assert "<!-- boosting, test -->" in drawn["boost_by_time"]
    assert "<!-- plain, test -->" in drawn["boost_by_time"]
    assert "plots/boost_by_time" in readme.read_text()


def test_another_growth_in_its_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Run]
) -> None:
    path = tmp_path / "figures.json"
    assert run(monkeypatch, "--json", str(path)) == 0
    out = trained[0].out
    before = (out / records.SUMMARY).read_text()
    assert run(monkeypatch, "--json", str(path), "--boost=--train-size 512 --depth 8") == 1
    assert "holds a run with --epochs 7" in load(path)["rows"][0]["failed"]
    assert (out / records.SUMMARY).read_text() == before


def test_flags_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, word in (
        (["--boost=--unit-epochs 0"], "--unit-epochs 0"),
        (["--plain=--unit-epochs 1"], "unit-epochs"),
        (["--folder", "no"], "no such folder"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *flags)
        assert word in capsys.readouterr().err
