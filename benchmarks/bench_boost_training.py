"""Grow a ResNet by boosting and train it end to end; then train one plainly for as long.

python benchmarks/bench_boost_training.py --folder DIR --seeds 0 1 2
python benchmarks/bench_boost_training.py --boost="--train-size 10000 --unit-epochs 5 --epochs 20"

Both are runs of the training programs, with the same network, images, batch and seed, and by the
cosine schedule; --boost holds flags of train/boost.py, of which plain training takes those that it
has, and --plain its own. It has as many epochs as fit the seconds that boosting took, by the time
of its epochs in a short trial. Seconds are those of the steps, and of edges and features: what
held-out accuracies cost counts on neither side. Without --folder the images are the built-in ones;
the runs lie beside --json FILE, and go on from there.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from _program import finish, parser
from _results import Row, measured
from _sheet import Sheet

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

import records  # noqa: E402  # found by the line above
from boost_config import BoostConfig  # noqa: E402  # as above
from boost_config import parse as parse_boost  # noqa: E402  # as above
from boost_records import REFINED  # noqa: E402  # as above
from config import Config, parse, to_flags  # noqa: E402  # as above
from errors import TrainError  # noqa: E402  # as above
from recipes import Recipe  # noqa: E402  # as above
from table_files import GROWN, before_refinement  # noqa: E402  # as above
from table_runs import Run  # noqa: E402  # as above

_BOOSTING = Recipe("boosting", "Grown, then trained end to end", {}, program="boost.py")
_PLAIN = Recipe("plain", "Trained end to end as long", {})
# Epochs by which it is seen how long one takes; the first warms up.
_TRIAL = 3
# Points of a curve over the epochs of a training, more or less.
_POINTS = 8
_ACCURACIES = ("train_accuracy", "dev_accuracy", "test_accuracy")
_OF_A_UNIT = ("unit", "edge", "gamma", "alpha", "bound", "attempts", "seconds", *_ACCURACIES)
# Of a run's settings, those that say where it lies, and those that a row has.
_UNSAID = {"data_dir", "out", "device", "seed", "resume"}
_SMALL = [
    "--depth", "8", "--width", "4", "--train-size", "128", "--image-size", "8",
    "--batch-size", "32", "--unit-epochs", "2", "--epochs", "2", "--min-gamma", "-0.9",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What both sides train, and the folder of their runs."""

    boost: BoostConfig
    plain: Config
    out: Path

    @classmethod
    def of(cls, args: argparse.Namespace, out: Path) -> "Comparison":
        """As the command line has it.

        Raises:
            TrainError: a flag that does not fit.
        """
        common = ["--fused", "--schedule", "cosine", "--device", args.device.type]
        data = ["--dataset", "synthetic"]
        if args.folder:
            data = ["--dataset", "folder", "--data-dir", str(args.folder.absolute())]
        boost = parse_boost([*common, *data, *(_SMALL if args.small else []), *args.boost])
        # Not its epochs, which the time decides, nor what a growth has by a default of its own.
        names = {field.name for field in dataclasses.fields(Config)} - {"epochs", "zero_init"}
        shared = {name: value for name, value in _settings(boost).items() if name in names}
        return cls(boost, parse([*to_flags(shared), *args.plain]), out)

    def grow(self, seed: int) -> Run:
        return self._trained(_BOOSTING, "", _settings(self.boost), seed, self.boost.epochs)

    def train_as_long(self, seed: int, seconds: float) -> Run:
        """For as many epochs as fit."""
        settings = _settings(self.plain)
        trial = {"warmup_epochs": min(self.plain.warmup_epochs, _TRIAL)}
        tried = self._trained(_PLAIN, "-trial", settings | trial, seed, _TRIAL)
        each = statistics.median(epoch["seconds"] for epoch in _lines(tried.out)[1:])
        return self._trained(_PLAIN, "", settings, seed, max(round(seconds / each), 1))

    def _trained(
        self, recipe: Recipe, what: str, settings: dict[str, Any], seed: int, epochs: int
    ) -> Run:
        """A run that is finished: trained, unless it lies in its folder."""
        own = {
            "seed": seed,
            "out": self.out / f"{recipe.name}{what}-{seed}",
            "epochs": epochs,
            "eval_every": -(-epochs // _POINTS),
        }
        run = Run(recipe, seed, 1, settings | own)
        run.check_folder()
        failure = run.train() if run.summary() is None else None
        if run.summary() is None:
            raise RuntimeError(failure)
        return run


def _settings(config: Config) -> dict[str, Any]:
    """All that differs from the defaults."""
    usual = type(config)()
    every = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in every.items() if value != getattr(usual, name)}


