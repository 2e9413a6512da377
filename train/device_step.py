"""A training step whose numbers lie on the device, and the CUDA graph that holds it.

A graph replays launches with the arguments that they were captured with. So whatever changes from
step to step (the images, the learning rate, the epoch, what stochastic depth draws) is read on the
device, and a DeviceStep is the same calls every time, with a graph or without one.
"""

import gc
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from errors import TrainError
from torch import Tensor

from fastres.data import ImageSet
from fastres.ops import shuffle

if TYPE_CHECKING:
    from trainer import Trainer

# Steps of a kind before its capture: what a run does but once (build kernels, choose algorithms,
# make momentum) is no part of a step.
WARMUP = 2
# Graphs that are kept; what stochastic depth by "batch" leaves out is a graph of its own each time,
# and a step whose graph has no place any more runs without one.
MOST_GRAPHS = 64
# NCCL's own threads may ask the device something meanwhile, which is no part of a graph.
_CAPTURE = "thread_local"


class EpochLosses:
    """The losses of an epoch's steps, each put where it belongs, to be summed at its end.

    Args:
        steps: of an epoch.
    Attributes:
        each: fp32 [steps].
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.each = torch.zeros(steps, dtype=torch.float32, device=device)

    def put(self, step: int | Tensor, loss: Tensor) -> None:
        """step: of the epoch; a tensor, int64 [], is read on the device."""
        if isinstance(step, Tensor):
            self.each.index_copy_(0, step.view(1), loss.float().view(1))
        else:
            self.each[step].copy_(loss)

    def total(self, *, finite: bool) -> tuple[Tensor, Tensor]:
        """Their sum and number, fp64 []; finite: without those that overflowed.

        With loss scaling a step that overflows is skipped, and its loss then has no part in the
        mean, as it had none in the weights.
        """
        losses = self.each.double()
        counted = losses.isfinite() if finite else torch.ones_like(losses, dtype=torch.bool)
        return torch.where(counted, losses, 0.0).sum(), counted.sum().double()


class DeviceStep:
    """A trainer's next step, whatever step that is: begin an epoch, then call it once a step.

    The results are bitwise those of trainer.train_step, whose numbers come from the host.
    """

    def __init__(self, trainer: "Trainer") -> None:
        device, config, workers = trainer.workers.device, trainer.config, trainer.workers
        self._trainer = trainer
        self._number = 0  # of the run's steps, as `_step` has it on the device
        steps = config.epochs * trainer.steps_per_epoch
        rates = [trainer.fp32_lr_of(step) for step in range(steps)]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=device)
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        self._epoch = torch.zeros((), dtype=torch.int64, device=device)
        # The step of the run and of the epoch, and of this process's share of its batch the places
        # in the epoch's order; all go on at once.
        share = config.batch_size // workers.world_size
        self._first = torch.arange(share, device=device) + workers.rank * share
        self._counters = torch.zeros(2 + share, dtype=torch.int64, device=device)
        self._step, self._of_epoch = self._counters[:2]
        self._places = self._counters[2:]
        self._onward = torch.full_like(self._counters, config.batch_size)
        self._onward[:2] = 1
        self._order = torch.zeros(len(trainer.data.train), dtype=torch.int64, device=device)

    def begin_epoch(self, epoch: int, order: Tensor | None = None) -> None:
        """Go to the first step of an epoch.

        order: int64 [training images], on the device; None: the epoch's own shuffle.
        """
        trainer = self._trainer
        for group in trainer.optimizer.param_groups:
            group["lr"] = self._lr
        self._number = epoch * trainer.steps_per_epoch
        self._epoch.fill_(epoch)
        self._step.fill_(self._number)
        self._of_epoch.zero_()
        self._places.copy_(self._first)
        if order is None:
            order = shuffle(len(self._order), trainer.config.seed, epoch, trainer.workers.device)
        self._order.copy_(order)

    def end_epoch(self) -> None:
        """Leave the optimizer with the learning rate of its last step, a number as elsewhere."""
        for group in self._trainer.optimizer.param_groups:
            group["lr"] = self._trainer.fp32_lr_of(self._number - 1)

    def __call__(self) -> None:
        self.decide()
        self.run()

    def decide(self) -> tuple[bool, ...]:
        """The host's part, and what makes of this step another kind than others: for each unit
        whether stochastic depth by "batch" leaves it out, and whether meProp is dense."""
        trainer = self._trainer
        dropped = trainer.drops.decide(self._number)
        self._number += 1
        # Other modes draw on the device.
        return *(dropped if trainer.config.drop_mode == "batch" else ()), trainer.meprop_dense

    def run(self) -> None:
        """The device's part: from the images to the updated weights, without a word to the host."""
        trainer = self._trainer
        with trainer.phase("step"):
            self._lr.copy_(self._rates.index_select(0, self._step.view(1))[0])
            trainer.drops.follow(self._step)
            index = self._order.index_select(0, self._places)
            loss, _ = trainer.update(index, self._epoch)
            trainer.losses.put(self._of_epoch, loss)
            self._counters += self._onward


class GraphedStep(DeviceStep):
    """A DeviceStep that is one launch: captured after a few steps, then replayed.

    Graphs share one pool of memory, since they run one after the other.

    Raises:
        TrainError: the trainer is where there are no CUDA graphs.
    """

    def __init__(self, trainer: "Trainer") -> None:
        check_graphs(trainer.workers.device)
        super().__init__(trainer)
        self._seen: Counter[tuple[bool, ...]] = Counter()
        self._graphs: dict[tuple[bool, ...], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self) -> None:
        kind = self.decide()
        graph = self._graphs.get(kind)
        if graph is None and self._seen[kind] >= WARMUP and len(self._graphs) < MOST_GRAPHS:
            graph = self._graphs[kind] = self._capture()
        if graph is not None:
            graph.replay()
            return
        self._seen[kind] += 1
        # On the stream of the captures, whose memory and gradients these steps then prepare.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self.run()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # A collection in the middle could free another graph's memory, which capture forbids.
        gc.collect()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=_CAPTURE):
            self.run()
        return graph


class GraphedCount:
    """A count of right answers in evaluation, a graph for each set of images.

    A batch of another size than the set's first, as the last one is, runs without.

    Args:
        count: of images at an index, int64 []: reads nothing on the host.
    """

    def __init__(self, count: Callable[[ImageSet, Tensor], Tensor]) -> None:
        self._count = count
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._sizes: dict[int, int] = {}

    def __call__(self, images: ImageSet, index: Tensor) -> Tensor:
        size = self._sizes.get(id(images))
        if size is None:
            # The first batch prepares what a capture must find done.
            self._sizes[id(images)] = len(index)
        if size != len(index):
            return self._count(images, index)
        if id(images) not in self._graphs:
            self._graphs[id(images)] = self._capture(images, index)
        graph, source, counted = self._graphs[id(images)]
        source.copy_(index)
        graph.replay()
        return counted

    def _capture(
        self, images: ImageSet, index: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        source, graph = index.clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        gc.collect()
        with torch.cuda.graph(graph, capture_error_mode=_CAPTURE):
            counted = self._count(images, source)
        return graph, source, counted


def check_graphs(device: torch.device) -> None:
    """See that there are CUDA graphs.

    Raises:
        TrainError: not on this device.
    """
    if device.type != "cuda":
        raise TrainError(
            f"--cuda-graph: a CUDA graph needs a GPU, this run is on {device.type}; leave it out"
        )
