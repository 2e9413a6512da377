"""train/boost.py in one process: a growth from start to end."""

import json
from pathlib import Path
from typing import Any

import boost
import checkpoint
import pytest
import torch
import unit_trainer
from PIL import Image
from train.tiny_growths import TINY, grow, growth_of, lines, silent
from train.tiny_runs import same, weights_of
from trainer import Trainer
from unit_trainer import UnitTrainer

from fastres.boost import (
    Boosting,
    FeatureCache,
    Verdict,
    boosting_loss,
    outputs,
    training_costs,
    weak_unit,
)

pytestmark = pytest.mark.usefixtures("native_path")


def test_a_run_leaves_everything_behind(grown: Path) -> None:
    names = {"checkpoint.pt", "config.json", "growth.png", "metrics.jsonl", "summary.json"}
    assert {path.name for path in grown.iterdir()} == names | {"refined"}
    units = lines(grown / "metrics.jsonl")
    assert [unit["unit"] for unit in units] == [1, 2, 3]
    for unit in units:
        for name in ("edge", "gamma", "gamma_squared", "alpha", "z", "bound", "covariance"):
            assert isinstance(unit[name], float), name
        for name in ("train", "dev", "test"):
            assert 0 <= unit[f"{name}_accuracy"] <= 100
        assert unit["seconds"] > 0 and unit["memory_bytes"] > 1e6
    assert [unit["cache_place"] for unit in units] == ["none", "host", "host"]
    assert [unit["cache_bytes"] for unit in units] == [0, 40 * 4 * 64 * 4, 40 * 8 * 16 * 4]
    summary = json.loads((grown / "summary.json").read_text())
    assert summary["units"] == 3 and summary["epochs"] == 1
    assert summary["ended"] == "all 3 units are grown"
    refined = json.loads((grown / "refined" / "summary.json").read_text())
    for name in ("train_accuracy", "dev_accuracy", "test_accuracy"):
        assert summary["before_refinement"][name] == units[-1][name]
        assert summary[name] == refined[name]
    seconds = summary["growth_seconds"] + summary["refinement_seconds"]
    assert summary["training_seconds"] == pytest.approx(seconds) and seconds > 0
    with Image.open(grown / "growth.png") as curve:
        assert curve.size[0] > 500 and curve.convert("L").getextrema() == (0, 255)


def test_resume_goes_on_bitwise(grown: Path, tmp_path: Path) -> None:
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
    assert same(weights_of(tmp_path), weights_of(grown))
    assert same(weights_of(tmp_path / "refined"), weights_of(grown / "refined"))
    a, b = (checkpoint.load(out / "checkpoint.pt")["boosting"] for out in (tmp_path, grown))
    assert torch.equal(a.pop("state"), b.pop("state"))
    assert torch.equal(a.pop("contribution"), b.pop("contribution")) and a == b
    times = {"seconds", "training_seconds", "cache_seconds", "evaluation_seconds", "memory_bytes"}
    for x, y in zip(lines(tmp_path / "metrics.jsonl"), lines(grown / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in x.items() if k not in times} == {
            k: v for k, v in y.items() if k not in times
        }


def test_resuming_a_finished_run_trains_nothing_more(
    grown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights_of(grown), (grown / "metrics.jsonl").read_text()
    grow(grown)
    said = capsys.readouterr().out
    assert "resume   after unit 3 of 3" in said and "nothing to train" in said
    assert same(weights_of(grown), before[0])
    assert (grown / "metrics.jsonl").read_text() == before[1]


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_refinement_begins_with_a_share_of_the_grown_weights(share: float, tmp_path: Path) -> None:
    """Bitwise, in the usual program's own checkpoint; the rest is a new network's."""
    flags = ["--refine-share", str(share)]
    save = checkpoint.save

    def stops(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if path.parent.name == "refined":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", stops)
        boost.main([*TINY, *flags, "--out", str(tmp_path / "cut")])
    state = checkpoint.load(tmp_path / "cut" / "refined" / "checkpoint.pt")
    growth = growth_of(*flags)
    new = Trainer(growth.config.of_refinement(3), growth.workers, growth.data).model.state_dict()
    want = {
        name: new[name].lerp(w, share) if w.is_floating_point() else w
        for name, w in weights_of(tmp_path / "cut").items()
    }
    assert state["epoch"] == 0 and same(state["model"], want)
    assert share < 1 or same(state["model"], weights_of(tmp_path / "cut"))
    for name in ("cut", "whole"):
        grow(tmp_path / name, *flags)
    assert same(weights_of(tmp_path / "cut/refined"), weights_of(tmp_path / "whole/refined"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--features", "fresh"],
        ["--boost-loss", "exp"],
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


def test_features_on_disk_are_those_in_memory(grown: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = ["--cache-host-gb", "0", "--cache-device-gb", "0", "--cache-dir", str(cache)]
    with pytest.MonkeyPatch.context() as patch:
        # By the thread that fetches ahead, and by it alone.
        patch.setattr(FeatureCache, "take", lambda *_: pytest.fail("fetched by the training loop"))
        grow(tmp_path / "out", *flags, "--no-refine")
    assert same(weights_of(tmp_path / "out"), weights_of(grown))
    places = [unit["cache_place"] for unit in lines(tmp_path / "out" / "metrics.jsonl")]
    assert places == ["none", "disk", "disk"] and not list(cache.iterdir())
    assert not (tmp_path / "out" / "refined").exists()


def test_outputs_from_the_cache_are_those_from_the_images() -> None:
    growth = growth_of()
    growth.grow(silent())
    growth.grow(silent())
    growth.frozen.advance()
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
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    kept, other = weights_of(grown), weights_of(tmp_path)
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
