"""The step whose numbers lie on the device: bitwise the host's steps, and what a graph refuses."""

import json
from pathlib import Path

import checkpoint
import pytest
import torch
import trainer as training
from device_step import DeviceStep, EpochLosses
from main import main
from ops.gradient_lists import ReadsOnTheHost
from train.tiny_runs import interrupted, same, tensors_of, trainer_of

TINY = [
    "--dataset", "synthetic", "--train-size", "48", "--image-size", "8",
    "--depth", "8", "--width", "4", "--batch-size", "12", "--epochs", "3", "--deterministic",
]  # fmt: skip
CPU = [*TINY, "--device", "cpu"]
DROP = ["--drop-prob", "0.5", "--drop-schedule", "uniform", "--drop-mode"]
METHODS = {
    "plain": [],
    "fused, warmup": ["--fused", "--warmup-epochs", "0.5", "--schedule", "cosine"],
    "fp16": ["--fused", "--precision", "fp16"],
    "pure-fp16, row": ["--fused", "--precision", "pure-fp16", *DROP, "row"],
    "batch": ["--fused", *DROP, "batch"],
    "subset, meprop": [
        "--fused", *DROP, "subset", "--meprop-ratio", "0.5", "--meprop-warmup-epochs", "1",
    ],
    "micro-batches": ["--fused", "--micro-batches", "2", "--precision", "fp16", *DROP, "row"],
    "adam": ["--optimizer", "adam"],
    "yellowfin": ["--fused", "--optimizer", "yellowfin"],
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("native_path")


def by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trainer takes a DeviceStep, as one with --cuda-graph takes its graphs."""
    init = training.Trainer.__init__

    def with_device_step(self: training.Trainer, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]  # handed on as they came
        self.device_step = DeviceStep(self)

    monkeypatch.setattr(training.Trainer, "__init__", with_device_step)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


def accuracies(out: Path) -> list[list[float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [[v for name, v in record.items() if "accuracy" in name] for record in records]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_bitwise_that_of_the_hosts_steps(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted and resumed between them, too."""
    flags, host, device = [*CPU, *METHODS[method]], tmp_path / "host", tmp_path / "device"
    assert main([*flags, "--out", str(host)]) == 0
    with interrupted():
        main([*flags, "--out", str(device)])
    by_device(monkeypatch)
    assert main([*flags, "--out", str(device)]) == 0
    assert same(tensors_of(host), tensors_of(device))
    assert losses(host) == losses(device)


def test_a_checkpoint_goes_on_with_the_hosts_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate, a tensor in the one, is a number again in the other."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert main([*CPU, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch, interrupted():
        by_device(patch)
        main([*CPU, "--out", str(halved)])
    assert main([*CPU, "--out", str(halved)]) == 0
    assert same(tensors_of(whole), tensors_of(halved))
    (group,) = checkpoint.load(halved / "checkpoint.pt")["optimizer"]["param_groups"]
    assert type(group["lr"]) is float


@pytest.mark.parametrize("method", ["fp16", "pure-fp16, row", "subset, meprop", "yellowfin"])
def test_a_step_reads_nothing_on_the_host(method: str) -> None:
    trainer = trainer_of([*CPU, *METHODS[method]], "cpu")
    trainer.network.train()
    step = DeviceStep(trainer)
    step.begin_epoch(1)
    step()
    before = trainer.model.fc.weight.detach().clone()
    step.decide()
    with ReadsOnTheHost():  # raises
        step.run()
    assert not torch.equal(trainer.model.fc.weight, before)


def test_the_same_calls_go_from_step_to_step() -> None:
    """run() alone, which is what a graph replays, takes the steps of an epoch one by one."""
    flags = [*CPU, "--fused", "--warmup-epochs", "1", *DROP, "row"]
    one, other = trainer_of(flags, "cpu"), trainer_of(flags, "cpu")
    for trainer in (one, other):
        trainer.network.train()
    step = DeviceStep(other)
    for epoch in (0, 2):
        step.begin_epoch(epoch)
        for i, index in enumerate(one.batches(epoch)):
            one.train_step(index, epoch * one.steps_per_epoch + i)
            step.run()
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_learning_rate_is_one_fp32_number_to_both() -> None:
    """PyTorch's fused optimizers read a tensor on a GPU as fp32, and a float as fp64."""
    trainer = trainer_of([*CPU, "--lr", "0.1", "--schedule", "cosine"], "cpu")
    trainer.network.train()
    step = DeviceStep(trainer)
    step.begin_epoch(0)
    (group,) = trainer.optimizer.param_groups
    for i, index in enumerate(trainer.batches(0)):
        step()
        on_device = group["lr"]
        assert on_device.dtype == torch.float32
        trainer.train_step(index, i)
        assert type(group["lr"]) is float and group["lr"] == float(on_device)
        group["lr"] = on_device


def test_a_count_of_right_answers_reads_nothing_on_the_host() -> None:
    trainer = trainer_of(CPU, "cpu")
    trainer.model.eval()
    dev = trainer.data.dev
    with torch.inference_mode(), ReadsOnTheHost():  # raises
        right = trainer.right_answers(dev, torch.arange(100))
    assert right.dtype == torch.int64 and right.shape == ()


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ([], 1),
        # Three units: a pattern of their own is drawn on the device, or decided on the host.
        ([*DROP, "row"], 1),
        ([*DROP, "subset"], 1),
        ([*DROP, "batch"], 8),
        (["--fused", "--meprop-ratio", "0.5", "--meprop-warmup-epochs", "1"], 1),
    ],
    ids=["plain", "row", "subset", "batch", "meprop"],
)
def test_steps_are_of_few_kinds(flags: list[str], kinds: int) -> None:
    """A kind is a graph: what the device draws makes none."""
    trainer = trainer_of([*CPU, *flags], "cpu")
    step = DeviceStep(trainer)
    seen = set()
    for dense in (True, False):
        trainer.meprop_dense = dense
        step.begin_epoch(0)
        seen |= {step.decide() for _ in range(64)}
    assert len(seen) == 2 * kinds
    assert {kind[-1] for kind in seen} == {True, False}


