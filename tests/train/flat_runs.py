"""Under torchrun: runs by DistributedDataParallel and by FlatGradients, and what those refuse.

torchrun --standalone --nproc_per_node 2 tests/train/flat_runs.py OUT '{"plain": [FLAG, ...], ...}'

With an even number of a run its gradients are in three buckets, else in one.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import main as training
import prebuild
import torch
import torch.distributed as dist
import trainer
from config import parse
from device_step import DeviceStep
from errors import TrainError
from flat_gradients import FlatGradients
from torch import nn
from workers import Workers, end_process

from fastres.data import split, synthetic


def models(workers: Workers) -> dict[str, str]:
    """What is said of models that differ, and of one that loses a gradient on one process."""
    said = {}
    rank = workers.rank
    try:
        FlatGradients(nn.Linear(3, 2 + rank), workers)
    except TrainError as error:
        said["other models"] = str(error)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).requires_grad_()
    gradients = FlatGradients(model, workers)
    # The leading process's weights, whatever the seed.
    said["weights"] = repr([p.tolist() for p in model.parameters()])
    model(torch.full((4, 3), 1.0 + rank)).sum().backward()
    before = [p.grad for p in model.parameters()]
    gradients.average()
    gradients.check()
    said["mean"] = repr([p.grad.tolist() for p in model.parameters() if p.grad is not None])
    assert len(before) == 4
    if rank == 1:
        model[0].weight.grad = None
    gradients.average()
    try:
        gradients.check()
    except TrainError as error:
        said["other gradients"] = str(error)
    return said | in_buckets(workers)


def in_buckets(workers: Workers) -> dict[str, str]:
    """When collectives begin, and what two buckets make of processes that differ."""
    said: dict[str, str] = {}
    begun: list[int] = []
    reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        begun.append(len(begun))
        return reduce(*args, **kwargs)

    first = nn.Linear(3, 2)
    model = nn.Sequential(first, nn.Linear(2, 2))
    gradients = FlatGradients(model, workers, buckets=2)
    seen: list[int] = []
    first.weight.register_hook(lambda grad: seen.append(len(begun)))
    x = torch.full((4, 3), 1.0 + workers.rank)
    with mock.patch.object(dist, "all_reduce", counted):
        model(x).sum().backward()
        said["before the last backward"] = repr((seen, begun))
        gradients.begin()
        model(x).sum().backward()
        said["in the last backward"] = repr((seen, len(begun)))
        gradients.average()
        said["after it"] = repr(len(begun))
    gradients.check()
    # Here the last layer's bucket waits for ever: the first layer's goes after it all the same.
    model.zero_grad()
    gradients.begin()
    (model if workers.rank == 0 else first)(x).sum().backward()
    gradients.average()
    try:
        gradients.check()
    except TrainError as error:
        said["other layers"] = str(error)
    return said


def prebuilt(flags: list[str], workers: Workers) -> tuple[bool, int]:
    """Whether two steps after --prebuild are those without, and how many launches it collected."""
    collected: list[Any] = []

    def collect(launches: list[Any], target: str, threads: int) -> int:
        collected.extend(launches)
        return len(launches)

    after = []
    for ahead in (False, True):
        config = parse([*flags, *(["--prebuild"] if ahead else [])], quiet=True)
        made = trainer.Trainer(config, workers, split(synthetic(48, 20, 8)))
        if ahead:
            with mock.patch.object(prebuild, "build_kernels", collect):
                prebuild.prebuild(made, "sm_90")
        made.network.train()
        for step, index in enumerate(list(made.batches(0))[:2]):
            made.train_step(index, step)
        after.append([*made.model.state_dict().values()])
    return all(torch.equal(a, b) for a, b in zip(*after, strict=True)), len(collected)


def main() -> None:
    workers = Workers.join("cpu")
    out, flags = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        (out / f"said{workers.rank}.json").write_text(json.dumps(models(workers)))
        for name, each in flags.items():
            training.train(parse([*each, "--out", str(out / f"{name}-ddp")], quiet=True), workers)
        ahead = [prebuilt(flags["plain"], workers)]
        # On a GPU a graph replays what a DeviceStep calls; here it is called.
        trainer.GraphedStep = DeviceStep  # type: ignore[misc, assignment]  # in its place
        training.check_graphs = lambda device: None
        trainer.GraphedCount = lambda count: count  # type: ignore[misc, assignment, return-value]  # as above
        for number, (name, each) in enumerate(flags.items()):
            buckets = "3" if number % 2 == 0 else "1"
            graph = [*each, "--cuda-graph", "--gradient-buckets", buckets]
            training.train(parse([*graph, "--out", str(out / f"{name}-flat")], quiet=True), workers)
        ahead.append(prebuilt([*flags["plain"], "--cuda-graph"], workers))
        (out / f"ahead{workers.rank}.json").write_text(json.dumps(ahead))
    finally:
        workers.leave()


if __name__ == "__main__":
    main()
    end_process(0)
