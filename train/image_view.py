"""How a run's model sees images: normalised, in the dtype and layout that it computes in."""

import contextlib
from typing import Any

import torch
from config import Config
from torch import Tensor

from fastres.data import ImageSet, Splits
from fastres.ops import augment

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16, "pure-fp16": torch.float16}


class ImageView:
    """Images of data on a device as a config has them.

    Attributes:
        mean, std: fp32 [3], on the device.
        half: the dtype of activations, None for fp32.
        memory_format: of activations.
    """

    def __init__(self, config: Config, data: Splits, device: torch.device) -> None:
        self.mean = torch.tensor(data.mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(data.std, dtype=torch.float32, device=device)
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        self.half = _HALF.get(config.precision)
        self._autocasts = config.precision in ("fp16", "bf16")

    def _images(self, images: ImageSet, index: Tensor, **how: Any) -> Tensor:
        return augment(
            images.images,
            index,
            self.mean,
            self.std,
            dtype=self.half or torch.float32,
            memory_format=self.memory_format,
            **how,
        )

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.mean.device.type, dtype=self.half, enabled=self._autocasts)
