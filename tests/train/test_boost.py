"""train/boost.py in one process: a growth from start to end, and every way to get it wrong."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boost
import checkpoint
import main as training
import pytest
import torch
import unit_trainer
from boost_config import parse
from errors import TrainError
from growth import Growth
from PIL import Image
from records import Progress
from train.tiny_runs import on_native_path, same, weights_of
from unit_trainer import UnitTrainer
from workers import Workers

from fastres.boost import Boosting, Verdict, boosting_loss, outputs, training_costs, weak_unit

DATA = ["--dataset", "synthetic", "--train-size", "40", "--image-size", "8", "--device", "cpu"]
TINY = [
    *DATA, "--depth", "8", "--width", "4", "--batch-size", "16", "--unit-epochs", "2", "--epochs",
    "1", "--deterministic", "--fused", "--min-gamma", "-0.99", "--lr", "0.8",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("native_path")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def grow(out: Path, *flags: str) -> dict[str, Any]:
    """A run to its end: its summary."""
    assert boost.main([*TINY, *flags, "--out", str(out)]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def growth_of(*flags: str) -> Growth:
    config = parse([*TINY, *flags])
    data = training.load_data(config)
    return Growth(config, Workers(0, 1, 0, torch.device("cpu")), data)


def silent() -> Progress:
    return Progress(1, 1, 1, 0, False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A growth of all three units, and an epoch end to end."""
    out = tmp_path_factory.mktemp("run") / "out"
    with on_native_path():
        grow(out)
    return out


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    names = {"checkpoint.pt", "config.json", "growth.png", "metrics.jsonl", "summary.json"}
    assert {path.name for path in finished.iterdir()} == names | {"refined"}
    units = lines(finished / "metrics.jsonl")
    assert [unit["unit"] for unit in units] == [1, 2, 3]
    for unit in units:
        for name in ("edge", "gamma", "gamma_squared", "alpha", "z", "bound", "covariance"):
            assert isinstance(unit[name], float), name
        for name in ("train", "dev", "test"):
            assert 0 <= unit[f"{name}_accuracy"] <= 100
        assert unit["seconds"] > 0 and unit["memory_bytes"] > 1e6
    assert [unit["cache_place"] for unit in units] == ["host", "host", "host"]
    assert [unit["cache_bytes"] for unit in units][:2] == [40 * 4 * 64 * 4, 40 * 8 * 16 * 4]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["units"] == 3 and summary["epochs"] == 1
    assert summary["ended"] == "all 3 units are grown"
    refined = json.loads((finished / "refined" / "summary.json").read_text())
    for name in ("train_accuracy", "dev_accuracy", "test_accuracy"):
        assert summary["before_refinement"][name] == units[-1][name]
        assert summary[name] == refined[name]
    seconds = summary["growth_seconds"] + summary["refinement_seconds"]
    assert summary["training_seconds"] == pytest.approx(seconds) and seconds > 0
    with Image.open(finished / "growth.png") as curve:
        assert curve.size[0] > 500 and curve.convert("L").getextrema() == (0, 255)


def test_resume_goes_on_bitwise(finished: Path, tmp_path: Path) -> None:
    """A growth killed after each unit, before its checkpoint, with a record that runs ahead."""
    save = checkpoint.save
    for units in (1, 2, 3):

        def stops(path: Path, state: dict[str, Any], units: int = units) -> None:
            if state.get("units") == units:
                raise KeyboardInterrupt
            save(path, state)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "save", stops)
            boost.main([*TINY, "--out", str(tmp_path)])
        assert len(lines(tmp_path / "metrics.jsonl")) == units
        assert checkpoint.load(tmp_path / "checkpoint.pt")["units"] == units - 1
    grow(tmp_path)
    assert same(weights_of(tmp_path), weights_of(finished))
    assert same(weights_of(tmp_path / "refined"), weights_of(finished / "refined"))
    a, b = (checkpoint.load(out / "checkpoint.pt")["boosting"] for out in (tmp_path, finished))
    assert torch.equal(a.pop("state"), b.pop("state"))
    assert torch.equal(a.pop("contribution"), b.pop("contribution")) and a == b
    times = {"seconds", "training_seconds", "cache_seconds", "memory_bytes"}
    for x, y in zip(
        lines(tmp_path / "metrics.jsonl"), lines(finished / "metrics.jsonl"), strict=True
    ):
        assert {k: v for k, v in x.items() if k not in times} == {
            k: v for k, v in y.items() if k not in times
        }


