"""Images and labels in memory, and their split into train, dev and test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.data.errors import DataError

# Images counted at a time: 3 MB of 32x32 pixels, so the statistics never copy a whole set.
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels.

    Args:
        images: [N, 3, H, W], uint8 in [0, 255], channels_last memory.
        labels: [N], int64, on the device of images.
    Raises:
        DataError: another shape, dtype, memory format, or two devices.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"images must be uint8 of shape [N, 3, H, W], got {images.dtype} of shape "
                f"{list(images.shape)}"
            )
        if 0 in images.shape[2:]:
            raise DataError(f"images must have pixels, got shape {list(images.shape)}")
        if not images.is_contiguous(memory_format=torch.channels_last):
            raise DataError(
                f"images must be in channels_last memory, got strides {list(images.stride())}: "
                "call .contiguous(memory_format=torch.channels_last)"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels must be int64 of shape [{len(images)}], one for each image, got "
                f"{labels.dtype} of shape {list(labels.shape)}"
            )
        if labels.device != images.device:
            raise DataError(
                f"images and labels must be on one device, got {images.device} and {labels.device}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on device; memory format kept, nothing copied where it is there already."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageData:
    """What a loader returns: two image sets of one image size, on the CPU.

    Args:
        name: the data set, as it is to be named in a report.
        classes: class names; label i means classes[i].
        train: the training set, at least one image.
        test: the test set.
    Raises:
        DataError: no training image, two image sizes, or a label outside [0, len(classes)).
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet

    def __post_init__(self) -> None:
        if len(self.train) == 0:
            raise DataError(f"{self.name} has no training image")
        sizes = [tuple(part.images.shape[2:]) for part in (self.train, self.test)]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{self.name}: training images are {sizes[0]} pixels (H, W), test images {sizes[1]}"
            )
        for part in (self.train, self.test):
            if len(part) == 0:
                continue
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= len(self.classes):
                raise DataError(
                    f"{self.name}: labels must lie in [0, {len(self.classes)}), got {low} to {high}"
                )


@dataclass(frozen=True, eq=False)
class Splits:
    """Three image sets and the statistics to normalise them by.

    Args:
        name: the data set, as it is to be named in a report.
        classes: class names; label i means classes[i].
        train: the images to train on.
        dev: the images to choose settings by.
        test: the images to report.
        mean: per channel (R, G, B), in [0, 1] pixel units, over the full training set.
        std: likewise; the population's (divided by N), 1 for a channel that is constant.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    dev: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to(self, device: torch.device | str) -> Splits:
        """The same splits on device."""
        return Splits(
            self.name,
            self.classes,
            self.train.to(device),
            self.dev.to(device),
            self.test.to(device),
            self.mean,
            self.std,
        )


def split(data: ImageData, train_size: int | None = None) -> Splits:
    """Split the test set into dev and test, and measure the training set.

    dev is the first 1,000 test images where there are at least 2,000, else the first tenth (at
    least one image); test is the rest. Every part is a view: no image is copied.

    Args:
        data: what a loader returned.
        train_size: keep the first train_size training images; None keeps all. mean and std come
            from the full training set either way, so a short trial sees the same pixels.
    Returns:
        Splits on data's device.
    Raises:
        DataError: fewer than two classes or two test images, train_size out of range.
    """
    if len(data.classes) < 2:
        raise DataError(
            f"{data.name} has {len(data.classes)} class {list(data.classes)}: a classifier needs "
            "at least 2"
        )
    if len(data.test) < 2:
        raise DataError(
            f"{data.name} has {len(data.test)} test image(s): dev and test need one each, "
            "give it at least 2"
        )
    if train_size is not None and not 1 <= train_size <= len(data.train):
        raise DataError(
            f"train size must be 1 to {len(data.train)}, the training images of {data.name}, got "
            f"{train_size}"
        )
    held_out = len(data.test)
    dev_size = 1000 if held_out >= 2000 else max(1, held_out // 10)
    mean, std = _moments(data.train.images)
    return Splits(
        data.name,
        data.classes,
        _part(data.train, 0, train_size),
        _part(data.test, 0, dev_size),
        _part(data.test, dev_size, None),
        mean,
        std,
    )


def _part(images: ImageSet, start: int, stop: int | None) -> ImageSet:
    return ImageSet(images.images[start:stop], images.labels[start:stop])


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of [N, 3, H, W] uint8, in units of [0, 1].

    A pixel has 256 values: their counts give both sums as exact integers.
    """
    counts = torch.zeros(3, 256, dtype=torch.int64, device=images.device)
    for chunk in images.split(_CHUNK):
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    means, stds = [], []
    for row in counts.tolist():
        n = sum(row)
        total = sum(value * count for value, count in enumerate(row))
        squares = sum(value * value * count for value, count in enumerate(row))
        std = math.sqrt(n * squares - total * total) / n / 255
        means.append(total / n / 255)
        # A constant channel is all zeros once centred; dividing by 0 would make it NaN.
        stds.append(std if std > 0 else 1.0)
    return tuple(means), tuple(stds)
