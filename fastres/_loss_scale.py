"""The scale of a loss, on its device: how it starts, grows and backs off, is told and saved."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastres.ops import update_scale
from fastres.ops._dense import send

_T = TypeVar("_T")


class LossScale:
    """The part of LossScaler that knows no optimizer; there are the arguments described."""

    def __init__(
        self,
        init_scale: float,
        growth_factor: float,
        backoff_factor: float,
        growth_interval: int,
        enabled: bool,
        min_scale: float,
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
        # int32 [2]: in a row, and in all since there is one.
        self._skipped: Tensor | None = None

    def scale(self, outputs: _T) -> _T:
        """Multiply a loss, or losses in lists, tuples and other iterables, by the scale."""
        if not self._enabled:
            return outputs
        return self._scaled(outputs)

    def seed(self, loss: Tensor) -> Tensor | None:
        """What loss.backward begins with in place of scale(loss).backward(): two launches less.

            loss.backward(scaler.seed(loss))

        Args:
            loss: one element, fp32 or fp64.
        Returns:
            The scale, in the loss's dtype and shape, of this moment: to be used before the next
            update. None where scaling is disabled, as backward takes it.
        Raises:
            ValueError: a loss of half precision, in which the scale may have no number, or of more
                elements.
        """
        if not self._enabled:
            return None
        if loss.numel() != 1 or loss.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"loss: expected one element of torch.float32 or torch.float64, got "
                f"{list(loss.shape)} of {loss.dtype}: use scale(loss).backward()"
            )
        if self._scale is None:
            self._start(loss.device)
        assert self._scale is not None
        return send(self._scale, loss.device).to(loss.dtype).view(loss.shape)

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
        self._skipped = scalar(self._init_skipped, torch.int32).repeat(2)

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
        return self._skipped[0]

    @property
    def skipped_in_all(self) -> Tensor:
        """int32 [], on the device: steps skipped since some moment; two readings are compared."""
        if self._skipped is None:
            return torch.tensor(self._init_skipped, dtype=torch.int32)
        return self._skipped[1]

    def _adapt(self, found_inf: Tensor, adapts: bool = True) -> None:
        """Back off, or grow after growth_interval clean steps; or count what was skipped alone."""
        scale, growth_tracker, skipped = self._started("update")
        if not adapts:
            scale, growth_tracker = scale.clone(), growth_tracker.clone()
        update_scale(
            scale, growth_tracker, skipped, found_inf, growth_factor=self._growth_factor,
            backoff_factor=self._backoff_factor, growth_interval=self._growth_interval,
            min_scale=self._min_scale,
        )  # fmt: skip

    def _set(self, new_scale: float | Tensor) -> None:
        scale, *_ = self._started("update")
        if not isinstance(new_scale, Tensor):
            scale.fill_(new_scale)
            return
        if new_scale.numel() != 1 or new_scale.requires_grad:
            raise AssertionError(
                "new_scale should be a float or a 1-element tensor with requires_grad=False, got "
                f"shape {list(new_scale.shape)}, requires_grad={new_scale.requires_grad}"
            )
        scale.copy_(new_scale.reshape(()), non_blocking=True)

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
        state = self.__dict__.copy()
        if self._enabled:
            known = self.state_dict()
            state["_init_scale"] = known["scale"]
            state["_init_growth_tracker"] = known["_growth_tracker"]
            state["_init_skipped"] = known["skipped_in_a_row"]
        # The tensors begin again on the device of the next loss.
        return state | {"_scale": None, "_growth_tracker": None, "_skipped": None}
