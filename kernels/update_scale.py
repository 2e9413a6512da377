"""The next loss scale: backed off after a step that overflowed, grown after many that did not.

One program, a few numbers: what counts is that it is one launch, and that nobody waits for it.
"""

import struct

import torch
import triton
import triton.language as tl

from . import _addresses
from ._launch import launch_opaque

__all__ = ["update_scale_fwd"]


@triton.jit
def _update_scale_fwd_kernel(
    scale_ptr, growth_tracker_ptr, skipped_ptr, found_inf_ptr, numbers_ptr
):
    """numbers: int64, growth and backoff factor and least scale as the bits of fp64, interval."""
    growth = tl.load(numbers_ptr).to(tl.float64, bitcast=True)
    backoff = tl.load(numbers_ptr + 1).to(tl.float64, bitcast=True)
    least = tl.load(numbers_ptr + 2).to(tl.float64, bitcast=True).to(tl.float32)
    interval = tl.load(numbers_ptr + 3)
    found = tl.load(found_inf_ptr) != 0.0
    scale = tl.load(scale_ptr)
    clean = tl.load(growth_tracker_ptr) + 1
    # As PyTorch's own: the product in fp64, and no scale that is not finite.
    grown = (scale.to(tl.float64) * growth).to(tl.float32)
    grows = clean == interval
    after = tl.where(grows & (grown < float("inf")), grown, scale)
    after = tl.where(found, (scale.to(tl.float64) * backoff).to(tl.float32), after)
    tl.store(scale_ptr, tl.maximum(after, least))
    tl.store(growth_tracker_ptr, tl.where(found | grows, 0, clean))
    tl.store(skipped_ptr, tl.where(found, tl.load(skipped_ptr) + 1, 0))
    tl.store(skipped_ptr + 1, tl.load(skipped_ptr + 1) + found.to(tl.int32))


def update_scale_fwd(
    scale: torch.Tensor,
    growth_tracker: torch.Tensor,
    skipped: torch.Tensor,
    found_inf: torch.Tensor,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float,
) -> None:
    """Update scale, growth_tracker and skipped in place.

    Args:
        scale, found_inf: fp32, one element; growth_tracker: int32, one element; skipped: int32 [2].
    """
    bits = struct.unpack("3q", struct.pack("3d", growth_factor, backoff_factor, min_scale))
    launch_opaque(
        _update_scale_fwd_kernel, (1,),
        scale, growth_tracker, skipped, found_inf,
        _addresses.numbers((*bits, growth_interval), scale.device), num_warps=1,
    )  # fmt: skip
