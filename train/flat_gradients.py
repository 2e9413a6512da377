"""The gradients' mean over all processes, by one collective a dtype over one flat buffer.

What DistributedDataParallel does in hooks and buckets is here the same few calls at every step,
which a CUDA graph can hold; and its guarantees: processes begin with the leading one's weights, a
model that differs between them is refused, and so are gradients of different parameters.
"""

import zlib
from dataclasses import dataclass

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


class FlatGradients:
    """A model's gradients, a view each of one flat buffer, and their mean over the processes.

    Args:
        model: on its device; every process has one.
        workers: the processes, of one group.
    Raises:
        TrainError: the processes' models differ in names, shapes or dtypes.
    """

    def __init__(self, model: nn.Module, workers: Workers) -> None:
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
        self._parts = []
        alike: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in model.parameters():
            if p.requires_grad:
                alike.setdefault(p.dtype, []).append(p)
        for params in alike.values():
            offsets, total = flat_offsets([p.numel() for p in params])
            # The last element says which of the parameters have a gradient.
            flat = torch.zeros(total + 1, dtype=params[0].dtype, device=params[0].device)
            views = [
                flat.as_strided(p.shape, p.stride(), offset)
                for p, offset in zip(params, offsets, strict=True)
            ]
            self._parts.append(_Part(params, flat, views))
        self._differ = torch.zeros((), dtype=torch.bool, device=workers.device)

    @torch.no_grad()
    def average(self) -> None:
        """Replace every gradient by its mean over the processes."""
        for part in self._parts:
            have = [p.grad is not None for p in part.params]
            grads = [p.grad for p in part.params if p.grad is not None]
            into = [view for view, there in zip(part.views, have, strict=True) if there]
            absent = [view for view, there in zip(part.views, have, strict=True) if not there]
            if grads:
                torch._foreach_copy_(into, grads)
            if absent:
                torch._foreach_zero_(absent)
            which = _number(have, part.flat.dtype)
            part.flat[-1].fill_(which)
            # Divided before it is summed, as DistributedDataParallel does: fp16 would overflow.
            part.flat.div_(self._world_size)
            dist.all_reduce(part.flat)
            self._differ |= (part.flat[-1] - which).abs() > 0.25
            for p, view, there in zip(part.params, part.views, have, strict=True):
                p.grad = view if there else None

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
