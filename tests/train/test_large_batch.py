"""Large batches: workers that one process stands for, zero-init, weight decay by kind."""

import copy
import json
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from config import parse
from errors import TrainError
from main import main, train
from micro_batches import MicroBatches
from ops.gradient_lists import ReadsOnTheHost
from tolerances import DDP_ABSOLUTE, DDP_HALF_ABSOLUTE
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from train.tiny_runs import assert_no_wait_on_a_gpu, interrupted, run_each, tensors_of, trainer_of
from trainer import Trainer
from workers import Workers, usable_cpus

from fastres.amp import LossScaler
from fastres.ops import StepGenerator

# 48 images in batches of 12: four steps an epoch, shared evenly by two, three, four or six workers.
TINY = [
    "--dataset", "synthetic", "--train-size", "48", "--image-size", "8", "--device", "cpu",
    "--depth", "8", "--width", "4", "--batch-size", "12", "--epochs", "2", "--deterministic",
    "--eval-every", "2",
]  # fmt: skip
DROP = ["--drop-prob", "0.5", "--drop-schedule", "uniform", "--drop-mode"]
METHODS = {
    "plain": ["--fused"],
    "not fused": ["--no-decay-norm-bias", "--block", "postact"],
    "large batch": ["--fused", "--zero-init", "--no-decay-norm-bias", "--warmup-epochs", "1"],
    "batch": ["--fused", *DROP, "batch"],
    "row": ["--fused", *DROP, "row"],
    "subset, meProp": ["--fused", *DROP, "subset", "--meprop-ratio", "0.5"],
    "fp16": ["--fused", "--precision", "fp16"],
    "pure-fp16": ["--fused", "--precision", "pure-fp16"],
}
# By processes: methods and micro-batches a process.
REAL = {
    2: [*((method, 1) for method in METHODS), ("row", 2), ("fp16", 3)],
    3: [(method, 1) for method in ("plain", "batch", "row", "subset, meProp")],
}

pytestmark = pytest.mark.usefixtures("native_path")


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("processes", REAL)
def test_micro_batches_are_processes(processes: int, tmp_path: Path) -> None:
    """Whole runs of real processes, and emulated ones that were interrupted and resumed."""
    # As many as each process takes: more of them add in another order.
    torch.set_num_threads(max(1, usable_cpus() // processes))
    flags: dict[tuple[str, int], list[str]] = {}
    for method, each in REAL[processes]:
        out = tmp_path / f"{method} {each}"
        flags[method, each] = [*TINY, *METHODS[method], "--micro-batches", str(each)]
        flags[method, each] += ["--out", str(out)]
    run_each(processes, list(flags.values()))
    for (method, each), real in flags.items():
        emulated = str(processes * each)
        out = tmp_path / f"{method} {each} emulated"
        halved = [*real, "--micro-batches", emulated, "--out", str(out)]
        with interrupted():
            main(halved)
        assert main(halved) == 0
        assert checkpoint.load(out / "checkpoint.pt")["epoch"] == 2
        a, b = tensors_of(tmp_path / f"{method} {each}"), tensors_of(out)
        error = apart(a, b)
        tolerance = DDP_HALF_ABSOLUTE if "fp16" in method else DDP_ABSOLUTE
        # Sums of two are the same in any order.
        assert error <= (0.0 if (processes, each) == (2, 1) else tolerance), (method, error)
        # Of the metrics of both epochs too: losses are means of means, accuracies counts.
        records = [
            [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
            for where in (tmp_path / f"{method} {each}", out)
        ]
        for x, y in zip(*records, strict=True):
            assert x["loss"] == pytest.approx(y["loss"], rel=tolerance)
            assert x.get("skipped_steps") == y.get("skipped_steps")
            if error == 0:
                assert x.get("test_accuracy") == y.get("test_accuracy")


def test_workers_are_not_one_large_batch(tmp_path: Path) -> None:
    """Else the equality above would show nothing: BatchNorm and draws are each worker's own."""
    found = []
    for count in ("1", "2", "3"):
        flags = [*TINY, *METHODS["row"], "--micro-batches", count]
        assert main([*flags, "--out", str(tmp_path / count)]) == 0
        found.append(tensors_of(tmp_path / count))
    for a, b in ((0, 1), (1, 2)):
        assert apart(found[a], found[b]) > 100 * DDP_ABSOLUTE
    summary = json.loads((tmp_path / "3" / "summary.json").read_text())
    assert summary["workers"] == 3 and [h["processes"] for h in summary["hardware"]] == [1]


def test_a_skipped_step_leaves_every_workers_statistics() -> None:
    index = torch.arange(12)
    trainer = trainer_of([*TINY, *METHODS["fp16"], "--micro-batches", "3"])
    trainer.network.train()
    trainer.train_step(index, 0)
    before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    statistics = [s.flat.clone() for s in trainer.micro_batches._statistics]
    assert any(not torch.equal(s[0], s[1]) for s in statistics)
    scaler: Any = trainer.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**40})
    _, stepped = trainer.train_step(index, 1)
    assert stepped is not None and not stepped
    for name, t in trainer.model.state_dict().items():
        assert torch.equal(t, before[name]), name
    for s, was in zip(trainer.micro_batches._statistics, statistics, strict=True):
        assert torch.equal(s.flat, was)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1.0})
    _, stepped = trainer.train_step(index, 2)
    assert stepped
    for s, was in zip(trainer.micro_batches._statistics, statistics, strict=True):
        assert (s.flat != was).any(1).all()  # each worker's


