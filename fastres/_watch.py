"""BatchNorm's running statistics, copied before a step's batches and put back if it is skipped."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_NAMES = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class _Alike:
    """Statistics of one dtype and device: their copies, and both flat to be chosen from at once.

    The statistics themselves stay tensors of their own. As views of one buffer they would share a
    version counter, and the backward of one BatchNorm would forbid the update of the next; cut
    from the counter, torch.compile refuses them.
    """

    numbers: list[int]
    copies: list[Tensor]
    was: Tensor
    now: Tensor
    was_views: list[Tensor]
    now_views: list[Tensor]


class WatchedStatistics:
    """The running statistics and counters of a model, copied and put back in a few launches.

    Attributes:
        model: the model, whose forward in training copies the statistics once after each `open`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._owners = [
            (module, name)
            for module in model.modules()
            if isinstance(module, _NormBase)
            for name in _NAMES
            if module._buffers.get(name) is not None
        ]
        self._open = True
        self._groups: list[_Alike] = []
        self._prepare()
        model.register_forward_pre_hook(self._before_forward)

    def open(self) -> None:
        """Let the next forward in training copy the statistics."""
        self._open = True

    @torch.no_grad()
    def restore(self, found_inf: Tensor) -> None:
        """Put the copies back where found_inf is set, bitwise, decided on the device."""
        if self._open:
            return  # no forward in training since: nothing changed
        for group in self._groups:
            statistics = self._statistics(group)
            overflowed = found_inf.to(group.now.device, non_blocking=True) != 0
            torch._foreach_copy_(group.was_views, group.copies)
            torch._foreach_copy_(group.now_views, statistics)
            group.now.copy_(torch.where(overflowed, group.was, group.now))
            torch._foreach_copy_(statistics, group.now_views)

    def _statistics(self, group: _Alike) -> list[Tensor]:
        owners = [self._owners[i] for i in group.numbers]
        return [b for owner, name in owners if (b := owner._buffers[name]) is not None]

    @torch.no_grad()
    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not (self._open and module.training):
            return
        self._open = False
        if not self._fits():
            self._prepare()  # model.to(...) made other ones
        for group in self._groups:
            torch._foreach_copy_(group.copies, self._statistics(group))

    def _fits(self) -> bool:
        return all(
            b.dtype == copy.dtype and b.device == copy.device
            for group in self._groups
            for b, copy in zip(self._statistics(group), group.copies, strict=True)
        )

    def _prepare(self) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, (owner, name) in enumerate(self._owners):
            statistic = owner._buffers[name]
            assert statistic is not None
            groups.setdefault((statistic.dtype, statistic.device), []).append(i)
        self._groups = []
        for (dtype, device), numbers in groups.items():
            found = [self._owners[i][0]._buffers[self._owners[i][1]] for i in numbers]
            copies = [torch.empty_like(b) for b in found if b is not None]
            sizes = [copy.numel() for copy in copies]
            was, now = (torch.zeros(sum(sizes), dtype=dtype, device=device) for _ in range(2))
            was_views, now_views = (
                [part.view(copy.shape) for part, copy in zip(v.split(sizes), copies, strict=True)]
                for v in (was, now)
            )
            self._groups.append(_Alike(numbers, copies, was, now, was_views, now_views))
