"""The end of a pre-activation network as one op: its last norm, the pooling, classifier and loss.

    a = relu(norm(x)),   logits = (mean of a over H, W) @ weight^T + bias,
    loss = mean over N of cross_entropy(logits, target)

Read from the top: the reference, the registered op with its backward, the function.
Sources: He et al. 2016, arXiv:1603.05027; label smoothing: Szegedy et al. 2016, arXiv:1512.00567.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops._autocast import autocast_dtype, without_autocast
from fastres.ops._norm import Norm, norm_relu, norm_relu_reference, update_stats
from fastres.ops._norm_relu_conv2d_check import CHANNELS, check_moments, check_norm
from fastres.ops._register import kernels, register_autograd, register_op, takes_kernels
from fastres.ops.norm_relu_conv2d import as_nhwc, contiguous
from fastres.ops.preact_unit import BatchMoments

# Channels of x, and classes, that the kernels hold at a time.
MOST_CHANNELS, MOST_CLASSES = 512, 128


def classifier_cross_entropy_reference(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    norm_relu: Callable[[Tensor, Norm], Tensor] = norm_relu_reference,
) -> tuple[Tensor, Tensor]:
    """The definition of classifier_cross_entropy, in PyTorch's own ops."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    pooled = norm_relu(x, norm).mean((2, 3), dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(pooled, weight.to(dtype), None if bias is None else bias.to(dtype))
        right = (target >= 0) & (target < weight.shape[0])
        losses = F.cross_entropy(
            logits, target.where(right, 0), reduction="none", label_smoothing=label_smoothing
        )
    # Times NaN, so that the gradients are NaN too.
    return (losses * torch.where(right, 1.0, torch.nan)).mean(), logits.detach()


