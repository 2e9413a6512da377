"""A convolution whose backward goes by the largest k gradients of its output alone.

    y = conv(x, weight) + bias,   (dx, dweight) = conv's backward of s(dy),   dbias = sum of dy

s keeps k elements of each example's dy ("row"), or k output channels for the whole minibatch
("unified"). Read from the top: the reference, the registered op with its backward, the function,
the Module.
Source: Sun et al. 2017, arXiv:1706.06197; "unified": Wei et al. 2017, arXiv:1709.05804.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops._autocast import without_autocast
from fastres.ops._meprop import (
    autocast,
    channels_last,
    check_share,
    check_tensors,
    count_kept,
    select_channels,
    select_row,
    selected_reference,
)
from fastres.ops._register import register_autograd, register_op


def meprop_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    k: int,
    mode: str,
) -> Tensor:
    """The definition of meprop_conv2d. The bias is added after the hook: its gradient is dense."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if y.requires_grad:
        y.register_hook(lambda dy: selected_reference(dy, k, mode))
    return y if bias is None else y + bias[:, None, None]


@register_op("meprop_conv2d")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    k: int,
    mode: str,
) -> Tensor:
    """y = F.conv2d(x, weight, bias, ...); its backward keeps k of dy."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    k: int,
    mode: str,
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.geometry, ctx.k, ctx.mode = inputs
    ctx.save_for_backward(x, weight)


@without_autocast
def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
    dx = dweight = None
    if needs_dx or needs_dweight:
        index, dy_kept, kept = None, dy, weight
        if ctx.mode == "row":
            dy_kept = select_row(dy, ctx.k)
        else:
            index = select_channels(dy, ctx.k)
            if groups == 1:
                dy_kept, kept = _channels(dy, index), _filters(weight, index)
            else:
                # The channels kept need not make groups of one size, which a convolution wants.
                mask = torch.zeros(dy.shape[1], dtype=torch.bool, device=dy.device)
                dy_kept = torch.where(mask.index_fill_(0, index, True)[:, None, None], dy, 0.0)
        dx, dweight, _ = torch.ops.aten.convolution_backward.default(
            dy_kept, x, kept, None, stride, padding, dilation, False, [0, 0], groups,
            [needs_dx, needs_dweight, False],
        )  # fmt: skip
        if dweight is not None and index is not None and groups == 1:
            dweight = torch.zeros_like(weight).index_copy_(0, index, dweight)
    dbias = dy.sum((0, 2, 3)) if needs_dbias else None
    return dx, dweight, dbias, None, None, None, None, None, None


def _channels(dy: Tensor, index: Tensor) -> Tensor:
    """dy's channels `index`, in dy's memory format: index_select's own result is always NCHW."""
    if not channels_last(dy):
        return dy.index_select(1, index)
    N, C, H, W = dy.shape
    rows = dy.permute(0, 2, 3, 1).reshape(-1, C).index_select(1, index)
    return rows.view(N, H, W, index.shape[0]).permute(0, 3, 1, 2)


def _filters(weight: Tensor, index: Tensor) -> Tensor:
    """weight's filters `index`, in weight's memory format."""
    if not channels_last(weight):
        return weight.index_select(0, index)
    return weight.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)


register_autograd(_forward, _autograd_backward, _setup_context)


def meprop_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    k: int | None = None,
    ratio: float | None = None,
    mode: str = "unified",
) -> Tensor:
    """F.conv2d, whose backward keeps the largest k of its output's gradients and drops the rest.

    y = conv(x, weight) + bias,   (dx, dweight) = conv's backward of s(dy),   dbias = sum of dy

    The forward is PyTorch's own. So is the whole op where nothing is to be dropped (ratio = 1 or k
    the whole width) or no gradients are recorded.

    Args:
        x: [N, C, H, W] or [C, H, W], fp32, fp16 or bf16, any strides; on a CPU fp64 too. Under
            autocast x, weight and bias are cast as F.conv2d's are.
        weight: [out, C / groups, h, w]; bias: [out] or None; both in x's dtype and on its device.
        stride, padding, dilation, groups: as F.conv2d's, padding "same" and "valid" too.
        k: how many gradients are kept, 1 <= k <= width. The width is out in "unified", and the
            out * H * W of an example's output in "row".
        ratio: in place of k, the share kept, 0 < ratio <= 1, rounded half up and at least one.
        mode: "row" keeps the k largest |dy| of each example; "unified" the k output channels of
            largest sum |dy| over the minibatch, so that the backward is a convolution's with k
            output channels. With groups > 1 the other channels' dy is zeroed and nothing is saved.
            NaN is largest, and of equals the lowest index, in (C, H, W) order, is kept.
    Returns:
        [N, out, H, W], or [out, H, W], in x's dtype and F.conv2d's memory format. All gradients
        are dense tensors, zero where nothing is kept; bias's sums the whole of dy.
    Raises:
        ValueError: a shape, dtype or device that does not fit; groups that do not divide; both or
            neither of k and ratio, or one out of range; unknown mode.
    Source: Sun et al. 2017, arXiv:1706.06197; "unified": Wei et al. 2017, arXiv:1709.05804.
    """
    check_share(k, ratio, mode)
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, bias, groups)
    strides, dilations = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    width, of = weight.shape[0], "out channels"
    if mode == "row":
        width, of = _outputs(x, weight, strides, padding, dilations), "outputs of an example"
    kept = count_kept(k, ratio, width, of)
    if kept >= width or not torch.is_grad_enabled():
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    batch = x if x.dim() == 4 else x[None]
    paddings = [0, 0]
    if isinstance(padding, str):
        before, after = _sides(weight, strides, padding, dilations)
        paddings = before
        if before != after:
            # PyTorch's too: what is odd in "same" goes to the right and to the bottom.
            batch = F.pad(batch, (0, after[1] - before[1], 0, after[0] - before[0]))
    else:
        paddings = _pair("padding", padding, 0)
    y = torch.ops.fastres.meprop_conv2d.default(
        batch, weight, bias, strides, paddings, dilations, groups, kept, mode
    )
    return y if x.dim() == 4 else y[0]


