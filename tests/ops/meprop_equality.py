"""What "right" means for meProp's ops: values whose sums are exact, and the check against fp64."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from tolerances import EPS, EPSILONS, TIMES_TORCH, store_error, store_floor, sum_epsilons
from torch import Tensor

from fastres.ops import _register
from fastres.ops._meprop import selected_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = ["unified", "row"]
VALUES = ("grid", "integers", "zeros", "same")
NAMES = ("x", "weight", "bias")


def drawn(shape: Sequence[int], values: str, generator: torch.Generator) -> Tensor:
    """Values of few bits, so that the sum of a few thousand is exact in fp32, in any order.

    The selection of the fp64 reference is then the selection, ties and all.
    """
    v = torch.randn(*shape, generator=generator)
    match values:
        case "grid":
            return (v * 32).round() / 32
        case "integers":
            return v.round()
        case "zeros":
            return v * 0.0
        case "same":
            return v.sign()
    raise ValueError(values)


def gradients(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def run(
    op: Callable[..., Tensor], given: dict[str, Tensor | None], dy: Tensor, needs: Any = NAMES
) -> dict[str, Tensor]:
    """y, and the gradients of those tensors of `given` that are named in `needs`."""
    t = {name: None if v is None else v.detach() for name, v in given.items()}
    leaves = {name: v.requires_grad_() for name in needs if (v := t[name]) is not None}
    y = op(t["x"], t["weight"], t["bias"])
    return {"y": y.detach()} | (gradients(y, leaves, dy) if leaves else {})


def check(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    given: dict[str, Tensor | None],
    dy: Tensor,
) -> None:
    """Raise AssertionError unless op is right: y bitwise PyTorch's, gradients as fp64's are."""
    dense = {name: None if v is None else v.contiguous() for name, v in given.items()}
    double = {name: None if v is None else v.double() for name, v in dense.items()}
    sizes = {name: None if v is None else v.abs() for name, v in double.items()}
    got = run(op, given, dy)
    peer = run(reference, dense, dy.contiguous())
    want = run(reference, double, dy.double().contiguous())
    # The same reference of sizes: what the terms of each sum come to before they cancel.
    scale = run(reference, sizes, dy.double().abs().contiguous())
    assert got.keys() == peer.keys()
    for name in got:
        assert (got[name].dtype, got[name].shape) == (peer[name].dtype, peer[name].shape), name
        if got[name].numel() == 0:
            continue
        dtype = got[name].dtype
        allowed = (EPSILONS + sum_epsilons(dy.numel())) * EPS * scale[name].max()
        allowed += store_error(dtype) * want[name].abs().max() + store_floor(dtype)
        allowed = max(allowed, TIMES_TORCH * (peer[name].double() - want[name]).abs().max())
        off = (got[name].double() - want[name]).abs().max()
        if not bool(off <= allowed):
            raise AssertionError(f"{name} is off by {off}, allowed {allowed}")


def check_row(select: Callable[[Tensor, int], Tensor], dy: Tensor, k: int) -> None:
    """Raise AssertionError unless `select` keeps, to the bit, what the reference keeps."""
    got, want = select(dy, k), selected_reference(dy, k, "row")
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if not torch.equal(got.nan_to_num(nan=777.0), want.nan_to_num(nan=777.0)):
        raise AssertionError(f"other elements are kept: k = {k} of {list(dy.shape)}")


def channels_reference(dy: Tensor, k: int) -> Tensor:
    """The index of the k channels of largest sum |dy|, ascending."""
    sums = dy.double().abs().sum((0, 2, 3))
    return sums.sort(descending=True, stable=True).indices[:k].sort().values


def check_channels(select: Callable[[Tensor, int], Tensor], dy: Tensor, k: int) -> None:
    """Raise AssertionError unless `select` names the reference's channels; sums must be exact."""
    got, want = select(dy, k), channels_reference(dy, k)
    if got.dtype != torch.int64 or not torch.equal(got, want):
        raise AssertionError(f"other channels are kept: {got.tolist()}, not {want.tolist()}")


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks and limits so small that a few hundred elements make several of everything."""
    kernels: Any = _register._import_kernels("meprop")
    tiles, moments = (sys.modules[f"{kernels.__package__}.{n}"] for n in ("_tiles", "_moments"))
    limits: Any = {"MERGE_BLOCK_C": 8, "BLOCK_P": 2}
    with (
        mock.patch.multiple(kernels, BLOCK=32, MAX_CHUNKS=3),
        mock.patch.multiple(moments, **limits),
        mock.patch.multiple(tiles, TILE=64),
    ):
        yield
