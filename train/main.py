"""Train a ResNet on CIFAR-10, on a folder of images, or on the built-in synthetic set.

torchrun --standalone --nproc_per_node gpu train/main.py --fused
torchrun --standalone --nproc_per_node 2 train/main.py --fused --device cpu --dataset synthetic
python train/main.py --dataset folder --data-dir DIR --train-size 5000 --epochs 5
python train/main.py --config train/best.toml --help
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint
import records
import torch
from config import C, Config, parse
from device_step import check_graphs
from errors import LoneError, TrainError
from networks import fused_ops
from prebuild import check_builds, prebuild
from profiling import WARMUP, Profile, load_nvtx
from trainer import Trainer, set_precision_and_determinism
from workers import Workers, end_process

from fastres.data import Splits, cifar10, folder, split, synthetic

# What a checkpoint's model is made of; the other settings may change from one start to the next.
_MODEL = ("depth", "units", "width", "block", "shortcut")
# Settings whose change needs no word.
_SILENT = (
    "config", "out", "resume", "data_dir", "device", "epochs", "fused", "profile", "profile_steps",
)  # fmt: skip
# What is to be said of a change that has no effect.
_NOTES = {"zero_init": " (to no effect: the weights are the checkpoint's)"}


def identity(data: Splits) -> dict[str, Any]:
    """What tells one data set from another, wherever it lies."""
    return {
        "classes": list(data.classes),
        "image_size": list(data.train.images.shape[2:]),
        "test_images": len(data.dev) + len(data.test),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def load_data(config: Config) -> Splits:
    """The data set of a config, on the CPU.

    Raises:
        DataError: it cannot be had.
    """
    if config.dataset == "cifar10":
        data = cifar10(config.data_dir or Path("data"))
    elif config.dataset == "folder":
        assert config.data_dir is not None  # Config has seen to it
        data = folder(config.data_dir, config.image_size, config.test_fraction)
    else:
        sizes = {} if config.train_size is None else {"train_size": config.train_size}
        data = synthetic(image_size=config.image_size or 32, **sizes)
    return split(data, config.train_size)


def find_checkpoint(config: Config, program: str = "main.py") -> dict[str, Any] | None:
    """The checkpoint to go on from, or None for a fresh start.

    Raises:
        TrainError: it is damaged, absent, another model's or another program's, or --resume none
            meets one.
    """
    own = config.out_dir / checkpoint.NAME
    if config.resume == "none":
        if own.exists():
            raise TrainError(
                f"--out {config.out_dir}: holds a run already, and --resume none would overwrite "
                "it; choose another --out, or --resume auto to go on with it"
            )
        return None
    if config.resume == "auto" and not own.exists():
        return None
    path = own if config.resume == "auto" else Path(config.resume)
    if own.exists() and path.resolve() != own.resolve():
        raise TrainError(
            f"--out {config.out_dir}: holds a run already, and --resume {path} would overwrite it; "
            "choose another --out"
        )
    state = checkpoint.load(path)
    writer = state.get("program", "main.py")
    if writer != program:
        raise TrainError(
            f"{path}: a checkpoint of train/{writer}, not of train/{program}; name another, or "
            "another --out"
        )
    then, now = state["config"], config.as_dict()
    precisions = {then["precision"], now["precision"]}
    if len(precisions) > 1 and "pure-fp16" in precisions:
        raise TrainError(
            f"{path}: its weights are of --precision {then['precision']}, this run's of "
            f"--precision {now['precision']}; pass the former, or another --out"
        )
    optimizer = then.get("optimizer", "sgd")  # which had no name at first
    if optimizer != config.optimizer:
        raise TrainError(
            f"{path}: its state is that of --optimizer {optimizer}, not of --optimizer "
            f"{config.optimizer}; pass the former, or another --out"
        )
    for name in _MODEL:
        held = then.get(name)  # there was no --units at first
        if held != now[name]:
            here = f"--{name} {now[name]}" if now[name] is not None else f"no --{name}"
            there, advice = f"--{name} {held}", f"pass --{name} {held}"
            if held is None:
                there, advice = f"no --{name}", f"leave out --{name}"
            raise TrainError(
                f"{path}: its model has {there}, this run {here}; {advice}, or another --out"
            )
    return state


def check_data(state: dict[str, Any], data: Splits) -> None:
    """See that a checkpoint is of this data.

    Raises:
        TrainError: it is of other data.
    """
    if state["data"] != identity(data):
        differ = [key for key, value in identity(data).items() if state["data"][key] != value]
        raise TrainError(
            f"the checkpoint was trained on other data than {data.name} ({', '.join(differ)} "
            "differ); name the data of that run, or choose another --out"
        )


def check_machine(config: Config, workers: Workers) -> None:
    """See that a batch is shared evenly, and that there is a GPU for what needs one.

    Raises:
        TrainError: it cannot be, or there is none.
    """
    if config.cuda_graph:
        check_graphs(workers.device)
    if config.prebuild:
        check_builds(workers.device)
    shares = workers.world_size * config.micro_batches
    if config.batch_size % shares:
        each = f" of {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
        raise TrainError(
            f"--batch-size {config.batch_size}: {workers.world_size} processes{each} cannot share "
            f"it evenly; choose a multiple of {shares}"
        )


def describe(
    config: Config, workers: Workers, data: Splits, trainer: Trainer, state: dict[str, Any] | None
) -> None:
    """Say what is about to run, so that nothing about it is silent."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    device = workers.device
    threads = f", {torch.get_num_threads()} thread(s) each" if device.type == "cpu" else ""
    workers.say(f"device   {workers.device_name}, {workers.world_size} process(es){threads}")
    sizes = f"{len(data.train):,} train, {len(data.dev):,} dev, {len(data.test):,} test"
    workers.say(f"data     {data.name}: {sizes}, {len(data.classes)} classes")
    layout = "channels_last" if config.channels_last else "NCHW"
    cut = "" if config.units is None else f", its first {config.units} units"
    workers.say(
        f"model    {config.block} ResNet-{config.depth}{cut}, width {config.width}: "
        f"{parameters:,} parameters, {config.precision}, {layout}"
    )
    if config.micro_batches > 1:
        count = workers.world_size * config.micro_batches
        workers.say(
            f"workers  {count}, emulated: {config.micro_batches} micro-batches in each process, of "
            f"{config.batch_size // count} images"
        )
    if config.optimizer != "sgd":
        of = " times what it tunes" if config.optimizer == "yellowfin" else ""
        workers.say(f"steps    by {config.optimizer}, lr {config.lr:g}{of}")
    if config.fused:
        workers.say(f"fused    {fused_ops(trainer)}")
    if config.drop_prob > 0:
        workers.say(
            f"depth    stochastic, p = {config.drop_prob:g} {config.drop_schedule}, "
            f"by {config.drop_mode}"
        )
    if config.meprop_ratio is not None:
        warm, every = config.meprop_warmup_epochs, config.meprop_dense_every
        dense = f", dense for the first {warm} epoch(s)" if warm else ""
        if every:
            dense += f", {'then ' if warm else ''}dense every {every} epochs"
        workers.say(f"meProp   keeps {config.meprop_ratio:g} of dy, {config.meprop_mode}{dense}")
    workers.say(f"out      {config.out_dir}")
    if state is not None:
        workers.say(f"resume   after epoch {trainer.epoch} of {config.epochs}")
        say_changes(config, workers, state)


