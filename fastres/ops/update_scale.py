"""The next loss scale, from whether the last step overflowed: on the device, where both are.

    found_inf:      scale *= backoff_factor;  clean = 0;   skipped in a row += 1;  in all += 1
    otherwise:      clean += 1;                            skipped in a row = 0
    clean enough:   scale *= growth_factor;   clean = 0    unless that is not finite

Read from the top: the reference, the registered op, the function.
Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
"""

import math

import torch
from torch import Tensor

from fastres.ops._register import kernels, register_op, takes_kernels


def update_scale_reference(
    scale: float,
    growth_tracker: int,
    skipped: tuple[int, int],
    found_inf: bool,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float,
) -> tuple[float, int, tuple[int, int]]:
    """The definition of update_scale, in Python's numbers."""
    row, total = skipped
    if found_inf:
        return max(scale * backoff_factor, min_scale), 0, (row + 1, total + 1)
    if growth_tracker + 1 != growth_interval:
        return max(scale, min_scale), growth_tracker + 1, (0, total)
    grown = scale * growth_factor
    finite = math.isfinite(grown) and grown <= torch.finfo(torch.float32).max
    return max(grown if finite else scale, min_scale), 0, (0, total)


@register_op("update_scale", mutates_args=("scale", "growth_tracker", "skipped"), traceable=False)
def _update_scale(
    scale: Tensor,
    growth_tracker: Tensor,
    skipped: Tensor,
    found_inf: Tensor,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float,
) -> None:
    kernels("update_scale", scale).update_scale_fwd(
        scale, growth_tracker, skipped, found_inf, growth_factor, backoff_factor, growth_interval,
        min_scale,
    )  # fmt: skip


@_update_scale.register_fake
def _(
    scale: Tensor,
    growth_tracker: Tensor,
    skipped: Tensor,
    found_inf: Tensor,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float,
) -> None:
    return None


def update_scale(
    scale: Tensor,
    growth_tracker: Tensor,
    skipped: Tensor,
    found_inf: Tensor,
    *,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    min_scale: float = 1.0,
) -> None:
    """Back a loss scale off, or grow it after growth_interval clean steps, in one launch on a GPU.

    Args:
        scale: fp32, one element, changed in place as the next two are.
        growth_tracker: int32, one element: clean steps in a row since the scale last changed.
        skipped: int32 [2]: steps skipped in a row, and in all.
        found_inf: fp32, one element: anything but 0, the step overflowed.
        growth_factor, backoff_factor: what the scale is multiplied by; a scale that would not be
            finite does not grow.
        growth_interval: clean steps.
        min_scale: the scale is never less.
    Raises:
        ValueError: a tensor that does not fit.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; the rounding is that of
        torch.amp.GradScaler.
    """
    for name, t, numel, dtype in (
        ("scale", scale, 1, torch.float32),
        ("growth_tracker", growth_tracker, 1, torch.int32),
        ("skipped", skipped, 2, torch.int32),
        ("found_inf", found_inf, 1, torch.float32),
    ):
        if t.numel() != numel or t.dtype != dtype or t.device != scale.device:
            raise ValueError(
                f"{name}: expected {numel} of {dtype} on {scale.device}, got {list(t.shape)} of "
                f"{t.dtype} on {t.device}"
            )
    if takes_kernels(scale):
        torch.ops.fastres.update_scale.default(
            scale, growth_tracker, skipped, found_inf, growth_factor, backoff_factor,
            growth_interval, min_scale,
        )  # fmt: skip
        return
    found = found_inf.ne(0).reshape(())
    skipped[1].add_(found)
    skipped[0].add_(1).mul_(found)
    torch._amp_update_scale_(
        scale, growth_tracker, found.float(), growth_factor, backoff_factor, growth_interval
    )
    scale.clamp_(min=min_scale)
