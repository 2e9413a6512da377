"""The settings of train/boost.py: those of train/main.py, and what a growth needs beside them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from boost_records import REFINED
from config import Config, parse_over_file

from fastres.boost import Room

# Settings of train/main.py that a growth has no use for, and what they must be.
_LEFT_OUT: dict[str, tuple[Any, str]] = {
    "block": ("preact", "preact: its units are sums of features"),
    "drop_prob": (0.0, "0: a unit that is trained alone is not dropped"),
    "meprop_ratio": (None, "none: a growth takes dense backwards"),
    "micro_batches": (1, "1: start processes by torchrun"),
    "profile": (False, "train/main.py for it"),
    "cuda_graph": (False, "train/main.py for it"),
    "gradient_buckets": (1, "train/main.py for it"),
    "prebuild": (False, "train/main.py for it"),
}
# A retrained unit's learning rate, as a part of the first attempt's.
RETRY_LR = 0.5


@dataclasses.dataclass(frozen=True)
class BoostConfig(Config):
    """Grow a ResNet unit by unit by boosting (BoostResNet), then train it end to end.

    python train/boost.py --fused
    """

    epochs: int = 100
    """Of the training end to end that follows the growth."""
    refine: bool = True
    """--no-refine ends with the growth."""
    refine_lr: float | None = None
    """Learning rate of the training end to end, in the units of --lr (--lr)."""
    refine_share: float = 0.25
    """Of the grown weights in those that the training end to end begins with; the rest is a new
    network's. With all of them, 1, what a growth knows by heart of its training images stays."""
    zero_init: bool = True
    """Each unit begins as its shortcut: from the classifier that was before it."""

    unit_epochs: int = 10
    """Passes over the training set for each unit and its classifier."""
    boost_loss: Literal["cost", "exp"] = "cost"
    """Of a unit: cross-entropy weighted by cost, or its exponential, boosting's own loss, whose
    edges and training accuracies rise more slowly."""
    min_gamma: float = 0.0
    """A unit's gamma must be greater, or it is retrained once, and the growth ends if it is not
    then; under 0 tolerates an edge that falls."""
    features: Literal["cached", "fresh"] = "cached"
    """cached: the frozen units' output for every training image, computed once a unit, without
    augmentation. fresh: computed for every batch, from images augmented anew."""
    cache_precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of cached features; auto: that of --precision."""
    cache_device_gb: float = 16.0
    """Cached features may take so much of the GPU's memory; more goes to the host's."""
    cache_host_gb: float = 32.0
    """They may take so much of the host's memory; more goes to files in --cache-dir."""
    cache_dir: Path | None = None
    """Where features lie that memory does not hold; they are gone when the run ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need = self.need
        for name, (value, wants) in _LEFT_OUT.items():
            need(getattr(self, name) == value, name, wants)
        need(self.unit_epochs >= 1, "unit_epochs", "1 or more")
        need(-1 <= self.min_gamma < 1, "min_gamma", "-1 or more, under 1")
        need(0 <= self.refine_share <= 1, "refine_share", "between 0 and 1")
        lr = self.refine_lr
        need(lr is None or 0 < lr < float("inf"), "refine_lr", "a positive number")
        need(0 <= self.cache_device_gb < float("inf"), "cache_device_gb", "0 or more")
        need(0 <= self.cache_host_gb < float("inf"), "cache_host_gb", "0 or more")
        folder = self.cache_dir
        need(folder is None or self.features == "cached", "cache_dir", "--features cached with it")

    @property
    def most_units(self) -> int:
        """Units to grow at most."""
        return self.units or (self.depth - 2) // 2

    @property
    def out_dir(self) -> Path:
        return self.out or Path("runs") / f"{self.dataset}-boost{self.depth}"

    @property
    def room(self) -> Room:
        """For cached features."""
        device, host = (round(gb * 1e9) for gb in (self.cache_device_gb, self.cache_host_gb))
        return Room(device, host, self.cache_dir)

    def of_unit(self, number: int, attempt: int) -> Config:
        """The training of a unit, from 0, at an attempt, 0 or 1: weights and order of its own."""
        assert self.lr is not None
        return self._run(
            epochs=self.unit_epochs,
            warmup_epochs=min(self.warmup_epochs, self.unit_epochs),
            lr=self.lr * (RETRY_LR if attempt else 1.0),
            # Apart from the seeds that a person would name.
            seed=(self.seed + ((2 * number + attempt) << 40)) % 2**63,
        )

    def of_refinement(self, units: int) -> Config:
        """The training end to end of so many units."""
        whole = units == (self.depth - 2) // 2
        return self._run(
            units=None if whole else units,
            lr=self.refine_lr or self.lr,
            out=self.out_dir / REFINED,
            resume="auto",
        )

    def _run(self, **changes: Any) -> Config:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Config(**(own | {"config": None} | changes))


def parse(argv: Sequence[str], *, quiet: bool = False) -> BoostConfig:
    """The flags in argv over the TOML file that --config names, over the defaults.

    Raises:
        TrainError: a flag, key or value that does not fit, in one line.
        SystemExit: after --help.
    """
    return parse_over_file(BoostConfig, "boost.py", argv, quiet=quiet)