def test_the_mean_leaves_out_what_overflowed() -> None:
    losses = EpochLosses(3, torch.device("cpu"))
    for step, loss in ((0, 2.0), (torch.tensor(1), float("inf")), (torch.tensor(2), 4.0)):
        losses.put(step, torch.tensor(loss))
    assert [float(v) for v in losses.total(finite=True)] == [6.0, 2.0]
    assert [float(v) for v in losses.total(finite=False)] == [float("inf"), 3.0]
    losses.put(1, torch.tensor(torch.nan))
    assert losses.total(finite=False)[0].isnan() and losses.total(finite=True)[0] == 6.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*CPU, "--cuda-graph"], "--cuda-graph True: expected a GPU, and no --device cpu"),
        ([*TINY, "--cuda-graph", "--profile"], "--cuda-graph True: expected no --profile"),
    ],
)
def test_flags_that_a_graph_refuses(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*flags, "--out", str(out)]) == 2
    assert words in capsys.readouterr().err and not out.exists()


def test_a_machine_without_a_gpu_refuses_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--device auto is the CPU there; nothing was loaded."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = tmp_path / "out"
    assert main([*TINY, "--cuda-graph", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "--cuda-graph: a CUDA graph needs a GPU, this run is on cpu" in said
    assert not out.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_graphed_run_is_bitwise_the_ungraphed_one(method: str, tmp_path: Path) -> None:
    flags = [*TINY, "--device", "cuda", "--epochs", "6", *METHODS[method]]
    plain, graphed = tmp_path / "plain", tmp_path / "graphed"
    assert main([*flags, "--out", str(plain)]) == 0
    assert main([*flags, "--cuda-graph", "--out", str(graphed)]) == 0
    assert same(tensors_of(plain), tensors_of(graphed))
    assert losses(plain) == losses(graphed)
    assert accuracies(plain) == accuracies(graphed)


@pytest.mark.gpu
def test_a_replay_is_one_launch() -> None:
    """So that a graph is what ran: a step's kernels come without their launches."""
    trainer = trainer_of([*TINY, "--fused", "--cuda-graph"], "cuda")
    trainer.network.train()
    step = trainer.device_step
    assert step is not None
    step.begin_epoch(0)
    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        step()
        torch.cuda.synchronize()
    launches = [e.name for e in seen.events() if "Launch" in e.name]
    assert launches == ["cudaGraphLaunch"]
