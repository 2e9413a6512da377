"""What a unit and its classifier are trained by: the costs of boosting as weights of a loss."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("cost", "exp")


def training_costs(C: Tensor) -> Tensor:
    """Costs scaled for training: fp32, and on average a row's wrong classes sum to 1.

    Args:
        C: fp64 [N, classes], of the whole training set, from fastres.boost.costs.
    """
    return (C * (2.0 * len(C) / C.abs().sum())).float()


def boosting_loss(
    logits: Tensor, labels: Tensor, costs: Tensor, kind: Literal["cost", "exp"] = "cost"
) -> Tensor:
    """The mean loss of a batch by its images' costs.

        w[i] = sum over l other than y of C[i, l],  c[i, l] = (classes - 1) C[i, l] / w[i]
        L[i] = ln(1 + sum over l other than y of c[i, l] exp(z[l] - z[y]))
        "cost": mean of w L            "exp": mean of w exp(L)

    w is what an image costs, c which wrong classes it costs. Where all costs are equal L is the
    cross-entropy, and the gradient of a row is proportional to w in any case. exp(L) = 1 + sum c
    exp(z[l] - z[y]) is boosting's own exponential loss, cost by cost. It has no bound and one image
    could fill a batch's gradient: beyond L = ln(classes), which is chance, its tangent goes on.

    Args:
        logits: fp32 [B, classes], z.
        labels: int64 [B], y.
        costs: fp32 [B, classes], rows of training_costs.
        kind: "cost" or "exp".
    Returns:
        fp32 [].
    Raises:
        ValueError: shapes differ, or another kind.
    """
    if kind not in LOSSES:
        raise ValueError(f"kind: expected 'cost' or 'exp', got {kind!r}")
    if logits.shape != costs.shape or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and costs: expected one shape [B, classes] and labels [B], got "
            f"{list(logits.shape)}, {list(costs.shape)} and {list(labels.shape)}"
        )
    classes, own = logits.shape[1], labels[:, None]
    weight = -costs.gather(1, own)
    spread = (costs * ((classes - 1) / weight)).scatter(1, own, 1.0)
    loss = F.cross_entropy(logits + spread.log(), labels, reduction="none")
    if kind == "exp":
        limit = math.log(classes)
        # At the limit itself, where an untrained classifier is, clamp could lose both gradients.
        over = loss > limit
        tangent = classes * (1.0 + loss - limit)
        loss = torch.where(over, tangent, torch.exp(loss.masked_fill(over, limit)))
    return (weight.squeeze(1) * loss).mean()
