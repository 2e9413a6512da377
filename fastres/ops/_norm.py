"""A BatchNorm as functions take it, and BatchNorm and ReLU by PyTorch's own operators."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops._register import kernels, register_op
from fastres.ops.batch_norm_relu import checked_batch_norm_relu


class Norm(NamedTuple):
    """A BatchNorm as a function takes it: F.batch_norm's arguments, and the counter of a Module.

    Args:
        running_mean, running_var: [C] contiguous, both or neither; updated in training.
        weight, bias: [C] or None.
        training: normalise by the batch's statistics in place of the running ones.
        momentum: share of the batch's statistics in the updated running ones; None: a cumulative
            average, which needs num_batches_tracked.
        eps: added to the variance.
        num_batches_tracked: int64 scalar or None, counted up in training.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None

    @classmethod
    def of(cls, module: nn.BatchNorm2d) -> "Norm":
        """What the Module would hand to F.batch_norm."""
        tracks = module.running_mean is not None
        training = module.training or not tracks
        updates = module.training and module.track_running_stats and tracks
        kept = updates or not training
        return cls(
            module.running_mean if kept else None,
            module.running_var if kept else None,
            module.weight,
            module.bias,
            training,
            module.momentum,
            module.eps,
            module.num_batches_tracked if updates else None,
        )

    @property
    def statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """What to normalise by: the running ones, or None for the batch's."""
        return (None, None) if self.training else (self.running_mean, self.running_var)

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """weight and bias as kernels read them: contiguous."""
        return (
            None if self.weight is None else self.weight.contiguous(),
            None if self.bias is None else self.bias.contiguous(),
        )


def norm_relu_reference(x: Tensor, norm: Norm) -> Tensor:
    """relu(norm(x)) in PyTorch's own ops."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    z = F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, momentum,
        norm.eps,
    )  # fmt: skip
    return torch.relu(z)


def norm_relu(x: Tensor, norm: Norm) -> Tensor:
    """The same as a run takes it, where the convolution that follows takes none of our kernels."""
    return checked_batch_norm_relu(
        x, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.weight, norm.bias,
        norm.training, norm.momentum, norm.eps, None, True,
    )  # fmt: skip


@register_op(
    "batch_norm_update_two_stats",
    mutates_args=(
        "running_mean1", "running_var1", "num_batches_tracked1",
        "running_mean2", "running_var2", "num_batches_tracked2",
    ),
)  # fmt: skip
def _update_two_stats(
    running_mean1: Tensor,
    running_var1: Tensor,
    num_batches_tracked1: Tensor | None,
    mean1: Tensor,
    var1: Tensor,
    momentum1: float | None,
    count1: int,
    running_mean2: Tensor,
    running_var2: Tensor,
    num_batches_tracked2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    momentum2: float | None,
    count2: int,
) -> None:
    """batch_norm_update_stats of two BatchNorms, in one launch."""
    kernels("batch_norm_relu", mean1).update_two_running(
        (running_mean1, running_var1, num_batches_tracked1),
        (running_mean2, running_var2, num_batches_tracked2),
        (mean1, var1), (mean2, var2), (momentum1, momentum2), (count1, count2),
    )  # fmt: skip


@_update_two_stats.register_fake
def _(
    running_mean1: Tensor,
    running_var1: Tensor,
    num_batches_tracked1: Tensor | None,
    mean1: Tensor,
    var1: Tensor,
    momentum1: float | None,
    count1: int,
    running_mean2: Tensor,
    running_var2: Tensor,
    num_batches_tracked2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    momentum2: float | None,
    count2: int,
) -> None:
    return None


class RunningUpdate(NamedTuple):
    """What is to move a norm's running statistics: the batch's, taken over so many values."""

    norm: Norm
    mean: Tensor
    var: Tensor
    values: int


# Where updates go in place of being made, while somebody collects them.
_collected: list[RunningUpdate] | None = None


@contextlib.contextmanager
def deferred_updates() -> Iterator[list[RunningUpdate]]:
    """Collect what the ops inside would do to running statistics, for update_every_stats.

    A whole network's BatchNorms then take one launch, and a step that is skipped need not undo what
    it did. Of this package's ops without batch_norm_relu, on a GPU, with fp32 statistics; what
    others do they do at once.
    """
    global _collected
    if _collected is not None:
        raise RuntimeError("deferred_updates: entered already")
    _collected = []
    try:
        yield _collected
    finally:
        _collected = None


def update_every_stats(updates: Sequence[RunningUpdate], applies: Tensor | None = None) -> None:
    """Make the updates that were collected, in one launch.

    Args:
        updates: what deferred_updates gave; of a norm that is in it twice the second needs another
            launch.
        applies: bool, one element, on the device: false leaves every statistic bitwise as it is;
            None: true.
    """
    rest = list(updates)
    while rest:
        now: list[RunningUpdate] = []
        again: list[RunningUpdate] = []
        for update in rest:
            known = any(update.norm.running_mean is other.norm.running_mean for other in now)
            (again if known else now).append(update)
        rest = again
        kernels("batch_norm_relu", now[0].mean).update_every_running(
            [t for u in now for t in (*u.norm[:2], u.norm.num_batches_tracked, u.mean, u.var)],
            [u.norm.momentum for u in now],
            [u.values for u in now],
            applies,
        )


def _is_deferred(norm: Norm, mean: Tensor, var: Tensor, count: int) -> bool:
    running = norm.running_mean
    if _collected is None or running is None or not running.dtype == mean.dtype == torch.float32:
        return False
    _collected.append(RunningUpdate(norm, mean, var, count))
    return True


def update_stats(norm: Norm, mean: Tensor, var: Tensor, count: int) -> None:
    """Move a norm's running statistics toward the batch's, taken over `count` values."""
    if norm.training and norm.running_mean is not None:
        if _is_deferred(norm, mean, var, count):
            return
        torch.ops.fastres.batch_norm_update_stats.default(
            norm.running_mean, norm.running_var, norm.num_batches_tracked, mean, var,
            norm.momentum, count,
        )  # fmt: skip


def update_two_stats(
    norm1: Norm, batch1: tuple[Tensor, Tensor, int], norm2: Norm, batch2: tuple[Tensor, Tensor, int]
) -> None:
    """update_stats for two norms, in one launch where both have something to move.

    batch1, batch2: mean, var and count.
    """
    alone = any(not norm.training or norm.running_mean is None for norm in (norm1, norm2))
    if alone or _collected is not None:
        update_stats(norm1, *batch1)
        update_stats(norm2, *batch2)
        return
    first, second = (
        (n.running_mean, n.running_var, n.num_batches_tracked, mean, var, n.momentum, count)
        for n, (mean, var, count) in ((norm1, batch1), (norm2, batch2))
    )
    torch.ops.fastres.batch_norm_update_two_stats.default(*first, *second)
