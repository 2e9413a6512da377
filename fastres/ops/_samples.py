"""Picking samples out of a batch."""

import torch
from torch import Tensor


def take_samples(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for x [N, C, H, W], in x's memory format: index_select alone returns NCHW."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)
