"""The one door through which every kernel is launched."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import wrap_triton
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True)
class Launch:
    """A kernel with the very arguments that it would have been launched with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    num_warps: int
    constexprs: dict[str, Any]


# Whose device launches are configured for where none runs them; None: that of this machine.
_family: str | None = None
_recorder: Callable[[Launch], None] | None = None
_watcher: Callable[[Launch], AbstractContextManager[None]] | None = None


def family() -> str:
    """What a kernel's configuration goes by: where tensor cores take the factors of a product from.

    "tcgen05" and "wgmma": from shared memory, on NVIDIA's Blackwell of data centres and Hopper;
    "mma": from registers, on its others; "hip": from registers, on AMD. Without a GPU "wgmma".
    """
    return _family or _of_machine()


@functools.cache
def _of_machine() -> str:
    if torch.version.hip:
        return "hip"
    if not torch.cuda.is_available():
        return "wgmma"
    return family_of(torch.cuda.get_device_capability()[0])


def family_of(major: int) -> str:
    """Of an NVIDIA GPU of compute capability major.x."""
    return {9: "wgmma", 10: "tcgen05"}.get(major, "mma")


@contextmanager
def configure_for(family: str) -> Iterator[None]:
    """Launches are made as they would be on a device of this family."""
    global _family
    previous, _family = _family, family
    try:
        yield
    finally:
        _family = previous


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches in place of running them, so that launchers work on meta tensors.

    What is then built ahead of time is what would run, not a second description of it.
    """
    global _recorder
    launches: list[Launch] = []
    previous, _recorder = _recorder, launches.append
    try:
        yield launches
    finally:
        _recorder = previous


@contextmanager
def watch(watcher: Callable[[Launch], AbstractContextManager[None]]) -> Iterator[None]:
    """Run every launch inside the context that watcher makes of it."""
    global _watcher
    previous, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = previous


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: Any
) -> None:
    """Run `kernel` over `grid` on the device of its first tensor argument."""
    _launch(Launch(kernel, grid, args, num_warps, constexprs), traced=True)


def launch_opaque(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: Any
) -> None:
    """launch for ops that are registered with traceable=False.

    Outside a triton_op, wrap_triton would trace every launch for a graph that nobody asked for.
    """
    _launch(Launch(kernel, grid, args, num_warps, constexprs), traced=False)


def _launch(what: Launch, traced: bool) -> None:
    if _watcher is None:
        _run(what, traced)
    else:
        with _watcher(what):
            _run(what, traced)


def _run(what: Launch, traced: bool) -> None:
    settings = {"num_warps": what.num_warps, **what.constexprs}
    if _recorder is not None:
        _recorder(what)
    elif isinstance(what.kernel, InterpretedFunction):
        what.kernel[what.grid](*what.args, **settings)
    else:
        first = next(arg for arg in what.args if isinstance(arg, torch.Tensor))
        runnable = wrap_triton(what.kernel) if traced else what.kernel
        # Triton launches on the current device, which need not be the tensors' own.
        with torch.cuda.device_of(first):
            runnable[what.grid](*what.args, **settings)
