"""What a run of the table leaves in its folder, without the training."""

import json
from typing import IO

import records
from boost_config import BoostConfig
from boost_records import REFINED
from table_runs import Run

HARDWARE = {"device": "cpu", "device_name": "CPU", "threads": 2, "torch": "2.15"}


def make_up(run: Run, lock: IO[str] | None = None) -> None:
    """A minute where it is fused, else two and 12 seconds more for each seed; 90 % and the seed.

    A growth takes a third of its time, and has 80 % before the rest. There are three epochs.
    """
    seconds = 60.0 if run.config.fused else 120.0 + 12 * run.seed
    hardware = {"processes": run.processes} | HARDWARE
    summary = {
        "training_seconds": seconds, "wall_seconds": seconds + 10, "epochs": run.config.epochs,
        "train_accuracy": 99.0, "dev_accuracy": 91.0, "test_accuracy": 90.0 + run.seed,
        "workers": run.processes * run.config.micro_batches, "data": "photos",
        "hardware": [hardware],
        "train_images": run.config.train_size or 50_000,
        "config": run.config.as_dict(),
    }  # fmt: skip
    out = run.out
    rest = seconds
    before = dict.fromkeys(("train_accuracy", "dev_accuracy", "test_accuracy"), 80.0)
    if isinstance(run.config, BoostConfig):
        rest = seconds * 2 / 3
        summary |= {"units": 9, "growth_seconds": seconds / 3, "before_refinement": before}
        out = run.out / REFINED
    epochs = [
        {"epoch": i, "loss": 1 / i, "images_per_second": 100.0 * i, "seconds": rest / 3}
        | (dict.fromkeys(before, 90.0) if i == 3 else {})
        for i in (1, 2, 3)
    ]
    out.mkdir(parents=True, exist_ok=True)
    records.write_json(run.out / records.CONFIG, run.config.as_dict())
    records.write_json(run.out / records.SUMMARY, summary)
    lines = "".join(json.dumps(epoch) + "\n" for epoch in epochs)
    (out / records.METRICS).write_text(lines)
    if out != run.out:
        edge = {"edge": 0.4, "gamma": 0.2, "alpha": 0.5, "bound": 0.9, "attempts": 1}
        units = [
            {"unit": i, "loss": 2 / i, "seconds": seconds / 27, **edge, **before}
            for i in range(1, 10)
        ]
        text = "".join(json.dumps(unit) + "\n" for unit in units)
        (run.out / records.METRICS).write_text(text)