def say_changes(config: Config, workers: Workers, state: dict[str, Any]) -> None:
    """Say which settings are others than a checkpoint's."""
    then, now = state["config"], config.as_dict()
    for key in sorted(now.keys() & then.keys() - set(_SILENT)):
        if then[key] != now[key]:
            note = _NOTES.get(key, "")
            workers.say(f"changed  {key}: {then[key]} -> {now[key]}{note}")


def train(config: Config, workers: Workers) -> None:
    """The whole run.

    Raises:
        TrainError: on every process at once; what --out held is still whole.
    """
    started = time.perf_counter()
    set_precision_and_determinism(config)
    check_machine(config, workers)
    nvtx = workers.together(lambda: load_nvtx("--profile")) if config.profile else None
    workers.together(lambda: records.make_out(config.out_dir) if workers.leads else None)
    state = workers.together(lambda: find_checkpoint(config))
    workers.agree(None if state is None else state["epoch"], "the checkpoint's epoch in --out")
    data = workers.leader_first(lambda: load_data(config)).to(workers.device)
    if state is not None:
        check_data(state, data)
    trainer = Trainer(config, workers, data)
    if state is not None:
        trainer.load_state_dict(state)
    steps = (config.epochs - trainer.epoch) * trainer.steps_per_epoch
    if config.profile and steps <= WARMUP:
        raise TrainError(
            f"--profile: records steps after the first {WARMUP}, and this run has {steps}; "
            "raise --epochs or lower --batch-size"
        )
    describe(config, workers, data, trainer, state)
    if config.prebuild and trainer.epoch < config.epochs:
        count, seconds = prebuild(trainer)
        workers.say(f"built    {count} kernels in {seconds:.1f} s")

    out, done = config.out_dir, trainer.epoch
    metrics = records.Metrics(out / records.METRICS)

    def open_out() -> None:
        if workers.leads:
            metrics.keep_until(done)
            records.write_json(out / records.CONFIG, config.as_dict())

    workers.together(open_out)
    progress = records.Progress(
        trainer.steps_per_epoch, config.batch_size, config.epochs, done, workers.leads
    )
    if config.profile:
        say = progress.line if workers.leads else lambda line: None
        Profile(trainer, min(config.profile_steps, steps - WARMUP), out, nvtx, say)

    def save_first() -> None:
        # What diverges or is killed in its first epoch leaves something to go on from, too.
        if workers.leads and not (out / checkpoint.NAME).exists():
            save_checkpoint(config, trainer)

    workers.together(save_first)
    accuracies: records.Record = {}
    training_started = time.perf_counter()
    while trainer.epoch < config.epochs:
        progress.epoch(trainer.epoch + 1)
        record = trainer.train_epoch(progress)
        record["hardware"] = workers.hardware()
        trainer.average_statistics()
        if trainer.epoch % config.eval_every == 0 or trainer.epoch == config.epochs:
            accuracies = trainer.accuracies()
            record |= accuracies
        workers.together(partial(keep, record, config, workers, trainer, metrics))
        seconds_each = (time.perf_counter() - training_started) / (trainer.epoch - done)
        if workers.leads:
            left = seconds_each * (config.epochs - trainer.epoch)
            progress.line(records.epoch_line(record, config.epochs, left))
    progress.close()
    if trainer.epoch == done:
        workers.say(f"nothing to train: {out} is at epoch {done} of {config.epochs}")
        accuracies = trainer.accuracies()
    seconds = time.perf_counter() - started
    workers.together(
        lambda: finish(config, workers, data, metrics, accuracies, trainer.epoch, seconds)
    )


