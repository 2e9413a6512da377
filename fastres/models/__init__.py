"""Models built on fastres.ops."""

from fastres.models.resnet import ResNet

__all__ = ["ResNet"]
