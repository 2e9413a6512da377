"""The pre-activation residual unit, forward in two kernels, backward in three to five.

Those are the counts where a tensor's channels are one block, up to 64 in half precision and 16 in
fp32; of several blocks the partial moments and sums take a launch each, two a direction.

    h = conv1(relu(norm1(x))),   y = shortcut + scale * conv2(relu(norm2(h)))

shortcut is x, or a 1x1 convolution of relu(norm1(x)), which conv1's kernel computes from the same
loads. Between the kernels travel x, h and y, each once; of the normalised tensors none is stored,
nor is the gradient between the convolutions. Where a subset of the samples takes the branch, index
names them, and position says for each sample where it lies among them, or -1.
"""

import dataclasses
import functools

import torch

from ._conv import as_nhwc, conv2d_shape, empty_nhwc, moments_pixels
from ._conv_backward import chunks, conv_backward
from ._conv_dgrad import conv_dgrad
from ._conv_dx import conv_dx
from ._conv_forward import conv_forward, conv_pixels
from ._conv_gradient import Input, Norm, Output
from ._conv_group import group_of, norm_sums
from ._conv_select import select
from ._conv_wgrad import conv_wgrad
from ._integers import cdiv
from ._moments import Moments, Stats
from .norm_relu_conv2d import (
    batch_moments,
    batch_stats,
    empty_like_or_none,
    given_stats,
    or_empty,
    outputs,
)

Vector = torch.Tensor | None


def moments_chunk(y: torch.Tensor) -> int:
    """Pixels of a chunk of the moments that a unit leaves of its output y."""
    return moments_pixels(y.shape, y.dtype).chunk


def given_moments(x: torch.Tensor, partial: torch.Tensor, chunk: int) -> Moments:
    """x's moments, of chunks of so many pixels; 0: as a unit leaves them."""
    rows, chunk = x.numel() // x.shape[1], chunk or moments_chunk(x)
    P = cdiv(rows, chunk)
    if partial.shape[1] != P:
        raise ValueError(
            f"moments: expected {P} chunks of {chunk} pixels each, for x of {list(x.shape)}, got "
            f"partial of {list(partial.shape)}: hand on what came with this x"
        )
    return Moments(partial, chunk, rows)


def empty_outputs(
    x: torch.Tensor,
    index: torch.Tensor | None,
    trains1: bool,
    weight1: torch.Tensor,
    trains2: bool,
    weight2: torch.Tensor,
    stride: int,
    with_moments: bool,
) -> tuple[torch.Tensor, ...]:
    """What preact_unit_fwd returns, uninitialised."""
    shape = conv2d_shape(x, weight1, stride, x.shape[0])
    branch = shape if index is None else [index.shape[0], *shape[1:]]
    C, K = x.shape[1], shape[1]
    y = empty_nhwc(x, *shape)
    P = conv_pixels(shape, weight2, x.dtype).P
    empty = functools.partial(x.new_empty, dtype=torch.float32)
    return (
        y,
        empty((2, P, K)) if with_moments else empty(0),
        empty_nhwc(x, *branch),
        *(empty(C if trains1 else 0) for _ in range(2)),
        *(empty(K if trains2 else 0) for _ in range(2)),
    )


def preact_unit_fwd(
    x: torch.Tensor,
    partial: torch.Tensor | None,
    chunk: int,
    index: torch.Tensor | None,
    position: torch.Tensor | None,
    running1: tuple[Vector, Vector],
    norm1: tuple[Vector, Vector],
    weight1: torch.Tensor,
    running2: tuple[Vector, Vector],
    norm2: tuple[Vector, Vector],
    weight2: torch.Tensor,
    shortcut_weight: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    scale: float,
    stride: int,
    eps: tuple[float, float],
    with_moments: bool,
    group: tuple[str, int],
) -> tuple[torch.Tensor, ...]:
    """y, its moments' partial, h, and mean and var of norm1 and of norm2.

    Empty are the partial without with_moments, and what was given: means and vars in evaluation.

    Args:
        x: [N, C, H, W], dense in NHWC.
        partial, chunk: its moments, of chunks of so many pixels, 0: as a unit leaves them; or None:
            then a kernel more takes them, as it does of a subset.
        index: int64 [s], the samples that take the branch; position: int64 [N]; or both None.
        running1, running2: mean and var to normalise by, or None for the batch's.
        norm1, norm2: weight and bias, [C] and [K], or None.
        weight1: [K, C, 3, 3]; weight2: [K, K, 3, 3]; shortcut_weight: [K, C, 1, 1] or None.
        row_scale: fp32 [N], a factor of scale for each sample, or None; not with an index.
        group: name and size of the ProcessGroup whose samples the batch's statistics are of.
    """
    shared = group_of(*group)
    given1, given2 = given_stats(*running1), given_stats(*running2)
    # Without a projection norm1 is of the branch alone, and sees what that sees.
    seen = index if shortcut_weight is None else None
    if given1 is not None:
        stats1 = given1
    elif partial is None or seen is not None:
        stats1 = batch_stats(batch_moments(x, seen), x, shared)
    else:
        stats1 = batch_stats(given_moments(x, partial, chunk), x, shared)
    first = stats1
    beside = shortcut_weight if index is None else None
    shortcut: torch.Tensor | None = x
    if shortcut_weight is not None and index is not None:
        # Of all samples, where conv1 is of some.
        shortcut, _, _ = conv_forward(
            x, None, first, *norm1, shortcut_weight, None, None, None, 1.0, stride, eps[0], False
        )
        first = Stats(stats1.mean, stats1.var)
    h, projected, h_moments = conv_forward(
        x, index, first, *norm1, weight1, beside, None, None, 1.0, stride, eps[0], given2 is None
    )
    if beside is not None:
        shortcut = projected
    stats2 = given2
    if stats2 is None:
        assert h_moments is not None
        stats2 = batch_stats(h_moments, h, shared)
    y, _, y_moments = conv_forward(
        h, position, stats2, *norm2, weight2, None, shortcut, row_scale, scale, 1, eps[1],
        with_moments,
    )  # fmt: skip
    (y_partial,) = or_empty(stats2.mean, None if y_moments is None else y_moments.partial)
    return y, y_partial, h, *outputs(stats1, given1 is None), *outputs(stats2, given2 is None)


