"""Image sets held whole in memory: CIFAR-10, a folder of class folders, ten drawn shapes.

A loader (cifar10, folder, synthetic) returns ImageData; split() turns it into train, dev and test.
torchvision and PIL are imported only when a loader needs them.
"""

from fastres.data.cifar10 import cifar10
from fastres.data.errors import DataError
from fastres.data.folder import folder
from fastres.data.image_set import ImageData, ImageSet, Splits, split
from fastres.data.synthetic import synthetic

__all__ = [
    "DataError",
    "ImageData",
    "ImageSet",
    "Splits",
    "cifar10",
    "folder",
    "split",
    "synthetic",
]
