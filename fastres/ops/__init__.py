"""The library's face: each op as a function and as a Module. Nothing here imports Triton."""

from fastres.ops._register import takes_kernels
from fastres.ops.augment import augment, shuffle
from fastres.ops.batch_norm_relu import BatchNormReLU2d, batch_norm_relu
from fastres.ops.meprop_conv2d import MePropConv2d, meprop_conv2d
from fastres.ops.meprop_linear import MePropLinear, meprop_linear

__all__ = [
    "BatchNormReLU2d",
    "MePropConv2d",
    "MePropLinear",
    "augment",
    "batch_norm_relu",
    "meprop_conv2d",
    "meprop_linear",
    "shuffle",
    "takes_kernels",
]
