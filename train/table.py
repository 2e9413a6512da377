"""Train every row of the report's Table 1, and ours, and set them beside the report's figures.

python train/table.py                           depth 20, 200 epochs, seeds 0 1 2, CIFAR-10
python train/table.py --depth 122 --rows baseline best everything
python train/table.py --quick                   every row, in minutes on two CPU cores
python train/table.py --sweep batch-size        or survival, meprop-ratio, optimizer

Each row and seed is a run of train/main.py, or of train/boost.py, in a folder of its own. What is
finished is not trained again, an interrupted run goes on from its checkpoint, and one that fails
shows as failed and is tried again by the next call. table.md, table.csv, runs.csv and the plots are
written anew after every run, from all that the folder holds.
"""

import contextlib
import dataclasses
import fcntl
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import records
from config import parse_as
from errors import TrainError
from main import load_data
from recipes import SWEEPS, Recipe, Setting, table_rows
from table_files import Table, write_files
from table_plots import draw_plots
from table_runs import LOG, Run, read_json
from trainer import check_fits
from workers import count_gpus

from fastres.data import DataError

_SETTINGS, _LOCK = "table.json", ".lock"


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
    """Train these rows only, by their names in train/recipes.py."""
    sweep: Literal["batch-size", "survival", "meprop-ratio", "optimizer"] | None = None
    """Train the points of a sweep instead of the table."""
    quick: bool = False
    """A small trial: 5,000 images, 4 epochs, a quarter of each batch. Marked wherever it shows."""

    dataset: Literal["cifar10", "folder", "synthetic"] = "cifar10"
    """As of train/main.py."""
    data_dir: Path | None = None
    """As of train/main.py."""
    image_size: int | None = None
    """As of train/main.py."""
    test_fraction: float | None = None
    """As of train/main.py."""
    train_size: int | None = None
    """Train on this many images only (all; with --quick 5000)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As of train/main.py. A row's workers are spread over the GPUs, and emulated by micro-batches
    where there are fewer; on a CPU one process emulates them all."""
    half: Literal["auto", "fp16", "bf16"] = "auto"
    """Of the rows in half precision. auto: fp16 on a GPU; bf16 on a CPU, which has no fast fp16."""
    out: Path | None = None
    """Folder for the runs, table.md, table.csv, runs.csv and plots (runs/table-DEPTH)."""

    def __post_init__(self) -> None:
        if len(set(self.all_seeds)) < len(self.all_seeds):
            given = " ".join(map(str, self.all_seeds))
            raise TrainError(f"--seeds {given}: expected each once")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return self.seeds or ((0,) if self.quick else (0, 1, 2))

    @property
    def all_epochs(self) -> int:
        usual = 4 if self.quick else 200
        return usual if self.epochs is None else self.epochs

    @property
    def images(self) -> int | None:
        return 5000 if self.quick and self.train_size is None else self.train_size

    @property
    def half_dtype(self) -> str:
        if self.half != "auto":
            return self.half
        return "fp16" if count_gpus(self.device) else "bf16"

    @property
    def out_dir(self) -> Path:
        what = f"sweep-{self.sweep}" if self.sweep else "table"
        return self.out or Path("runs") / f"{what}-{self.depth}{'-quick' * self.quick}"

    def shared(self) -> dict[str, Any]:
        """What all rows of a folder have in common."""
        return {
            "depth": self.depth, "epochs": self.all_epochs, "sweep": self.sweep,
            "quick": self.quick, "dataset": self.dataset, "image_size": self.image_size,
            "test_fraction": self.test_fraction, "train_size": self.images,
            "half": self.half_dtype,
        }  # fmt: skip


def every_row(config: TableConfig) -> list[Recipe]:
    setting = Setting(config.all_epochs, config.half_dtype, config.quick)
    return SWEEPS[config.sweep](setting) if config.sweep else table_rows(setting)


def asked_for(config: TableConfig, recipes: list[Recipe]) -> list[Recipe]:
    """The rows to train.

    Raises:
        TrainError: a name that is none of theirs.
    """
    names = [recipe.name for recipe in recipes]
    if config.rows == ():
        raise TrainError(f"--rows: expected some of {', '.join(names)}, got none")
    for name in config.rows or ():
        if name not in names:
            raise TrainError(f"--rows {name}: expected some of {', '.join(names)}")
    return [r for r in recipes if config.rows is None or r.name in config.rows]


