"""Gradients as autograd leaves them: any shapes, dtypes and layouts, some missing, some broken."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.ops import _register

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _offset(v: Tensor) -> Tensor:
    """Dense, from one element into its storage on: no 16-byte alignment."""
    base = torch.full((v.numel() + 1,), torch.nan, dtype=v.dtype, device=v.device)
    return base[1:].view(v.shape).copy_(v)


def _permuted(v: Tensor) -> Tensor:
    return v.permute(*reversed(range(v.dim()))).contiguous().permute(*reversed(range(v.dim())))


def _sliced(v: Tensor) -> Tensor:
    """Every other element of the last dimension, NaN between them: what is read there shows."""
    size = [*v.shape[:-1], 2 * v.shape[-1] + 1]
    base = torch.full(size, torch.nan, dtype=v.dtype, device=v.device)
    return base[..., 1::2].copy_(v)


def _expanded(v: Tensor) -> Tensor:
    return v[:1].expand_as(v)


# Each takes dense values to a tensor of that layout; the expanded one repeats a part of them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda v: v,
    "offset": _offset,
    "permuted": _permuted,
    "sliced": _sliced,
    "expanded": _expanded,
}
DENSE = ["dense", "offset", "permuted"]


@dataclass(frozen=True)
class Gradient:
    """One gradient, or with dtype None a missing one."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = torch.float32
    layout: str = "dense"
    values: str = "normal"

    def make(self, generator: torch.Generator, device: str) -> Tensor | None:
        if self.dtype is None:
            return None
        v = torch.randn(self.shape, generator=generator)
        factor = {"normal": 1.0, "large": 1e4, "small": 1e-4, "zeros": 0.0}.get(self.values, 1.0)
        v = (v * factor).clamp(-6e4, 6e4)
        if self.values in ("nan", "inf", "-inf") and v.numel() > 0:
            v.view(-1)[v.numel() // 2] = float(self.values)
        return LAYOUTS[self.layout](v.to(device, self.dtype))


def make(gradients: list[Gradient], device: str, seed: int = 0) -> list[Tensor | None]:
    """The same tensors on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [gradient.make(generator, device) for gradient in gradients]


SHAPES = st.one_of(
    st.tuples(st.integers(0, 70)),
    st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple),
    st.just((3, 0, 2)),
)


def gradient_lists(
    layouts: list[str], values: tuple[str, ...] = ("normal", "large", "small", "zeros")
) -> st.SearchStrategy[list[Gradient]]:
    """Up to seven gradients, any of them missing."""
    one = st.builds(
        Gradient,
        shape=SHAPES,
        dtype=st.sampled_from([*DTYPES, *DTYPES, None]),
        layout=st.sampled_from(layouts),
        values=st.sampled_from(values),
    )
    return st.lists(one, max_size=7)


@contextmanager
def small_blocks(*stems: str) -> Iterator[None]:
    """Blocks so small that a few dozen elements make several."""
    limits = {"BLOCK": 16, "BLOCK_P": 2}
    with ExitStack() as stack:
        for stem in stems:
            kernels = _register._import_kernels(stem)
            for module in (kernels, sys.modules.get(f"{kernels.__package__}._addresses")):
                for name, limit in limits.items():
                    if hasattr(module, name):
                        stack.enter_context(mock.patch.object(module, name, limit))
        yield


class ReadsOnTheHost(TorchDispatchMode):
    """Refuses every op that makes the host wait for the device to tell it a number."""

    WAITS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAITS:
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))
