"""A pre-activation residual unit as one op.

    h = conv1(relu(norm1(x))),   y = shortcut + scale * conv2(relu(norm2(h)))

shortcut is x, or a 1x1 convolution of relu(norm1(x)). Read from the top: the reference, the
registered op with its backward, the function, the Module.
Source: He et al. 2016, arXiv:1603.05027; stochastic depth: Huang et al. 2016, arXiv:1603.09382.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastres.ops._autocast import autocast_dtype, without_autocast
from fastres.ops._norm import Norm, norm_relu, norm_relu_reference, update_two_stats
from fastres.ops._norm_relu_conv2d_check import check_group, check_moments, check_unit
from fastres.ops._register import kernels, register_autograd, register_op, takes_kernels
from fastres.ops._samples import add_samples, take_samples
from fastres.ops.meprop_conv2d import meprop_conv2d_reference
from fastres.ops.norm_relu_conv2d import as_dense, as_nhwc, contiguous


class BatchMoments(NamedTuple):
    """An activation's moments by chunks of its pixels, as the op that made it leaves them.

    Args:
        partial: fp32 [2, P, C], of each chunk the mean and the sum of squared deviations.
        chunk: pixels of a chunk; 0: as preact_unit leaves them.
    """

    partial: Tensor
    chunk: int = 0


def preact_unit_reference(
    x: Tensor,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    index: Tensor | None = None,
    kept: Sequence[int] | None = None,
    norm_relu: Callable[[Tensor, Norm], Tensor] = norm_relu_reference,
) -> Tensor:
    """The definition of preact_unit, in PyTorch's own ops."""

    def conv(a: Tensor, weight: Tensor, stride: int, which: int) -> Tensor:
        given = a, weight.to(x.dtype), None, stride, weight.shape[2] // 2
        if kept is None or kept[which] >= weight.shape[0]:
            return F.conv2d(*given)
        return meprop_conv2d_reference(*given, 1, 1, kept[which], "unified")

    if shortcut_weight is None:
        shortcut = x
        a = norm_relu(x if index is None else take_samples(x, index), norm1)
    else:
        # norm1 is of the shortcut, too, and sees every sample.
        a = norm_relu(x, norm1)
        shortcut = conv(a, shortcut_weight, stride, 2)
        a = a if index is None else take_samples(a, index)
    h = conv(a, weight1, stride, 0)
    branch = conv(norm_relu(h, norm2), weight2, 1, 1)
    if index is not None:
        return add_samples(shortcut, index, branch, scale)
    if row_scale is not None:
        branch = branch * row_scale[:, None, None, None].to(x.dtype)
    return torch.add(shortcut, branch, alpha=scale)