def test_resuming_a_finished_run_trains_nothing_more(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights_of(finished), (finished / "metrics.jsonl").read_text()
    grow(finished)
    said = capsys.readouterr().out
    assert "resume   after unit 3 of 3" in said and "nothing to train" in said
    assert same(weights_of(finished), before[0])
    assert (finished / "metrics.jsonl").read_text() == before[1]


def test_refinement_begins_with_the_grown_network(finished: Path, tmp_path: Path) -> None:
    """Bitwise, in the usual program's own checkpoint."""
    save = checkpoint.save

    def stops(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if path.parent.name == "refined":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", stops)
        boost.main([*TINY, "--out", str(tmp_path)])
    state = checkpoint.load(tmp_path / "refined" / "checkpoint.pt")
    assert state["epoch"] == 0 and same(state["model"], weights_of(tmp_path))
    grow(tmp_path)
    assert same(weights_of(tmp_path / "refined"), weights_of(finished / "refined"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--features", "fresh"],
        ["--boost-loss", "cost"],
        ["--precision", "fp16"],
        ["--precision", "bf16", "--cache-precision", "fp32"],
        ["--precision", "pure-fp16"],
        ["--optimizer", "adam"],
        ["--optimizer", "yellowfin", "--no-fused"],
        ["--no-channels-last", "--cache-precision", "fp16", "--warmup-epochs", "1"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_method_grows_and_resumes_bitwise(flags: list[str], tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    summary = grow(whole, *flags, "--units", "2")
    assert summary["units"] == 2
    save = checkpoint.save

    def stops(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if state.get("units") == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", stops)
        boost.main([*TINY, *flags, "--units", "2", "--out", str(halved)])
    grow(halved, *flags, "--units", "2")
    assert same(weights_of(whole), weights_of(halved))
    assert same(weights_of(whole / "refined"), weights_of(halved / "refined"))


def test_features_on_disk_are_those_in_memory(finished: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = ["--cache-host-gb", "0", "--cache-device-gb", "0", "--cache-dir", str(cache)]
    grow(tmp_path / "out", *flags, "--no-refine")
    assert same(weights_of(tmp_path / "out"), weights_of(finished))
    places = [unit["cache_place"] for unit in lines(tmp_path / "out" / "metrics.jsonl")]
    assert places[:2] == ["disk", "disk"] and not list(cache.iterdir())
    assert not (tmp_path / "out" / "refined").exists()


def test_outputs_from_the_cache_are_those_from_the_images() -> None:
    growth = growth_of()
    growth.grow(silent())
    growth.grow(silent())
    part = weak_unit(growth.plan, 2, growth.frozen.parts[-1])
    costs = training_costs(growth.boosting.costs())
    trainer = UnitTrainer(growth.config.of_unit(2, 0), growth.frozen, part, costs)
    index = torch.arange(40)
    with torch.no_grad():
        cached, taken = trainer.outputs(), trainer.inputs(index, 0)
        growth.frozen.cache = None
        assert torch.equal(trainer.outputs(), cached)
        assert torch.equal(trainer.inputs(index, 0), taken)
        logits = trainer.predict(growth.data.train, index)
    assert torch.equal(outputs(logits), cached)


def test_the_costs_of_earlier_units_enter_a_step() -> None:
    """The gradient of a unit is another one under other costs."""
    growth = growth_of()
    growth.grow(silent())
    gradients = []
    for state in (growth.boosting.state, torch.zeros_like(growth.boosting.state)):
        growth.boosting.state.copy_(state)
        part = weak_unit(growth.plan, 1)
        costs = training_costs(growth.boosting.costs())
        trainer = UnitTrainer(growth.config.of_unit(1, 0), growth.frozen, part, costs)
        torch.manual_seed(0)
        torch.nn.init.normal_(part.fc.weight)
        torch.nn.init.zeros_(part.fc.bias)
        trainer._loss(torch.arange(16), 0)[0].backward()
        assert part.fc.bias.grad is not None
        gradients.append(part.fc.bias.grad.clone())
    a, b = gradients
    assert not torch.allclose(a, b, rtol=1e-3)


def test_each_unit_is_trained_by_the_costs_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []

    def loss(
        logits: torch.Tensor, labels: torch.Tensor, costs: torch.Tensor, kind: Any
    ) -> torch.Tensor:
        seen.append(costs)
        return boosting_loss(logits, labels, costs, kind)

    monkeypatch.setattr(unit_trainer, "boosting_loss", loss)
    growth = growth_of("--unit-epochs", "1")
    for unit in range(2):
        costs = training_costs(growth.boosting.costs())
        rows = {tuple(row) for row in costs.tolist()}
        seen.clear()
        growth.grow(silent())
        used = {tuple(row) for t in seen for row in t.tolist()}
        assert len(seen) == 2 and used <= rows
        assert len(used) == (10 if unit == 0 else 32)  # a row a class, then a row an image


def violate(patch: pytest.MonkeyPatch, unit: int, attempts: int) -> None:
    """Let the first attempts at a unit violate weak learning."""
    judge, left = Boosting.judge, [attempts]

    def judges(self: Boosting, o: torch.Tensor) -> Verdict:
        verdict = judge(self, o)
        if self.units == unit - 1 and left[0] > 0:
            left[0] -= 1
            object.__setattr__(verdict, "holds", False)
        return verdict

    patch.setattr(Boosting, "judge", judges)


def test_a_unit_that_violates_weak_learning_is_retrained_once(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        violate(patch, 2, 1)
        grow(tmp_path, "--no-refine")
    said = capsys.readouterr().out
    assert "unit 2 violates weak learning: edge " in said and "it is trained once more" in said
    units = lines(tmp_path / "metrics.jsonl")
    assert [unit["attempts"] for unit in units] == [1, 2, 1]
    assert [len(unit["violating_edges"]) for unit in units] == [0, 1, 0]
    # It began from other weights: what it had learnt is not what another run keeps.
    kept, other = weights_of(finished), weights_of(tmp_path)
    assert torch.equal(kept["units.0.conv1.weight"], other["units.0.conv1.weight"])
    assert not torch.allclose(kept["units.1.conv1.weight"], other["units.1.conv1.weight"])


def test_a_unit_that_violates_it_twice_ends_the_growth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        violate(patch, 2, 2)
        summary = grow(tmp_path)
    said = capsys.readouterr().out
    assert "the growth ends without it" in said and "its first 1 units" in said
    assert summary["units"] == 1 and "unit 2 violated weak learning twice" in summary["ended"]
    assert {name.split(".")[1] for name in weights_of(tmp_path / "refined") if "units" in name} == {
        "0"
    }
    # The end is the checkpoint's: a resume does not try again.
    assert grow(tmp_path)["units"] == 1


def test_an_edge_of_1_ends_the_growth(tmp_path: Path) -> None:
    judge = Boosting.judge

    def judges(self: Boosting, o: torch.Tensor) -> Verdict:
        if self.units == 1:
            o.copy_(torch.eye(10)[self.labels] * 2 - 1)
        return judge(self, o)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Boosting, "judge", judges)
        summary = grow(tmp_path, "--no-refine")
    assert summary["units"] == 2 and "edge of 1: there is nothing left" in summary["ended"]
    assert lines(tmp_path / "metrics.jsonl")[-1]["alpha"] == pytest.approx(7.254, abs=1e-3)


def fails(
    argv: list[str], capsys: pytest.CaptureFixture[str], *words: str, status: int = 1
) -> None:
    """The run ends with this status and one line that holds these words."""
    capsys.readouterr()
    assert boost.main(argv) == status
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: "), said
    for word in words:
        assert word in said[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--block", "postact"], ["--block postact", "preact"]),
        (["--drop-prob", "0.5"], ["--drop-prob 0.5"]),
        (["--meprop-ratio", "0.5"], ["--meprop-ratio 0.5"]),
        (["--micro-batches", "2"], ["--micro-batches 2", "torchrun"]),
        (["--unit-epochs", "0"], ["--unit-epochs 0", "1 or more"]),
        (["--units", "4"], ["--units 4", "1 to 3", "--depth 8"]),
        (["--min-gamma", "1"], ["--min-gamma 1.0"]),
        (["--refine-lr", "0"], ["--refine-lr 0.0", "positive"]),
        (["--cache-host-gb", "-1"], ["--cache-host-gb -1.0"]),
        (["--cache-dir", "x", "--features", "fresh"], ["--cache-dir x", "cached"]),
        (["--boost-loss", "mse"], ["--boost-loss", "cost"]),
    ],
)
def test_bad_flags(
    flags: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails([*TINY, *flags, "--out", str(tmp_path / "out")], capsys, *words, status=2)
    assert not (tmp_path / "out").exists()


def test_a_file_of_flags_may_hold_those_of_a_growth(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("unit_epochs = 7\ndepth = 14\n")
    config = parse(["--config", str(tmp_path / "run.toml"), "--depth", "8"])
    assert (config.unit_epochs, config.depth) == (7, 8)
    assert str(config.out_dir) == "runs/cifar10-boost8"


def test_checkpoints_that_do_not_fit(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = finished / "checkpoint.pt"
    before = source.read_bytes()
    here = [*TINY, "--resume", str(source), "--out", str(tmp_path / "out")]
    fails([*here, "--depth", "14"], capsys, "--depth 8", "--depth 14")
    fails([*here, "--width", "8"], capsys, "--width 4", "--width 8")
    fails([*here, "--units", "2"], capsys, "has no --units", "--units 2", "leave out --units")
    with pytest.raises(TrainError, match=r"state is of \[40, 10\] images and classes, not"):
        growth_of("--train-size", "41").load_state_dict(checkpoint.load(source))
    fails([*here, "--image-size", "16"], capsys, "other data", "image_size")
    fails([*TINY, "--out", str(finished), "--resume", "none"], capsys, "holds a run already")
    # Each program knows its own.
    refined = str(finished / "refined" / "checkpoint.pt")
    words = ("a checkpoint of train/main.py, not of train/boost.py",)
    fails([*TINY, "--resume", refined, "--out", str(tmp_path / "out")], capsys, *words)
    flags = [*DATA, "--depth", "8", "--width", "4", "--batch-size", "16"]
    assert training.main([*flags, "--out", str(finished)]) == 1
    assert "a checkpoint of train/boost.py, not of train/main.py" in capsys.readouterr().err
    (tmp_path / "out" / "checkpoint.pt").write_bytes(before[: len(before) // 2])
    fails([*TINY, "--out", str(tmp_path / "out")], capsys, "damaged or cut short")
    assert source.read_bytes() == before


def draw_folder(root: Path, train: dict[str, int]) -> None:
    for part, counts in (("train", train), ("test", {"a": 5, "b": 5})):
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (8, 8), (ord(name), i, 0))
                image.save(root / part / name / f"{i}.png")


def test_images_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_folder(tmp_path / "images", {"a": 16, "b": 16})
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--device", "cpu"]
    flags += ["--depth", "8", "--width", "4", "--batch-size", "8", "--out", str(tmp_path / "out")]
    train = tmp_path / "images" / "train"
    shutil.rmtree(train / "b")
    fails(flags, capsys, "a folder of images for each class, at least 2")
    (train / "b").mkdir()
    fails(flags, capsys, "class folder", "train/b")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_training_labels_of_one_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_one(*args: Any, **kwargs: Any) -> Any:
        data = load(*args, **kwargs)
        data.train.labels.fill_(3)
        return data

    load = training.load_data
    monkeypatch.setattr(training, "load_data", of_one)
    out = ["--out", str(tmp_path / "out")]
    fails([*TINY, *out], capsys, "2 classes or more; all 40 of them are of one class")


def test_nothing_that_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    fails([*TINY, *out, "--min-gamma", "0.99"], capsys, "nothing is grown: unit 1", "--unit-epochs")
    fails([*TINY, *out, "--min-gamma", "0.99"], capsys, "nothing is grown: unit 1")


def test_a_full_disk_loses_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The unit before is in its checkpoint, and the growth goes on from it elsewhere."""
    out = tmp_path / "out"
    flags = [*TINY, "--out", str(out), "--no-refine"]
    disk = ["--cache-host-gb", "0", "--cache-device-gb", "0", "--cache-dir", str(tmp_path / "c")]
    fails([*TINY, "--out", str(tmp_path / "no"), *disk[:4]], capsys, "more than the memory")
    free = iter([10**9, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
        fails([*flags, *disk], capsys, "free the disk", str(tmp_path / "c"))
    assert not os.listdir(tmp_path / "c")
    assert [unit["unit"] for unit in lines(out / "metrics.jsonl")] == [1]
    assert boost.main(flags) == 0
    assert same(weights_of(out), weights_of(finished))


def test_divergence_stops_the_growth_and_keeps_the_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    fails([*TINY, *out, "--lr", "1e30"], capsys, "diverged", "--lr 1e+30")
    assert checkpoint.load(tmp_path / "out" / "checkpoint.pt")["units"] == 0
    grow(tmp_path / "out", "--no-refine")
    assert same(weights_of(tmp_path / "out"), weights_of(finished))