def _pair(name: str, v: int | tuple[int, ...], least: int) -> list[int]:
    pair = [v] if isinstance(v, int) else [*v]
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: expected one or two integers of at least {least}, got {v}")
    return pair


def _sides(
    weight: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[list[int], list[int]]:
    """Zeros before and after, in H and in W, for a padding that is named."""
    if padding == "valid":
        return [0, 0], [0, 0]
    if padding != "same":
        raise ValueError(f"padding: expected integers, 'same' or 'valid', got {padding!r}")
    if stride != [1, 1]:
        raise ValueError(f"padding: 'same' wants a stride of 1, got stride {stride}")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    return [t // 2 for t in total], [t - t // 2 for t in total]


def _outputs(
    x: Tensor, weight: Tensor, stride: list[int], padding: Any, dilation: list[int]
) -> int:
    """out * H * W of an example's output."""
    if isinstance(padding, str):
        before, after = _sides(weight, stride, padding, dilation)
    else:
        before = after = _pair("padding", padding, 0)
    outputs = weight.shape[0]
    for i in range(2):
        size = x.shape[i - 2] + before[i] + after[i] - dilation[i] * (weight.shape[2 + i] - 1)
        outputs *= max((size - 1) // stride[i] + 1, 0)
    return outputs


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    shape = weight.shape
    if len(shape) != 4:
        raise ValueError(f"weight: expected [out, C / groups, h, w], got shape {list(shape)}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected [N, C, H, W] or [C, H, W], got shape {list(x.shape)}")
    C = x.shape[-3]
    if groups < 1 or C % groups or shape[0] % groups:
        raise ValueError(
            f"groups: expected a divisor of x's {C} channels and of weight's {shape[0]} outputs, "
            f"got {groups}"
        )
    if shape[1] * groups != C:
        raise ValueError(
            f"weight: expected [out, {C // groups}, h, w] for x's {C} channels in {groups} groups, "
            f"got shape {list(shape)}"
        )
    check_tensors(x, weight, bias)


class MePropConv2d(nn.Conv2d):
    """nn.Conv2d, trained by meprop_conv2d: its constructor, its weights, its state_dict.

    k, ratio, mode and `dense` are plain attributes, read at each call. A trainer sets `dense` for
    epochs in which it is nn.Conv2d, as it is in evaluation, gradients included; torch.compile makes
    one graph for each of the two.

    Args:
        in_channels ... dtype: as nn.Conv2d's, every padding and padding_mode too.
        k, ratio, mode: as meprop_conv2d's; one of k and ratio.
    Raises:
        ValueError: both or neither of k and ratio, or one out of range; unknown mode.
    """

    dense = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        k: int | None = None,
        ratio: float | None = None,
        mode: str = "unified",
    ) -> None:
        check_share(k, ratio, mode)
        if mode == "unified":
            count_kept(k, ratio, out_channels, "out channels")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.k, self.ratio, self.mode = k, ratio, mode

    def forward(self, x: Tensor) -> Tensor:
        if self.dense or not self.training:
            return super().forward(x)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return meprop_conv2d(
            x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            k=self.k, ratio=self.ratio, mode=self.mode,
        )  # fmt: skip

    def extra_repr(self) -> str:
        share = f"ratio={self.ratio}" if self.k is None else f"k={self.k}"
        dense = ", dense" if self.dense else ""
        return f"{super().extra_repr()}, {share}, mode={self.mode!r}{dense}"
