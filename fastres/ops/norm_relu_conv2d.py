"""BatchNorm, ReLU and a convolution as one op, with the residual add behind it.

    y = residual + scale * conv(relu(norm(x)))

Read from the top: the reference, the registered op with its backward, the function, the Module.
Source: pre-activation, He et al. 2016, arXiv:1603.05027.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops._autocast import autocast_dtype, autocasts, without_autocast
from fastres.ops._norm import Norm, norm_relu, norm_relu_reference, update_stats
from fastres.ops._norm_relu_conv2d_check import (
    check_group,
    check_like,
    check_norm,
    check_row_scale,
    check_stride,
    check_weight,
    is_as_made,
    serves,
)
from fastres.ops._register import kernels, register_autograd, register_op, takes_kernels


def norm_relu_conv2d_reference(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    norm_relu: Callable[[Tensor, Norm], Tensor] = norm_relu_reference,
) -> Tensor:
    """The definition of norm_relu_conv2d, in PyTorch's own ops."""
    a = norm_relu(x, norm)
    y = F.conv2d(a, weight.to(x.dtype), None, stride, weight.shape[2] // 2)
    if row_scale is not None:
        y = y * row_scale[:, None, None, None].to(y.dtype)
    if residual is not None:
        return torch.add(residual, y, alpha=scale)
    return y if scale == 1 else scale * y


@register_op("norm_relu_conv2d")
def _forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    stride: int,
    eps: float,
    group: str,
    world_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, var. Without running statistics normalises by the batch's, and returns them fp32.

    x, residual: dense in NHWC. group: a ProcessGroup's name, of world_size processes, or "".
    """
    return kernels("norm_relu_conv2d", x).norm_relu_conv2d_fwd(
        x, running_mean, running_var, norm_weight, norm_bias, weight, residual, row_scale, scale,
        stride, eps, (group, world_size),
    )  # fmt: skip


@_forward.register_fake
def _(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    stride: int,
    eps: float,
    group: str,
    world_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("norm_relu_conv2d", x).empty_outputs(x, weight, stride, running_mean is None)


@register_op("norm_relu_conv2d_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    scale: float,
    stride: int,
    eps: float,
    training: bool,
    group: str,
    world_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dnorm_weight, dnorm_bias, dweight; empty where there is no such parameter."""
    return kernels("norm_relu_conv2d", x).norm_relu_conv2d_bwd(
        dy, x, norm_weight, norm_bias, mean, var, weight, row_scale, scale, stride, eps, training,
        (group, world_size),
    )  # fmt: skip


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    scale: float,
    stride: int,
    eps: float,
    training: bool,
    group: str,
    world_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight, dbias = (
        x.new_empty(0) if p is None else torch.empty_like(p) for p in (norm_weight, norm_bias)
    )
    return torch.empty_like(x), dweight, dbias, torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mean, var, norm_weight, norm_bias, weight, _, row_scale, *ctx.numbers = inputs
    ctx.training = mean is None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    stats = output[1:] if ctx.training else (mean, var)
    ctx.save_for_backward(x, norm_weight, norm_bias, *stats, weight, row_scale)


@without_autocast
def _autograd_backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    x, norm_weight, norm_bias, mean, var, weight, row_scale = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None,) * 4
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5)]
    if any(wanted):
        scale, stride, eps, *group = ctx.numbers
        grads = torch.ops.fastres.norm_relu_conv2d_backward.default(
            dy, x, norm_weight, norm_bias, mean, var, weight, row_scale, scale, stride, eps,
            ctx.training, *group,
        )  # fmt: skip
        grads = tuple(g if w else None for g, w in zip(grads, wanted, strict=True))
    dx, dnorm_weight, dnorm_bias, dweight = grads
    dresidual = dy if ctx.needs_input_grad[6] else None
    return dx, None, None, dnorm_weight, dnorm_bias, dweight, dresidual, *(None,) * 6


register_autograd(_forward, _autograd_backward, _setup_context)


