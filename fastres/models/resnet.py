"""ResNets for small images, depth 6n + 2, in three stages of n residual units.

Sources: post-activation, He et al. 2015, arXiv:1512.03385; pre-activation, He et al. 2016,
arXiv:1603.05027.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops import BatchNormReLU2d


class PlainBatchNormReLU2d(nn.BatchNorm2d):
    """What BatchNormReLU2d replaces, in PyTorch's own ops: the plain model's layer."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = super().forward(x)
        return F.relu(z if residual is None else z + residual, inplace=True)


class PadShortcut(nn.Module):
    """Shortcut A: every stride-th pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class PreActUnit(nn.Module):
    """x + conv2(relu(bn2(conv1(a)))) with a = relu(bn1(x)), and shortcut(a) where shapes differ."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: nn.Module | None,
        norm_relu: type[nn.BatchNorm2d],
    ) -> None:
        super().__init__()
        self.bn1 = norm_relu(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn2 = norm_relu(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(x)
        shortcut = x if self.shortcut is None else self.shortcut(a)
        return self.conv2(self.bn2(self.conv1(a))) + shortcut


class PostActUnit(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); a projection is batch-normalised."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: nn.Module | None,
        norm_relu: type[nn.BatchNorm2d],
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = norm_relu(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = norm_relu(out_channels)
        if isinstance(shortcut, nn.Conv2d):
            shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=shortcut)


_UNITS: dict[str, type[PreActUnit] | type[PostActUnit]] = {
    "preact": PreActUnit,
    "postact": PostActUnit,
}


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
    Raises:
        ValueError: depth is not 6n + 2, or another argument is none of the above.

    Input [N, 3, H, W], H and W 4 or more; output logits [N, num_classes].
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        block: Literal["preact", "postact"] = "preact",
        shortcut: Literal["A", "B"] = "B",
        num_classes: int = 10,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: expected 6n + 2 (8, 14, 20, ...), got {depth}")
        if block not in _UNITS:
            raise ValueError(f"block: expected 'preact' or 'postact', got {block!r}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut: expected 'A' or 'B', got {shortcut!r}")
        if width < 1 or num_classes < 1:
            raise ValueError(
                f"width and num_classes: expected 1 or more, got {width} and {num_classes}"
            )
        norm_relu = BatchNormReLU2d if fused else PlainBatchNormReLU2d
        preact = block == "preact"
        self.stem = _conv3x3(3, width)
        self.stem_bn = None if preact else norm_relu(width)
        units: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                out_channels, stride = width << stage, 2 if stage > 0 and i == 0 else 1
                way: nn.Module | None = None
                if stride > 1 or out_channels != channels:
                    way = (
                        PadShortcut(channels, out_channels, stride)
                        if shortcut == "A"
                        else nn.Conv2d(channels, out_channels, 1, stride, bias=False)
                    )
                units.append(_UNITS[block](channels, out_channels, stride, way, norm_relu))
                channels = out_channels
        self.units = nn.Sequential(*units)
        self.bn = norm_relu(channels) if preact else None
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.stem_bn is not None:
            x = self.stem_bn(x)
        x = self.units(x)
        if self.bn is not None:
            x = self.bn(x)
        return self.fc(x.mean((2, 3)))
