"""Stochastic depth, meProp and loss scaling in the training program, in one process."""

import copy
import json
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import torch
from main import main
from ops.gradient_lists import ReadsOnTheHost
from train.tiny_runs import assert_no_wait_on_a_gpu, interrupted, same, tensors_of, trainer_of

TINY = [
    "--dataset", "synthetic", "--train-size", "48", "--image-size", "8", "--device", "cpu",
    "--depth", "8", "--width", "4", "--batch-size", "12", "--epochs", "2", "--deterministic",
    "--fused",
]  # fmt: skip
DROP = ["--drop-prob", "0.5", "--drop-schedule", "uniform", "--drop-mode"]
METHODS = {
    "batch": [*DROP, "batch"],
    "row": [*DROP, "row"],
    "subset": [*DROP, "subset"],
    "meprop": ["--meprop-ratio", "0.5"],
    "meprop row": ["--meprop-ratio", "0.1", "--meprop-mode", "row"],
    "fp16": ["--precision", "fp16"],
    "pure-fp16": ["--precision", "pure-fp16"],
    "adam": ["--optimizer", "adam"],
    "yellowfin": ["--optimizer", "yellowfin"],
    "yellowfin fp16": ["--optimizer", "yellowfin", "--precision", "fp16", *DROP, "subset"],
    "all": [*DROP, "subset", "--meprop-ratio", "0.5", "--precision", "fp16"],
}


pytestmark = pytest.mark.usefixtures("native_path")


def state_of(out: Path) -> dict[str, Any]:
    return checkpoint.load(out / "checkpoint.pt")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_resumes_bitwise(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run draws, scales and selects from where it was, as one that went through."""
    flags = [*TINY, *METHODS[method]]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert main([*flags, "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    assert ("p = 0.5 uniform" in said) == ("--drop-prob" in flags)
    assert ("meprop_conv2d (" in said) == ("--meprop-ratio" in flags)
    assert (", unscale" in said) == ("--precision" in flags)
    assert ("sgd_step" in said) == ("--optimizer" not in flags)

    with interrupted():
        main([*flags, "--out", str(halved)])
    assert state_of(halved)["epoch"] == 1
    assert main([*flags, "--out", str(halved)]) == 0
    assert same(tensors_of(whole), tensors_of(halved))
    assert state_of(whole)["scaler"] == state_of(halved)["scaler"]


def test_methods_change_what_is_learnt(tmp_path: Path) -> None:
    """A flag that did nothing would leave the plain run's weights."""
    seen = {}
    for method in ("plain", "batch", "row", "subset", "meprop", "meprop row"):
        assert main([*TINY, *METHODS.get(method, []), "--out", str(tmp_path / method)]) == 0
        seen[method] = state_of(tmp_path / method)["model"]["fc.weight"]
    assert len({t.numpy().tobytes() for t in seen.values()}) == len(seen)


def test_what_yellowfin_tunes_is_in_the_metrics(tmp_path: Path) -> None:
    """Before the schedule's factor, which is `lr`: 1, then a tenth."""
    flags = [*TINY, "--optimizer", "yellowfin", "--epochs", "5"]
    assert main([*flags, "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in records] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    # 20 steps of the 200 of its slow start.
    rates = [r["tuned_lr"] for r in records]
    assert 0 < rates[0] < rates[1] < rates[2] and all(0 <= r["tuned_momentum"] < 1 for r in records)


def test_another_optimizer_is_refused_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--epochs", "1", "--out", str(tmp_path)]
    assert main([*flags, "--optimizer", "yellowfin"]) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    for optimizer in ("sgd", "adam"):
        assert main([*flags, "--epochs", "2", "--optimizer", optimizer]) == 1
        said = capsys.readouterr().err
        assert "--optimizer yellowfin" in said and f"--optimizer {optimizer}" in said
        assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "yellowfin"])
def test_state_follows_a_change_of_memory_format(optimizer: str, fused: str) -> None:
    """Each element of a weight is stepped by its own momentum, however the two lay before."""
    first = trainer_of([*TINY, fused, "--optimizer", optimizer])
    first.network.train()
    for step, index in enumerate(first.batches(0)):
        first.train_step(index, step)
    state = first.state_dict()
    trainers = [
        trainer_of([*TINY, fused, "--optimizer", optimizer, layout])
        for layout in ("--channels-last", "--no-channels-last")
    ]
    for trainer in trainers:
        trainer.load_state_dict(copy.deepcopy(state))
        for n, p in enumerate(trainer.model.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
            p.grad = torch.empty_like(p).copy_(noise)
        trainer.optimizer.step()
    for p, q in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(p, q)  # assert_close's own tolerances: some FMAs, some not


def test_the_schedules_of_stochastic_depth() -> None:
    for schedule, wanted in (("uniform", [0.6] * 6), ("linear", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])):
        flags = ["--depth", "14", "--drop-prob", "0.6", "--drop-schedule", schedule]
        units: Any = trainer_of([*TINY, *flags]).model.units
        assert [unit.drop.p for unit in units] == pytest.approx(wanted)


def test_meprop_keeps_the_last_layer_dense() -> None:
    model = trainer_of([*TINY, "--meprop-ratio", "0.25"]).model
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "weight")}
    assert kinds["fc"] == "Linear"
    convolutions = {kind for name, kind in kinds.items() if "conv" in name or name == "stem"}
    assert convolutions == {"MePropConv2d"}


