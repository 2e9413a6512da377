"""What the rows of Table 1 and the points of the sweeps train: a named function a row.

A row gives the settings that it changes of its program, train/main.py or another one that PROGRAM
names. Its micro_batches are its workers: train/table.py spreads them over the GPUs that there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Fields of the program's Config and their values.
Changes = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all rows of one table share."""

    epochs: int
    half: str
    quick: bool = False

    def batch(self, images: int) -> int:
        """A global batch; a quick run has too few images for it, and takes a quarter."""
        return images // 4 if self.quick else images

    def large_batch(self, images: int) -> Changes:
        """With a rate that rises for 5 epochs of 200, or for a quarter of a short run."""
        return {"batch_size": self.batch(images), "warmup_epochs": min(5.0, self.epochs / 4)}


@dataclass(frozen=True)
class Reported:
    """A row of the report: time in minutes, accuracies in %."""

    minutes: float
    train: float
    test: float


@dataclass(frozen=True)
class Recipe:
    """One row, and the program that trains it.

    A sweep's has a place in a plot: x, on the line of its series, or on every line without one.
    """

    name: str
    about: str
    changes: Changes
    reported: Reported | None = None
    program: str = "main.py"
    series: str = ""
    x: float = 0.0


Row = Callable[[Setting], Changes]


# The report's six rows. The middle four each change one thing of the baseline.


def baseline(run: Setting) -> Changes:
    """Post-activation, one worker, fp32, batch 128."""
    return {"block": "postact", "batch_size": run.batch(128)}


def half_precision(run: Setting) -> Changes:
    """The baseline by autocast; fp16 with loss scaling."""
    return baseline(run) | {"precision": run.half}


def pre_activation(run: Setting) -> Changes:
    """The baseline with BatchNorm and ReLU before each convolution."""
    return baseline(run) | {"block": "preact"}


def four_workers(run: Setting) -> Changes:
    """The baseline on four workers of 128 images, by the large-batch recipe."""
    return baseline(run) | run.large_batch(512) | {"micro_batches": 4}


def stochastic_depth(run: Setting) -> Changes:
    """The baseline, half of whose branches are dropped for a whole batch."""
    return baseline(run) | {"drop_prob": 0.5, "drop_schedule": "uniform"}


def best(run: Setting) -> Changes:
    """Pre-activation, four workers, batch 1024, uniform stochastic depth."""
    return stochastic_depth(run) | pre_activation(run) | run.large_batch(1024) | {
        "micro_batches": 4
    }  # fmt: skip


# Ours: fused ops under what the report stacked, and what it could not make work.


def fused(run: Setting) -> Changes:
    """Pre-activation with every fused op."""
    return pre_activation(run) | {"fused": True}


def fused_stochastic_depth(run: Setting) -> Changes:
    """The former with uniform stochastic depth."""
    return fused(run) | {"drop_prob": 0.5, "drop_schedule": "uniform"}


def fused_best(run: Setting) -> Changes:
    """The report's best with every fused op."""
    return best(run) | {"fused": True}


def everything(run: Setting) -> Changes:
    """The former in half precision: all that stacks, train/best.toml on four workers."""
    return fused_best(run) | {"precision": run.half}


def yellowfin(run: Setting) -> Changes:
    """Fused, by YellowFin with nothing tuned."""
    return fused(run) | {"optimizer": "yellowfin"}


