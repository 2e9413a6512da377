"""Figures of trainings, of runs that are made up."""

import sys
from pathlib import Path

import pytest
from _report_figures import accuracies
from _results import load
from bench_training import main
from table_runs import Run
from train.made_up_runs import make_up

FLAGS = "--quick --train-size 512 --depth 8 --seeds 0 1 --rows baseline fused"


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "--device", "cpu", *flags])
    return main()


def test_each_run_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train(run: Run) -> str | None:
        trained.append(run.recipe.name)
        if run.recipe.name == "fused" and run.seed == 1:
            return "the loss of epoch 1 is nan"
        make_up(run)
        return None

    monkeypatch.setattr(Run, "train", train)
    path = tmp_path / "figures.json"
    assert run(monkeypatch, "--table", FLAGS, "--json", str(path), "--go-on") == 1
    content = load(path)
    assert content["benchmark"] == "training_table_8_quick"
    first, second, *_ = rows = content["rows"]
    assert [(r["provider"], r["seed"]) for r in rows] == [
        ("baseline", 0), ("fused", 0), ("baseline", 1), ("fused", 1),
    ]  # fmt: skip
    assert first["images_per_second"] == 250 and first["test_accuracy"] == 90
    assert "--block postact" in first["flags"] and "--fused" in second["flags"]
    assert "the loss of epoch 1 is nan" in rows[3]["failed"] and "test_accuracy" not in rows[3]
    said = accuracies(epochs=4, train_size=512)(rows)
    assert said == (
        "baseline 90.5 ± 0.7 % in 2.10 ± 0.14 min; fused 90.0 % in 1.00 min (1 of 2 seeds) "
        "(photos, n = 2)"
    )
    assert accuracies(epochs=200)(rows[:3]) is None
    # What is measured is kept; what failed is tried again.
    trained.clear()
    assert run(monkeypatch, "--table", FLAGS, "--json", str(path), "--go-on") == 1
    assert trained == ["fused"]


def test_what_a_table_has_trained_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "train", make_up)
    flags = ["--table", f"{FLAGS} --out {tmp_path / 'table'}"]
    assert run(monkeypatch, *flags, "--json", str(tmp_path / "a.json")) == 0
    monkeypatch.setattr(Run, "train", lambda run: pytest.fail("trained again"))
    assert run(monkeypatch, *flags, "--json", str(tmp_path / "b.json")) == 0
    assert load(tmp_path / "a.json")["rows"] == load(tmp_path / "b.json")["rows"]


def test_flags_of_the_table_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, word in (
        (["--table", "--rows besst"], "besst"),
        (["--folder", "no"], "no"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *flags)
        assert word in capsys.readouterr().err


def test_a_growth_is_a_row_before_its_training_end_to_end_and_one_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train(run: Run) -> None:
        trained.append(run.recipe.name)
        make_up(run)

    monkeypatch.setattr(Run, "train", train)
    path = tmp_path / "figures.json"
    flags = ["--table", "--quick --train-size 512 --depth 8 --rows fused boostresnet"]
    assert run(monkeypatch, *flags, "--json", str(path)) == 0
    rows = {row["provider"]: row for row in load(path)["rows"]}
    grown, refined = rows["boostresnet (grown)"], rows["boostresnet"]
    assert (grown["test_accuracy"], refined["test_accuracy"]) == (80, 90)
    assert grown["training_seconds"] == refined["training_seconds"] / 3 == 20
    assert (grown["unit_epochs"], grown["end_to_end_epochs"], grown["epochs"]) == (1, 0, 4)
    assert (refined["unit_epochs"], refined["end_to_end_epochs"], refined["epochs"]) == (1, 3, 4)
    assert grown["units"] == 9 and len(grown["losses"]) == 9 and len(refined["losses"]) == 3
    assert refined["images_per_second"] == 250 and "images_per_second" not in grown
    assert accuracies(epochs=4, train_size=512)(list(rows.values())) == (
        "fused 90.0 % in 1.00 min; boostresnet (grown) 80.0 % in 0.33 min; "
        "boostresnet 90.0 % in 1.00 min (photos, n = 1)"
    )
    assert trained == ["fused", "boostresnet"]
    assert run(monkeypatch, *flags, "--json", str(path), "--go-on") == 0
    assert trained == ["fused", "boostresnet"] and len(load(path)["rows"]) == 3
