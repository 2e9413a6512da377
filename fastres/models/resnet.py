"""ResNets for small images, depth 6n + 2, in three stages of n residual units.

Sources: post-activation, He et al. 2015, arXiv:1512.03385; pre-activation, He et al. 2016,
arXiv:1603.05027; stochastic depth, Huang et al. 2016, arXiv:1603.09382; zero_init, Goyal et al.
2017, arXiv:1706.02677.
"""

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops import (
    BatchNormReLU2d,
    MePropConv2d,
    PreActUnit,
    StemConv2d,
    StepGenerator,
    StochasticDepth,
)
from fastres.ops._norm import Norm
from fastres.ops._norm_relu_conv2d_check import has_hooks
from fastres.ops._samples import take_samples
from fastres.ops.classifier_cross_entropy import classifier_cross_entropy, serves_classifier
from fastres.ops.preact_unit_module import Conv, PadShortcut, plain_conv
from fastres.ops.stochastic_depth_add import check_drop


class PlainBatchNormReLU2d(nn.BatchNorm2d):
    """What BatchNormReLU2d replaces, in PyTorch's own ops: the plain model's layer."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = True,
        index: Tensor | None = None,
    ) -> Tensor:
        z = super().forward(x if index is None else take_samples(x, index))
        z = z if residual is None else z + residual
        return F.relu(z, inplace=True) if relu else z


class PostActUnit(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); a projection is batch-normalised."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: nn.Module | None,
        conv: Conv,
        norm_relu: type[nn.BatchNorm2d],
        drop: StochasticDepth | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride, 1)
        self.bn1 = norm_relu(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, 1, 1)
        self.bn2 = norm_relu(out_channels)
        if isinstance(shortcut, nn.Conv2d):
            shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))
        self.shortcut = shortcut
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if self.drop is None or not self.training:
            return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=shortcut)
        return F.relu(self.drop(self._branch, x, shortcut, self._branch_parameters))

    def _branch(self, x: Tensor, index: Tensor | None) -> Tensor:
        x = x if index is None else take_samples(x, index)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), relu=False)

    def _branch_parameters(self) -> list[nn.Parameter]:
        layers = (self.conv1, self.bn1, self.conv2, self.bn2)
        return [p for layer in layers for p in layer.parameters()]

    def zero_branch(self) -> None:
        # bn2 ends the branch. conv2 in its place would give bn2 a batch without variance, and take
        # its gradient times 1 / sqrt(eps).
        nn.init.zeros_(self.bn2.weight)


class ResNet(nn.Module):
    """A ResNet for images of 32x32 or so.

    Args:
        depth: 6n + 2 weighted layers, n residual units a stage: 8, 14, 20, 26, ... 110, 122.
        width: channels of the first stage; the second has twice, the third four times as many.
        block: "preact" (BatchNorm and ReLU before each convolution) or "postact" (after it).
        shortcut: where the shape changes, "A" slices and pads with zeros, "B" projects by a 1x1
            convolution.
        num_classes: outputs.
        fused: take BatchNormReLU2d of fastres.ops; the plain model computes the same, and has the
            same state_dict, in PyTorch's own ops.
        drop_prob: p of stochastic depth, 0 <= p <= 1; see fastres.ops.StochasticDepthUnit. A unit
            that changes the shape keeps its shortcut.
        drop_mode: "batch", "row" or "subset".
        drop_schedule: "uniform" drops every one of the L units with probability p, "linear" the
            l-th with p * l / L.
        meprop_ratio: share of each convolution's output gradient that its backward keeps; None is
            the dense backward, and the last layer's is dense in any case. See
            fastres.ops.meprop_conv2d.
        meprop_mode: "row" or "unified".
        zero_init: whether each unit begins as its shortcut, its branch 0: of "preact" conv2's
            weight is 0 at first, of "postact" bn2's. The other weights are as without it.
        keep_units: how many of the units to have, from the first one on; the classifier follows the
            last of them. None: all.
        fused_units: run the stem, each pre-activation unit, and classifier and loss as one op each
            on a GPU, where their shapes allow it; with fused and "preact". Not run on one yet.
    Raises:
        ValueError: depth is not 6n + 2, or another argument is none of the above.

    Input [N, 3, H, W], H and W 4 or more; output logits [N, num_classes], see forward for the loss.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        block: Literal["preact", "postact"] = "preact",
        shortcut: Literal["A", "B"] = "B",
        num_classes: int = 10,
        fused: bool = True,
        drop_prob: float = 0.0,
        drop_mode: Literal["batch", "row", "subset"] = "batch",
        drop_schedule: Literal["uniform", "linear"] = "linear",
        meprop_ratio: float | None = None,
        meprop_mode: Literal["row", "unified"] = "unified",
        zero_init: bool = False,
        keep_units: int | None = None,
        fused_units: bool = False,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: expected 6n + 2 (8, 14, 20, ...), got {depth}")
        if block not in ("preact", "postact"):
            raise ValueError(f"block: expected 'preact' or 'postact', got {block!r}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut: expected 'A' or 'B', got {shortcut!r}")
        if width < 1 or num_classes < 1:
            raise ValueError(
                f"width and num_classes: expected 1 or more, got {width} and {num_classes}"
            )
        if drop_schedule not in ("uniform", "linear"):
            raise ValueError(
                f"drop_schedule: expected 'uniform' or 'linear', got {drop_schedule!r}"
            )
        if fused_units and not (fused and block == "preact"):
            raise ValueError("fused_units: expected with fused and block 'preact'")
        check_drop(drop_prob, drop_mode)
        norm_relu = BatchNormReLU2d if fused else PlainBatchNormReLU2d
        preact = block == "preact"

        def conv(
            in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int
        ) -> nn.Conv2d:
            sizes = (in_channels, out_channels, kernel_size, stride, padding)
            if meprop_ratio is None:
                return plain_conv(*sizes)
            return MePropConv2d(*sizes, bias=False, ratio=meprop_ratio, mode=meprop_mode)

        # meProp's backward is not the op's.
        fused_stem = fused_units and meprop_ratio is None
        self.stem: nn.Module = StemConv2d(3, width) if fused_stem else conv(3, width, 3, 1, 1)
        self.stem_bn = None if preact else norm_relu(width)
        units: list[nn.Module] = []
        channels, number = width, (depth - 2) // 2
        if keep_units is not None and not 1 <= keep_units <= number:
            raise ValueError(f"keep_units: expected 1 to {number}, got {keep_units}")
        keep = number if keep_units is None else keep_units
        for stage in range(3):
            for i in range(number // 3):
                if len(units) == keep:
                    break
                out_channels, stride = width << stage, 2 if stage > 0 and i == 0 else 1
                way: nn.Module | None = None
                if stride > 1 or out_channels != channels:
                    way = (
                        PadShortcut(channels, out_channels, stride)
                        if shortcut == "A"
                        else conv(channels, out_channels, 1, stride, 0)
                    )
                drop = None
                if drop_prob > 0:
                    linear = drop_schedule == "linear"
                    p = drop_prob * (len(units) + 1) / number if linear else drop_prob
                    drop = StochasticDepth(p, drop_mode)
                shape = channels, out_channels, stride, way, conv, norm_relu, drop
                if preact:
                    unit = PreActUnit(*shape, fused_units)
                    unit.clones = False
                    units.append(unit)
                else:
                    units.append(PostActUnit(*shape))
                channels = out_channels
        self.units = nn.Sequential(*units)
        self.bn = norm_relu(channels) if preact else None
        self.fc = nn.Linear(channels, num_classes)
        # Whether the loss is one op with all that follows the units.
        self.fused_loss = fused_units and serves_classifier(self.fc)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if zero_init and isinstance(module, PreActUnit | PostActUnit):
                module.zero_branch()

    @overload
    def forward(self, x: Tensor, target: None = None, label_smoothing: float = 0.0) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, target: Tensor, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, target: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """logits [N, num_classes]; with target, int64 [N], the cross entropy and the logits.

        By fused_units these logits are fp32 and have no gradient: the loss comes of the same op.
        """
        # Moments go with x from op to op. A hook is handed x alone: it may change it.
        if isinstance(self.stem, StemConv2d) and not has_hooks(self.stem):
            x, moments = self.stem(x, True)
        else:
            x, moments = self.stem(x), None
        if self.stem_bn is not None:
            x = self.stem_bn(x)
        for unit in self.units:
            if isinstance(unit, PreActUnit) and not has_hooks(unit):
                x, moments = unit(x, moments, True)
            else:
                x, moments = unit(x), None
        # Others may have been put in their place since.
        bn = self.bn
        made = self.fused_loss and serves_classifier(self.fc) and not has_hooks(self.fc)
        if target is not None and made and isinstance(bn, nn.BatchNorm2d) and not has_hooks(bn):
            return classifier_cross_entropy(
                x, Norm.of(bn), self.fc.weight, self.fc.bias, target, label_smoothing, moments
            )
        if self.bn is not None:
            x = self.bn(x)
        logits = self.fc(x.mean((2, 3)))
        if target is None:
            return logits
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing), logits

    def extra_repr(self) -> str:
        return "classifier and loss: " + ("one op on a GPU" if self.fused_loss else "by layers")

    def set_meprop(self, sparse: bool) -> None:
        """Take meProp's backward, or the dense one, from the next forward on; weights stay.

        Compiled, a model has a graph for each of the two, made when it is first needed.
        """
        for module in self.modules():
            if isinstance(module, MePropConv2d):
                module.dense = not sparse

    def draw_from(self, generator: StepGenerator) -> None:
        """Drop units as the generator has it, in place of PyTorch's own random numbers."""
        for module in self.modules():
            if isinstance(module, StochasticDepth):
                module.generator = generator.unit(module.p)
