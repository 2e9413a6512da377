"""The network of a config, and which fused ops it takes."""

from typing import TYPE_CHECKING

import torch
from config import Config
from torch import nn

from fastres.models import ResNet
from fastres.ops import (
    BatchNormReLU2d,
    MePropConv2d,
    PreActUnit,
    StemConv2d,
    StochasticDepth,
    takes_kernels,
)
from fastres.optim import FusedSGD

if TYPE_CHECKING:
    from trainer import Trainer


def build_model(config: Config, num_classes: int) -> ResNet:
    """The model of a config, its weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ResNet(
            config.depth,
            config.width,
            config.block,
            config.shortcut,
            num_classes,
            config.fused,
            drop_prob=config.drop_prob,
            drop_mode=config.drop_mode,
            drop_schedule=config.drop_schedule,
            meprop_ratio=config.meprop_ratio,
            meprop_mode=config.meprop_mode,
            zero_init=config.zero_init,
            keep_units=config.units,
            fused_units=config.fused_units,
        )


def to_half(model: nn.Module) -> None:
    """fp16 weights, but for BatchNorm, whose fp32 parameters and statistics cost nothing."""
    for module in model.modules():
        if not isinstance(module, nn.BatchNorm2d):
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(p.detach().half()))


def defers_statistics(model: ResNet, device: torch.device, fused_loss: bool) -> bool:
    """Whether no BatchNorm of a model moves its running statistics but by deferred_updates.

    So it is where every one is in a unit that is one op or, with fused_loss, in the classifier's,
    by the kernels.
    """
    norms = {m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    units = [m for m in model.modules() if isinstance(m, PreActUnit) and m.whole]
    deferred = {norm for unit in units for norm in unit.modules()} & norms
    if fused_loss and model.bn is not None:
        deferred.add(model.bn)
    fp32 = all(b.dtype in (torch.float32, torch.int64) for norm in norms for b in norm.buffers())
    return takes_kernels(torch.empty(0, device=device)) and fp32 and deferred == norms


def fused_ops(trainer: "Trainer") -> str:
    """Which fused ops a run takes, for the person who asked for --fused."""
    triton = takes_kernels(torch.empty(0, device=trainer.workers.device))
    units = [m for m in trainer.model.modules() if isinstance(m, PreActUnit) and m.whole and triton]
    norms = [m for m in trainer.model.modules() if isinstance(m, BatchNormReLU2d)]
    counts = {
        "stem_conv2d": sum(
            isinstance(m, StemConv2d) and m.fused and triton for m in trainer.model.modules()
        ),
        "preact_unit": len(units),
        # In training; an evaluation takes the layers.
        "classifier_cross_entropy": int(trainer.model.fused_loss and triton),
        # A unit that is one op has two of them, which it does not call.
        "batch_norm_relu": len(norms) - 2 * len(units),
        # "batch" decides on the host what to compute: there is nothing left for the op to do.
        "stochastic_depth_add": sum(
            isinstance(m, StochasticDepth) and m.mode != "batch" for m in trainer.model.modules()
        ),
        "meprop_conv2d": sum(isinstance(m, MePropConv2d) for m in trainer.model.modules()),
    }
    layers = [f"{name} ({count} layers)" for name, count in counts.items() if count]
    sgd = trainer.optimizer if isinstance(trainer.optimizer, FusedSGD) else None
    steps = ["augment"]
    if trainer.scaler.is_enabled():
        # A step that sees for itself whether it overflows has nothing unscaled before it.
        steps += ["update_scale"] if sgd and sgd.finds_overflow else ["unscale", "update_scale"]
    steps += ["sgd_step"] if sgd else []
    path = "Triton kernels" if triton else "PyTorch's own operators, as on any CPU"
    return f"{', '.join(layers + steps)}; by {path}"
