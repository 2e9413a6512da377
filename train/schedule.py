"""What changes over a run, as functions of the step or epoch: a resumed run needs no state."""

import math

import numpy as np


def lr_factor(
    step: int, *, steps_per_epoch: int, epochs: int, warmup_epochs: float, schedule: str
) -> float:
    """What the peak learning rate is multiplied by at a step, counted from 0.

    "step" divides by ten after 40 % and 80 % of the epochs (80 and 160 of 200); "cosine" falls to
    0 over the steps that follow the warmup. The warmup rises linearly, a little at every step.

    Sources: He et al. 2015, arXiv:1512.03385 (step); Loshchilov and Hutter 2016, arXiv:1608.03983
    (cosine); Goyal et al. 2017, arXiv:1706.02677 (warmup).
    """
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        rest = max(epochs * steps_per_epoch - warmup_steps, 1)
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / rest))
    # In tenths of all steps, as integers: 0.4 * epochs would not be exact.
    tenths = 10 * step / (epochs * steps_per_epoch)
    return 0.1 ** ((tenths >= 4) + (tenths >= 8))


def to_fp32(lr: float) -> float:
    """A learning rate as an fp32 number.

    PyTorch's fused optimizers read one that is a tensor on a GPU as fp32, but take one of the
    host's as fp64: rounded, it is the same number to both.
    """
    return float(np.float32(lr))


def meprop_is_dense(epoch: int, *, warmup_epochs: int, dense_every: int | None) -> bool:
    """Whether meProp's layers take the dense backward in an epoch, counted from 0.

    The first warmup_epochs do, and from then on every dense_every-th: with 3 two sparse ones, one
    dense, and so on.
    """
    after = epoch - warmup_epochs
    return after < 0 or (dense_every is not None and (after + 1) % dense_every == 0)
