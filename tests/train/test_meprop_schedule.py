"""meProp's dense epochs: the warm start, and those in between."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import torch
from config import parse
from errors import TrainError
from main import load_data, main
from records import Progress
from schedule import meprop_is_dense
from trainer import Trainer
from workers import Workers

from fastres.ops import _register

TINY = [
    "--dataset", "synthetic", "--train-size", "48", "--image-size", "8", "--device", "cpu",
    "--depth", "8", "--width", "4", "--batch-size", "12", "--epochs", "4", "--deterministic",
    "--fused", "--eval-every", "4",
]  # fmt: skip
MEPROP = ["--meprop-ratio", "0.25"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _native_path(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(_register, "INTERPRET", False)
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)  # at this size more of them wait for each other
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.set_num_threads(threads)


def trainer_of(flags: list[str]) -> Trainer:
    config = parse([*TINY, *flags])
    return Trainer(config, Workers(0, 1, 0, torch.device("cpu")), load_data(config))


def epoch_of(trainer: Trainer) -> dict[str, Any]:
    config = trainer.config
    quiet = Progress(trainer.steps_per_epoch, config.batch_size, config.epochs, 0, False)
    return trainer.train_epoch(quiet)


@pytest.mark.parametrize(
    ("warmup_epochs", "dense_every", "dense"),
    [
        (0, None, ""),
        (3, None, "012"),
        (0, 2, "13579"),
        (2, 3, "0147"),
        (1, 8, "08"),
    ],
)
def test_which_epochs_are_dense(warmup_epochs: int, dense_every: int | None, dense: str) -> None:
    is_dense = partial(meprop_is_dense, warmup_epochs=warmup_epochs, dense_every=dense_every)
    assert "".join(str(epoch) for epoch in range(10) if is_dense(epoch)) == dense


def test_a_dense_epoch_is_the_plain_runs_and_a_sparse_one_is_not() -> None:
    """Bitwise, from the same weights."""
    scheduled = trainer_of([*MEPROP, "--meprop-warmup-epochs", "1", "--meprop-dense-every", "2"])
    plain, sparse = trainer_of([]), trainer_of(MEPROP)
    for dense in (True, False, True, False):
        peer = plain if dense else sparse
        for other in (plain, sparse):
            other.load_state_dict(scheduled.state_dict())
        assert epoch_of(scheduled)["meprop_dense"] == dense
        for other in (plain, sparse):
            epoch_of(other)
            weights = zip(scheduled.model.parameters(), other.model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in weights) == (other is peer)


def test_a_schedule_resumes_bitwise_after_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, *MEPROP, "--meprop-warmup-epochs", "1", "--meprop-dense-every", "3"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    words = "keeps 0.25 of dy, unified, dense for the first 1 epoch(s), then dense every 3 epochs"
    assert words in capsys.readouterr().out
    save = checkpoint.save

    def stops(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["main"].checkpoint, "save", stops)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            main([*flags, "--out", str(tmp_path / "parts")])
    whole, parts = (
        checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")
    )
    assert whole["epoch"] == parts["epoch"] == 4
    assert all(torch.equal(t, parts["model"][name]) for name, t in whole["model"].items())
    for key, values in whole["optimizer"]["state"].items():
        buffer = parts["optimizer"]["state"][key]["momentum_buffer"]
        assert torch.equal(values["momentum_buffer"], buffer)
    for name in ("whole", "parts"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["meprop_dense"] for line in lines] == [True, False, False, True]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--meprop-warmup-epochs", "1"], ["--meprop-warmup-epochs 1", "--meprop-ratio under 1"]),
        (["--meprop-dense-every", "2"], ["--meprop-dense-every 2", "--meprop-ratio under 1"]),
        (["--meprop-ratio", "1", "--meprop-dense-every", "2"], ["--meprop-dense-every 2", "under"]),
        ([*MEPROP, "--meprop-warmup-epochs", "4"], ["--meprop-warmup-epochs 4", "under --epochs"]),
        ([*MEPROP, "--meprop-warmup-epochs", "-1"], ["--meprop-warmup-epochs -1", "0 or more"]),
        ([*MEPROP, "--meprop-dense-every", "1"], ["--meprop-dense-every 1", "2 or more"]),
        (
            [*MEPROP, "--meprop-warmup-epochs", "2", "--meprop-dense-every", "3"],
            ["--meprop-dense-every 3", "the 2 epochs after"],
        ),
    ],
)
def test_schedules_without_sense_are_refused_in_words(flags: list[str], words: list[str]) -> None:
    with pytest.raises(TrainError) as error:
        parse([*TINY, *flags])
    for word in words:
        assert word in str(error.value)
