"""Dynamic loss scaling that never waits for the device: torch.amp.GradScaler's interface.

    scaler = LossScaler()
    scaler.watch(model)
    scaler.scale(loss).backward()
    stepped = scaler.step(optimizer)
    scaler.update()

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
from fastres.optim import FusedSGD

_T = TypeVar("_T")


@dataclass
class _Progress:
    """How far an optimizer has come since the last update."""

    stage: str = "ready"  # then "unscaled", then "stepped"
    found_inf: Tensor | None = None


class LossScaler:
    """Scale the loss, unscale the gradients, skip steps that overflowed: GradScaler in its place.

    Methods, state_dict and errors are those of torch.amp.GradScaler. Beside that: `step` returns
    whether it stepped, `unscale_` measures the gradients when asked, the scale has a floor,
    `skipped_in_a_row` counts on the device, and `watch` keeps BatchNorm's statistics clean of
    skipped batches.

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
        if isinstance(init_scale, str):
            raise ValueError(
                f"init_scale: expected a float, got {init_scale!r}: a LossScaler is on the loss's "
                "device and takes no device"
            )
        if enabled:
            if growth_factor <= 1.0:
                raise AssertionError(f"The growth factor must be > 1.0, got {growth_factor}.")
            if backoff_factor >= 1.0:
                raise AssertionError(f"The backoff factor must be < 1.0, got {backoff_factor}.")
            for name, value in (
                ("init_scale", init_scale),
                ("backoff_factor", backoff_factor),
                ("min_scale", min_scale),
            ):
                if not 0.0 < value < float("inf"):
                    raise ValueError(f"{name}: expected a number above 0, got {value}")
            if growth_interval < 1:
                raise ValueError(f"growth_interval: expected 1 or more, got {growth_interval}")
        self._enabled = enabled
        self._init_scale = init_scale
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._min_scale = min(min_scale, init_scale)
        self._init_growth_tracker = 0
        self._init_skipped = 0
        # On the device of the first loss, once there is one.
        self._scale: Tensor | None = None
        self._growth_tracker: Tensor | None = None
        self._skipped: Tensor | None = None
        self._progress: dict[int, _Progress] = {}
        self._watched: list[WatchedStatistics] = []

    # The scale

    def scale(self, outputs: _T) -> _T:
        """Multiply a loss, or losses in lists, tuples and other iterables, by the scale."""
        if not self._enabled:
            return outputs
        return self._scaled(outputs)

    def _scaled(self, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            if self._scale is None:
                self._start(outputs.device)
            assert self._scale is not None
            return outputs * send(self._scale, outputs.device)
        if isinstance(outputs, Iterable):
            scaled = map(self._scaled, outputs)
            return type(outputs)(scaled) if isinstance(outputs, list | tuple) else scaled
        raise ValueError(
            f"outputs must be a Tensor or an iterable of Tensors, got {type(outputs).__name__}"
        )

    def _start(self, device: torch.device) -> None:
        def scalar(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((), value, dtype=dtype, device=device)

        self._scale = scalar(self._init_scale, torch.float32)
        self._growth_tracker = scalar(self._init_growth_tracker, torch.int32)
        self._skipped = scalar(self._init_skipped, torch.int32)

    def _started(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        if self._scale is None or self._growth_tracker is None or self._skipped is None:
            raise AssertionError(
                f"Attempted {name} but _scale is None: call scaler.scale(loss).backward() first."
            )
        return self._scale, self._growth_tracker, self._skipped

    def get_scale(self) -> float:
        """The scale, or 1.0 where scaling is disabled. Waits for the device."""
        if not self._enabled:
            return 1.0
        return self._init_scale if self._scale is None else float(self._scale)

    @property
    def skipped_in_a_row(self) -> Tensor:
        """int32 [], on the device: steps skipped since the last one that was taken.

        A trainer reads it now and then, and stops a run in which every step is skipped.
        """
        if self._skipped is None:
            return torch.tensor(self._init_skipped, dtype=torch.int32)
        return self._skipped

    # The step

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
        """Let optimizer.step() find the scale and found_inf as its attributes; return found_inf."""
        # What the user left there counts as a part of the scale, as with GradScaler.
        given = getattr(optimizer, "grad_scale", None)
        if progress.stage == "ready":
            if isinstance(optimizer, FusedSGD):
                optimizer.drop_master_grads()
            grads = [p.grad for p in parameters(optimizer) if p.grad is not None]
            scale = send(scale, device_of(grads, scale))
            progress.found_inf, _ = unscale(grads, scale, write=False)
            given = scale if given is None else scale * given
        assert progress.found_inf is not None
        optimizer.grad_scale, optimizer.found_inf = given, progress.found_inf
        try:
            optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf
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
        scale, growth_tracker, skipped = self._started("update")
        found = [
            send(progress.found_inf, scale.device)
            for progress in self._progress.values()
            if progress.found_inf is not None
        ]
        if new_scale is not None:
            _set(scale, new_scale)
        elif not found:
            raise AssertionError(
                "No inf checks were recorded prior to update: call step(optimizer) first."
            )
        if found:
            found_inf = found[0] if len(found) == 1 else torch.stack(found).amax()
            skipped.add_(1).mul_(found_inf.to(torch.int32))
            if new_scale is None:
                torch._amp_update_scale_(
                    scale, growth_tracker, found_inf, self._growth_factor, self._backoff_factor,
                    self._growth_interval,
                )  # fmt: skip
                scale.clamp_(min=self._min_scale)
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

    # What GradScaler has

    def is_enabled(self) -> bool:
        """Whether scaling is enabled."""
        return self._enabled

    def get_growth_factor(self) -> float:
        """What the scale grows by."""
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Set what the scale grows by."""
        self._growth_factor = new_factor

    def get_backoff_factor(self) -> float:
        """What the scale backs off by."""
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set what the scale backs off by."""
        self._backoff_factor = new_factor

    def get_growth_interval(self) -> int:
        """Clean steps in a row before the scale grows."""
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Set the clean steps in a row before the scale grows."""
        self._growth_interval = new_interval

    def state_dict(self) -> dict[str, Any]:
        """GradScaler's five entries, and skipped_in_a_row; empty where disabled.

        Waits for the device. To be called after update.
        """
        if not self._enabled:
            return {}
        tracker = self._growth_tracker
        return {
            "scale": self.get_scale(),
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._init_growth_tracker if tracker is None else int(tracker),
            "skipped_in_a_row": int(self.skipped_in_a_row),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of a LossScaler or of a GradScaler."""
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError(
                "The source state dict is empty: it was saved from a disabled scaler."
            )
        self._init_scale = state_dict["scale"]
        self._min_scale = min(self._min_scale, self._init_scale)
        self._growth_factor = state_dict["growth_factor"]
        self._backoff_factor = state_dict["backoff_factor"]
        self._growth_interval = state_dict["growth_interval"]
        self._init_growth_tracker = state_dict["_growth_tracker"]
        self._init_skipped = state_dict.get("skipped_in_a_row", 0)
        if self._scale is not None:
            scale, growth_tracker, skipped = self._started("load_state_dict")
            scale.fill_(self._init_scale)
            growth_tracker.fill_(self._init_growth_tracker)
            skipped.fill_(self._init_skipped)

    def __getstate__(self) -> dict[str, Any]:
        if self._progress:
            raise AssertionError(
                "A LossScaler may only be pickled at the beginning of an iteration, or at the end "
                "after scaler.update()."
            )
        state = self.__dict__.copy()
        if self._enabled:
            known = self.state_dict()
            state["_init_scale"] = known["scale"]
            state["_init_growth_tracker"] = known["_growth_tracker"]
            state["_init_skipped"] = known["skipped_in_a_row"]
        # The tensors begin again on the device of the next loss; a model is watched anew.
        return state | {"_scale": None, "_growth_tracker": None, "_skipped": None, "_watched": []}


def _set(scale: Tensor, new_scale: float | Tensor) -> None:
    if not isinstance(new_scale, Tensor):
        scale.fill_(new_scale)
        return
    if new_scale.numel() != 1 or new_scale.requires_grad:
        raise AssertionError(
            "new_scale should be a float or a 1-element tensor with requires_grad=False, got "
            f"shape {list(new_scale.shape)}, requires_grad={new_scale.requires_grad}"
        )
    scale.copy_(new_scale.reshape(()), non_blocking=True)
