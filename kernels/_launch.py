"""The one door through which every kernel is launched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


_recorder: Callable[[Launch], None] | None = None


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


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: Any
) -> None:
    """Run `kernel` over `grid` on the device of its first tensor argument."""
    if _recorder is not None:
        _recorder(Launch(kernel, grid, args, num_warps, constexprs))
    elif isinstance(kernel, InterpretedFunction):
        kernel[grid](*args, num_warps=num_warps, **constexprs)
    else:
        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
        # Triton launches on the current device, which need not be the tensors' own.
        with torch.cuda.device_of(first):
            wrap_triton(kernel)[grid](*args, num_warps=num_warps, **constexprs)
