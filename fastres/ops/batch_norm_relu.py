"""BatchNorm, an optional residual add, and ReLU, as one op.

    z = (x - mean) / sqrt(var + eps) * weight + bias + residual,   y = max(z, 0)

Read from the top: the reference, the registered op with its backward, the function, the Module.
Source: Ioffe and Szegedy 2015, arXiv:1502.03167; before the convolution, as here: He et al. 2016,
arXiv:1603.05027.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops._batch_norm_check import check_batch_norm, check_eps
from fastres.ops._register import kernels, register_autograd, register_op, takes_kernels
from fastres.ops._samples import take_samples


def batch_norm_relu_reference(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
    index: Tensor | None = None,
) -> Tensor:
    """The definition of batch_norm_relu, in PyTorch's own ops."""
    x = x if index is None else x[index]
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        z = z + residual
    return torch.relu(z) if relu else z


@register_op("batch_norm_relu")
def _forward(
    x: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, var, mask. Without running statistics normalises by the batch's, and returns them.

    mean, var: [C] fp32, var biased; empty where the running ones were given. mask: a bit an element
    of the ReLU's gradient, where a residual keeps the backward from recomputing it; else empty.
    """
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    return kernels("batch_norm_relu", x).batch_norm_relu_fwd(
        x, index, weight, bias, residual, running, eps, relu
    )


@_forward.register_fake
def _(
    x: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masked = residual is not None and relu
    return kernels("batch_norm_relu", x).empty_outputs(x, index, running_mean is None, masked)


@register_op("batch_norm_relu_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor,
    eps: float,
    relu: bool,
    training: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual; those that `needs` does not ask for are empty."""
    return kernels("batch_norm_relu", x).batch_norm_relu_bwd(
        dy, x, index, weight, bias, mean, var, mask, eps, relu, training, needs
    )


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor,
    eps: float,
    relu: bool,
    training: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels("batch_norm_relu", x).empty_grads(x, index, weight, bias, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, index, weight, bias, residual, running_mean, running_var, ctx.eps, ctx.relu = inputs
    _, mean, var, mask = output
    ctx.mark_non_differentiable(mean, var, mask)
    # The three gradients that never come would otherwise be made as zeros at every step.
    ctx.set_materialize_grads(False)
    ctx.training = running_mean is None
    stats = (mean, var) if ctx.training else (running_mean, running_var)
    ctx.save_for_backward(x, index, weight, bias, *stats, mask)


def _autograd_backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, index, weight, bias, mean, var, mask = ctx.saved_tensors
    needs_dx, _, needs_dweight, needs_dbias, needs_dresidual = ctx.needs_input_grad[:5]
    # Without a ReLU the residual's gradient is dy itself.
    needs = [needs_dx, needs_dweight, needs_dbias, needs_dresidual and ctx.relu]
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if any(needs):
        grads = torch.ops.fastres.batch_norm_relu_backward.default(
            dy, x, index, weight, bias, mean, var, mask, ctx.eps, ctx.relu, ctx.training, needs
        )
        grads = tuple(g if wanted else None for g, wanted in zip(grads, needs, strict=True))
    if needs_dresidual and not ctx.relu:
        grads = (*grads[:3], dy)
    return (grads[0], None, *grads[1:], None, None, None, None)


register_autograd(_forward, _autograd_backward, _setup_context)


@register_op(
    "batch_norm_update_stats",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def _update_stats(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    count: int,
) -> None:
    """Move running statistics toward a batch's: an op with a gradient may not, so this one does.

    One launch, and the factor of a cumulative average (momentum None) never leaves the device.
    """
    kernels("batch_norm_relu", mean).update_running(
        running_mean, running_var, num_batches_tracked, mean, var, momentum, count
    )


@_update_stats.register_fake
def _(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    count: int,
) -> None:
    return None


def batch_norm_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
    index: Tensor | None = None,
) -> Tensor:
    """Batch-normalise, add a residual, apply ReLU: the signature of F.batch_norm and three more.

    z = (x - mean) / sqrt(var + eps) * weight + bias + residual,   y = max(z, 0)

    On a GPU it runs in Triton and keeps x for the backward, and with a residual one bit an element,
    in place of the normalised tensor. On a CPU it is PyTorch's own batch_norm and an in-place ReLU.

    Args:
        x: [N, C, H, W], fp32, fp16 or bf16, any strides; a tensor whose H and W do not merge into
            one stride is copied first. On a CPU fp64 too.
        running_mean, running_var: [C] contiguous, both or neither; updated in training (with the
            unbiased variance), needed in evaluation.
        weight, bias: [C] or None, in fp32 or in x's dtype.
        training: normalise by the batch's statistics in place of the running ones.
        momentum: share of the batch's statistics in the updated running ones.
        eps: added to the variance.
        residual: [N, C, H, W] in x's dtype and on its device, any strides, added before the ReLU.
        relu: whether to apply the ReLU.
        index: int64 [s], the samples of x to take, as if x were x[index], without a pass of its
            own for the gather. Each in [0, N) and none twice, which on a GPU nobody checks: asking
            would wait for the device. Not with a residual.
    Returns:
        [N, C, H, W], or [s, C, H, W], in x's dtype and memory format; arithmetic in fp32.
    Raises:
        ValueError: a shape, dtype or device that does not fit; one value per channel in training;
            evaluation without running statistics.
    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    check_batch_norm(x, running_mean, running_var, weight, bias, training, residual, index)
    if momentum is None:
        raise ValueError(
            "momentum: expected a float, got None: a cumulative average needs a batch counter, "
            "which BatchNormReLU2d keeps"
        )
    return checked_batch_norm_relu(
        x, running_mean, running_var, None, weight, bias, training, momentum, eps, residual, relu,
        index,
    )  # fmt: skip


def checked_batch_norm_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    index: Tensor | None = None,
) -> Tensor:
    """batch_norm_relu for checked inputs, with the batch counter that a Module keeps."""
    check_eps(eps, training)
    if not takes_kernels(x):
        x = x if index is None else take_samples(x, index)
        return _native(
            x, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum,
            eps, residual, relu,
        )  # fmt: skip
    y, mean, var, _ = torch.ops.fastres.batch_norm_relu.default(
        x,
        None if index is None else index.contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        residual,
        None if training else running_mean,
        None if training else running_var,
        eps,
        relu,
    )
    if training and running_mean is not None:
        if y.numel() > 0:
            count = y.numel() // y.shape[1]
            torch.ops.fastres.batch_norm_update_stats.default(
                running_mean, running_var, num_batches_tracked, mean, var, momentum, count
            )
        elif num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    return y


def _native(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """The CPU's path: PyTorch's batch_norm, then the add and the ReLU in its output's place."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is not None or not training or running_mean is None or running_var is None:
        z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)
    else:
        # F.batch_norm wants its factor as a float, which would break a compiled graph; with
        # momentum 1 it hands out the batch's own statistics, for a factor that stays a tensor.
        assert num_batches_tracked is not None
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        z = F.batch_norm(x, mean, var, weight, bias, training, 1.0, eps)
        if x.numel() > 0:
            factor = 1.0 / num_batches_tracked.to(running_mean.dtype)
            running_mean.mul_(1.0 - factor).add_(mean * factor)
            running_var.mul_(1.0 - factor).add_(var * factor)
    if residual is not None:
        z = z.add_(residual)
    return z.relu_() if relu else z


class BatchNormReLU2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, an optional residual add, and ReLU: same constructor, same state_dict.

    Where a pre-activation unit reads `relu(bn(x))`, or a post-activation one
    `relu(bn(x) + shortcut)`, this is the whole expression.

    nn.SyncBatchNorm.convert_sync_batchnorm puts a BatchNorm without the ReLU in its place, and
    torch.nn.utils.fuse_conv_bn_eval a convolution without it: take PreActUnit's process_group, or
    PyTorch's own BatchNorm and ReLU, for these.
    """

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = True,
        index: Tensor | None = None,
    ) -> Tensor:
        """See batch_norm_relu."""
        tracks = self.running_mean is not None
        training = self.training or not tracks
        updates = self.training and self.track_running_stats and tracks
        mean = self.running_mean if updates or not training else None
        var = self.running_var if updates or not training else None
        check_batch_norm(x, mean, var, self.weight, self.bias, training, residual, index)
        return checked_batch_norm_relu(
            x, mean, var, self.num_batches_tracked if updates else None, self.weight, self.bias,
            training, self.momentum, self.eps, residual, relu, index,
        )  # fmt: skip