@register_op("preact_unit")
def _forward(
    x: Tensor,
    partial: Tensor | None,
    chunk: int,
    index: Tensor | None,
    position: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    weight1: Tensor,
    mean2: Tensor | None,
    var2: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    weight2: Tensor,
    shortcut_weight: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    stride: int,
    eps1: float,
    eps2: float,
    with_moments: bool,
    kept: list[int],
    group: str,
    world_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the partial of its moments, h, and mean and var of norm1 and of norm2, fp32.

    Empty are the partial without with_moments, and of a norm in evaluation what was given. kept: of
    conv1, conv2 and the projection, how many output channels their backward goes by. group: a
    ProcessGroup's name, of world_size processes, or "".
    """
    return kernels("preact_unit", x).preact_unit_fwd(
        x, partial, chunk, index, position, (mean1, var1), (norm1_weight, norm1_bias), weight1,
        (mean2, var2), (norm2_weight, norm2_bias), weight2, shortcut_weight, row_scale, scale,
        stride, (eps1, eps2), with_moments, (group, world_size),
    )  # fmt: skip


@_forward.register_fake
def _(
    x: Tensor,
    partial: Tensor | None,
    chunk: int,
    index: Tensor | None,
    position: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    weight1: Tensor,
    mean2: Tensor | None,
    var2: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    weight2: Tensor,
    shortcut_weight: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    stride: int,
    eps1: float,
    eps2: float,
    with_moments: bool,
    kept: list[int],
    group: str,
    world_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels("preact_unit", x).empty_outputs(
        x, index, mean1 is None, weight1, mean2 is None, weight2, stride, with_moments
    )


@register_op("preact_unit_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    index: Tensor | None,
    position: Tensor | None,
    mean1: Tensor,
    var1: Tensor,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    weight1: Tensor,
    mean2: Tensor,
    var2: Tensor,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    weight2: Tensor,
    shortcut_weight: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    stride: int,
    eps1: float,
    eps2: float,
    training1: bool,
    training2: bool,
    kept: list[int],
    group: str,
    world_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, of norm1 dweight and dbias, of norm2 too, and the weights' gradients in one, flat."""
    return kernels("preact_unit", x).preact_unit_bwd(
        dy, x, h, index, position, (mean1, var1), (norm1_weight, norm1_bias), weight1,
        (mean2, var2), (norm2_weight, norm2_bias), weight2, shortcut_weight, row_scale, scale,
        stride, (eps1, eps2), (training1, training2), (kept[0], kept[1], kept[2]),
        (group, world_size),
    )  # fmt: skip


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    index: Tensor | None,
    position: Tensor | None,
    mean1: Tensor,
    var1: Tensor,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    weight1: Tensor,
    mean2: Tensor,
    var2: Tensor,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    weight2: Tensor,
    shortcut_weight: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    stride: int,
    eps1: float,
    eps2: float,
    training1: bool,
    training2: bool,
    kept: list[int],
    group: str,
    world_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = (norm1_weight, norm1_bias, norm2_weight, norm2_bias)
    weights = (weight1, weight2, shortcut_weight)
    dweight1, dbias1, dweight2, dbias2 = (
        x.new_empty(0) if v is None else torch.empty_like(v) for v in vectors
    )
    dweights = weight1.new_empty(sum(w.numel() for w in weights if w is not None))
    return torch.empty_like(x), dweight1, dbias1, dweight2, dbias2, dweights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, index, position = inputs[:5]
    mean1, var1, norm1_weight, norm1_bias, weight1 = inputs[5:10]
    mean2, var2, norm2_weight, norm2_bias, weight2, shortcut_weight, row_scale = inputs[10:17]
    ctx.numbers, ctx.rest = inputs[17:21], inputs[22:]
    ctx.training = mean1 is None, mean2 is None
    _, _, h, *batch = output
    ctx.mark_non_differentiable(*output[1:])
    # The gradients of what is no gradient's business would otherwise be made as zeros each time.
    ctx.set_materialize_grads(False)
    if mean1 is None:
        mean1, var1 = batch[:2]
    if mean2 is None:
        mean2, var2 = batch[2:]
    ctx.save_for_backward(
        x, h, index, position, mean1, var1, norm1_weight, norm1_bias, weight1,
        mean2, var2, norm2_weight, norm2_bias, weight2, shortcut_weight, row_scale,
    )  # fmt: skip


# Where the differentiable inputs stand among those of the op: x, of each norm weight and bias, and
# the weights.
_INPUTS, _X, _NORMS, _WEIGHTS = 25, 0, (7, 8, 12, 13), (9, 14, 15)


@without_autocast
def _autograd_backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _INPUTS
    if dy is None or not any(ctx.needs_input_grad):
        return tuple(grads)
    saved = ctx.saved_tensors
    dx, *dnorms, flat = torch.ops.fastres.preact_unit_backward.default(
        dy, *saved, *ctx.numbers, *ctx.training, *ctx.rest
    )
    start, weights = 0, (saved[8], saved[13], saved[14])
    grads[_X] = dx
    for place, dnorm in zip(_NORMS, dnorms, strict=True):
        grads[place] = dnorm
    for place, weight in zip(_WEIGHTS, weights, strict=True):
        if weight is not None:
            grads[place] = flat.as_strided(weight.shape, weight.stride(), start)
            start += weight.numel()
    return tuple(
        grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True)
    )


register_autograd(_forward, _autograd_backward, _setup_context)