def plan(config: TableConfig, recipes: list[Recipe], seeds: Sequence[int]) -> list[Run]:
    """The runs of some rows: all of a seed, then the next seed.

    Raises:
        TrainError: settings that do not fit together.
    """
    gpus, epochs = count_gpus(config.device), config.all_epochs
    runs = []
    for seed in seeds:
        for recipe in recipes:
            workers = recipe.changes.get("micro_batches", 1)
            # As many GPUs as share the workers evenly.
            most = max(gpus, 1)
            processes = max(n for n in range(1, workers + 1) if workers % n == 0 and n <= most)
            settings = {
                "depth": config.depth,
                "epochs": epochs,
                # About twenty points of a curve; of a short run its end alone.
                "eval_every": -(-epochs // 20) if epochs >= 20 else epochs,
                "seed": seed,
                "dataset": config.dataset,
                "data_dir": config.data_dir,
                "image_size": config.image_size,
                "test_fraction": config.test_fraction,
                "train_size": config.images,
                "device": config.device,
                "out": config.out_dir / recipe.name / f"seed-{seed}",
                **recipe.changes,
                "micro_batches": workers // processes,
            }
            runs.append(Run(recipe, seed, processes, settings))
    return runs


def check(config: TableConfig, runs: list[Run]) -> None:
    """See that all of them can be trained, and load the data, which they will find decoded.

    Raises:
        TrainError: the folder holds another table, the data cannot be had, or a batch exceeds it.
    """
    held = read_json(config.out_dir / _SETTINGS)
    for key, value in config.shared().items():
        if held is not None and held.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise TrainError(
                f"--out {config.out_dir}: holds a table with {flag} {held.get(key)}, this one has "
                f"{flag} {value}; choose another --out"
            )
    for run in runs:
        run.check_folder()
    missing = [run for run in runs if run.summary() is None]
    if not missing:
        return
    try:
        data = load_data(missing[0].config)
    except DataError as error:
        raise TrainError(str(error)) from error
    for run in missing:
        try:
            check_fits(run.config, data)
        except TrainError as error:
            raise TrainError(f"row {run.recipe.name}: {error}") from None


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[IO[str]]:
    """Keep other calls out of a folder; a run that outlives this one goes on keeping them out.

    Raises:
        TrainError: another one is there.
    """
    records.make_out(out)
    with open(out / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainError(
                f"--out {out}: another table.py, or a run that it left, is training there; wait "
                "for its end, or choose another --out"
            ) from None
        yield file


def train_all(config: TableConfig) -> bool:
    """Train what is missing; whether all that was asked for is trained.

    Raises:
        TrainError: before any training, what cannot be trained.
    """
    recipes = every_row(config)
    runs = plan(config, asked_for(config, recipes), config.all_seeds)
    check(config, runs)
    out, failures = config.out_dir, {}
    with alone_in(out) as lock:
        records.write_json(out / _SETTINGS, config.shared())
        missing = [run for run in runs if run.summary() is None]
        started = time.perf_counter()
        write(config, recipes)
        for i, run in enumerate(missing, 1):
            minutes = (time.perf_counter() - started) / 60
            print(
                f"run {i} of {len(missing)}, after {minutes:.1f} minutes: {run.recipe.name}, seed "
                f"{run.seed} ({run.recipe.about})",
                flush=True,
            )
            failures[run.out] = run.train(lock)
            if failures[run.out]:
                print(f"  failed: {failures[run.out]} (its log: {run.out / LOG})", flush=True)
            write(config, recipes)
        print(read(config, recipes).markdown())
        print(f"table.md, table.csv, runs.csv and the plots lie in {out}")
        return not any(failures.values())


def read(config: TableConfig, recipes: list[Recipe]) -> Table:
    """All rows and all seeds that the folder holds, beside those that are asked for."""
    found = {
        int(path.name.removeprefix("seed-"))
        for recipe in recipes
        for path in (config.out_dir / recipe.name).glob("seed-*")
        if path.name.removeprefix("seed-").isdecimal()
    }
    runs = plan(config, recipes, sorted(found.union(config.all_seeds)))
    return Table.read(title(config), config.quick, config.sweep, recipes, runs)


def title(config: TableConfig) -> str:
    images = "" if config.images is None else f"{config.images:,} images, "
    what = "Table 1" if config.sweep is None else f"Sweep of {config.sweep}"
    text = f"{what}, depth {config.depth}, {images}{config.all_epochs} epochs"
    return text + (", quick" if config.quick else "")


def write(config: TableConfig, recipes: list[Recipe]) -> None:
    """The table's files; a full disk costs no training."""
    try:
        table = read(config, recipes)
        write_files(table, config.out_dir)
        draw_plots(table, config.out_dir)
    except TrainError as error:
        print(f"the table is not written: {error}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, 1 where a run failed, 2 where nothing could begin, 130 when interrupted."""
    try:
        return 0 if train_all(parse_as(TableConfig, "table.py", argv)) else 1
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr, flush=True)
        return 130


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Asked to end, or left by its terminal, it ends the run that is training, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish
            signal.signal(number, _interrupt)
    sys.exit(main(sys.argv[1:]))
