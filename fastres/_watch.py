"""BatchNorm's running statistics, copied before a step's batches and put back if it is skipped."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

# Statistics begin at multiples of so many elements, aligned for 128-bit accesses.
_ALIGNMENT = 16
_NAMES = ("running_mean", "running_var", "num_batches_tracked")


class WatchedStatistics:
    """The running statistics and counters of a model, flat: few launches copy all of them.

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
        self._views: list[Tensor] = []
        self._flat: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._gather()
        model.register_forward_pre_hook(self._before_forward)

    def open(self) -> None:
        """Let the next forward in training copy the statistics."""
        self._open = True

    @torch.no_grad()
    def restore(self, found_inf: Tensor) -> None:
        """Put the copies back where found_inf is set, bitwise, decided on the device."""
        if self._open:
            return  # no forward in training since: nothing changed
        for flat, copy in zip(self._flat, self._copies, strict=True):
            overflowed = found_inf.to(flat.device, non_blocking=True) != 0
            flat.copy_(torch.where(overflowed, copy, flat))

    @torch.no_grad()
    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not (self._open and module.training):
            return
        self._open = False
        if any(
            owner._buffers[name] is not view
            for (owner, name), view in zip(self._owners, self._views, strict=True)
        ):
            self._gather()  # model.to(...) made new ones
        for flat, copy in zip(self._flat, self._copies, strict=True):
            copy.copy_(flat)

    @torch.no_grad()
    def _gather(self) -> None:
        """Make the statistics views of one flat buffer for each dtype and device."""
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        found = [owner._buffers[name] for owner, name in self._owners]
        self._views = [b for b in found if b is not None]
        for i, buffer in enumerate(self._views):
            groups.setdefault((buffer.dtype, buffer.device), []).append(i)
        self._flat = []
        for (dtype, device), numbers in groups.items():
            starts, total = [], 0
            for i in numbers:
                starts.append(total)
                total += -(-self._views[i].numel() // _ALIGNMENT) * _ALIGNMENT
            flat = torch.zeros(total, dtype=dtype, device=device)
            for i, start in zip(numbers, starts, strict=True):
                buffer = self._views[i]
                view = flat[start : start + buffer.numel()].view(buffer.shape)
                view.copy_(buffer)
                owner, name = self._owners[i]
                owner._buffers[name] = self._views[i] = view
            self._flat.append(flat)
        self._copies = [torch.empty_like(flat) for flat in self._flat]