def test_an_overflow_is_skipped_and_recovered_from() -> None:
    """The scale is set so high that fp16 gradients overflow, and comes down by itself."""
    index = torch.arange(12)
    first = trainer_of([*TINY, "--precision", "fp16"])
    first.network.train()
    first.train_step(index, 0)
    # Resumed, so that what it goes back to are the loaded statistics.
    trainer = trainer_of([*TINY, "--precision", "fp16"])
    trainer.load_state_dict(copy.deepcopy(first.state_dict()))
    trainer.network.train()
    scaler: Any = trainer.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**40})
    before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    momentum = [s["momentum_buffer"].clone() for s in trainer.optimizer.state.values()]
    _, stepped = trainer.train_step(index, 1)
    assert stepped is not None and not stepped
    # Running statistics and their counters too.
    for name, t in trainer.model.state_dict().items():
        assert torch.equal(t, before[name]), name
    for t, s in zip(momentum, trainer.optimizer.state.values(), strict=True):
        assert torch.equal(t, s["momentum_buffer"])
    assert scaler.get_scale() == 2.0**39 and int(scaler.skipped_in_a_row) == 1
    for step in range(2, 40):
        _, stepped = trainer.train_step(index, step)
        assert stepped is not None
        if stepped:
            break
    assert stepped and int(scaler.skipped_in_a_row) == 0
    assert not torch.equal(trainer.model.fc.weight, before["fc.weight"])


def test_a_step_reads_nothing_on_the_host() -> None:
    """Every method at once: what a GPU computes, the host would have to wait for."""
    trainer = trainer_of([*TINY, *METHODS["all"]])
    trainer.network.train()
    index = torch.arange(12)
    trainer.train_step(index, 0)
    before = trainer.model.fc.weight.detach().clone()
    with ReadsOnTheHost():  # raises
        loss, stepped = trainer.train_step(index, 1)
    assert loss.isfinite() and stepped is not None and bool(stepped)
    assert not torch.equal(trainer.model.fc.weight, before)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_a_gpu(method: str) -> None:
    assert_no_wait_on_a_gpu([*TINY, *METHODS[method]])


def test_nothing_but_overflows_stops_the_run_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gradients that are NaN whatever the scale."""
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, one: backward(loss * torch.nan, one))
    flags = [*TINY, "--precision", "fp16", "--epochs", "9", "--max-skipped-steps", "6"]
    assert main([*flags, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "steps in a row were skipped" in said
    assert "--precision fp16" in said and "--lr" in said
    # Six of four steps an epoch: in the second, whose record is not written.
    assert state_of(tmp_path)["epoch"] == 1
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert record["skipped_steps"] == 4 and record["loss_scale"] == 2.0**12
    weight = state_of(tmp_path)["model"]["fc.weight"]
    assert torch.equal(weight, trainer_of(flags).model.fc.weight)


def test_weights_of_another_precision_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--epochs", "1", "--out", str(tmp_path)]
    assert main([*flags, "--precision", "pure-fp16"]) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert main([*flags, "--precision", "fp16"]) == 1
    said = capsys.readouterr().err
    assert "--precision pure-fp16" in said and "--precision fp16" in said
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
