"""The library's face: each op as a function and as a Module. Nothing here imports Triton."""

from fastres.ops._norm import Norm, RunningUpdate, deferred_updates, update_every_stats
from fastres.ops._register import takes_kernels
from fastres.ops.augment import augment, shuffle
from fastres.ops.batch_norm_relu import BatchNormReLU2d, batch_norm_relu
from fastres.ops.cast import cast
from fastres.ops.classifier_cross_entropy import classifier_cross_entropy
from fastres.ops.dry_run import build_kernels, dry_run
from fastres.ops.meprop_conv2d import MePropConv2d, meprop_conv2d
from fastres.ops.meprop_linear import MePropLinear, meprop_linear
from fastres.ops.norm_relu_conv2d import NormReLUConv2d, norm_relu_conv2d
from fastres.ops.preact_unit import BatchMoments, preact_unit
from fastres.ops.preact_unit_module import PreActUnit
from fastres.ops.sgd_step import flat_offsets, sgd_step
from fastres.ops.stem_conv2d import StemConv2d, stem_conv2d
from fastres.ops.step_generator import StepGenerator, UnitGenerator
from fastres.ops.stochastic_depth_add import StochasticDepthAdd, stochastic_depth_add
from fastres.ops.stochastic_depth_unit import StochasticDepth, StochasticDepthUnit
from fastres.ops.unscale import unscale
from fastres.ops.update_scale import update_scale

__all__ = [
    "BatchMoments",
    "BatchNormReLU2d",
    "MePropConv2d",
    "MePropLinear",
    "Norm",
    "NormReLUConv2d",
    "PreActUnit",
    "RunningUpdate",
    "StemConv2d",
    "StepGenerator",
    "StochasticDepth",
    "StochasticDepthAdd",
    "StochasticDepthUnit",
    "UnitGenerator",
    "augment",
    "batch_norm_relu",
    "build_kernels",
    "cast",
    "classifier_cross_entropy",
    "deferred_updates",
    "dry_run",
    "flat_offsets",
    "meprop_conv2d",
    "meprop_linear",
    "norm_relu_conv2d",
    "preact_unit",
    "sgd_step",
    "shuffle",
    "stem_conv2d",
    "stochastic_depth_add",
    "takes_kernels",
    "unscale",
    "update_every_stats",
    "update_scale",
]
