"""The gradients' mean over all processes, by a collective a dtype over one flat buffer.

What DistributedDataParallel does in hooks and buckets is here the same few calls at every step,
which a CUDA graph can hold; and its guarantees: processes begin with the leading one's weights, a
model that differs between them is refused, and so are gradients of different parameters.
"""

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from errors import TrainError
from torch import Tensor, nn
from workers import Workers

from fastres.ops import flat_offsets

# Of a number below 2^20 fp32 tells the mean over any processes from its neighbour.
_BITS = 20


@dataclass
class _Part:
    """Parameters of one dtype, their gradients' flat buffer, and their parts of it."""

    params: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    # Of the backward that goes on: gradients still to come, what the flat says of those that came,
    # and the collective.
    left: int = 0
    which: int = 0
    work: Any = None


class FlatGradients:
    """A model's gradients, a view each of a flat buffer, and their mean over the processes.

    With several buckets each is reduced as soon as its gradients are there, while the backward goes
    on; every process begins them in the same order, the last layers' first.

    Args:
        model: on its device; every process has one.
        workers: the processes, of one group.
        buckets: collectives of a step for each dtype. One waits for the whole backward.
    Raises:
        TrainError: the processes' models differ in names, shapes or dtypes.
    """

    def __init__(self, model: nn.Module, workers: Workers, buckets: int = 1) -> None:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        shapes = [(name, list(t.shape), str(t.dtype)) for name, t in tensors.items()]
        every: list[object] = [None] * workers.world_size
        dist.all_gather_object(every, zlib.crc32(repr(shapes).encode()))
        if len(set(every)) > 1:
            raise TrainError(
                "the processes have different models; start them with the same flags and one "
                "version of fastres"
            )
        for t in tensors.values():
            dist.broadcast(t.detach(), 0)
        self._world_size = workers.world_size
        self._parts = [_part(params) for params in _in_buckets(model, buckets)]
        self._differ = torch.zeros((), dtype=torch.bool, device=workers.device)
        self._complete, self._begun = False, 0
        if buckets > 1:
            for part in self._parts:
                for p in part.params:
                    p.register_post_accumulate_grad_hook(partial(self._arrived, part))

    def begin(self) -> None:
        """Say that the backward that follows is the step's last: its gradients are complete."""
        for part in self._parts:
            part.left = len(part.params)
        self._complete, self._begun = True, 0

    @torch.no_grad()
    def _arrived(self, part: _Part, _: Tensor) -> None:
        if not self._complete:
            return
        part.left -= 1
        # In turn, so that processes agree on the order, whatever arrives first.
        while self._begun < len(self._parts) and self._parts[self._begun].left == 0:
            self._reduce(self._parts[self._begun])
            self._begun += 1

    def _reduce(self, part: _Part) -> None:
        """Begin the collective of the gradients that there are."""
        have = [p.grad is not None for p in part.params]
        grads = [p.grad for p in part.params if p.grad is not None]
        into = [view for view, there in zip(part.views, have, strict=True) if there]
        absent = [view for view, there in zip(part.views, have, strict=True) if not there]
        if grads:
            torch._foreach_copy_(into, grads)
        if absent:
            torch._foreach_zero_(absent)
        part.which = _number(have, part.flat.dtype)
        part.flat[-1].fill_(part.which)
        # Divided before it is summed, as DistributedDataParallel does: fp16 would overflow.
        part.flat.div_(self._world_size)
        part.work = dist.all_reduce(part.flat, async_op=True)

    @torch.no_grad()
    def average(self) -> None:
        """Replace every gradient by its mean over the processes, once the backward has ended."""
        for part in self._parts[self._begun :]:
            self._reduce(part)
        self._complete, self._begun = False, 0
        for part in self._parts:
            part.work.wait()
            self._differ |= (part.flat[-1] - part.which).abs() > 0.25
            for p, view in zip(part.params, part.views, strict=True):
                p.grad = None if p.grad is None else view

    def check(self) -> None:
        """See that all processes had gradients of the same parameters so far; it waits.

        Raises:
            TrainError: on every process at once; they had not.
        """
        differ = self._differ.to(torch.int32)
        dist.all_reduce(differ)
        if int(differ):
            raise TrainError(
                "the processes had gradients of different parameters in one step: their sums mean "
                "nothing; start them with the same flags and seed (the last checkpoint is whole)"
            )


def _number(have: list[bool], dtype: torch.dtype) -> int:
    """A number that tells sets of parameters apart, whose mean is exact enough in a dtype."""
    found = zlib.crc32(bytes(have))
    return found % (1 << (_BITS if dtype == torch.float32 else 8))


def _in_buckets(model: nn.Module, buckets: int) -> list[list[nn.Parameter]]:
    """Parameters of one dtype each, in the order in which a backward reaches them, about alike in
    bytes."""
    alike: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in reversed(list(model.parameters())):
        if p.requires_grad:
            alike.setdefault(p.dtype, []).append(p)
    cut: list[list[list[nn.Parameter]]] = []
    for params in alike.values():
        total, before = sum(p.numel() for p in params), 0
        found: list[list[nn.Parameter]] = [[] for _ in range(buckets)]
        for p in params:
            found[before * buckets // total].append(p)
            before += p.numel()
        cut.append(found)
    # Of all dtypes the first, then of all the second.
    return [params for several in zip(*cut, strict=True) for params in several if params]


def _part(params: list[nn.Parameter]) -> _Part:
    offsets, total = flat_offsets([p.numel() for p in params])
    # The last element says which of the parameters have a gradient.
    flat = torch.zeros(total + 1, dtype=params[0].dtype, device=params[0].device)
    views = [
        flat.as_strided(p.shape, p.stride(), offset)
        for p, offset in zip(params, offsets, strict=True)
    ]
    return _Part(params, flat, views)
