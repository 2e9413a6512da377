"""Launches and bytes as they happen, without a GPU: of Triton's kernels and of PyTorch's own calls.

A Triton kernel is counted in Triton's interpreter, from the lanes that its loads and stores do not
mask. A call of PyTorch is counted where it is dispatched: its tensor inputs and outputs, each once,
which is the least that its kernels can move (BatchNorm's read their input twice, for one).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import interpreter_builder

from fastres.kernels._launch import Launch, watch
from fastres.ops.dry_run import ALLOCATIONS

# What they change they do not read.
OVERWRITES = {"zero_", "fill_", "copy_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"}


@dataclass
class Traffic:
    """Of one kernel or call, over all its launches. Bytes.

    read: each address once a launch, what device memory must give. loaded: as often as the kernel
    asks for it; what exceeds `read` is left to the caches. PyTorch's kernels do not tell the
    second, and read stands for it.
    """

    launches: int = 0
    read: int = 0
    loaded: int = 0
    written: int = 0

    def add(self, other: "Traffic") -> None:
        self.launches += other.launches
        self.read += other.read
        self.loaded += other.loaded
        self.written += other.written


@dataclass
class Account:
    """What ran: by the kernel's or the call's name, and the outputs of the network's layers."""

    kernels: dict[str, Traffic] = field(default_factory=dict)
    calls: dict[str, Traffic] = field(default_factory=dict)
    # Of all convolutions but the 1x1 projections, forward: the unit that is called a pass.
    conv_outputs: int = 0

    @property
    def total(self) -> Traffic:
        every = [*self.kernels.values(), *self.calls.values()]
        return Traffic(
            *(sum(getattr(t, name) for t in every) for name in Traffic.__dataclass_fields__)
        )


@contextmanager
def counted() -> Iterator[Account]:
    """Count everything that runs inside: fastres's kernels in the interpreter, and PyTorch."""
    account = Account()
    calls = _Calls(account)

    @contextmanager
    def counts(launch: Launch) -> Iterator[None]:
        # What the interpreter itself asks of PyTorch is no part of the step.
        calls.paused = True
        traffic = account.kernels.setdefault(launch.kernel.__name__, Traffic())
        traffic.launches += 1
        try:
            with _memory_operations(traffic):
                yield
        finally:
            calls.paused = False

    with watch(counts), calls:
        yield account


@contextmanager
def _memory_operations(traffic: Traffic) -> Iterator[None]:
    """Count one launch's loads, stores and atomics, which all pass through these four methods."""
    loads: list[np.ndarray] = []
    widths: list[int] = []

    def lanes(pointers: Any, mask: Any = None) -> np.ndarray:
        addresses = np.atleast_1d(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        return addresses.ravel()

    def load(pointers: Any, mask: Any = None) -> None:
        loads.append(lanes(pointers, mask))
        widths.append(_width(pointers))

    def store(pointers: Any, mask: Any = None) -> None:
        traffic.written += lanes(pointers, mask).size * _width(pointers)

    def atomic(pointers: Any, mask: Any = None) -> None:
        load(pointers, mask)
        store(pointers, mask)

    # By the place of the mask among the arguments, which Triton 3.6 to 3.9 agree on.
    hooks: dict[str, Callable[..., None]] = {
        "create_masked_load": lambda p, mask, *_, **__: load(p, mask),
        "create_masked_store": lambda p, value, mask, *_, **__: store(p, mask),
        "create_atomic_cas": lambda p, *_, **__: atomic(p),
        "create_atomic_rmw": lambda op, p, value, mask, *_, **__: atomic(p, mask),
    }
    for name, hook in hooks.items():
        setattr(interpreter_builder, name, _after(hook, getattr(interpreter_builder, name)))
    try:
        yield
    finally:
        for name in hooks:
            delattr(interpreter_builder, name)
    for width in set(widths):
        every = np.concatenate([a for a, w in zip(loads, widths, strict=True) if w == width])
        traffic.loaded += every.size * width
        traffic.read += np.unique(every).size * width


def _after(hook: Callable[..., None], method: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        hook(*args, **kwargs)
        return method(*args, **kwargs)

    return both


def _width(pointers: Any) -> int:
    """Bytes of an element; a boolean has one."""
    return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)


class _Calls(TorchDispatchMode):
    """Counts the calls of ATen that start a kernel on a GPU.

    A call does that if it changes an argument or returns memory that is new. Views, detach and
    reshape return what was there; allocations, and reading a number on the host, run no kernel.
    Some calls start more than one, a convolution's backward above all: launches are the fewest.
    """

    def __init__(self, account: Account) -> None:
        super().__init__()
        self.account = account
        self.paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether what is compiled runs as such under this mode, and not by its single calls."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.namespace == "fastres":
            # Past this mode and no further: what the op itself calls counts too.
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:
                out = func.redispatch(keys, *args, **kwargs)
            name = func.overloadpacket.__name__
            if name == "preact_unit":
                y, _, h, *_ = out
                self.account.conv_outputs += _bytes(y) + _bytes(h)
            elif name == "stem_conv2d":
                self.account.conv_outputs += _bytes(out[0])
            return out
        out = func(*args, **kwargs)
        # detach_ and its like are written as changes and change no element.
        if func.namespace == "aten" and torch.Tag.inplace_view not in func.tags:
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changes = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        if name == "_fused_sgd_" and given.get("grad_scale") is None:
            changes.remove("grads")  # they are written where they are unscaled, and only there
        inputs, changed = _tensors(given), _tensors([given.get(name) for name in changes])
        there = {t.untyped_storage().data_ptr() for t in inputs}
        made = [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in there]
        written = sum(map(_bytes, [*changed, *made]))
        if name in ALLOCATIONS or not written:
            return
        if name in OVERWRITES:
            ids = {id(t) for t in changed}
            inputs = [t for t in inputs if id(t) not in ids]
        traffic = self.account.calls.setdefault(name, Traffic())
        read = sum(map(_bytes, inputs))
        traffic.launches += 1
        traffic.read += read
        traffic.loaded += read
        traffic.written += written
        if name == "convolution" and max(given["weight"].shape[2:]) > 1:
            self.account.conv_outputs += _bytes(out)


def _tensors(values: Any) -> list[torch.Tensor]:
    """Every tensor among them, each once."""
    found = {id(v): v for v in tree_leaves(values) if isinstance(v, torch.Tensor)}
    return list(found.values())


def _bytes(t: torch.Tensor) -> int:
    """Of memory: an expanded dimension has one element's."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * t.element_size()
