"""train/main.py under a real torchrun, with gloo: equality, resume after a kill, errors."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from schedule import lr_factor
from tolerances import DDP_ABSOLUTE
from train.tiny_runs import run_each, trainer_of

from fastres.ops import StepGenerator, shuffle

ROOT = Path(__file__).parents[2]
# 48 images in batches of 12: four steps an epoch, shared evenly by two or three processes.
FLAGS = [
    "--dataset", "synthetic", "--train-size", "48", "--image-size", "16", "--device", "cpu",
    "--fused", "--depth", "20", "--width", "4", "--batch-size", "12", "--deterministic",
]  # fmt: skip
# Where it takes all processes to be right: none may wait for a gradient that never comes.
METHODS = {
    "plain": [],
    "batch": ["--drop-prob", "0.5", "--drop-schedule", "uniform", "--drop-mode", "batch"],
    "row": ["--drop-prob", "0.5", "--drop-schedule", "uniform", "--drop-mode", "row"],
    "yellowfin": ["--optimizer", "yellowfin"],
    "subset, meProp": ["--drop-prob", "0.5", "--drop-mode", "subset", "--meprop-ratio", "0.25"],
}


def start(processes: int, flags: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(ROOT / "train" / "main.py"), *flags]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["XDG_CACHE_HOME"] = str(Path(flags[flags.index("--out") + 1]).parent / "cache")
    return subprocess.Popen(
        command, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(processes: int, flags: list[str]) -> tuple[int, str, str]:
    process = start(processes, flags)
    # A rank left hanging in a collective would outlast this.
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def one_process(flags: list[str], shares: int) -> dict[str, Any]:
    """What `shares` processes compute, by one: each share by itself, the gradients averaged."""
    trainer = trainer_of(flags)
    config = trainer.config
    model = trainer.model.train()
    statistics = [copy.deepcopy(dict(model.named_buffers())) for _ in range(shares)]
    size = config.batch_size // shares
    for epoch in range(config.epochs):
        order = shuffle(len(trainer.data.train), config.seed, epoch, "cpu")
        for i in range(trainer.steps_per_epoch):
            step = epoch * trainer.steps_per_epoch + i
            for rank, buffers in enumerate(statistics):
                draws = StepGenerator(config.seed, rank)
                model.draw_from(draws)
                draws.set_step(step)
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
                first = i * config.batch_size + rank * size
                index = order[first : first + size]
                x = trainer._images(trainer.data.train, index, seed=config.seed, epoch=epoch)
                loss = F.cross_entropy(model(x), trainer.data.train.labels[index])
                (loss / shares).backward()
                statistics[rank] = {n: b.clone() for n, b in model.named_buffers()}
            factor = lr_factor(
                step,
                steps_per_epoch=trainer.steps_per_epoch,
                epochs=config.epochs,
                warmup_epochs=0,
                schedule="step",
            )
            trainer.optimizer.param_groups[0]["lr"] = config.peak_lr * factor
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        for name, buffer in model.named_buffers():  # averaged before each evaluation
            if buffer.is_floating_point():
                mean = torch.stack([b[name] for b in statistics]).mean(0)
                for buffers in statistics:
                    buffers[name].copy_(mean)
    return {n: p.detach() for n, p in model.named_parameters()} | statistics[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags of a finished run by method: of three processes, and of two that did all others."""
    out = tmp_path_factory.mktemp("finished")
    flags = {
        method: [*FLAGS, *more, "--epochs", "1", "--out", str(out / method)]
        for method, more in METHODS.items()
    }
    status, said, err = run(3, flags["plain"])
    assert status == 0, err
    assert "3 process(es)" in said
    run_each(2, [flags[method] for method in METHODS if method != "plain"])
    return flags


