"""The growth of a ResNet by boosting: unit after unit, and the rule by which it ends."""

import dataclasses
import time
from typing import Any

import torch
from boost_config import BoostConfig
from networks import build_model, to_half
from records import Progress, Record
from torch import Tensor
from trainer import check_fits
from unit_trainer import Frozen, UnitTrainer, in_words
from workers import Workers

from fastres.boost import Boosting, Verdict, grown, training_costs, weak_unit
from fastres.data import Splits
from fastres.models import ResNet


class Growth:
    """What grows: the parts, and the state of boosting.

    The rule of growth: a unit satisfies weak learning if its edge, over the whole training set and
    on the costs of the units before it, gives a gamma greater than --min-gamma. One that does not
    is trained once more, from other weights of its own and at half the learning rate; if it does
    not then either, the growth ends without it. It also ends where no unit is left, and with a unit
    whose edge is 1 to 1e-6: all is learnt.

    Attributes:
        ended: why the growth is over; None before.
    """

    def __init__(self, config: BoostConfig, workers: Workers, data: Splits) -> None:
        """data: on the workers' device.

        Raises:
            TrainError: its training images are of one class.
        """
        check_fits(config, data)
        self.config, self.workers, self.data = config, workers, data
        # On the CPU: each unit goes to the device when it is its turn.
        self.plan = build_model(config, len(data.classes))
        self.frozen = Frozen(config, workers, data)
        self.ended: str | None = None
        with in_words():
            labels = data.train.labels
            self.boosting = Boosting(labels, len(data.classes), config.min_gamma)

    @property
    def units(self) -> int:
        """Units grown."""
        return len(self.frozen.parts)

    def network(self) -> ResNet:
        """The ResNet of the units grown, its classifier the last one's."""
        return grown(self.plan, self.frozen.parts)

    def grow(self, progress: Progress) -> Record | None:
        """Train the next unit; its record, or None where the growth ended without it.

        Raises:
            TrainError: training diverged, or there is no room for features, on every process.
        """
        started = time.perf_counter()
        number, workers = self.units, self.workers
        if workers.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if number > 0:
            # Not at the end of the unit before, whose record is safe before room is looked for.
            self.frozen.advance()
        cached = time.perf_counter()
        costs = training_costs(self.boosting.costs())
        failed: list[Verdict] = []
        for attempt in range(2):
            trainer = self._trainer(number, attempt, costs)
            while trainer.epoch < self.config.unit_epochs:
                progress.epoch(number * self.config.unit_epochs + trainer.epoch + 1)
                trained = trainer.train_epoch(progress)
                trainer.average_statistics()
            o = trainer.outputs()
            verdict = self.boosting.judge(o)
            if verdict.holds:
                break
            failed.append(verdict)
            gamma = f"gamma {verdict.gamma:.4f} is not over {self.config.min_gamma:g}"
            self._say(
                progress,
                f"unit {number + 1} violates weak learning: edge {verdict.edge:.4f} after "
                f"{self.boosting.edge:.4f}, {gamma}; "
                + ("it is trained once more" if attempt == 0 else "the growth ends without it"),
            )
        else:
            edges = " and ".join(f"{v.edge:.4f}" for v in failed)
            self.ended = (
                f"unit {number + 1} violated weak learning twice: edges {edges} after "
                f"{self.boosting.edge:.4f}"
            )
            return None
        judged = time.perf_counter()
        held_out = {"dev": self.data.dev, "test": self.data.test}
        accuracies = {f"{name}_accuracy": trainer.evaluate(s) for name, s in held_out.items()}
        self.boosting.add(o)
        self.frozen.add(trainer.model)
        if verdict.clamped:
            self.ended = f"unit {number + 1} has an edge of 1: there is nothing left to boost"
        elif self.units == self.config.most_units:
            self.ended = f"all {self.units} units are grown"
        cache = self.frozen.cache
        right = o.argmax(1) == self.data.train.labels
        return {
            "unit": self.units,
            "channels": trainer.model.fc.in_features,
            "attempts": len(failed) + 1,
            "violating_edges": [v.edge for v in failed],
            **dataclasses.asdict(verdict),
            "gamma": verdict.gamma,
            "loss": trained["loss"],
            "train_accuracy": 100.0 * float(right.double().mean()),
            **accuracies,
            # As of train/main.py, whose accuracies are no part of its training either.
            "seconds": judged - started,
            "training_seconds": judged - cached,
            "cache_seconds": cached - started,
            "evaluation_seconds": time.perf_counter() - judged,
            "memory_bytes": trained["memory_bytes"],
            "cache_bytes": cache.nbytes if cache else 0,
            "cache_place": cache.place if cache else "none",
        }

    def _trainer(self, number: int, attempt: int, costs: Tensor) -> UnitTrainer:
        config = self.config.of_unit(number, attempt)
        if attempt:
            other = build_model(config, len(self.data.classes))
            self.plan.units[number] = other.units[number]
            if number == 0:
                self.plan.stem = other.stem
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            before = self.frozen.parts[-1] if number > 0 else None
            part = weak_unit(self.plan, number, before)
        return UnitTrainer(config, self.frozen, part, costs)

    def _say(self, progress: Progress, line: str) -> None:
        if self.workers.leads:
            progress.line(line)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed growth needs; features are computed anew."""
        return {
            "units": self.units,
            "ended": self.ended,
            "model": self.network().state_dict() if self.units else {},
            "boosting": self.boosting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            TrainError: it is of another number of images.
        """
        with in_words():
            self.boosting.load_state_dict(state["boosting"])
        parts = [weak_unit(self.plan, number) for number in range(state["units"])]
        self.ended = state["ended"]
        if not parts:
            return
        network = grown(self.plan, parts)
        if self.config.precision == "pure-fp16":
            to_half(network)
        network.to(self.workers.device).to(memory_format=self.frozen.memory_format)
        network.load_state_dict(state["model"])
        for part in parts:
            # Of the classifiers only the last one is needed any more.
            part.bn, part.fc = network.bn, network.fc
            self.frozen.add(part)
