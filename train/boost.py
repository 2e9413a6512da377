"""Grow a ResNet by boosting, one unit and its weak classifier at a time, then train it end to end.

python train/boost.py --fused
torchrun --standalone --nproc_per_node gpu train/boost.py --fused --precision fp16
python train/boost.py --dataset synthetic --device cpu --unit-epochs 2 --epochs 2
"""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import checkpoint
import main as training
import records
import torch
from boost_config import BoostConfig, parse
from boost_records import GROWTH, REFINED, draw_growth, unit_line
from errors import TrainError
from growth import Growth
from records import Progress, Record
from trainer import Trainer, set_precision_and_determinism
from workers import Workers, end_process

from fastres.models import ResNet

PROGRAM = "boost.py"


class Refinement(Trainer):
    """The grown network before the first epoch of its training end to end.

    share: of its weights in the model's; the rest is that of a network newly made, as in shrink and
    perturb (Ash and Adams 2020, arXiv:1910.08475).
    """

    def __init__(self, growth: Growth, share: float) -> None:
        self._weights, self._share = growth.network().state_dict(), share
        config = growth.config.of_refinement(growth.units)
        super().__init__(config, growth.workers, growth.data)

    def make_model(self) -> ResNet:
        model = super().make_model()
        new = model.state_dict()
        model.load_state_dict(
            {
                name: grown if not grown.is_floating_point() or self._share == 1
                else new[name].lerp(grown.to(new[name]), self._share)
                for name, grown in self._weights.items()
            }
        )  # fmt: skip
        return model


def save(config: BoostConfig, growth: Growth) -> None:
    about = {"program": PROGRAM, "config": config.as_dict(), "data": training.identity(growth.data)}
    checkpoint.save(config.out_dir / checkpoint.NAME, about | growth.state_dict())


def describe(
    config: BoostConfig, workers: Workers, growth: Growth, state: dict[str, Any] | None
) -> None:
    data, threads = growth.data, ""
    if workers.device.type == "cpu":
        threads = f", {torch.get_num_threads()} thread(s) each"
    workers.say(f"device   {workers.device_name}, {workers.world_size} process(es){threads}")
    sizes = f"{len(data.train):,} train, {len(data.dev):,} dev, {len(data.test):,} test"
    workers.say(f"data     {data.name}: {sizes}, {len(data.classes)} classes")
    workers.say(
        f"growth   of ResNet-{config.depth}, width {config.width}: up to {config.most_units} "
        f"units, {config.unit_epochs} epoch(s) each, {config.precision}, features {config.features}"
    )
    workers.say(f"out      {config.out_dir}")
    if state is not None:
        workers.say(f"resume   after unit {growth.units} of {config.most_units}")
        training.say_changes(config, workers, state)


def run(config: BoostConfig, workers: Workers) -> None:
    """The growth, and the training end to end.

    Raises:
        TrainError: on every process at once; what --out held is still whole.
    """
    started = time.perf_counter()
    set_precision_and_determinism(config)
    training.check_machine(config, workers)
    summary = grow(config, workers)
    if config.refine:
        # It finds the grown network in its folder, and loads its own data.
        training.train(config.of_refinement(summary["units"]), workers)
    workers.together(lambda: finish(config, workers, summary, started))


