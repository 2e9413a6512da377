"""Under torchrun: runs by DistributedDataParallel and by FlatGradients, and what those refuse.

torchrun --standalone --nproc_per_node 2 tests/train/flat_runs.py OUT '{"plain": [FLAG, ...], ...}'
"""

import json
import sys
from pathlib import Path

import torch
import trainer
from config import parse
from device_step import DeviceStep
from errors import TrainError
from flat_gradients import FlatGradients
from main import train
from torch import nn
from workers import Workers, end_process


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
    return said


def main() -> None:
    workers = Workers.join("cpu")
    out, flags = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        (out / f"said{workers.rank}.json").write_text(json.dumps(models(workers)))
        for name, each in flags.items():
            train(parse([*each, "--out", str(out / f"{name}-ddp")], quiet=True), workers)
        # On a GPU a graph replays what a DeviceStep calls; here it is called.
        trainer.GraphedStep = DeviceStep  # type: ignore[misc, assignment]  # in its place
        trainer.GraphedCount = lambda count: count  # type: ignore[misc, assignment, return-value]  # as above
        for name, each in flags.items():
            graph = [*each, "--cuda-graph", "--out", str(out / f"{name}-flat")]
            train(parse(graph, quiet=True), workers)
    finally:
        workers.leave()


if __name__ == "__main__":
    main()
    end_process(0)