def bench(comparison: Comparison, seeds: list[int], sheet: Sheet) -> dict[str, Any]:
    """For each seed a row when it is grown, one when it is refined, and one of plain training."""
    said = {k: v for k, v in _settings(comparison.boost).items() if k not in _UNSAID}
    config = comparison.boost
    about = {
        "images": config.data_dir.name if config.data_dir else config.dataset,
        "flags": shlex.join(to_flags(said)),
    }
    measures: dict[str, Callable[[Comparison, int], Row]] = {
        f"{_BOOSTING.name} ({GROWN})": partial(_boosting, when=GROWN),
        _BOOSTING.name: partial(_boosting, when=""),
        _PLAIN.name: _plain,
    }
    for seed in seeds:
        for provider, measure in measures.items():
            row = {"provider": provider, "seed": seed, **about}
            if not sheet.known(row) and sheet.has(20, row, f"{provider}, seed {seed}"):
                sheet.add([measured(row, partial(measure, comparison, seed))])
                _say(sheet.last)
    return {"rows": sheet.rows}


def _boosting(comparison: Comparison, seed: int, when: str) -> Row:
    run = comparison.grow(seed)
    summary = run.summary()
    assert summary is not None
    records_of = [{key: unit[key] for key in _OF_A_UNIT} for unit in _lines(run.out, "unit")]
    curve = _curve(records_of)
    if not when:
        curve += _curve(_lines(run.out / REFINED), summary["growth_seconds"])
    return {
        **_figures(before_refinement(summary) if when else summary, run),
        "units": summary["units"],
        "unit_epochs": summary["config"]["unit_epochs"],
        **({"by_unit": records_of} if when else {}),
        "curve": curve,
    }


def _plain(comparison: Comparison, seed: int) -> Row:
    grown = comparison.grow(seed).summary()
    assert grown is not None
    run = comparison.train_as_long(seed, grown["training_seconds"])
    summary = run.summary()
    assert summary is not None
    return {**_figures(summary, run), "curve": _curve(_lines(run.out))}


def _figures(summary: dict[str, Any], run: Run) -> Row:
    kept = ("data", "train_images", "epochs", "training_seconds", *_ACCURACIES)
    own = {"depth": run.config.depth, "batch_size": run.config.batch_size}
    return {key: summary[key] for key in kept} | own | {"precision": run.config.precision}


def _lines(out: Path, counted: str = "epoch") -> list[records.Record]:
    metrics = [json.loads(line) for line in (out / records.METRICS).open()]
    assert all(counted in record for record in metrics)
    return metrics


def _curve(metrics: list[records.Record], seconds: float = 0.0) -> list[Row]:
    """Accuracies by the seconds until then, where there are any."""
    found = []
    for record in metrics:
        seconds += record["seconds"]
        if "test_accuracy" in record:
            found.append({"seconds": seconds, **{key: record[key] for key in _ACCURACIES}})
    return found


def _say(row: Row) -> None:
    if "test_accuracy" in row:
        train, dev, test = (row[key] for key in _ACCURACIES)
        print(
            f"{row['provider']:17} seed {row['seed']}: test {test:.2f} %, dev {dev:.2f} %, train "
            f"{train:.2f} % after {row['training_seconds']:.0f} s, {row['epochs']} epochs",
            flush=True,
        )


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--folder", type=Path, help="class folders with train/ and test/")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="(0)")
    p.add_argument("--boost", type=shlex.split, default=[], help="flags of train/boost.py")
    p.add_argument("--plain", type=shlex.split, default=[], help="flags of train/main.py over them")
    args = p.parse_args()
    if args.folder is not None and not args.folder.is_dir():
        p.error(f"--folder {args.folder}: no such folder")
    with tempfile.TemporaryDirectory() as scratch:
        beside = args.json.parent / f"{args.json.stem}-runs" if args.json else Path(scratch)
        try:
            comparison = Comparison.of(args, beside)
        except TrainError as error:
            p.error(str(error))
        found = bench(comparison, args.seeds, Sheet.open("boost_training", args))
    return finish("boost_training", args, found)


if __name__ == "__main__":
    sys.exit(main())
