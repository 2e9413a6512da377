"""BatchNorm's running statistics, copied before a step's batches and put back if it is skipped."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastres.ops._dense import send

_NAMES = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class _Alike:
    """Statistics of one dtype and device: their copies, and both flat to be chosen from at once.

    The statistics themselves stay tensors of their own. As views of one buffer they would share a
    version counter, and the backward of one BatchNorm would forbid the update of the next; cut
    from the counter, torch.compile refuses them.
    """

    owners: list[tuple[nn.Module, str]]
    copies: list[Tensor]
    was: Tensor
    now: Tensor
    was_views: list[Tensor]
    now_views: list[Tensor]

    def statistics(self) -> list[Tensor]:
        return [getattr(owner, name) for owner, name in self.owners]


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
            statistics = group.statistics()
            overflowed = send(found_inf, group.now.device) != 0
            torch._foreach_copy_(group.was_views, group.copies)
            torch._foreach_copy_(group.now_views, statistics)
            group.now.copy_(torch.where(overflowed, group.was, group.now))
            torch._foreach_copy_(statistics, group.now_views)

    @torch.no_grad()
    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not (self._open and module.training):
            return
        self._open = False
        if not self._fits():
            self._prepare()  # model.to(...) made other ones
        for group in self._groups:
            torch._foreach_copy_(group.copies, group.statistics())

    def _fits(self) -> bool:
        for group in self._groups:
            for statistic, copy in zip(group.statistics(), group.copies, strict=True):
                if statistic.dtype != copy.dtype or statistic.device != copy.device:
                    return False
        return True

    def _prepare(self) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[tuple[nn.Module, str]]] = {}
        for owner, name in self._owners:
            statistic = getattr(owner, name)
            groups.setdefault((statistic.dtype, statistic.device), []).append((owner, name))
        self._groups = []
        for (dtype, device), owners in groups.items():
            copies = [torch.empty_like(getattr(owner, name)) for owner, name in owners]
            sizes = [copy.numel() for copy in copies]
            was, now = (torch.zeros(sum(sizes), dtype=dtype, device=device) for _ in range(2))
            was_views, now_views = (
                [part.view(copy.shape) for part, copy in zip(v.split(sizes), copies, strict=True)]
                for v in (was, now)
            )
            self._groups.append(_Alike(owners, copies, was, now, was_views, now_views))