def preact_unit_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    index: torch.Tensor | None,
    position: torch.Tensor | None,
    stats1: tuple[torch.Tensor, torch.Tensor],
    norm1: tuple[Vector, Vector],
    weight1: torch.Tensor,
    stats2: tuple[torch.Tensor, torch.Tensor],
    norm2: tuple[Vector, Vector],
    weight2: torch.Tensor,
    shortcut_weight: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    scale: float,
    stride: int,
    eps: tuple[float, float],
    training: tuple[bool, bool],
    kept: tuple[int, int, int],
    group: tuple[str, int],
) -> tuple[torch.Tensor, ...]:
    """dx, the gradients of norm1's weight and bias and of norm2's, and dweight.

    Empty are those of a weight or bias that is None. dweight: [T] in weight1's dtype, the gradients
    of weight1, weight2 and the projection one after the other, each as its weight lies in memory.

    Args:
        dy: as y, any strides; h, stats1, stats2: what the forward made, or was given.
        kept: of conv1, conv2 and the projection, the output channels by which meProp goes, those of
            largest sum |g|; K is all.
        group: as in the forward.
    """
    # What the forward saved comes back in other strides from hooks that kept it elsewhere.
    dy, x, h = as_nhwc(dy), as_nhwc(x), as_nhwc(h)
    N, branch, S = x.shape[0], h.shape[0], x.shape[2] * x.shape[3]
    of_branch = index is not None and shortcut_weight is None
    rows1 = (branch if of_branch else N) * S
    rows2, size, shared = h.numel() // h.shape[1], group[1], group_of(*group)
    first = Norm(Stats(*stats1, rows=size * rows1), *norm1, eps[0], training[0])
    second = Norm(Stats(*stats2, rows=size * rows2), *norm2, eps[1], training[1])
    dnorm = [empty_like_or_none(p) for p in (*norm1, *norm2)]
    sizes = [w.numel() for w in (weight1, weight2, shortcut_weight) if w is not None]
    dweight = weight1.new_empty(sum(sizes))
    P = chunks(weight2, 1, kept[1], dy.numel() // dy.shape[1], x.dtype)
    slab = dweight.new_empty(P, dweight.numel(), dtype=torch.float32)
    slabs = slab.split(sizes, 1)

    into2 = Input(h, None, second)
    out2 = select(Output(dy, index, scale, row_scale), kept[1], branch)
    dz2, sums2 = conv_backward(into2, out2, weight2, 1, branch, slabs[1])
    into1 = Input(x, index, first)
    sums2, (dweight2, dbias2) = norm_sums(sums2, second, dnorm[2:], shared)
    out1 = Output(dz2, norm=second, h=h, sums=sums2, dweight=dweight2, dbias=dbias2)
    out1 = select(out1, kept[0], branch)
    if shortcut_weight is None:
        dz1, sums1 = conv_backward(into1, out1, weight1, stride, branch, slabs[0])
        shortcut, dz_index = dy, position
    else:
        whole, direct = Input(x, None, first), select(Output(dy), kept[2], N)
        conv_wgrad(
            into1, out1, weight1, stride, branch, slabs[0], direct, shortcut_weight, slabs[2]
        )
        out1 = dataclasses.replace(out1, index=position)
        dz1, sums1 = conv_dgrad(whole, out1, weight1, stride, N, direct, shortcut_weight)
        shortcut, dz_index = None, None
    sums1, written = norm_sums(sums1, first, dnorm[:2], shared)
    dx = conv_dx(shortcut, dz1, dz_index, x, first, sums1, *written, slab, dweight)
    return dx, *or_empty(x, *dnorm), dweight
