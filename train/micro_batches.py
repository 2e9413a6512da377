"""Workers that one process takes one after the other, each as a process of its own would be."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastres.amp import LossScaler
from fastres.ops import RunningUpdate, StepGenerator, deferred_updates


@dataclass
class _Statistics:
    """The model's buffers of one dtype, and what each worker's are: flat [count, elements]."""

    live: list[Tensor]
    flat: Tensor
    views: list[list[Tensor]]

    def load(self, k: int) -> None:
        torch._foreach_copy_(self.live, self.views[k])

    def store(self, k: int) -> None:
        torch._foreach_copy_(self.views[k], self.live)


class MicroBatches:
    """`count` workers in each process: micro-batch k of rank r stands for rank r * count + k.

    Each has its part of the batch, as the shuffle gives it to that rank, its draws of stochastic
    depth, and running statistics of its own, which move in and out of the model; between steps the
    model holds the first worker's. A gradient is divided by `count` as it arrives, after its own
    backward with the whole loss scale, as DistributedDataParallel divides what it sums: what
    overflows for one worker overflows here.

    A skipped step leaves every worker's statistics bitwise as they were. With a count of 1 that is
    the loss scaler's doing, and there is nothing else to do.

    Args:
        count: micro-batches a process.
        rank: of this process.
        network: the model or its DistributedDataParallel, which reduces after the last one only.
        model: where it trains, in its dtype.
        drops: what the model's units draw from.
        scaler: of the loss; with a count of 1 it watches the model.
        watch: False where every statistic moves by `deferred`, and nothing is ever to be undone.
    """

    def __init__(
        self,
        count: int,
        rank: int,
        network: nn.Module,
        model: nn.Module,
        drops: StepGenerator,
        scaler: LossScaler,
        watch: bool = True,
    ) -> None:
        self.count, self._first = count, rank * count
        self._network, self._drops, self._scaler = network, drops, scaler
        self._statistics: list[_Statistics] = []
        self._before: list[Tensor] = []
        if count == 1:
            if watch:
                scaler.watch(model)
            return
        for p in model.parameters():
            p.register_hook(lambda grad: grad * (1 / count))
        alike: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            alike.setdefault(buffer.dtype, []).append(buffer)
        for live in alike.values():
            sizes = [t.numel() for t in live]
            flat = live[0].new_zeros(count, sum(sizes))
            views = [
                [v.view_as(t) for v, t in zip(row.split(sizes), live, strict=True)] for row in flat
            ]
            self._statistics.append(_Statistics(live, flat, views))
        self.adopt()

    def each(self, index: Tensor) -> Iterator[Tensor]:
        """The parts of this process's share of a batch, to take forward and backward in turn."""
        if self.count == 1:
            yield index
            return
        if self._scaler.is_enabled():
            self._before = [s.flat.clone() for s in self._statistics]
        for k, part in enumerate(index.view(self.count, -1)):
            self._drops.set_rank(self._first + k)
            if k > 0:
                self._load(k)
            alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if isinstance(self._network, DistributedDataParallel) and k < self.count - 1:
                alone = self._network.no_sync()
            with alone:
                yield part
            self._store(k)

    def deferred(self) -> contextlib.AbstractContextManager[list[RunningUpdate]]:
        """Collects what a forward does to running statistics, for one launch at the step's end.

        Workers that are emulated have their own, which move between their parts: at once.
        """
        return deferred_updates() if self.count == 1 else contextlib.nullcontext([])

    def settle(self, stepped: Tensor | None) -> None:
        """End a step: undo the workers' statistics if it was skipped, and go back to the first's.

        stepped: bool [], on the device, or None where no step is ever skipped.
        """
        if stepped is not None:
            for s, before in zip(self._statistics, self._before, strict=True):
                s.flat.copy_(torch.where(stepped, s.flat, before))
        self._load(0)

    def average(self) -> None:
        """Put the mean of the workers' running statistics into the model."""
        for s in self._statistics:
            if s.flat.is_floating_point():
                s.flat.copy_(s.flat.mean(0, keepdim=True))
        self._load(0)

    def adopt(self) -> None:
        """Give every worker the statistics that the model holds."""
        for k in range(self.count):
            self._store(k)

    @torch.no_grad()
    def _load(self, k: int) -> None:
        for s in self._statistics:
            s.load(k)

    @torch.no_grad()
    def _store(self, k: int) -> None:
        for s in self._statistics:
            s.store(k)
