"""A checkpoint is written whole or not at all, and read only if every byte is right."""

import random
import subprocess
import sys
from pathlib import Path

import checkpoint
import pytest
import torch
from errors import TrainError

STATE = {
    "model": {"weight": torch.arange(1000.0), "step": torch.tensor(7)},
    "config": {"depth": 20, "lr": 0.1, "out": None},
    "epoch": 3,
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    state = checkpoint.load(path)
    assert state["config"] == STATE["config"] and state["epoch"] == 3
    assert torch.equal(state["model"]["weight"], torch.arange(1000.0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    # The tensor's own bytes lie together: some of these positions are sure to hit them.
    for position in draw.sample(range(len(whole)), 150):
        broken = bytearray(whole)
        broken[position] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            state = checkpoint.load(path)
        except TrainError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:  # in padding, or in a field that nobody reads
            assert state["config"] == STATE["config"] and state["epoch"] == 3
            assert torch.equal(state["model"]["weight"], torch.arange(1000.0))
            assert torch.equal(state["model"]["step"], torch.tensor(7))
    assert refused > 75  # 4,000 of some 6,500 bytes are the tensor's


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(TrainError, match="damaged or cut short.*another"):
        checkpoint.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"none\.pt: no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(TrainError, match="damaged or cut short"):
        checkpoint.load(tmp_path)  # a folder
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(TrainError, match="not a checkpoint of train/main.py"):
        checkpoint.load(tmp_path / "other.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()

    # A limit on the size of files stands for a full disk: the write itself fails.
    program = (
        "import resource, signal, sys, torch, checkpoint, pathlib\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "checkpoint.save(pathlib.Path(sys.argv[1]), {'w': torch.zeros(10000)})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=Path(checkpoint.__file__).parent, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert "TrainError: " in done.stderr.splitlines()[-1], done.stderr
    assert "cannot be written (File too large); free the disk" in done.stderr
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
