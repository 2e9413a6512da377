"""Picking samples out of a batch, and adding them back."""

import torch
from torch import Tensor


def take_samples(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for x [N, C, H, W], in x's memory format: index_select alone returns NCHW."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)


def add_samples(x: Tensor, index: Tensor, samples: Tensor, scale: float) -> Tensor:
    """x with scale * samples added to x[index], in x's memory format."""
    if x.is_contiguous(memory_format=torch.channels_last):
        # Over NHWC memory seen as [N, H, W, C], a sample is one run of elements.
        order = (0, 2, 3, 1)
        y = x.permute(order).index_add(0, index, samples.permute(order), alpha=scale)
        return y.permute(0, 3, 1, 2)
    return x.index_add(0, index, samples, alpha=scale)
