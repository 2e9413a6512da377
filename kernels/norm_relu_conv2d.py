"""BatchNorm, ReLU and a convolution, forward in two kernels and backward in two or three.

    y = residual + scale * conv(relu(norm(x)))

The first kernel of the forward takes the moments of x, which a unit would have from the one before.
"""

from collections.abc import Sequence

import torch

from ._conv import as_nhwc, conv2d_shape, empty_nhwc, merges
from ._conv_backward import chunks, conv_backward
from ._conv_dx import conv_dx
from ._conv_forward import conv_forward
from ._conv_gradient import Input, Norm, Output
from ._conv_group import Group, group_of, norm_sums, stats_of_all
from ._moments import Moments, Stats, moments, stats_of
from ._tiles import as_rows, tiling


def batch_moments(x: torch.Tensor, index: torch.Tensor | None = None) -> Moments:
    """The moments of x [N, C, H, W], or of its samples index, int64 [s]."""
    x, rows = as_rows(x)
    shape = x.shape if index is None else torch.Size((index.shape[0], *x.shape[1:]))
    tiles = tiling(shape, rows)
    partial, _, chunk = moments(x, index, rows, tiles)
    return Moments(partial, chunk, tiles.M)


def batch_stats(moments: Moments, x: torch.Tensor, group: Group | None) -> Stats:
    """What a convolution of x, whose moments these are, normalises by in training."""
    if group is not None:
        return stats_of_all(moments, group)
    return stats_of(moments, merges(x.shape[1], x.dtype))


def given_stats(mean: torch.Tensor | None, var: torch.Tensor | None, rows: int = 0) -> Stats | None:
    """mean and var, where they are given, for kernels that merge nothing."""
    return None if mean is None or var is None else Stats(mean, var, rows=rows)


def outputs(stats: Stats, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and var, or, where they were given and are no outputs, two empty ones."""
    if training:
        return stats.mean, stats.var
    empty = stats.mean.new_empty(0, dtype=torch.float32)
    return empty, torch.empty_like(empty)


def empty_outputs(
    x: torch.Tensor, weight: torch.Tensor, stride: int, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What norm_relu_conv2d_fwd returns, uninitialised."""
    y = empty_nhwc(x, *conv2d_shape(x, weight, stride, x.shape[0]))
    stats = x.new_empty(x.shape[1] if training else 0, dtype=torch.float32)
    return y, stats, torch.empty_like(stats)


def norm_relu_conv2d_fwd(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    scale: float,
    stride: int,
    eps: float,
    group: tuple[str, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and mean and var where they are the batch's, else two empty tensors.

    Args: as conv_forward; group: name and size of the ProcessGroup that the batch is of.
    """
    given = given_stats(running_mean, running_var)
    stats = given or batch_stats(batch_moments(x), x, group_of(*group))
    y, _, _ = conv_forward(
        x, None, stats, norm_weight, norm_bias, weight, None, residual, row_scale, scale, stride,
        eps, False,
    )  # fmt: skip
    return y, *outputs(stats, given is None)


def empty_like_or_none(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else torch.empty_like(t)


def or_empty(t: torch.Tensor, *several: torch.Tensor | None) -> Sequence[torch.Tensor]:
    """Each of several, or where it is None an empty tensor as t: ops return tensors."""
    return [t.new_empty(0) if s is None else s for s in several]


def norm_relu_conv2d_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor | None,
    scale: float,
    stride: int,
    eps: float,
    training: bool,
    group: tuple[str, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dnorm_weight and dnorm_bias, empty where there is none, and dweight, laid out as weight.

    dy: as the forward's y, any strides. The residual's gradient is dy itself.
    """
    # Hooks that kept it elsewhere hand x back in other strides.
    x = as_nhwc(x)
    N, C, H, W = x.shape
    rows, shared = group[1] * N * H * W, group_of(*group)
    norm = Norm(Stats(mean, var, rows=rows), norm_weight, norm_bias, eps, training)
    into, out = Input(x, None, norm), Output(as_nhwc(dy), scale=scale, row_scale=row_scale)
    P = chunks(weight, stride, out.inner, dy.numel() // dy.shape[1], x.dtype)
    slab = dy.new_empty(P, weight.numel(), dtype=torch.float32)
    dweight = torch.empty_like(weight)
    dnorm = [empty_like_or_none(p) for p in (norm_weight, norm_bias)]
    dz, sums = conv_backward(into, out, weight, stride, N, slab)
    sums, written = norm_sums(sums, norm, dnorm, shared)
    dx = conv_dx(None, dz, None, x, norm, sums, *written, slab, dweight)
    dnorm_weight, dnorm_bias = or_empty(x, *dnorm)
    return dx, dnorm_weight, dnorm_bias, dweight
