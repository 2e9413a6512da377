"""meProp's dense epochs: the warm start, and those in between."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import torch
from config import parse
from errors import TrainError
from main import main
from records import Progress
from schedule import meprop_is_dense
from train.tiny_runs import interrupted, same, tensors_of, trainer_of
from trainer import Trainer

TINY = [
    "--dataset", "synthetic", "--train-size", "48", "--image-size", "8", "--device", "cpu",
    "--depth", "8", "--width", "4", "--batch-size", "12", "--epochs", "4", "--deterministic",
    "--fused", "--eval-every", "4",
]  # fmt: skip
MEPROP = ["--meprop-ratio", "0.25"]


pytestmark = pytest.mark.usefixtures("native_path")


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
    scheduled = trainer_of(
        [*TINY, *MEPROP, "--meprop-warmup-epochs", "1", "--meprop-dense-every", "2"]
    )
    plain, sparse = trainer_of(TINY), trainer_of([*TINY, *MEPROP])
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, *MEPROP, "--meprop-warmup-epochs", "1", "--meprop-dense-every", "3"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    words = "keeps 0.25 of dy, unified, dense for the first 1 epoch(s), then dense every 3 epochs"
    assert words in capsys.readouterr().out
    for _ in range(4):
        with interrupted():
            main([*flags, "--out", str(tmp_path / "parts")])
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for out in (whole, parts):
        assert checkpoint.load(out / "checkpoint.pt")["epoch"] == 4
    assert same(tensors_of(whole), tensors_of(parts))
    for out in (whole, parts):
        lines = (out / "metrics.jsonl").read_text().splitlines()
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
