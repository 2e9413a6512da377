"""BoostResNet: a ResNet grown unit by unit, each trained alone by the costs of boosting.

    boosting = Boosting(labels, classes)
    for number in range(units):
        part = weak_unit(plan, number, before)
        ...  # train it on features, by boosting_loss with rows of training_costs(boosting.costs())
        verdict = boosting.judge(outputs(logits))  # over the whole training set, in eval mode
        if not verdict.holds:
            break
        boosting.add(outputs(logits))

The whole of it is train/boost.py.
Source: Huang, Ash, Langford and Schapire 2018, arXiv:1706.04964.
"""

from fastres.boost.cache import CHUNK, FeatureCache, Room, chunks, fill
from fastres.boost.errors import BoostError
from fastres.boost.growth import features, freeze, grown, weak_unit
from fastres.boost.loss import LOSSES, boosting_loss, training_costs
from fastres.boost.state import (
    EDGE_LIMIT,
    Boosting,
    Verdict,
    alpha,
    bound,
    clamp_edge,
    costs,
    edge,
    gamma_squared,
    outputs,
    total,
)

__all__ = [
    "CHUNK",
    "EDGE_LIMIT",
    "LOSSES",
    "BoostError",
    "Boosting",
    "FeatureCache",
    "Room",
    "Verdict",
    "alpha",
    "boosting_loss",
    "bound",
    "chunks",
    "clamp_edge",
    "costs",
    "edge",
    "features",
    "fill",
    "freeze",
    "gamma_squared",
    "grown",
    "outputs",
    "total",
    "training_costs",
    "weak_unit",
]