def norm_relu_conv2d(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Batch-normalise, apply ReLU, convolve, and add a residual, without a tensor in between.

    y = residual + scale * row_scale * conv(relu(norm(x)))

    On a GPU it runs in Triton: the normalised tensor exists in registers only, and x is what is
    kept for the backward. On a CPU it is PyTorch's own batch_norm, in-place ReLU and conv2d.

    Args:
        x: [N, C, H, W], fp32, fp16 or bf16; copied first unless dense in channels_last.
        norm: the BatchNorm, of C channels; see Norm.
        weight: [K, C, 3, 3], padded by one zero, or [K, C, 1, 1]; in fp32 or x's dtype. On a GPU C
            and K are multiples of 16.
        residual: [N, K, OH, OW] in x's dtype and on its device, or None.
        stride: 1 or 2.
        scale: factor of the convolution.
        row_scale: fp32 [N], a factor more for each sample, or None.
        process_group: whose processes' samples the batch's statistics are taken over, as
            nn.SyncBatchNorm takes them; each has as many. None: this process's alone.
    Returns:
        [N, K, OH, OW] in x's dtype and channels_last, OH = (H - 1) // stride + 1; under autocast
        in its dtype. Arithmetic in fp32, but for the products' factors, which have x's dtype.
    Raises:
        ValueError: a shape, dtype or device that does not fit; one value per channel in training;
            evaluation without running statistics; a process_group on a CPU.
    Source: He et al. 2016, arXiv:1603.05027.
    """
    dtype = autocast_dtype(x)
    x = x.to(dtype)
    if residual is not None and autocasts(x.device.type):
        residual = residual.to(dtype)
    check_stride(stride)
    check_norm(x, norm, "norm")
    takes = takes_kernels(x)
    check_weight(x, weight, "weight", x.shape[1], (1, 3), takes)
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    check_like(x, "residual", residual, (x.shape[0], weight.shape[0], height, width))
    check_row_scale(x, row_scale)
    group = check_group(x, process_group, norm.training, takes)
    if not takes or x.numel() == 0:
        return norm_relu_conv2d_reference(
            x, norm, weight, residual, stride, scale, row_scale, norm_relu
        )
    mean, var = norm.statistics
    y, mean, var = torch.ops.fastres.norm_relu_conv2d.default(
        as_nhwc(x), mean, var, *norm.affine, as_dense(weight),
        None if residual is None else as_nhwc(residual), contiguous(row_scale), scale, stride,
        norm.eps, *group,
    )  # fmt: skip
    update_stats(norm, mean, var, group[1] * (x.numel() // x.shape[1]))
    return y


def as_nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def as_dense(weight: Tensor) -> Tensor:
    """weight, dense: its gradient comes laid out as it is."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


class NormReLUConv2d(nn.Module):
    """BatchNorm, ReLU and a convolution: `conv(relu(norm(x)))`, as nn.Sequential would hold them.

    Args:
        in_channels, out_channels: multiples of 16, where a GPU is to take the fused kernels.
        kernel_size: 3, padded by one zero, or 1.
        stride: 1 or 2.
        eps, momentum: of the BatchNorm.
    Raises:
        ValueError: another kernel size or stride.

    Children `norm`, an nn.BatchNorm2d, and `conv`, an nn.Conv2d without bias; where they have been
    replaced by others since, or have hooks, as under pruning, it runs them one after the other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        check_stride(stride)
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size: expected 1 or 3, got {kernel_size}")
        self.norm = nn.BatchNorm2d(in_channels, eps, momentum)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False
        )
        self.fused = serves(self.conv)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See norm_relu_conv2d; a shape that its kernels do not serve takes PyTorch's layers."""
        if self.fused and is_as_made(self.norm, self.conv):
            return norm_relu_conv2d(
                x, Norm.of(self.norm), self.conv.weight, residual, self.conv.stride[0]
            )
        y = self.conv(F.relu(self.norm(x), inplace=True))
        return y if residual is None else y + residual

    def extra_repr(self) -> str:
        return "fused" if self.fused else "unfused: its shape is not served"
