"""The kernels of a training step, built at once before the first."""

import copy
import time
from typing import TYPE_CHECKING

import torch
from errors import TrainError
from workers import usable_cpus

from fastres.ops import build_kernels, dry_run

if TYPE_CHECKING:
    from trainer import Trainer


def check_builds(device: torch.device) -> None:
    """See that there is a GPU to build for.

    Raises:
        TrainError: there is none.
    """
    if device.type != "cuda":
        raise TrainError(
            f"--prebuild: builds kernels for a GPU, this run is on {device.type}; leave it out"
        )


def prebuild(
    trainer: "Trainer", target: str | None = None, threads: int | None = None
) -> tuple[int, float]:
    """Build what the trainer's next step launches, with all cores; train nothing.

    Every process takes part, since a step has collectives; the leading one builds first, and the
    others find it done.

    Args:
        target, threads: of build_kernels; None, the trainer's own GPU, and one for each core.
    Returns:
        How many binaries it was, and the seconds.
    Raises:
        TrainError: the trainer is not on a GPU, and no target is given.
    """
    if target is None:
        check_builds(trainer.workers.device)
    start = time.perf_counter()
    state = copy.deepcopy(trainer.state_dict())
    workers, steps = trainer.workers, trainer.device_step
    trainer.network.train()
    index = torch.arange(trainer.config.batch_size // workers.world_size, device=workers.device)
    with dry_run() as launches:
        if steps is None:
            trainer.train_step(index, 0)
        else:
            steps.begin_epoch(trainer.epoch)
            steps.decide()
            steps.run()
            steps.end_epoch()
    # What PyTorch's own calls made of numbers that no kernel had written.
    trainer.load_state_dict(state)
    threads = threads or usable_cpus()
    count = workers.leader_first(lambda: build_kernels(launches, target, threads))
    return count, time.perf_counter() - start