@pytest.mark.parametrize("method", METHODS)
def test_processes_train_what_one_would(
    method: str, finished: dict[str, list[str]], native_path: None
) -> None:
    flags, processes = finished[method], 3 if method == "plain" else 2
    out = Path(flags[-1])
    state = checkpoint.load(out / "checkpoint.pt")
    found = state["model"]
    wanted = one_process(flags, processes)
    assert found.keys() == wanted.keys()
    initial = one_process([*flags, "--lr", "1e-30"], processes)
    moved = 0.0
    for name, tensor in found.items():
        error = float((tensor.double() - wanted[name].double()).abs().max())
        assert error <= DDP_ABSOLUTE, (name, error)
        moved = max(moved, float((tensor.double() - initial[name].double()).abs().max()))
    assert moved > 100 * DDP_ABSOLUTE  # training moved them by far more than the tolerance

    # Every image counted once: one process finds the same accuracies, to the last image.
    alone = trainer_of(flags)
    alone.load_state_dict(state)
    summary = json.loads((out / "summary.json").read_text())
    assert [kind["processes"] for kind in summary["hardware"]] == [processes]
    assert {name: summary[name] for name in alone.accuracies()} == alone.accuracies()


def test_more_processes_than_images_to_evaluate(tmp_path: Path) -> None:
    for part, count in (("train", 12), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count // 2):
                image = Image.new("RGB", (8, 8), (100 if name == "a" else 200, i, 0))
                image.save(tmp_path / "images" / part / name / f"{i}.png")
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--device", "cpu"]
    flags += ["--depth", "8", "--width", "4", "--batch-size", "6", "--epochs", "1"]
    status, _, err = run(3, [*flags, "--out", str(tmp_path / "out")])  # one image in dev, in test
    assert status == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {summary["dev_accuracy"], summary["test_accuracy"]} <= {0.0, 100.0}


def test_kill_in_the_middle_of_an_epoch_and_resume(tmp_path: Path) -> None:
    """Three processes, since with two any order of summing is the same."""
    flags = [*FLAGS, "--epochs", "3", "--train-size", "480", "--image-size", "8"]
    flags += ["--drop-prob", "0.3", "--drop-mode", "subset"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, err = run(3, [*flags, "--out", str(whole)])
    assert status == 0, err

    process = start(3, [*flags, "--out", str(killed)])
    deadline = time.monotonic() + 120
    path = killed / "checkpoint.pt"
    while not (path.exists() and checkpoint.load(path)["epoch"] > 0):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # into the second epoch
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert checkpoint.load(path)["epoch"] < 3

    status, out, err = run(3, [*flags, "--out", str(killed)])
    assert status == 0, err
    assert "resume   after epoch" in out
    a, b = (checkpoint.load(path / "checkpoint.pt") for path in (whole, killed))
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    for key, state in a["optimizer"]["state"].items():
        momentum = b["optimizer"]["state"][key]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], momentum)


def test_an_error_is_one_line_and_leaves_none_hanging(tmp_path: Path) -> None:
    status, _, err = run(2, [*FLAGS, "--batch-size", "15", "--out", str(tmp_path / "out")])
    assert status != 0
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "--batch-size 15" in said[0] and "multiple of 2" in said[0]
    # torchrun's own report counts the ranks that failed by themselves.
    assert err.count("exitcode  : 1") + err.count("exitcode: 1") >= 1

    (tmp_path / "file").touch()
    status, _, err = run(2, [*FLAGS, "--out", str(tmp_path / "file" / "out")])
    assert status != 0
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "cannot be written" in said[0]


@pytest.mark.parametrize("mode", ["batch", "subset"])
def test_best_with_every_op_on_four_processes(mode: str, tmp_path: Path) -> None:
    """train/best.toml and meProp: BatchNorm, stochastic depth, loss scaling and sparse backward.

    "batch", best.toml's own, leaves stochastic_depth_add nothing to do; "subset" takes it too.
    """
    best = ROOT / "train" / "best.toml"
    flags = ["--config", str(best), "--meprop-ratio", "0.5", "--dataset", "synthetic"]
    flags += ["--image-size", "8", "--device", "cpu", "--width", "4", "--train-size", "48"]
    flags += ["--batch-size", "16", "--epochs", "5", "--eval-every", "5", "--out", str(tmp_path)]
    flags += [] if mode == "batch" else ["--drop-mode", mode]
    status, out, err = run(4, flags)
    assert status == 0, err
    assert "4 process(es)" in out
    ops = "batch_norm_relu (19", "meprop_conv2d (21", "unscale, update_scale, sgd_step"
    for words in (*ops, "p = 0.5 unif"):
        assert words in out, out
    assert ("stochastic_depth_add (9 layers)" in out) == (mode == "subset")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 5 and all(record["skipped_steps"] < 3 for record in records)
    assert records[-1]["loss"] < 3
