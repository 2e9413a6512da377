"""A linear layer whose backward goes by the largest k gradients of its output alone.

    y = x @ weight.T + bias,   dx = s(dy) @ weight,   dweight = s(dy).T @ x,   dbias = sum of dy

s keeps k elements of each row of dy ("row"), or k columns for the whole minibatch ("unified").
Read from the top: the reference, the registered op with its backward, the function, the Module.
Source: Sun et al. 2017, arXiv:1706.06197; "unified": Wei et al. 2017, arXiv:1709.05804.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops._autocast import without_autocast
from fastres.ops._meprop import (
    autocast,
    check_share,
    check_tensors,
    count_kept,
    select_channels,
    select_row,
    selected_reference,
)
from fastres.ops._register import register_autograd, register_op


def meprop_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, mode: str
) -> Tensor:
    """The definition of meprop_linear. The bias is added after the hook: its gradient is dense."""
    y = F.linear(x.reshape(-1, x.shape[-1]), weight)
    if y.requires_grad:
        y.register_hook(lambda dy: selected_reference(dy, k, mode))
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


@register_op("meprop_linear")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, mode: str) -> Tensor:
    """y = F.linear(x, weight, bias); its backward keeps k of dy."""
    return F.linear(x, weight, bias)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, mode: str) -> Tensor:
    return F.linear(x, weight, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.k, ctx.mode = inputs
    # A frozen weight needs no x; of weight, a parameter that stays anyway, the shape is needed too.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
    ctx.x_shape = x.shape


@without_autocast
def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
    dy = dy.reshape(-1, weight.shape[0])
    dx = dweight = None
    if needs_dx or needs_dweight:
        index, kept = None, weight
        if ctx.mode == "row":
            dy_kept = select_row(dy[:, :, None, None], ctx.k)[:, :, 0, 0]
        else:
            index = select_channels(dy[:, :, None, None], ctx.k)
            dy_kept, kept = dy.index_select(1, index), weight.index_select(0, index)
        if needs_dx:
            dx = (dy_kept @ kept).view(ctx.x_shape)
        if needs_dweight:
            dweight = dy_kept.t() @ x.reshape(-1, weight.shape[1])
            if index is not None:
                dweight = torch.zeros_like(weight).index_copy_(0, index, dweight)
    return dx, dweight, dy.sum(0) if needs_dbias else None, None, None


register_autograd(_forward, _autograd_backward, _setup_context)


def meprop_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int | None = None,
    ratio: float | None = None,
    mode: str = "unified",
) -> Tensor:
    """F.linear, whose backward keeps the largest k of out output gradients and drops the rest.

    y = x @ weight.T + bias,   dx = s(dy) @ weight,   dweight = s(dy).T @ x,   dbias = sum of dy

    The forward is PyTorch's own. So is the whole op where nothing is to be dropped (ratio = 1 or
    k = out) or no gradients are recorded.

    Args:
        x: [..., in], fp32, fp16 or bf16, any strides; on a CPU fp64 too. Under autocast x, weight
            and bias are cast as F.linear's are.
        weight: [out, in]; bias: [out] or None; both in x's dtype and on its device.
        k: how many of the out gradients are kept, 1 <= k <= out.
        ratio: in place of k, the share kept, 0 < ratio <= 1, rounded half up and at least one.
        mode: "row" keeps the k largest |dy| of each row of x; "unified" the k columns of largest
            sum |dy| over all rows, so that the backward is two dense products k/out as large.
            NaN is largest, and of equals the lowest index is kept.
    Returns:
        [..., out] in x's dtype. All gradients are dense tensors, zero where nothing is kept;
        bias's sums the whole of dy.
    Raises:
        ValueError: a shape, dtype or device that does not fit; both or neither of k and ratio, or
            one out of range; unknown mode.
    Source: Sun et al. 2017, arXiv:1706.06197; "unified": Wei et al. 2017, arXiv:1709.05804.
    """
    check_share(k, ratio, mode)
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, bias)
    width = weight.shape[0]
    kept = count_kept(k, ratio, width, "out features")
    if kept >= width or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return torch.ops.fastres.meprop_linear.default(x, weight, bias, kept, mode)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"weight: expected [out, in], got shape {list(shape)}")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x: expected [..., {shape[1]}] for weight's {list(shape)}, got shape {list(x.shape)}"
        )
    check_tensors(x, weight, bias)


class MePropLinear(nn.Linear):
    """nn.Linear, trained by meprop_linear: its constructor, its weights [out, in], its state_dict.

    k, ratio, mode and `dense` are plain attributes, read at each call. A trainer sets `dense` for
    epochs in which it is nn.Linear, as it is in evaluation, gradients included; torch.compile makes
    one graph for each of the two.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        k, ratio, mode: as meprop_linear's; one of k and ratio.
    Raises:
        ValueError: both or neither of k and ratio, or one out of range; unknown mode.
    """

    dense = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        k: int | None = None,
        ratio: float | None = None,
        mode: str = "unified",
    ) -> None:
        check_share(k, ratio, mode)
        count_kept(k, ratio, out_features, "out features")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.k, self.ratio, self.mode = k, ratio, mode

    def forward(self, x: Tensor) -> Tensor:
        if self.dense or not self.training:
            return super().forward(x)
        return meprop_linear(x, self.weight, self.bias, k=self.k, ratio=self.ratio, mode=self.mode)

    def extra_repr(self) -> str:
        share = f"ratio={self.ratio}" if self.k is None else f"k={self.k}"
        dense = ", dense" if self.dense else ""
        return f"{super().extra_repr()}, {share}, mode={self.mode!r}{dense}"
