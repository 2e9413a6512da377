"""What norm_relu_conv2d and preact_unit take: shapes served, and the checks of their inputs."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastres.ops._batch_norm_check import check_batch_norm, check_eps, check_values, check_vectors
from fastres.ops._meprop import count_kept
from fastres.ops._norm import Norm
from fastres.ops.meprop_conv2d import MePropConv2d

# A block of channels is a side of a tensor core's product.
CHANNELS = 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(conv: nn.Conv2d) -> bool:
    """Whether the fused kernels take a convolution's place: by its shape alone.

    3x3 with padding 1, or 1x1 without, at stride 1 or 2; channels in multiples of 16 on both sides;
    no bias, groups or dilation. Of nn.Conv2d's subclasses, whose forward may be another, only
    MePropConv2d is served, in mode "unified".
    """
    size = conv.kernel_size[0]
    return (
        (type(conv) is nn.Conv2d or (type(conv) is MePropConv2d and conv.mode == "unified"))
        and conv.kernel_size in ((1, 1), (3, 3))
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding in ((size // 2, size // 2), size // 2)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and conv.in_channels % CHANNELS == 0
        and conv.out_channels % CHANNELS == 0
    )


def has_hooks(*modules: nn.Module) -> bool:
    """Whether anything is called around a module's forward or backward, and may change it."""
    return any(
        m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks
        for m in modules
    )


def is_as_made(*modules: nn.Module | None) -> bool:
    """Whether an op may still take the place of these: convolutions that it serves, BatchNorms.

    One may have been replaced since, or hooked: pruning and weight_norm make a weight in a hook.
    """
    for module in modules:
        if module is None:
            continue
        fits = isinstance(module, nn.BatchNorm2d)
        if has_hooks(module) or not (serves(module) if isinstance(module, nn.Conv2d) else fits):
            return False
    return True


def kept_channels(conv: nn.Conv2d) -> int:
    """How many output channels the backward of a convolution goes by: meProp's, or all."""
    if type(conv) is MePropConv2d and conv.training and not conv.dense:
        return count_kept(conv.k, conv.ratio, conv.out_channels, "out channels")
    return conv.out_channels


def check_norm(x: Tensor, norm: Norm, name: str, shape: list[int] | None = None) -> None:
    """Raise ValueError unless norm fits x, or what of x's dtype and device has another shape."""
    try:
        if shape is None:
            check_batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, None
            )
        else:
            check_vectors(
                shape[1], x.dtype, x.device, norm.running_mean, norm.running_var, norm.weight,
                norm.bias, norm.training,
            )  # fmt: skip
        check_eps(norm.eps, norm.training)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if shape is not None:
        check_values(shape, norm.training, name)
    tracks = norm.training and norm.running_mean is not None
    if tracks and norm.momentum is None and norm.num_batches_tracked is None:
        raise ValueError(
            f"{name}: momentum: expected a float, got None: a cumulative average needs a batch "
            "counter, num_batches_tracked"
        )


def check_moments(x: Tensor, moments: tuple[Tensor, int] | None) -> None:
    """Raise ValueError unless BatchMoments may be x's; how many chunks there are, kernels check."""
    if moments is None:
        return
    (partial, chunk), C = moments, x.shape[1]
    sizes = list(partial.shape)
    fits = partial.device == x.device and partial.dtype == torch.float32
    if len(sizes) != 3 or sizes[::2] != [2, C] or not fits or chunk < 0:
        raise ValueError(
            f"moments: expected partial [2, P, {C}], torch.float32 on {x.device}, and a chunk of 0 "
            f"or more, got {sizes}, {partial.dtype} on {partial.device}, and {chunk}"
        )


def check_weight(
    x: Tensor, weight: Tensor, name: str, in_channels: int, taps: tuple[int, ...], kernels: bool
) -> None:
    """Raise ValueError unless weight is that of a convolution that is served.

    kernels: whether Triton's run it, which want channels in sixteens.
    """
    shape = tuple(weight.shape)
    sizes = " or ".join(f"{t}x{t}" for t in taps)
    if len(shape) != 4 or shape[1] != in_channels or shape[2:] not in [(t, t) for t in taps]:
        raise ValueError(f"{name}: expected [K, {in_channels}, h, w] of {sizes}, got {list(shape)}")
    if kernels and (shape[0] % CHANNELS or shape[1] % CHANNELS):
        raise ValueError(
            f"{name}: expected channels in multiples of {CHANNELS}, got {list(shape)}; take "
            "batch_norm_relu and F.conv2d for it"
        )
    if weight.device != x.device or (
        weight.dtype not in (x.dtype, torch.float32) and x.dtype in _DTYPES
    ):
        raise ValueError(
            f"{name}: expected {x.dtype} or torch.float32 on {x.device}, got {weight.dtype} on "
            f"{weight.device}"
        )