def keep(
    record: records.Record,
    config: Config,
    workers: Workers,
    trainer: Trainer,
    metrics: records.Metrics,
) -> None:
    """Write an epoch's record, then the checkpoint: a resume takes back records that run ahead."""
    if workers.leads:
        metrics.add(record)
        save_checkpoint(config, trainer)


def save_checkpoint(config: Config, trainer: Trainer) -> None:
    about = {"config": config.as_dict(), "data": identity(trainer.data)}
    checkpoint.save(config.out_dir / checkpoint.NAME, about | trainer.state_dict())


def finish(
    config: Config,
    workers: Workers,
    data: Splits,
    metrics: records.Metrics,
    accuracies: records.Record,
    epochs: int,
    seconds: float,
) -> None:
    """Draw the curve, write the summary, and say how it went and where everything lies."""
    if not workers.leads:
        return
    out = config.out_dir
    title = f"{config.block} ResNet-{config.depth} on {data.name}"
    records.draw_curve(out / records.CURVE, metrics.records, title)
    training = sum(record["seconds"] for record in metrics.records)
    summary = {
        "data": data.name,
        "train_images": len(data.train),
        "epochs": epochs,
        **accuracies,
        "training_seconds": training,
        "wall_seconds": seconds,
        "hardware": records.hardware_of(metrics.records),
        "workers": workers.world_size * config.micro_batches,
        "config": config.as_dict(),
    }
    records.write_json(out / records.SUMMARY, summary)
    print(
        f"test accuracy {accuracies['test_accuracy']:.2f} %  "
        f"(dev {accuracies['dev_accuracy']:.2f} %, train {accuracies['train_accuracy']:.2f} %) "
        f"after {training:.0f} s of training, {seconds:.0f} s in all"
    )
    names = {"metrics": records.METRICS, "checkpoint": checkpoint.NAME, "curve": records.CURVE}
    for what, name in (names | {"summary": records.SUMMARY}).items():
        print(f"{what:<10} {out / name}")
    sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    return run_program(argv, parse, train)


def run_program(
    argv: Sequence[str], parse: Callable[..., C], run: Callable[[C, Workers], None]
) -> int:
    """Exit status: 0, 1 where the run failed, 2 where a flag does not fit."""
    leads = os.environ.get("RANK", "0") == "0"
    try:
        config = parse(argv, quiet=not leads)
        workers = Workers.join(config.device)
    except TrainError as error:
        return fail(error, leads, status=2)
    try:
        run(config, workers)
    except TrainError as error:
        return fail(error, leads, status=1)
    finally:
        workers.leave()
    return 0


def fail(error: TrainError, leads: bool, status: int) -> int:
    """Say once what every process knows, and what one alone knows."""
    if leads or isinstance(error, LoneError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # torchrun ends all processes as soon as one has failed: the leading one speaks first.
        time.sleep(5)
    return status


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
