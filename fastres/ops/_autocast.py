"""Autocast, for which a registered op has no rule of its own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: under autocast too the backward's products keep the dtype of the forward's."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> Any:
        if dy is None or not autocasts(dy.device.type):
            return backward(ctx, dy, *others)
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy, *others)

    return wrapped


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make of x: its dtype where it is enabled, but for fp64; else x's own."""
    if x.dtype == torch.float64 or not autocasts(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