def preact_unit(
    x: Tensor,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    index: Tensor | None = None,
    position: Tensor | None = None,
    kept: Sequence[int] | None = None,
    moments: BatchMoments | None = None,
    with_moments: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, BatchMoments | None]:
    """A pre-activation residual unit: on a GPU two kernels forward, three to five backward.

    h = conv1(relu(norm1(x))),   y = shortcut + scale * row_scale * conv2(relu(norm2(h)))

    shortcut = x, or conv(relu(norm1(x))) by shortcut_weight. Kept for the backward are x and h, and
    nothing else of their size. On a CPU it is PyTorch's own layers.

    Args:
        x: [N, C, H, W], fp32, fp16 or bf16; copied first unless dense in channels_last.
        norm1, norm2: the BatchNorms, of C and of K channels; see Norm.
        weight1: [K, C, 3, 3]; weight2: [K, K, 3, 3]; shortcut_weight: [K, C, 1, 1], needed where
            the unit changes the shape; all of one dtype, fp32 or x's. On a GPU C and K are
            multiples of 16.
        stride: of conv1 and of the shortcut, 1 or 2.
        scale: factor of the branch, in stochastic depth 1 / (1 - p).
        row_scale: fp32 [N], a factor more for each sample, 0 where it drops its branch; or None.
        index, position: int64 [s] and [N], the samples that take the branch, and for each sample
            where it lies among them or -1; or both None. Without a shortcut_weight norm1 sees, as
            norm2 does in any case, only these. Not with row_scale.
        kept: for meProp ("unified"), the output channels by which the backward of conv1, of conv2
            and of the projection goes, those of largest sum |gradient|; None: all.
        moments: those of x, from the unit that made it, or None: then a kernel more takes them.
        with_moments: whether to return the moments of y for the next unit.
        process_group: whose processes' samples the batch's statistics are taken over, as
            nn.SyncBatchNorm takes them; each has as many. None: this process's alone.
    Returns:
        y [N, K, OH, OW] in x's dtype and channels_last, OH = (H - 1) // stride + 1, under autocast
        in its dtype; and its moments, None unless asked for or on a CPU.
    Raises:
        ValueError: a shape, dtype or device that does not fit; one value per channel in training;
            evaluation without running statistics; a process_group on a CPU.
    Source: He et al. 2016, arXiv:1603.05027.
    """
    x = x.to(autocast_dtype(x))
    takes = takes_kernels(x)
    check_unit(
        x, norm1, weight1, norm2, weight2, shortcut_weight, stride, row_scale, index, position,
        kept, takes,
    )  # fmt: skip
    check_moments(x, moments)
    group = check_group(x, process_group, norm1.training or norm2.training, takes)
    if not takes or x.numel() == 0 or (index is not None and index.numel() == 0):
        y = preact_unit_reference(
            x, norm1, weight1, norm2, weight2, shortcut_weight, stride, scale, row_scale, index,
            kept, norm_relu,
        )  # fmt: skip
        return y, None
    kept = kept or [weight1.shape[0]] * 3
    mean1, var1 = norm1.statistics
    mean2, var2 = norm2.statistics
    partial, chunk = (None, 0) if moments is None else moments
    weights = [None if w is None else as_dense(w) for w in (weight1, weight2, shortcut_weight)]
    y, y_partial, h, mean1, var1, mean2, var2 = torch.ops.fastres.preact_unit.default(
        as_nhwc(x), contiguous(partial), chunk, contiguous(index), contiguous(position),
        mean1, var1, *norm1.affine, weights[0],
        mean2, var2, *norm2.affine, weights[1], weights[2],
        contiguous(row_scale), scale, stride, norm1.eps, norm2.eps, with_moments, [*kept],
        *group,
    )  # fmt: skip
    seen = x if index is None or shortcut_weight is not None else index
    count1 = group[1] * seen.shape[0] * x.shape[2] * x.shape[3]
    count2 = group[1] * (h.numel() // h.shape[1])
    update_two_stats(norm1, (mean1, var1, count1), norm2, (mean2, var2, count2))
    return y, BatchMoments(y_partial) if with_moments else None