@register_op("classifier_cross_entropy")
def _forward(
    x: Tensor,
    partial: Tensor | None,
    chunk: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logits, mean, var, and for the backward dlogits, pooled, da and sums: all fp32.

    Without running statistics normalises by the batch's, and returns them. Without with_gradient
    the last four are empty, and there is no backward. x: dense in NHWC.
    """
    return kernels("classifier_cross_entropy", x).classifier_cross_entropy_fwd(
        x, partial, chunk, running_mean, running_var, norm_weight, norm_bias, weight, bias, target,
        label_smoothing, eps, with_gradient,
    )  # fmt: skip


@_forward.register_fake
def _(
    x: Tensor,
    partial: Tensor | None,
    chunk: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels("classifier_cross_entropy", x).empty_outputs(
        x, weight, running_mean is None, with_gradient
    )


@register_op("classifier_cross_entropy_backward")
def _backward(
    dloss: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dlogits: Tensor,
    pooled: Tensor,
    da: Tensor,
    sums: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dnorm_weight, dnorm_bias, dweight, dbias; empty where there is no such parameter."""
    return kernels("classifier_cross_entropy", x).classifier_cross_entropy_bwd(
        dloss, x, norm_weight, norm_bias, mean, var, weight, bias, dlogits, pooled, da, sums, eps,
        training,
    )  # fmt: skip


@_backward.register_fake
def _(
    dloss: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dlogits: Tensor,
    pooled: Tensor,
    da: Tensor,
    sums: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dnorm_weight, dnorm_bias, dbias = (
        x.new_empty(0) if p is None else torch.empty_like(p) for p in (norm_weight, norm_bias, bias)
    )
    return torch.empty_like(x), dnorm_weight, dnorm_bias, torch.empty_like(weight), dbias


# Where the differentiable inputs stand among those of the op.
_INPUTS, _LEAVES = 13, (0, 5, 6, 7, 8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, mean, var, norm_weight, norm_bias, weight, bias, _, _, ctx.eps, kept = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.training, ctx.kept = mean is None, kept
    stats = output[2:4] if ctx.training else (mean, var)
    ctx.save_for_backward(x, norm_weight, norm_bias, *stats, weight, bias, *output[4:])


@without_autocast
def _autograd_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _INPUTS
    if dloss is None or not any(ctx.needs_input_grad):
        return tuple(grads)
    if not ctx.kept:
        raise RuntimeError(
            "classifier_cross_entropy: the forward ran with with_gradient=False and kept nothing "
            "for a backward; call fastres.ops.classifier_cross_entropy, which sees what is needed"
        )
    found = torch.ops.fastres.classifier_cross_entropy_backward.default(
        dloss, *ctx.saved_tensors, ctx.eps, ctx.training
    )
    for place, grad in zip(_LEAVES, found, strict=True):
        grads[place] = grad if ctx.needs_input_grad[place] else None
    return tuple(grads)


register_autograd(_forward, _autograd_backward, _setup_context)


def classifier_cross_entropy(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    moments: BatchMoments | None = None,
) -> tuple[Tensor, Tensor]:
    """Batch-normalise, apply ReLU, pool, classify, and take the cross entropy.

    a = relu(norm(x)),   logits = (mean of a over H, W) @ weight^T + bias,
    loss = mean over N of cross_entropy(logits, target)

    On a GPU one kernel forward, which reads x once, and one backward, which reads x and writes its
    gradient; x is what is kept, and beside it a few numbers a channel and class of each sample. On
    a CPU it is PyTorch's own layers.

    Args:
        x: [N, C, H, W], fp32, fp16 or bf16; copied first unless dense in channels_last. On a GPU C
            is a multiple of 16, at most 512.
        norm: the BatchNorm, of C channels; see Norm.
        weight: [classes, C]; bias: [classes] or None; each in fp32 or x's dtype. On a GPU at most
            128 classes.
        target: int64 [N], each 0 to classes - 1; another one, -100 too, makes loss and gradients
            NaN: the device tells nobody.
        label_smoothing: 0 to 1, share of the wanted probabilities that all classes have alike.
        moments: those of x, from the op that made it, or None: then a kernel more takes them.
    Returns:
        loss, fp32 scalar, and logits, fp32 [N, classes], which have no gradient. Arithmetic in
        fp32, under autocast too, but a is rounded to x's dtype.
    Raises:
        ValueError: a shape, dtype or device that does not fit; one value per channel in training;
            evaluation without running statistics.
    Sources: He et al. 2016, arXiv:1603.05027; Szegedy et al. 2016, arXiv:1512.00567.
    """
    x = x.to(autocast_dtype(x))
    check_norm(x, norm, "norm")
    takes = takes_kernels(x)
    _check(x, weight, bias, target, label_smoothing, moments, takes)
    if not takes or x.numel() == 0:
        return classifier_cross_entropy_reference(
            x, norm, weight, bias, target, label_smoothing, norm_relu
        )
    mean, var = norm.statistics
    leaves = (x, norm.weight, norm.bias, weight, bias)
    with_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in leaves
    )
    partial, chunk = (None, 0) if moments is None else moments
    loss, logits, mean, var, *_ = torch.ops.fastres.classifier_cross_entropy.default(
        as_nhwc(x), contiguous(partial), chunk, mean, var, *norm.affine, weight.contiguous(),
        contiguous(bias), target.contiguous(), float(label_smoothing), norm.eps, with_gradient,
    )  # fmt: skip
    update_stats(norm, mean, var, x.numel() // x.shape[1])
    return loss, logits


def serves_classifier(fc: nn.Linear) -> bool:
    """Whether the kernels take the place of a classifier and its loss: by its shape alone."""
    return (
        type(fc) is nn.Linear
        and fc.in_features % CHANNELS == 0
        and fc.in_features <= MOST_CHANNELS
        and fc.out_features <= MOST_CLASSES
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    moments: BatchMoments | None,
    takes: bool,
) -> None:
    """Raise ValueError unless everything fits x; takes: whether kernels run it."""
    (N, C), shape = x.shape[:2], list(weight.shape)
    if len(shape) != 2 or shape[1] != C or shape[0] == 0:
        raise ValueError(f"weight: expected [classes, {C}], got {shape}")
    if takes and (C % CHANNELS or C > MOST_CHANNELS):
        raise ValueError(
            f"x: expected channels in multiples of {CHANNELS}, at most {MOST_CHANNELS}, got {C}; "
            "take batch_norm_relu, F.linear and F.cross_entropy for it"
        )
    if takes and shape[0] > MOST_CLASSES:
        raise ValueError(
            f"weight: expected at most {MOST_CLASSES} classes, got {shape[0]}; take "
            "batch_norm_relu, F.linear and F.cross_entropy for it"
        )
    if bias is not None and list(bias.shape) != shape[:1]:
        raise ValueError(f"bias: expected [{shape[0]}], got {list(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.device != x.device or t.dtype not in (x.dtype, torch.float32)):
            raise ValueError(
                f"{name}: expected {x.dtype} or torch.float32 on {x.device}, got {t.dtype} on "
                f"{t.device}"
            )
    if list(target.shape) != [N] or target.dtype != torch.int64 or target.device != x.device:
        raise ValueError(
            f"target: expected [{N}], torch.int64 on {x.device}, got {list(target.shape)}, "
            f"{target.dtype} on {target.device}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    check_moments(x, moments)