def grow(config: BoostConfig, workers: Workers) -> Record:
    """All units, from the checkpoint on if there is one; what is to be said of them at the end."""
    out = config.out_dir
    workers.together(lambda: records.make_out(out) if workers.leads else None)
    state = workers.together(lambda: training.find_checkpoint(config, PROGRAM))
    workers.agree(None if state is None else state["units"], "the checkpoint's unit in --out")
    data = workers.leader_first(lambda: training.load_data(config)).to(workers.device)
    if state is not None:
        training.check_data(state, data)
    growth = Growth(config, workers, data)
    if state is not None:
        growth.load_state_dict(state)
    describe(config, workers, growth, state)
    metrics = records.Metrics(out / records.METRICS, counted="unit")

    def open_out() -> None:
        if workers.leads:
            metrics.keep_until(growth.units)
            records.write_json(out / records.CONFIG, config.as_dict())
            if not (out / checkpoint.NAME).exists():
                save(config, growth)

    def keep(record: Record | None) -> None:
        if workers.leads:
            if record is not None:
                metrics.add(record)
                draw_growth(out / GROWTH, metrics.records, f"BoostResNet on {data.name}")
            save(config, growth)

    workers.together(open_out)
    progress = Progress(
        len(data.train) // config.batch_size, config.batch_size,
        config.most_units * config.unit_epochs, growth.units * config.unit_epochs, workers.leads,
    )  # fmt: skip
    while growth.ended is None:
        record = growth.grow(progress)
        if record is not None:
            record["hardware"] = workers.hardware()
        workers.together(partial(keep, record))
        if record is not None and workers.leads:
            progress.line(unit_line(record, config.most_units))
    progress.close()
    workers.say(f"growth   ended: {growth.ended}")
    if growth.units == 0:
        raise TrainError(
            f"nothing is grown: {growth.ended}; raise --unit-epochs or change --lr {config.lr}, "
            "with another --out"
        )
    return {
        "data": data.name,
        "train_images": len(data.train),
        "units": growth.units,
        "most_units": config.most_units,
        "ended": growth.ended,
        "edge": growth.boosting.edge,
        "bound": growth.boosting.bound,
        "growth_seconds": sum(record["seconds"] for record in metrics.records),
        "hardware": records.hardware_of(metrics.records),
        "before_refinement": hand_over(config, growth, workers),
    }


def hand_over(config: BoostConfig, growth: Growth, workers: Workers) -> Record:
    """The grown network's accuracies; what --refine-share leaves of it is where train/main.py's run
    goes on from."""
    growth.frozen.cache = None
    accuracies = Refinement(growth, 1.0).accuracies()
    if not config.refine:
        return accuracies
    trainer = Refinement(growth, config.refine_share)

    def first_checkpoint() -> None:
        out = trainer.config.out_dir
        if workers.leads:
            records.make_out(out)
            if not (out / checkpoint.NAME).exists():
                training.save_checkpoint(trainer.config, trainer)

    workers.together(first_checkpoint)
    return accuracies


def finish(config: BoostConfig, workers: Workers, summary: Record, started: float) -> None:
    """Write the summary, and say how it went and where everything lies."""
    if not workers.leads:
        return
    out, before = config.out_dir, summary["before_refinement"]
    lines = [("grown", before, summary["growth_seconds"])]
    after, seconds, epochs = before, 0.0, 0
    if config.refine:
        refined = json.loads((out / REFINED / records.SUMMARY).read_text())
        after = {name: refined[name] for name in before}
        seconds, epochs = refined["training_seconds"], refined["epochs"]
        summary["hardware"] += [h for h in refined["hardware"] if h not in summary["hardware"]]
        lines.append(("refined", after, seconds))
    summary |= {
        **after,
        "epochs": epochs,
        "refinement_seconds": seconds,
        "training_seconds": summary["growth_seconds"] + seconds,
        "wall_seconds": time.perf_counter() - started,
        "workers": workers.world_size,
        "config": config.as_dict(),
    }
    records.write_json(out / records.SUMMARY, summary)
    for when, accuracies, took in lines:
        print(
            f"{when:<8} test accuracy {accuracies['test_accuracy']:.2f} %  (dev "
            f"{accuracies['dev_accuracy']:.2f} %, train {accuracies['train_accuracy']:.2f} %) "
            f"in {took:.0f} s"
        )
    names = {"metrics": records.METRICS, "checkpoint": checkpoint.NAME, "curve": GROWTH}
    for what, name in (names | {"summary": records.SUMMARY}).items():
        print(f"{what:<10} {out / name}")
    sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    """Exit status: as of train/main.py."""
    return training.run_program(argv, parse, run)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
