"""The pre-activation residual unit as a Module, with stochastic depth.

Source: He et al. 2016, arXiv:1603.05027; stochastic depth: Huang et al. 2016, arXiv:1603.09382.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops._norm import Norm
from fastres.ops._norm_relu_conv2d_check import is_as_made, kept_channels, serves
from fastres.ops._register import takes_kernels
from fastres.ops._samples import take_samples
from fastres.ops.batch_norm_relu import BatchNormReLU2d
from fastres.ops.preact_unit import BatchMoments, preact_unit
from fastres.ops.stochastic_depth_add import (
    draw_subset,
    key_of,
    stochastic_depth_add,
    subset_size,
)
from fastres.ops.stochastic_depth_unit import StochasticDepth, skip

# Makes a convolution without bias from in_channels, out_channels, kernel_size, stride and padding.
Conv = Callable[[int, int, int, int, int], nn.Conv2d]


def plain_conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int
) -> nn.Conv2d:
    """A convolution of PyTorch's, without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)


class PadShortcut(nn.Module):
    """Shortcut A: every stride-th pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


def _identity(shape: Sequence[int], **where: Any) -> Tensor:
    """The weight of a 1x1 convolution that hands on what it is given, and zeros beyond it."""
    return torch.eye(*shape[:2], **where)[:, :, None, None]


class PreActUnit(nn.Module):
    """x + conv2(relu(bn2(conv1(a)))) with a = relu(bn1(x)), and shortcut(a) where shapes differ.

    On a GPU one op, fastres.ops.preact_unit, where `whole` and the convolutions' shapes allow it,
    which `print` shows; else, and on a CPU, layer by layer, as where a layer has been replaced or
    has hooks. Either way the same state_dict; under autocast the one op's output has its dtype.

    Args:
        in_channels, out_channels: multiples of 16, for the one op.
        stride: 1 or 2.
        shortcut: where the shape changes, a Module from relu(bn1(x)) to the sum's other side; by
            default a 1x1 convolution.
        conv: makes each convolution; the one op serves nn.Conv2d, and MePropConv2d of mode
            "unified".
        norm_relu: makes bn1 and bn2, whose forward takes an index, too.
        drop: stochastic depth, or None.
        whole: False keeps to the layers.
        process_group: whose processes' samples batch statistics are taken over, which the one op
            alone does: on a GPU, and not where the unit may be dropped whole.
    Raises:
        ValueError: a process_group, and the unit is no one op or may be dropped.
    Source: He et al. 2016, arXiv:1603.05027.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        shortcut: nn.Module | None = None,
        conv: Conv = plain_conv,
        norm_relu: type[nn.BatchNorm2d] = BatchNormReLU2d,
        drop: StochasticDepth | None = None,
        whole: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if shortcut is None and (stride != 1 or in_channels != out_channels):
            shortcut = conv(in_channels, out_channels, 1, stride, 0)
        self.bn1 = norm_relu(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride, 1)
        self.bn2 = norm_relu(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, 1, 1)
        self.shortcut = shortcut
        self.drop = drop
        convs = [self.conv1, self.conv2]
        if isinstance(shortcut, nn.Conv2d):
            convs.append(shortcut)
        self.whole = (
            whole
            and all(serves(c) for c in convs)
            and (shortcut is None or isinstance(shortcut, nn.Conv2d | PadShortcut))
        )
        self.process_group = process_group
        # ResNet, which changes no unit's output in place, has no need of the copy.
        self.clones = True
        if process_group is not None and not self.whole:
            raise ValueError(
                "process_group: its statistics are the one op's, and this unit is made of layers"
            )
        if process_group is not None and drop is not None and (drop.mode == "batch" or drop.p == 1):
            raise ValueError(
                f"process_group: every process must run the unit, got drop.mode {drop.mode!r} and "
                f"drop.p {drop.p}; take a mode that drops samples, and p < 1"
            )
        # Shortcut A as the projection that it is: the identity on the channels that there were.
        self.identity: Tensor | None
        pads = self.whole and isinstance(shortcut, PadShortcut)
        shape = (out_channels, in_channels, 1, 1)
        self.register_buffer("identity", _identity(shape) if pads else None, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # What moves a Module may leave its buffers unwritten, as to_empty does, and no state_dict
        # has this one.
        super()._apply(fn, recurse)
        if self.identity is not None:
            like = self.identity
            self.identity = _identity(like.shape, dtype=like.dtype, device=like.device)
        return self

    def forward(
        self, x: Tensor, moments: BatchMoments | None = None, with_moments: bool = False
    ) -> Tensor | tuple[Tensor, BatchMoments | None]:
        """[N, C, H, W] to [N, K, OH, OW].

        Args:
            moments: those of x, from the unit that made it; None: a kernel more takes them.
            with_moments: return y and its moments, for the next unit, or None where there are none.
        """
        if (takes_kernels(x) or self.process_group is not None) and self._is_whole():
            y, moments = self._fused(x, moments, with_moments and self.training)
        else:
            y, moments = self._by_layers(x), None
        return (y, moments) if with_moments else y

    def _is_whole(self) -> bool:
        """Whether the one op may take the layers' place, of which some may have been replaced."""
        shortcut = None if isinstance(self.shortcut, PadShortcut) else self.shortcut
        made = self.whole and is_as_made(self.bn1, self.conv1, self.bn2, self.conv2, shortcut)
        if self.process_group is not None and not made:
            raise ValueError(
                "process_group: its statistics are the one op's, and layers of this unit have been "
                "replaced by what that does not serve, or have hooks"
            )
        return made

    def _fused(
        self, x: Tensor, moments: BatchMoments | None, with_moments: bool
    ) -> tuple[Tensor, BatchMoments | None]:
        drop = self.drop
        options: dict[str, Any] = {"kept": self._kept()}
        if drop is not None and self.training and drop.p > 0:
            N = x.shape[0]
            if drop.mode == "subset":
                kept = subset_size(N, drop.p)
                if kept == 0:
                    return self._dropped(x, moments)
                key, unit = key_of(drop.generator, x.device)
                index, position = draw_subset(key, N, kept, unit)
                options |= {"index": index, "position": position, "scale": N / kept}
            elif drop.mode == "batch":
                if drop.drops():
                    return self._dropped(x, moments)
                options |= {"scale": 1.0 / (1.0 - drop.p)}
            else:
                # 1 / (1 - p) where a sample keeps its branch, and else 0: one launch.
                where: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
                one = torch.ones((), **where).expand(N, 1, 1, 1)
                zero = torch.zeros((), **where).expand(N, 1, 1, 1)
                scale = stochastic_depth_add(one, zero, drop.p, "row", True, drop.generator)
                options |= {"row_scale": scale.view(N)}
        return preact_unit(
            x, Norm.of(self.bn1), self.conv1.weight, Norm.of(self.bn2), self.conv2.weight,
            self._shortcut_weight(), self.conv1.stride[0], moments=moments,
            with_moments=with_moments, process_group=self.process_group, **options,
        )  # fmt: skip

    def _kept(self) -> list[int] | None:
        """Channels by which meProp's backward goes, of each convolution; None: all of all."""
        K = self.conv1.out_channels
        kept = [kept_channels(self.conv1), kept_channels(self.conv2), K]
        if isinstance(self.shortcut, nn.Conv2d):
            kept[2] = kept_channels(self.shortcut)
        return kept if min(kept) < K else None

    def _shortcut_weight(self) -> Tensor | None:
        if isinstance(self.shortcut, nn.Conv2d):
            return self.shortcut.weight
        if self.identity is None:
            return None
        weight = self.conv1.weight
        if self.identity.device != weight.device:
            # Made on the meta device, and given its parameters by load_state_dict(assign=True).
            self.identity = _identity(self.identity.shape, device=weight.device)
        return self.identity.to(weight.dtype)

    def _dropped(
        self, x: Tensor, moments: BatchMoments | None
    ) -> tuple[Tensor, BatchMoments | None]:
        """The shortcut, whose gradient is that of the whole; the branch's parameters get zeros."""
        if self.shortcut is None:
            return skip(x, self._branch_parameters(), self.clones), moments
        shortcut = self.shortcut(self.bn1(x))
        return skip(shortcut, self._branch_parameters(), self.clones), None

    def _by_layers(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            if self.drop is None:
                return self._branch(x) + x
            return self.drop(self._branch, x, x, self._branch_parameters, self.clones)
        # The shortcut reads a too, so bn1 is no part of what may be dropped.
        a = self.bn1(x)
        shortcut = self.shortcut(a)
        if self.drop is None:
            return self._convs(a) + shortcut
        return self.drop(self._convs, a, shortcut, self._branch_parameters, self.clones)

    def _branch(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return self._convs(self.bn1(x, index=index))

    def _convs(self, a: Tensor, index: Tensor | None = None) -> Tensor:
        return self.conv2(self.bn2(self.conv1(a if index is None else take_samples(a, index))))

    def _branch_parameters(self) -> list[nn.Parameter]:
        layers: list[Any] = [self.conv1, self.bn2, self.conv2]
        if self.shortcut is None:
            layers.append(self.bn1)
        return [p for layer in layers for p in layer.parameters()]

    def zero_branch(self) -> None:
        """Let the unit begin as its shortcut."""
        # conv2 ends the branch. bn2's weight in its place would never leave 0: the ReLU after it,
        # and with it conv2, would pass no gradient.
        nn.init.zeros_(self.conv2.weight)

    def extra_repr(self) -> str:
        return "one op on a GPU" if self.whole else "layer by layer"
