"""Cast one dense tensor into another, rounding to nearest: fp32 master weights to half, above all.

    out = source

Read from the top: the reference, the registered op, the function.
Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.
"""

import torch
from torch import Tensor

from fastres.ops._dense import DTYPES, is_dense
from fastres.ops._register import kernels, register_op, takes_kernels


def cast_reference(source: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition of cast, in PyTorch's own op."""
    return source.to(dtype)


@register_op("cast", mutates_args=("out",))
def _cast(source: Tensor, out: Tensor) -> None:
    kernels("cast", source).cast_fwd(source, out)


@_cast.register_fake
def _(source: Tensor, out: Tensor) -> None:
    return None


def cast(source: Tensor, out: Tensor) -> Tensor:
    """Write source into out, rounded to nearest: one launch on a GPU, PyTorch's copy on a CPU.

    Args:
        source: any shape, fp32, fp16 or bf16, dense in memory: a flat buffer, or a tensor in any
            order of dimensions.
        out: source's shape, strides and device, fp32, fp16 or bf16.
    Returns:
        out.
    Raises:
        ValueError: a dtype, shape, stride or device that does not fit.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.
    """
    _check(source, out)
    if takes_kernels(source):
        torch.ops.fastres.cast.default(source, out)
        return out
    # As on a GPU: what is written is no part of a graph, whichever of the two is a parameter.
    with torch.no_grad():
        return out.copy_(source)


def _check(source: Tensor, out: Tensor) -> None:
    for name, t in (("source", source), ("out", out)):
        if t.dtype not in DTYPES:
            raise ValueError(f"{name}: expected one of {list(DTYPES)}, got {t.dtype}")
    if out.shape != source.shape or out.device != source.device:
        raise ValueError(
            f"out: expected source's {list(source.shape)} on {source.device}, got "
            f"{list(out.shape)} on {out.device}"
        )
    if source.stride() != out.stride() and not (source.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"out: expected source's strides {source.stride()}, got {out.stride()}")
    if not is_dense(source):
        raise ValueError(f"source: expected dense in memory, got stride {source.stride()}")
