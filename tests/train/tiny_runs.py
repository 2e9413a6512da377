"""Runs of the training program inside a test: made, interrupted, and what they leave compared."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import torch
from config import parse
from main import load_data
from torch import Tensor
from trainer import Trainer
from workers import Workers

from fastres.ops import _register

_ROOT = Path(__file__).parents[2]


@contextmanager
def on_native_path() -> Iterator[None]:
    """What a CPU without the interpreter runs; and no run's settings left for the next test."""
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)  # at this size more of them wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_register, "INTERPRET", False)
        yield
    # conftest sets anew what --deterministic changes.
    torch.backends.cudnn.benchmark = benchmark
    torch.set_num_threads(threads)


@contextmanager
def interrupted() -> Iterator[None]:
    """The run inside ends as soon as it has saved its first epoch."""
    save = checkpoint.save

    def stops(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if state["epoch"] > 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", stops)
        yield


def run_each(processes: int, runs: list[list[str]]) -> None:
    """These runs, one after the other, by real processes that are started once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(Path(__file__).parent / "run_each.py")]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(_ROOT), str(_ROOT / "train"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [*command, json.dumps(runs)], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


def trainer_of(flags: list[str], device: str = "cpu") -> Trainer:
    config, place = parse([*flags, "--device", device]), torch.device(device)
    return Trainer(config, Workers(0, 1, 0, place), load_data(config).to(place))


def assert_no_wait_on_a_gpu(flags: list[str]) -> None:
    """Three steps to warm up, and one in which a wait for the GPU is an error."""
    trainer = trainer_of(flags, "cuda")
    trainer.network.train()
    index = torch.arange(12, device="cuda")
    for step in range(3):
        trainer.train_step(index, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(index, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def weights_of(out: Path) -> dict[str, Tensor]:
    return checkpoint.load(out / "checkpoint.pt")["model"]


def tensors_of(out: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, running statistics, and the optimizer's state."""
    state = checkpoint.load(out / "checkpoint.pt")
    optimizer = {
        f"{name} of {key}": t
        for key, values in state["optimizer"]["state"].items()
        for name, t in values.items()
        if isinstance(t, Tensor)
    }
    assert optimizer
    return state["model"] | optimizer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
