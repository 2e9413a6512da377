"""Train every row of the report's Table 1, and ours, and set them beside the report's figures.

python train/table.py                           depth 20, 200 epochs, seeds 0 1 2, CIFAR-10
python train/table.py --depth 122 --rows baseline best everything
python train/table.py --quick                   every row, in minutes on two CPU cores
python train/table.py --sweep batch-size        or survival, or meprop-ratio

Each row and seed is a run of train/main.py in a folder of its own. What is finished is not trained
again, an interrupted run goes on from its checkpoint, and one that fails shows as failed and is
tried again by the next call. table.md, table.csv, runs.csv and the plots are written anew after
every run.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import records
import torch
from config import parse_as
from errors import TrainError
from main import load_data
from recipes import SWEEPS, Recipe, Setting, table
from table_files import Sheet, write_files
from table_plots import draw_plots
from table_runs import LOG, Run

from fastres.data import DataError


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """Train the rows of the report's Table 1, and ours; or a sweep."""

    depth: int = 20
    """Weighted layers, 6n + 2; the report's table is of depth 122."""
    seeds: tuple[int, ...] | None = None
    """Each row is trained once for each (0 1 2; with --quick 0)."""
    epochs: int | None = None
    """Passes over the training set (200; with --quick 4)."""
    rows: tuple[str, ...] | None = None
    """Only these rows, by their names in train/recipes.py."""
    sweep: Literal["batch-size", "survival", "meprop-ratio"] | None = None
    """Train the points of a sweep instead of the table."""
    quick: bool = False
    """A small trial: 5,000 images, 4 epochs, a quarter of each batch. Marked wherever it shows."""

    dataset: Literal["cifar10", "folder", "synthetic"] = "cifar10"
    """As of train/main.py."""
    data_dir: Path | None = None
    """As of train/main.py."""
    image_size: int | None = None
    """As of train/main.py."""
    train_size: int | None = None
    """Train on this many images only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As of train/main.py. A row's workers are spread over the GPUs, and emulated by micro-batches
    where there are fewer; on a CPU one process emulates them all."""
    half: Literal["auto", "fp16", "bf16"] = "auto"
    """Of the rows in half precision. auto: fp16 on a GPU; bf16 on a CPU, which has no fast fp16."""
    out: Path | None = None
    """Folder for the runs, table.md, table.csv, runs.csv and plots (runs/table-DEPTH)."""

    def __post_init__(self) -> None:
        def settle(name: str, usual: Any, quick: Any) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, quick if self.quick else usual)

        settle("seeds", (0, 1, 2), (0,))
        settle("epochs", 200, 4)
        settle("train_size", None, 5000)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            given = " ".join(map(str, self.seeds or ()))
            raise TrainError(f"--seeds {given}: expected one or more, each once")

    @property
    def out_dir(self) -> Path:
        what = f"sweep-{self.sweep}" if self.sweep else "table"
        return self.out or Path("runs") / f"{what}-{self.depth}{'-quick' * self.quick}"


def gpus(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.device_count()


def recipes(config: TableConfig) -> list[Recipe]:
    """The rows that are asked for.

    Raises:
        TrainError: a name that is none of theirs.
    """
    half = config.half
    if half == "auto":
        half = "fp16" if gpus(config.device) else "bf16"
    assert config.epochs is not None  # settled
    setting = Setting(config.epochs, half, config.quick)
    found = SWEEPS[config.sweep](setting) if config.sweep else table(setting)
    if config.rows is None:
        return found
    names = [recipe.name for recipe in found]
    for name in config.rows:
        if name not in names:
            raise TrainError(f"--rows {name}: expected some of {', '.join(names)}")
    return [recipe for recipe in found if recipe.name in config.rows]


def plan(config: TableConfig, chosen: list[Recipe]) -> list[Run]:
    """Every run of the table: all rows of a seed, then the next seed.

    Raises:
        TrainError: settings that do not fit together, or a folder with other ones.
    """
    assert config.seeds is not None and config.epochs is not None  # settled
    runs = []
    for seed in config.seeds:
        for recipe in chosen:
            if recipe.changes is None:
                continue
            workers = recipe.changes.get("micro_batches", 1)
            # As many GPUs as share the workers evenly.
            most = max(gpus(config.device), 1)
            processes = max(n for n in range(1, workers + 1) if workers % n == 0 and n <= most)
            settings = {
                "depth": config.depth,
                "epochs": config.epochs,
                # A curve of twenty points; of a short run, its end.
                "eval_every": config.epochs // 20 or config.epochs,
                "seed": seed,
                "dataset": config.dataset,
                "data_dir": config.data_dir,
                "image_size": config.image_size,
                "train_size": config.train_size,
                "device": config.device,
                "out": config.out_dir / recipe.name / f"seed-{seed}",
                **recipe.changes,
                "micro_batches": workers // processes,
            }
            runs.append(Run(recipe, seed, processes, settings))
    for run in runs:
        run.check_folder()
    return runs


def check_data(runs: list[Run]) -> None:
    """Load the data once, which every run will find decoded.

    Raises:
        TrainError: it cannot be had, or a batch exceeds it.
    """
    try:
        data = load_data(runs[0].config)
    except DataError as error:
        raise TrainError(str(error)) from error
    for run in runs:
        if run.config.batch_size > len(data.train):
            raise TrainError(
                f"row {run.recipe.name}: --batch-size {run.config.batch_size}: more than the "
                f"{len(data.train)} training images; raise --train-size, or leave the row out"
            )


def train_all(config: TableConfig) -> bool:
    """Train what is missing; whether nothing failed.

    Raises:
        TrainError: before any training, what cannot be trained.
    """
    chosen = recipes(config)
    runs = plan(config, chosen)
    if not runs:
        raise TrainError("--rows: all of these are left open, there is nothing to train")
    missing = [run for run in runs if run.summary() is None]
    if missing:
        check_data(missing)
    out = config.out_dir
    records.make_out(out)
    started = time.perf_counter()

    def write() -> Sheet:
        sheet = Sheet.read(config.depth, config.quick, config.sweep, chosen, runs)
        write_files(sheet, out)
        draw_plots(sheet, out)
        return sheet

    write()
    for i, run in enumerate(missing, 1):
        minutes = (time.perf_counter() - started) / 60
        print(
            f"run {i} of {len(missing)}, after {minutes:.1f} minutes: {run.recipe.name}, seed "
            f"{run.seed} ({run.recipe.about})",
            flush=True,
        )
        run.train()
        failure = run.failure()
        if failure:
            print(f"  failed: {failure} (its log: {run.out / LOG})", flush=True)
        write()
    sheet = write()
    print(sheet.markdown())
    for path in sorted(path for path in out.iterdir() if path.is_file()):
        print(path)
    return all(run.failure() is None for run in runs)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, 1 where a run failed, 2 where nothing could begin."""
    try:
        return 0 if train_all(parse_as(TableConfig, "table.py", argv)) else 1
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
