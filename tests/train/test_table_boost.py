"""The row of train/table.py that train/boost.py trains: before and after training end to end."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import table_runs
from recipes import Setting, table_rows
from table import main
from table_runs import Run
from train.made_up_runs import make_up
from train.tiny_growths import lines

FLAGS = [
    "--dataset", "synthetic", "--image-size", "8", "--train-size", "256", "--device", "cpu",
    "--depth", "8", "--quick", "--epochs", "4", "--rows", "boostresnet",
]  # fmt: skip


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def test_a_growth_has_a_line_before_and_one_after_training_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: Run, lock: object) -> str | None:
        if run.seed == 2:
            return run_fails(run)
        make_up(run)
        return None

    def run_fails(run: Run) -> str:
        run.out.mkdir(parents=True)
        (run.out / table_runs.FAILURE).write_text("no room for features\n")
        return "no room for features"

    monkeypatch.setattr(Run, "train", train)
    assert main([*FLAGS, "--seeds", "0", "1", "2", "--out", str(tmp_path)]) == 1
    rows = rows_of(tmp_path / "table.csv")
    grown, refined = rows["boostresnet (grown)"], rows["boostresnet"]
    # made_up_runs: a minute in all, a third of it for the growth.
    assert float(grown["minutes_mean"]) == pytest.approx(1 / 3)
    assert float(refined["minutes_mean"]) == 1
    assert float(grown["test_mean"]) == 80 and float(refined["test_mean"]) == 90.5
    with (tmp_path / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [run["epochs"] for run in runs] == ["0", "0", "", "3", "3", ""]
    assert {run["units"] for run in runs} == {"9", ""}
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("# Table 1, depth 8, 256 images, 4 epochs, quick\n")
    assert "The next row, when it is grown" in text and "Of a growth by boosting" in text
    assert text.count("Failed: boostresnet, seed 2: no room for features") == 1
    assert text.count("Failed:") == 1 and "2 of 3" in text
    drawn = (tmp_path / "table.svg").read_text()
    assert "<!-- boostresnet (grown) -->" in drawn and "<!-- boostresnet -->" in drawn


def test_another_growth_in_the_folder_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "train", lambda run, lock: make_up(run))
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    path = tmp_path / "boostresnet" / "seed-0" / "config.json"
    config = json.loads(path.read_text())
    before = (tmp_path / "table.md").read_text()
    # What a growth keeps where, and on what, is no other growth.
    path.write_text(json.dumps(config | {"cache_dir": "there", "cache_host_gb": 1.0}))
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    for key, value in (("unit_epochs", 7), ("boost_loss", "exp"), ("zero_init", False)):
        path.write_text(json.dumps(config | {key: value}))
        assert main([*FLAGS, "--out", str(tmp_path)]) == 2
        said, flag = capsys.readouterr().err, "--" + key.replace("_", "-")
        assert f"{flag} {value}" in said and "row boostresnet has" in said
    assert (tmp_path / "table.md").read_text() == before


def test_a_growth_that_is_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run, ended after its first unit; then again, to its end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    recipe = next(r for r in table_rows(Setting(4, "bf16", True)) if r.name == "boostresnet")
    settings: dict[str, Any] = {
        "dataset": "synthetic", "image_size": 8, "train_size": 256, "device": "cpu", "depth": 8,
        "out": tmp_path / "run",
    }  # fmt: skip
    run = Run(recipe, 0, 1, settings | recipe.changes)

    def stop(line: str, **_: object) -> None:
        if "unit 1/3" in line:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("builtins.print", stop)
        run.train()
    assert run.summary() is None
    before = lines(run.out / "metrics.jsonl")
    assert run.train() is None
    log = (run.out / "log.txt").read_text()
    assert f"resume   after unit {len(before)} of 3" in log
    after = lines(run.out / "metrics.jsonl")
    assert after[: len(before)] == before and [unit["unit"] for unit in after] == [1, 2, 3]
    summary = run.summary()
    assert summary is not None and summary["epochs"] == 3
    assert summary["growth_seconds"] == pytest.approx(sum(unit["seconds"] for unit in after))
