"""A ResNet, grown unit by unit: each with its weak classifier, in front of units that are frozen.

    plan = ResNet(20, num_classes=10)
    part = weak_unit(plan, 0)              # stem, unit 0 and a classifier, to be trained
    freeze(part)
    part = weak_unit(plan, 1, before=part) # unit 1 and a classifier; it reads unit 0's features
    ...
    net = grown(plan, parts)               # eval logits are the last part's

Source: Huang, Ash, Langford and Schapire 2018, arXiv:1706.04964.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastres.boost.errors import BoostError
from fastres.models import ResNet
from fastres.ops import PreActUnit


def weak_unit(plan: ResNet, number: int, before: ResNet | None = None) -> ResNet:
    """A unit of a plan, the stem in front of the first, and its weak module classifier.

    The classifier is BatchNorm-ReLU, mean over pixels and linear layer, as the ResNet's own: so the
    last unit's is the grown network's. It starts from the classifier before it where the channels
    are the same, else from PyTorch's random numbers.

    Args:
        plan: a "preact" ResNet, whose layers the part takes; they are not copied.
        number: of the unit, from 0.
        before: the part before this one.
    Returns:
        a ResNet of one unit; its input is the features of the units before, or images.
    Raises:
        BoostError: a "postact" plan, or no such unit.
    """
    if plan.bn is None:
        raise BoostError("plan: expected a 'preact' ResNet: its units are sums of features")
    units = list(plan.units)
    if not 0 <= number < len(units):
        raise BoostError(f"number: expected a unit of 0 to {len(units) - 1}, got {number}")
    unit = units[number]
    assert isinstance(unit, PreActUnit)
    channels = unit.conv2.out_channels
    # Its own layers, the fewest that there can be, are replaced.
    part = ResNet(8, 1, num_classes=plan.fc.out_features, fused=False)
    part.stem = plan.stem if number == 0 else nn.Identity()
    part.units = nn.Sequential(unit)
    part.bn = type(plan.bn)(channels)
    part.fc = nn.Linear(channels, plan.fc.out_features)
    if before is not None and before.fc.in_features == channels and before.bn is not None:
        part.bn.load_state_dict(before.bn.state_dict())
        part.fc.load_state_dict(before.fc.state_dict())
    return part


def freeze(part: ResNet) -> ResNet:
    """In eval mode from now on, and without gradients: running statistics stay as they are."""
    for p in part.parameters():
        p.requires_grad_(False)
        p.grad = None
    return part.eval()


@torch.no_grad()
def features(part: ResNet, x: Tensor) -> Tensor:
    """What a frozen part hands to the next one: its unit's output, before the classifier."""
    return part.units(part.stem(x))


def grown(plan: ResNet, parts: Sequence[ResNet]) -> ResNet:
    """The network of the parts: the plan's stem and units, cut behind the last part's, and its
    classifier. The layers are the parts' own."""
    if not parts:
        raise BoostError("parts: expected one or more, got none")
    net = ResNet(8, 1, num_classes=plan.fc.out_features, fused=False)
    net.stem = parts[0].stem
    net.units = nn.Sequential(*(part.units[0] for part in parts))
    net.bn, net.fc = parts[-1].bn, parts[-1].fc
    return net
