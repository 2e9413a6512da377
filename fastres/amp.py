"""Dynamic loss scaling that never waits for the device: torch.amp.GradScaler's interface.

    scaler = LossScaler()
    scaler.watch(model)
    scaler.scale(loss).backward()
    stepped = scaler.step(optimizer)
    scaler.update()

Here is what is done with optimizers and models; the scale itself is in _loss_scale.py.
Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres._loss_scale import LossScale
from fastres._optimizers import (
    device_of,
    gradients,
    has_buffers,
    parameters,
    send,
    takes_tensors,
)
from fastres._watch import WatchedStatistics
from fastres.ops import unscale
from fastres.ops._dense import check_grads
from fastres.optim import FusedSGD


@dataclass
class _Progress:
    """How far an optimizer has come since the last update."""

    stage: str = "ready"  # then "unscaled", then "stepped"
    found_inf: Tensor | None = None


class LossScaler(LossScale):
    """Scale the loss, unscale the gradients, skip steps that overflowed: GradScaler in its place.

    Methods, state_dict and errors are those of torch.amp.GradScaler. Beside that: `step` returns
    whether it stepped, `unscale_` measures the gradients when asked, `seed` begins a backward with
    the scale, the scale has a floor, `skipped_in_a_row` and `skipped_in_all` count on the device,
    and `watch` keeps BatchNorm's statistics clean of skipped batches.

    With FusedSGD and YellowFin, and with torch's fused SGD, Adam, AdamW and (not yet in torch 2.11)
    Adagrad, which take the scale and found_inf as tensors, nothing ever waits for the device. For
    any other optimizer the host decides whether to step, and waits once a step, as with GradScaler.

    With DistributedDataParallel every rank sees the same reduced gradients, and so skips the same
    steps. Gradients of one optimizer are on one device.

    Args:
        init_scale: the first scale.
        growth_factor: what the scale is multiplied by after growth_interval clean steps in a row.
        backoff_factor: what it is multiplied by after a skipped one.
        growth_interval: steps.
        enabled: False makes every method pass through: `scale` returns what it is given and `step`
            what optimizer.step() returns.
        min_scale: the scale never backs off to less, nor to less than it begins with.
    Raises:
        AssertionError: a growth factor of 1 or less, a backoff factor of 1 or more, as GradScaler.
        ValueError: another number out of range.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float = 1.0,
    ) -> None:
        super().__init__(
            init_scale, growth_factor, backoff_factor, growth_interval, enabled, min_scale
        )
        self._progress: dict[int, _Progress] = {}
        self._watched: list[WatchedStatistics] = []

    def unscale_(self, optimizer: torch.optim.Optimizer, *, norm: bool = False) -> Tensor | None:
        """Divide the optimizer's gradients by the scale; `step` does not divide them again.

        For clipping and the like between backward and step. FusedSGD's half-precision parameters
        get the result as the fp32 .grad of their masters: see FusedSGD.masters.

        Args:
            optimizer: whose gradients are complete.
            norm: whether to measure them.
        Returns:
            fp32 [], on the device, the L2 norm of all the unscaled gradients, with norm=True; else
            None.
        Raises:
            RuntimeError: called twice since the last update, or after step.
            ValueError: sparse gradients, gradients of another device or dtype, fp16 gradients of an
                optimizer without fp32 masters.
        """
        if not self._enabled:
            return None
        scale, *_ = self._started("unscale_")
        progress = self._progress.setdefault(id(optimizer), _Progress())
        if progress.stage == "unscaled":
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update(): "
                "call it once, when all gradients are there."
            )
        if progress.stage == "stepped":
            raise RuntimeError("unscale_() is being called after step(): call it before.")
        grads, out = gradients(optimizer)
        device = device_of(grads, scale)
        found_inf, total = unscale(grads, send(scale, device), out=out, norm=norm)
        progress.found_inf = found_inf
        progress.stage = "unscaled"
        return total

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step the optimizer unless a gradient is Inf or NaN; the gradients are unscaled for it.

        Args:
            optimizer: any of torch.optim, or of fastres.optim.
            args, kwargs: for optimizer.step; no closure.
        Returns:
            bool [], on the device: whether it stepped. Where scaling is disabled, what
            optimizer.step returns.
        Raises:
            RuntimeError: a closure, or called twice since the last update.
            ValueError: as unscale_.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs or any(callable(arg) for arg in args):
            raise RuntimeError(
                "Closure use is not currently supported if LossScaler is enabled: compute the "
                "loss before step()."
            )
        scale, *_ = self._started("step")
        progress = self._progress.setdefault(id(optimizer), _Progress())
        if progress.stage == "stepped":
            raise RuntimeError(
                "step() has already been called since the last update(): call update() once an "
                "iteration, after step()."
            )
        if all(p.grad is None for p in parameters(optimizer)):
            raise AssertionError(
                "No inf checks were recorded for this optimizer: none of its parameters has a "
                "gradient. Call scaler.scale(loss).backward() before step()."
            )
        if takes_tensors(optimizer) and has_buffers(optimizer):
            found_inf = self._step_on_device(optimizer, progress, scale, *args, **kwargs)
        else:
            if progress.stage == "ready":
                self.unscale_(optimizer)
            assert progress.found_inf is not None
            found_inf = progress.found_inf
            # The one wait, as GradScaler's: such an optimizer is called or not called.
            if not bool(found_inf):
                optimizer.step(*args, **kwargs)
        progress.stage = "stepped"
        for watched in self._watched:
            watched.restore(found_inf)
        return found_inf == 0

    def _step_on_device(
        self,
        optimizer: Any,
        progress: _Progress,
        scale: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Let optimizer.step() find the scale and found_inf as its attributes; return found_inf.

        Or, where the step itself looks at the gradients, what it finds that with.
        """
        # What the user left there counts as a part of the scale, as with GradScaler.
        given = getattr(optimizer, "grad_scale", None)
        overflow = None
        if progress.stage == "ready":
            if isinstance(optimizer, FusedSGD):
                optimizer.drop_master_grads()
                overflow = optimizer.need_overflow() if optimizer.finds_overflow else None
            grads = [p.grad for p in parameters(optimizer) if p.grad is not None]
            scale = send(scale, device_of(grads, scale))
            if overflow is None:
                progress.found_inf, _ = unscale(grads, scale, write=False)
            else:
                check_grads(grads, scale.device)
            given = scale if given is None else scale * given
        handed: dict[str, Any] = {"grad_scale": given, "found_inf": progress.found_inf}
        if overflow is not None:
            handed["overflow"] = overflow
        for name, value in handed.items():
            setattr(optimizer, name, value)
        try:
            optimizer.step(*args, **kwargs)
        finally:
            for name in handed:
                delattr(optimizer, name)
        if overflow is not None:
            progress.found_inf = overflow.found_inf
        assert progress.found_inf is not None
        return progress.found_inf

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """End an iteration: back off if a step was skipped, grow after growth_interval clean ones.

        Args:
            new_scale: sets the scale in place of that, a float or a tensor of one element.
        Raises:
            AssertionError: called before step or unscale_; a new_scale that does not fit.
        """
        if not self._enabled:
            return
        scale, *_ = self._started("update")
        found = [
            send(progress.found_inf, scale.device)
            for progress in self._progress.values()
            if progress.found_inf is not None
        ]
        if new_scale is not None:
            self._set(new_scale)
        elif not found:
            raise AssertionError(
                "No inf checks were recorded prior to update: call step(optimizer) first."
            )
        if found:
            found_inf = found[0] if len(found) == 1 else torch.stack(found).amax()
            self._adapt(found_inf, adapts=new_scale is None)
        self._progress = {}
        for watched in self._watched:
            watched.open()

    def watch(self, model: nn.Module) -> None:
        """Undo what a skipped step's batches did to BatchNorm's running statistics and counters.

        At the first forward in training since the last update they are copied; `step` puts the
        copies back, decided on the device, bitwise, if it did not step. With several optimizers,
        any of them that skips puts them back.

        Args:
            model: watched with all its modules; before torch.compile, and the module itself rather
                than its DistributedDataParallel.
        Raises:
            ValueError: watched already.
        """
        if not self._enabled:
            return
        if any(watched.model is model for watched in self._watched):
            raise ValueError("watch: this model is watched already")
        self._watched.append(WatchedStatistics(model))

    def __getstate__(self) -> dict[str, Any]:
        if self._progress:
            raise AssertionError(
                "A LossScaler may only be pickled at the beginning of an iteration, or at the end "
                "after scaler.update()."
            )
        # A model is watched anew.
        return super().__getstate__() | {"_watched": []}