def meprop(run: Setting) -> Changes:
    """Fused, backward over half of the channels after dense epochs, a tenth of all or one."""
    dense = min(max(1, run.epochs // 10), run.epochs - 1)
    return fused(run) | {"meprop_ratio": 0.5, "meprop_warmup_epochs": dense}


def boostresnet(run: Setting) -> Changes:
    """Fused, grown unit by unit by boosting, then trained end to end.

    A pass of every unit, with classifiers, edges and features, takes up to twice as long as one of
    the whole network, which has the rest of the epochs that the other rows have; of a short run
    three, if these have so many.
    """
    passes = max(1, run.epochs // 8)
    rest = max(run.epochs - 2 * passes - 1, min(3, run.epochs))
    return fused(run) | {"unit_epochs": passes, "epochs": rest}


TABLE: tuple[Row, ...] = (
    baseline, half_precision, pre_activation, four_workers, stochastic_depth, best,
    fused, fused_stochastic_depth, fused_best, everything, yellowfin, meprop, boostresnet,
)  # fmt: skip

# Of the rows that train/main.py does not train.
PROGRAM: dict[Row, str] = {boostresnet: "boost.py"}

# Each adds one thing to the one before, named here: the speedup's waterfall.
STACK: dict[Row, str] = {
    baseline: "baseline",
    pre_activation: "pre-activation",
    fused: "fused ops",
    fused_stochastic_depth: "stochastic depth",
    fused_best: "batch 1024,\nfour workers",
    everything: "half precision",
}

# Solomatov and Stepanov 2017, "Speeding up ResNet training", Table 1: depth 122, 200 epochs, GTX
# 1080 Ti.
REPORTED: dict[Row, Reported] = {
    baseline: Reported(162, 100.0, 93.0),
    half_precision: Reported(162, 100.0, 92.8),
    pre_activation: Reported(162, 100.0, 93.5),
    four_workers: Reported(49, 100.0, 92.0),
    stochastic_depth: Reported(90, 99.0, 93.1),
    best: Reported(32, 99.1, 93.4),
}


def table_rows(run: Setting) -> list[Recipe]:
    """The rows of Table 1."""
    return [
        Recipe(row.__name__, _about(row), row(run), REPORTED.get(row), PROGRAM.get(row, "main.py"))
        for row in TABLE
    ]


def _about(row: Row) -> str:
    return (row.__doc__ or "").strip().splitlines()[0].removesuffix(".")


# The sweeps: the report's two, meProp's, and that of the learning rate, where the best of SGD's is
# what YellowFin, at 1 and with nothing tuned, is to come near.


def batch_size(run: Setting) -> list[Recipe]:
    """Global batch of the fused network, one worker, by the large-batch recipe."""
    return [
        Recipe(
            f"batch_{images}",
            f"Fused, batch {run.batch(images)}",
            fused(run) | ({} if images == 128 else run.large_batch(images)),
            x=run.batch(images),
        )
        for images in (128, 256, 512, 1024, 2048, 3072)
    ]


def survival(run: Setting) -> list[Recipe]:
    """Probability that a branch survives, "batch": the same for all, or falling to it linearly."""
    always = Recipe("survival_100", "Fused, every branch survives", fused(run), x=1.0)
    return [always] + [
        Recipe(
            f"survival_{schedule}_{keep}",
            f"Fused, branches survive at {keep} %, {schedule}",
            fused(run) | {"drop_prob": (100 - keep) / 100, "drop_schedule": schedule},
            series=schedule,
            x=keep / 100,
        )
        for schedule in ("uniform", "linear")
        for keep in (20, 40, 50, 60, 80)
    ]


def meprop_ratio(run: Setting) -> list[Recipe]:
    """Share of dy kept by meProp, width and mode: channels, or values of each image; 1 is dense.

    What its backward takes alone is measured by benchmarks/bench_meprop_conv2d.py.
    """
    dense = [
        Recipe(
            f"meprop_{width}_100",
            f"Fused, width {width}, meProp keeps 100 %",
            fused(run) | {"width": width},
            series=f"width {width}",
            x=1.0,
        )
        for width in (16, 64, 256)
    ]
    return dense + [
        Recipe(
            f"meprop_{prefix}{width}_{share}",
            f"Fused, width {width}, meProp{suffix} keeps {share} %",
            fused(run) | {"width": width, "meprop_ratio": share / 100, "meprop_mode": mode},
            series=f"width {width}{suffix}",
            x=share / 100,
        )
        for mode, prefix, suffix in (("unified", "", ""), ("row", "row_", " by row"))
        for width in (16, 64, 256)
        for share in (5, 10, 25, 50)
    ]


def optimizer(run: Setting) -> list[Recipe]:
    """--lr by optimizer, three times less and more than its default; YellowFin's is a factor."""
    return [
        Recipe(
            f"{name}_{lr:g}",
            f"Fused, by {name}, lr {lr:g}",
            fused(run) | {"optimizer": name, "lr": lr},
            series=name,
            x=lr,
        )
        for name, rates in (
            ("sgd", (0.03, 0.1, 0.3)),
            ("adam", (0.0003, 0.001, 0.003)),
            ("yellowfin", (0.3, 1.0, 3.0)),
        )
        for lr in rates
    ]


SWEEPS: dict[str, Callable[[Setting], list[Recipe]]] = {
    "batch-size": batch_size,
    "survival": survival,
    "meprop-ratio": meprop_ratio,
    "optimizer": optimizer,
}
