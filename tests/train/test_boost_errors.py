"""train/boost.py: every way to get it wrong, in words."""

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boost
import checkpoint
import main as training
import pytest
from boost_config import parse
from errors import LoneError, TrainError
from PIL import Image
from torch import Tensor
from train.tiny_growths import DATA, TINY, grow, growth_of, lines
from train.tiny_runs import same, weights_of

from fastres.boost import FeatureCache

pytestmark = pytest.mark.usefixtures("native_path")


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
        (["--refine-share", "1.5"], ["--refine-share 1.5", "between 0 and 1"]),
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
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = grown / "checkpoint.pt"
    before = source.read_bytes()
    here = [*TINY, "--resume", str(source), "--out", str(tmp_path / "out")]
    fails([*here, "--depth", "14"], capsys, "--depth 8", "--depth 14")
    fails([*here, "--width", "8"], capsys, "--width 4", "--width 8")
    fails([*here, "--units", "2"], capsys, "has no --units", "--units 2", "leave out --units")
    with pytest.raises(TrainError, match=r"state is of \[40, 10\] images and classes, not"):
        growth_of("--train-size", "41").load_state_dict(checkpoint.load(source))
    fails([*here, "--image-size", "16"], capsys, "other data", "image_size")
    fails([*TINY, "--out", str(grown), "--resume", "none"], capsys, "holds a run already")
    # Each program knows its own.
    refined = str(grown / "refined" / "checkpoint.pt")
    words = ("a checkpoint of train/main.py, not of train/boost.py",)
    fails([*TINY, "--resume", refined, "--out", str(tmp_path / "out")], capsys, *words)
    flags = [*DATA, "--depth", "8", "--width", "4", "--batch-size", "16"]
    assert training.main([*flags, "--out", str(grown)]) == 1
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
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every unit that was trained is in the checkpoint, and the growth goes on elsewhere."""
    out = tmp_path / "out"
    flags = [*TINY, "--out", str(out), "--no-refine"]
    disk = ["--cache-host-gb", "0", "--cache-device-gb", "0", "--cache-dir", str(tmp_path / "c")]
    fails([*TINY, "--out", str(tmp_path / "no"), *disk[:4]], capsys, "more than the memory")
    free = iter([10**9, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
        fails([*flags, *disk], capsys, "free the disk", str(tmp_path / "c"))
    assert not os.listdir(tmp_path / "c")
    assert [unit["unit"] for unit in lines(out / "metrics.jsonl")] == [1, 2]
    assert boost.main(flags) == 0
    assert same(weights_of(out), weights_of(grown))


def test_features_that_cannot_be_fetched(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the midst of an epoch, by the thread that fetches them; the process that met it says it,
    leading or not."""
    disk = ["--cache-host-gb", "0", "--cache-device-gb", "0", "--cache-dir", str(tmp_path / "c")]
    flags = [*TINY, "--out", str(tmp_path / "out"), "--no-refine"]
    fetch, left = FeatureCache._fetch, [3]

    def fails_later(self: FeatureCache, index: Tensor, copies: None) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the disk is gone")
        return fetch(self, index, copies)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCache, "_fetch", fails_later)
        fails([*flags, *disk], capsys, "could not be fetched from the disk: the disk is gone")
    assert [thread.name for thread in threading.enumerate() if "features" in thread.name] == []
    assert [unit["unit"] for unit in lines(tmp_path / "out" / "metrics.jsonl")] == [1]
    assert boost.main(flags) == 0
    assert same(weights_of(tmp_path / "out"), weights_of(grown))
    assert training.fail(LoneError("here alone"), leads=False, status=1) == 1
    assert capsys.readouterr().err == "error: here alone\n"


def test_divergence_stops_the_growth_and_keeps_the_checkpoint(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    fails([*TINY, *out, "--lr", "1e30"], capsys, "diverged", "--lr 1e+30")
    assert checkpoint.load(tmp_path / "out" / "checkpoint.pt")["units"] == 0
    grow(tmp_path / "out", "--no-refine")
    assert same(weights_of(tmp_path / "out"), weights_of(grown))
