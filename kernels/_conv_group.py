"""Statistics over the processes of a group: of every process's samples, of which each has as many.

A collective of 2 C numbers for each BatchNorm forward, and one backward. The gradients of its
weight and bias are of a process's own samples, as DistributedDataParallel averages them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._conv_gradient import Norm
from ._moments import Moments, Stats, merged_sums, stats_of


@dataclass(frozen=True)
class Group:
    """A torch.distributed.ProcessGroup's group_name, by which PyTorch's operators find it."""

    name: str
    size: int


def group_of(name: str, size: int) -> Group | None:
    """None where there is one process."""
    return Group(name, size) if size > 1 else None


def _of_all(t: torch.Tensor, collective: Any, *args: object) -> torch.Tensor:
    """By the operators beneath PyTorch's functional collectives, which torch.compile traces."""
    done: torch.Tensor = torch.ops._c10d_functional.wait_tensor(collective(t, *args))
    return done


def stats_of_all(moments: Moments, group: Group) -> Stats:
    """What to normalise by, of every process's rows."""
    own = stats_of(moments, merges=False)
    sent = torch.stack([own.mean, own.var * moments.rows])
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    gathered = _of_all(sent, gather, group.size, group.name).view(group.size, *sent.shape)
    partial = gathered.transpose(0, 1).contiguous()
    return stats_of(Moments(partial, moments.rows, group.size * moments.rows), merges=False)


def norm_sums(
    sums: torch.Tensor,
    norm: Norm,
    dnorm: Sequence[torch.Tensor | None],
    group: Group | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """What BatchNorm's backward goes by, and which of dnorm whoever makes that is to write.

    Of one process both as given. Of a group [2, 1, C] from every process's [2, P, C], and none:
    dnorm is written here, from this process's sums.

    sums: of dz, and of dz * (x - mean); dnorm: of norm's weight and bias, [C] or None.
    """
    dweight, dbias = dnorm
    if group is None or not norm.training:
        return sums, (dweight, dbias)
    own = merged_sums(sums)
    if dbias is not None:
        dbias.copy_(own[0])
    if dweight is not None:
        dweight.copy_(own[1] * torch.rsqrt(norm.stats.var.float() + norm.eps))
    reduce = torch.ops._c10d_functional.all_reduce
    return _of_all(own, reduce, "sum", group.name)[:, None], (None, None)