def test_a_step_of_micro_batches_reads_nothing_on_the_host() -> None:
    methods = [*METHODS["subset, meProp"], "--precision", "fp16", "--no-decay-norm-bias"]
    trainer = trainer_of([*TINY, *methods, "--micro-batches", "2"])
    trainer.network.train()
    index = torch.arange(12)
    trainer.train_step(index, 0)
    with ReadsOnTheHost():  # raises
        loss, stepped = trainer.train_step(index, 1)
    assert loss.isfinite() and stepped is not None and bool(stepped)


@pytest.mark.gpu
def test_a_step_of_micro_batches_never_waits_for_a_gpu() -> None:
    methods = [*METHODS["subset, meProp"], "--precision", "fp16", "--no-decay-norm-bias"]
    assert_no_wait_on_a_gpu([*TINY, *methods, "--micro-batches", "2"])


def test_gradients_are_reduced_once_a_step() -> None:
    """By the last micro-batch; the sum would come out right without."""
    linear = torch.nn.Linear(4, 3)
    model = torch.nn.Sequential(linear, torch.nn.BatchNorm1d(3))
    reduced = []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is the default group

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = DistributedDataParallel(model)
        network.register_comm_hook(None, hook)
        scaler = LossScaler(enabled=False)
        micro_batches = MicroBatches(3, 0, network, model, StepGenerator(), scaler)
        x = torch.randn(12, 4)
        for part in micro_batches.each(torch.arange(12)):
            assert not reduced
            network(x[part]).pow(3).sum().backward()
        assert reduced == [0]
    finally:
        dist.destroy_process_group()
    assert linear.weight.grad is not None
    weight = linear.weight.detach().clone().requires_grad_()
    total = torch.zeros(3, 4)
    for part in torch.arange(12).view(3, 4):
        y = F.batch_norm(F.linear(x[part], weight, linear.bias), None, None, training=True)
        total += torch.autograd.grad(y.pow(3).sum(), weight)[0] / 3
    torch.testing.assert_close(linear.weight.grad, total)


def test_batches_that_do_not_divide_are_refused_in_words() -> None:
    with pytest.raises(TrainError, match="--micro-batches 5: expected a divisor of --batch-size 1"):
        parse([*TINY, "--micro-batches", "5"])
    with pytest.raises(TrainError, match="--micro-batches 0: expected 1 or more"):
        parse([*TINY, "--micro-batches", "0"])
    config = parse([*TINY, "--micro-batches", "6"])
    words = "--batch-size 12: 4 processes of 6 micro-batches cannot .*; choose a multiple of 24"
    with pytest.raises(TrainError, match=words):
        train(config, Workers(0, 4, 0, torch.device("cpu")))


def test_changed_flags_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--fused", "--epochs", "1", "--out", str(tmp_path)]
    assert main([*flags, "--micro-batches", "2"]) == 0
    said = capsys.readouterr().out
    assert "workers  2, emulated: 2 micro-batches in each process, of 6 images" in said
    changed = ["--epochs", "2", "--zero-init", "--no-decay-norm-bias", "--micro-batches", "3"]
    assert main([*flags, *changed]) == 0
    said = capsys.readouterr().out
    assert "changed  micro_batches: 2 -> 3" in said
    assert "changed  decay_norm_bias: True -> False" in said
    assert "changed  zero_init: False -> True (to no effect" in said


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
@pytest.mark.parametrize("decays", [True, False])
def test_decay_spares_batch_norm_and_biases(fused: str, decays: bool) -> None:
    flag = "--decay-norm-bias" if decays else "--no-decay-norm-bias"
    trainer = trainer_of([*TINY, fused, flag, "--weight-decay", "0.25"])
    names = {p: name for name, p in trainer.model.named_parameters()}
    for p in names:
        with torch.no_grad():
            p.fill_(1.0)
        p.grad = torch.zeros_like(p)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.5
    trainer.optimizer.step()
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(names)
    for p, name in names.items():
        spared = not decays and ("bn" in name or name.endswith(".bias"))
        assert torch.equal(p, torch.full_like(p, 1.0 if spared else 0.875)), name


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_momentum_finds_its_parameter_when_the_groups_change(fused: str) -> None:
    """Both ways, and from one optimizer to the other."""
    index = torch.arange(12)

    def momentum(trainer: Trainer) -> dict[str, torch.Tensor]:
        state = trainer.optimizer.state
        return {n: state[p]["momentum_buffer"] for n, p in trainer.model.named_parameters()}

    for flags in ([fused], [fused, "--no-decay-norm-bias"]):
        trainer = trainer_of([*TINY, *flags])
        trainer.network.train()
        trainer.train_step(index, 0)
        state = copy.deepcopy(trainer.state_dict())
        for others in (["--fused"], ["--no-fused", "--no-decay-norm-bias"], ["--no-fused"]):
            other = trainer_of([*TINY, *others])
            other.load_state_dict(copy.deepcopy(state))
            found = momentum(other)
            for name, t in momentum(trainer).items():
                assert torch.equal(found[name], t), (flags, others, name)
            decays = [group["weight_decay"] for group in other.optimizer.param_groups]
            assert decays == ([1e-4, 0.0] if "--no-decay-norm-bias" in others else [1e-4])


def test_zero_init_starts_from_the_shortcuts_and_trains() -> None:
    trainer = trainer_of([*TINY, "--fused", "--zero-init"])
    weights = [w for n, w in trainer.model.named_parameters() if n.endswith("conv2.weight")]
    assert len(weights) == 3 and not any(w.any() for w in weights)
    trainer.network.train()
    trainer.train_step(torch.arange(12), 0)
    assert all(w.any() for w in weights)
    x = torch.randn(2, 3, 8, 8)
    assert F.softmax(trainer.model.eval()(x), 1).isfinite().all()
