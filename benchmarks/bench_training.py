"""Train rows of train/table.py, and keep their accuracies and rates among the results.

python benchmarks/bench_training.py --folder DIR             the quick table of a folder of images
python benchmarks/bench_training.py --table="--dataset cifar10 --out runs/table-20"
python benchmarks/bench_training.py                          the quick table of the built-in images

--table takes the flags of train/table.py. Where they name an --out, what that has trained is not
trained again; without one the runs lie beside --json FILE. A rate is the median over the epochs
after the first, which warms up. Of boostresnet there is a row at its end and one when it is grown,
before its training end to end.
"""

import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from _program import finish, parser
from _results import Row, measured
from _sheet import Sheet

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

import records  # noqa: E402  # found by the line above
from boost_records import REFINED  # noqa: E402  # as above
from config import parse_as, to_flags  # noqa: E402  # as above
from errors import TrainError  # noqa: E402  # as above
from table import TableConfig, asked_for, check, every_row, plan  # noqa: E402  # as above
from table_files import GROWN, before_refinement  # noqa: E402  # as above
from table_runs import Run  # noqa: E402  # as above

_SMALL = ["--quick", "--depth", "8", "--train-size", "256", "--epochs", "1"]
# Of a run's settings, those that say where it lies.
_WHERE = ("data_dir", "out", "device")


def settings(args: Any) -> TableConfig:
    """The table that the command line asks for, without a place for its runs.

    Raises:
        TrainError: a flag that does not fit.
    """
    data = ["--dataset", "synthetic"]
    if args.folder:
        data = ["--dataset", "folder", "--data-dir", str(args.folder)]
    flags = ["--device", args.device.type, *data]
    flags += args.table if args.table is not None else ["--quick"]
    config = parse_as(TableConfig, "--table", [*flags, *(_SMALL if args.small else [])])
    if args.small and config.rows is None:
        config = dataclasses.replace(config, rows=("everything",), sweep=None)
    return config


def bench(config: TableConfig, sheet: Sheet) -> dict[str, Any]:
    """A row for each run, and one for each growth in it; config: with a folder for them."""
    runs = plan(config, asked_for(config, every_row(config)), config.all_seeds)
    check(config, runs)
    images = config.data_dir.name if config.data_dir else config.dataset
    points = [(run, when) for run in runs for when in _points(run)]
    for run, when in points:
        settings = {k: v for k, v in run.settings.items() if k not in _WHERE}
        about = {
            "provider": run.recipe.name + (f" ({when})" if when else ""),
            "seed": run.seed,
            "images": images,
            "processes": run.processes,
            "flags": shlex.join(to_flags(settings)),
        }
        if sheet.known(about) or not sheet.has(20, about, f"training {run.recipe.name}"):
            continue
        sheet.add([measured(about, partial(figures, run, when, config.all_epochs))])
    return {"rows": sheet.rows}


def _points(run: Run) -> tuple[str, ...]:
    """Where in a run there is something to measure: at its end, and before it."""
    return (GROWN, "") if run.recipe.program == "boost.py" else ("",)


def figures(run: Run, when: str, epochs: int) -> Row:
    """Train, unless that has been done, and read what the run wrote.

    epochs: of the table's other rows; of a growth, which divides them, the row says more.
    """
    failure = run.train() if run.summary() is None else None
    summary = run.summary()
    if summary is None:
        raise RuntimeError(failure)
    if len(summary.get("hardware", ())) > 1:
        raise RuntimeError(f"{run.out}: was resumed on other hardware, and its time is of neither")
    divided: Row = {}
    out = run.out
    if "units" in summary:
        divided = {"units": summary["units"], "unit_epochs": summary["config"]["unit_epochs"]}
        divided["end_to_end_epochs"] = 0 if when else summary["epochs"]
        out = run.out if when else run.out / REFINED
        summary = (before_refinement(summary) if when else summary) | {"epochs": epochs}
    done = [json.loads(line) for line in (out / records.METRICS).open()]
    rates = [epoch["images_per_second"] for epoch in done[1:] or done if not when]
    kept = ("data", "epochs", "train_accuracy", "dev_accuracy", "test_accuracy", "workers")
    return {
        **{key: summary[key] for key in (*kept, "training_seconds", "wall_seconds")},
        **divided,
        "depth": run.config.depth,
        "train_size": run.config.train_size,
        "batch_size": run.config.batch_size,
        "precision": run.config.precision,
        **({"images_per_second": statistics.median(rates)} if rates else {}),
        "losses": [epoch["loss"] for epoch in done],
        "skipped_steps": sum(epoch.get("skipped_steps", 0) for epoch in done),
    }


def benchmark(config: TableConfig) -> str:
    """The kind of results: a sweep's or the table's, its depth, and whether it is a trial."""
    name = f"training_{config.sweep or 'table'}_{config.depth}{'_quick' * config.quick}"
    return name.replace("-", "_")


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--folder", type=Path, help="class folders with train/ and test/")
    p.add_argument(
        "--table",
        type=shlex.split,
        help='flags of train/table.py, as in --table="--seeds 0" (--quick)',
    )
    args = p.parse_args()
    if args.folder is not None and not args.folder.is_dir():
        p.error(f"--folder {args.folder}: no such folder")
    try:
        config = settings(args)
        sheet = Sheet.open(benchmark(config), args)
        with tempfile.TemporaryDirectory() as scratch:
            beside = args.json.parent / f"{args.json.stem}-runs" if args.json else Path(scratch)
            out = config.out or beside
            found = bench(dataclasses.replace(config, out=out), sheet)
    except TrainError as error:
        p.error(str(error))
    return finish(benchmark(config), args, found)


if __name__ == "__main__":
    sys.exit(main())
