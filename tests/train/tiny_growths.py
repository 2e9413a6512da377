"""Growths of train/boost.py that take a second, and what they are made of."""

import json
from pathlib import Path
from typing import Any

import boost
import main as training
import torch
from boost_config import parse
from growth import Growth
from records import Progress
from workers import Workers

DATA = ["--dataset", "synthetic", "--train-size", "40", "--image-size", "8", "--device", "cpu"]
TINY = [
    *DATA, "--depth", "8", "--width", "4", "--batch-size", "16", "--unit-epochs", "2", "--epochs",
    "1", "--deterministic", "--fused", "--min-gamma", "-0.99", "--lr", "0.8",
]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def grow(out: Path, *flags: str) -> dict[str, Any]:
    """A run to its end: its summary."""
    assert boost.main([*TINY, *flags, "--out", str(out)]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def growth_of(*flags: str) -> Growth:
    config = parse([*TINY, *flags])
    data = training.load_data(config)
    return Growth(config, Workers(0, 1, 0, torch.device("cpu")), data)


def silent() -> Progress:
    return Progress(1, 1, 1, 0, False)
