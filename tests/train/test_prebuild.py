"""--prebuild: a run trains as it would without, and what is refused."""

from pathlib import Path
from typing import Any

import prebuild
import pytest
import torch
from config import parse
from device_step import DeviceStep
from main import main
from records import Progress
from torch import Tensor
from trainer import Trainer
from workers import Workers

from fastres.data import split, synthetic
from fastres.ops import _register

TINY = [
    "--dataset", "synthetic", "--image-size", "8", "--depth", "8", "--width", "16",
    "--train-size", "64", "--batch-size", "16", "--epochs", "2",
]  # fmt: skip
CPU = [*TINY, "--device", "cpu", "--fused"]
RUNS: dict[str, list[str]] = {
    "units": ["--fused-units"],
    "units, fp16": ["--fused-units", "--precision", "fp16"],
    "subset": ["--fused-units", "--drop-prob", "0.5", "--drop-mode", "subset"],
    "everything": [
        "--precision", "pure-fp16", "--meprop-ratio", "0.5", "--drop-prob", "0.5",
        "--drop-mode", "row",
    ],
    "yellowfin": ["--optimizer", "yellowfin"],
    "micro-batches": ["--micro-batches", "2"],
}  # fmt: skip


def trained(flags: list[str], built: list[Any] | None, on_device: bool) -> list[Tensor]:
    """Loss, parameters and buffers after an epoch; built: launches are collected first."""
    config = parse([*CPU, *flags])
    trainer = Trainer(config, Workers(0, 1, 0, torch.device("cpu")), split(synthetic(64, 20, 8)))
    if on_device:
        trainer.device_step = DeviceStep(trainer)
    if built is not None:
        count, seconds = prebuild.prebuild(trainer, "sm_90", 1)
        assert count == len(built) > 15 and seconds > 0
    record = trainer.train_epoch(Progress(trainer.steps_per_epoch, 1, 1, 0, False))
    return [torch.tensor(record["loss"]), *trainer.model.state_dict().values()]


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_as_without(
    name: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the CPU's own path, on which a dry run leaves nothing."""
    monkeypatch.setattr(_register, "INTERPRET", False)
    built: list[Any] = []

    def collect(launches: list[Any], target: str, threads: int) -> int:
        assert (target, threads) == ("sm_90", 1)
        built.extend(launches)
        return len(launches)

    monkeypatch.setattr(prebuild, "build_kernels", collect)
    plain = trained(RUNS[name], None, on_device)
    after = trained(RUNS[name], built, on_device)
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--device", "cpu", "--fused"], 2, "--prebuild True: expected a GPU, and no --device cpu"),
        ([], 2, "--prebuild True: expected --fused beside it"),
        (["--fused"], 1, "--prebuild: builds kernels for a GPU, this run is on cpu"),
    ],
)
def test_what_is_refused(
    flags: list[str],
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*TINY, *flags, "--prebuild", "--out", str(tmp_path / "out")]) == status
    assert words in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--device", "cuda", "--fused", "--fused-units"]
    plain, built = tmp_path / "plain", tmp_path / "built"
    assert main([*flags, "--out", str(plain)]) == 0
    assert main([*flags, "--prebuild", "--out", str(built)]) == 0
    assert "built    " in capsys.readouterr().out
    states = [torch.load(out / "checkpoint.pt")["model"] for out in (plain, built)]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
