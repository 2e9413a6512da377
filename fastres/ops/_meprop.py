"""What meprop_linear and meprop_conv2d share: how many gradients are kept, which, and autocast.

Read from the top: the selection's reference, the two registered selections, then the checks. All of
them order |dy| alike: NaN is largest, and of equals the lowest index is kept.
Source: Sun et al. 2017, arXiv:1706.06197 ("row"); Wei et al. 2017, arXiv:1709.05804 ("unified").
"""

import torch
from torch import Tensor

from fastres.ops._autocast import autocasts
from fastres.ops._register import kernels, register_op, takes_kernels

MODES = ("unified", "row")


def selected_reference(dy: Tensor, k: int, mode: str) -> Tensor:
    """dy [N, C, ...] where meProp keeps it, else 0."""
    if mode == "row":
        size, dims = dy.flatten(1).abs(), dy.shape
    else:
        size, dims = dy.abs().transpose(0, 1).flatten(1).sum(1)[None], dy.shape[1:2]
    kept = size.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(size, dtype=torch.bool).scatter(1, kept, True)
    mask = mask.view(dims) if mode == "row" else mask.view(-1, *(1,) * (dy.dim() - 2))
    return torch.where(mask, dy, 0.0)


@register_op("meprop_select_channels")
def _select_channels(dy: Tensor, k: int) -> Tensor:
    """index int64 [k]: the k channels of dy [N, C, H, W] of largest sum |dy|, ascending."""
    if takes_kernels(dy):
        return kernels("meprop", dy).select_channels(dy, k)
    return _native_channels(dy, k)


@_select_channels.register_fake
def _(dy: Tensor, k: int) -> Tensor:
    return dy.new_empty(k, dtype=torch.int64)


@register_op("meprop_select_row")
def _select_row(dy: Tensor, k: int) -> Tensor:
    """dy [N, C, H, W] with all but the k largest |dy| of each example set to 0; dense."""
    if takes_kernels(dy):
        return kernels("meprop", dy).select_row(dy, k)
    return _native_row(dy, k)


@_select_row.register_fake
def _(dy: Tensor, k: int) -> Tensor:
    if takes_kernels(dy):
        return kernels("meprop", dy).empty_selected(dy)
    return torch.empty_like(dy, memory_format=_format(dy))


def select_channels(dy: Tensor, k: int) -> Tensor:
    """The registered op, as a backward calls it."""
    return torch.ops.fastres.meprop_select_channels.default(dy, k)


def select_row(dy: Tensor, k: int) -> Tensor:
    """The registered op, as a backward calls it."""
    return torch.ops.fastres.meprop_select_row.default(dy, k)


def channels_last(t: Tensor) -> bool:
    """Whether t [N, C, H, W] is dense in channels_last and not also in the default format."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if channels_last(t) else torch.contiguous_format


# The integers of a dtype's width, and the bits of its infinity.
_BITS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


def _native_keep(v: Tensor, k: int) -> Tensor:
    """Where v [..., n] is among the k largest |v| of its row, by the integer bits of |v|."""
    bits, infinity = _BITS[v.dtype]
    keys = (v.view(bits) & torch.iinfo(bits).max).clamp(max=infinity + 1)
    threshold = keys.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = keys > threshold, keys == threshold
    spare = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= spare))


def _native_row(dy: Tensor, k: int) -> Tensor:
    rows = dy.flatten(1)
    kept = torch.where(_native_keep(rows, k), rows, 0.0).view(dy.shape)
    return kept.contiguous(memory_format=_format(dy))


def _native_channels(dy: Tensor, k: int) -> Tensor:
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    C = dy.shape[1]
    if channels_last(dy) or dy.shape[2:] == (1, 1):
        # abs makes a copy, and is still faster than vector_norm over rows.
        sums = dy.permute(0, 2, 3, 1).reshape(-1, C).abs().sum(0, dtype=dtype)
    else:
        sums = torch.linalg.vector_norm(dy, 1, dim=(2, 3), dtype=dtype).sum(0)
    # The first channel by which j are kept, for each j: ascending, and of a size known beforehand.
    kept = _native_keep(sums, k).cumsum(0)
    return torch.searchsorted(kept, torch.arange(1, k + 1, device=dy.device))


def check_share(k: int | None, ratio: float | None, mode: str) -> None:
    """Raise ValueError unless exactly one of k and ratio is given, in its range, with a mode."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    if (k is None) == (ratio is None):
        given = "neither" if k is None else f"k={k} and ratio={ratio}"
        raise ValueError(f"k and ratio: expected one of the two, got {given}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected 0 < ratio <= 1, got {ratio}")
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise ValueError(f"k: expected an integer of at least 1, got {k}")


def count_kept(k: int | None, ratio: float | None, width: int, of: str) -> int:
    """How many of `width` are kept: k, or the ratio rounded half up, and one at the least."""
    if k is None:
        assert ratio is not None
        return max(1, int(ratio * width + 0.5))
    if k > width:
        raise ValueError(f"k: expected 1 <= k <= {width}, the {of}, got {k}")
    return k


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype, where it is enabled: a registered op has no rule of its own.

    As in PyTorch fp64 stays, and gradients flow back through the casts.
    """
    device_type = x.device.type
    if not autocasts(device_type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype) if v.is_floating_point() and v.dtype != torch.float64 else v


_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the dtypes and devices agree and bias is one value an output."""
    dtype, device = x.dtype, x.device
    if dtype not in _HALF_AND_SINGLE and (dtype != torch.float64 or takes_kernels(x)):
        allowed = [*_HALF_AND_SINGLE]
        if not takes_kernels(x):
            allowed.append(torch.float64)
        raise ValueError(f"x: expected one of {allowed} on {device}, got {dtype}")
    if weight.dtype != dtype or weight.device != device:
        raise ValueError(
            f"weight: expected x's {dtype} on {device}, got {weight.dtype} on {weight.device}"
        )
    if bias is not None and (
        bias.shape != weight.shape[:1] or bias.dtype != dtype or bias.device != device
    ):
        raise ValueError(
            f"bias: expected [{weight.shape[0]}] in x's {dtype} on {device}, "
            f"got {list(bias.shape)} in {bias.dtype} on {bias.device}"
        )