def check_stride(stride: int) -> None:
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")


def check_like(x: Tensor, name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless t, where there is one, has a shape and x's dtype and device."""
    if t is not None and (tuple(t.shape) != shape or t.dtype != x.dtype or t.device != x.device):
        raise ValueError(
            f"{name}: expected {list(shape)}, {x.dtype} on {x.device}, got {list(t.shape)}, "
            f"{t.dtype} on {t.device}"
        )


def check_row_scale(x: Tensor, row_scale: Tensor | None) -> None:
    if row_scale is not None and (
        row_scale.shape != x.shape[:1]
        or row_scale.dtype != torch.float32
        or row_scale.device != x.device
    ):
        raise ValueError(
            f"row_scale: expected [{x.shape[0]}], torch.float32 on {x.device}, got "
            f"{list(row_scale.shape)}, {row_scale.dtype} on {row_scale.device}"
        )


def check_unit(
    x: Tensor,
    norm1: Norm,
    weight1: Tensor,
    norm2: Norm,
    weight2: Tensor,
    shortcut_weight: Tensor | None,
    stride: int,
    row_scale: Tensor | None,
    index: Tensor | None,
    position: Tensor | None,
    kept: Sequence[int] | None,
    takes: bool,
) -> None:
    """Raise ValueError unless everything fits; takes: whether kernels run it."""
    check_norm(x, norm1, "norm1")
    check_stride(stride)
    C, K = x.shape[1], weight1.shape[0]
    check_weight(x, weight1, "weight1", C, (3,), takes)
    check_weight(x, weight2, "weight2", K, (3,), takes)
    if weight2.shape[0] != K or weight2.dtype != weight1.dtype:
        raise ValueError(
            f"weight2: expected [{K}, {K}, 3, 3], {weight1.dtype}, got {list(weight2.shape)}, "
            f"{weight2.dtype}"
        )
    if shortcut_weight is not None:
        check_weight(x, shortcut_weight, "shortcut_weight", C, (1,), takes)
        if shortcut_weight.shape[0] != K or shortcut_weight.dtype != weight1.dtype:
            raise ValueError(
                f"shortcut_weight: expected [{K}, {C}, 1, 1], {weight1.dtype}, got "
                f"{list(shortcut_weight.shape)}, {shortcut_weight.dtype}"
            )
    elif stride != 1 or C != K:
        raise ValueError(
            f"shortcut_weight: needed where the shape changes, from {C} channels to {K} at stride "
            f"{stride}, got None"
        )
    check_row_scale(x, row_scale)
    if kept is not None and (len(kept) != 3 or not all(1 <= k <= K for k in kept)):
        raise ValueError(f"kept: expected three numbers of channels, 1 to {K}, got {list(kept)}")
    check_subset(x, row_scale, index, position)
    N, _, H, W = x.shape
    samples = N if index is None else index.shape[0]
    if shortcut_weight is None:
        check_values([samples, C, H, W], norm1.training, "norm1")
    of_h = [samples, K, (H - 1) // stride + 1, (W - 1) // stride + 1]
    check_norm(x, norm2, "norm2", of_h)


def check_group(
    x: Tensor, process_group: dist.ProcessGroup | None, trains: bool, takes: bool
) -> tuple[str, int]:
    """A process group's name and size, as ops take them; "" and 1 where no norm trains.

    takes: whether kernels take x; raises ValueError where they do not.
    """
    if process_group is None or process_group.size() == 1 or not trains:
        return "", 1
    if not takes:
        raise ValueError(f"process_group: its statistics are taken by kernels, got x on {x.device}")
    return process_group.group_name, process_group.size()


def check_subset(
    x: Tensor, row_scale: Tensor | None, index: Tensor | None, position: Tensor | None
) -> None:
    if (index is None) != (position is None):
        raise ValueError("index and position: expected both or neither, got one")
    if index is None or position is None:
        return
    if row_scale is not None:
        raise ValueError("index and row_scale: expected one of the two at most, got both")
    for name, t in (("index", index), ("position", position)):
        if t.dim() != 1 or t.dtype != torch.int64 or t.device != x.device:
            raise ValueError(
                f"{name}: expected one dimension of torch.int64 on {x.device}, got "
                f"{list(t.shape)}, {t.dtype} on {t.device}"
            )
    if position.shape[0] != x.shape[0]:
        raise ValueError(f"position: expected [{x.shape[0]}], got {list(position.shape)}")
