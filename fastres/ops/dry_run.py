"""Build every kernel of a step at once, before the first step, instead of one after the other.

    with dry_run() as launches:
        model(x).sum().backward()
    build_kernels(launches)
    model.zero_grad()

Triton builds a kernel when it is first launched, and a step launches them in turn: a core works and
the others wait. In a dry run nothing is launched; what would have been is collected, and built by
all cores into Triton's cache, where the first step finds it.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastres.ops import _register

# They reserve memory and run nothing.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@contextmanager
def dry_run() -> Iterator[list[Any]]:
    """Collect the launches of this package's kernels inside, in place of running them.

    What an op would return is zeros, so that other code goes on with numbers that harm nothing: an
    index is in range. What PyTorch does by itself it does: statistics, gradients and weights that
    it changes are for the caller to put back. Tensors on a CPU take the path of a GPU.

    Yields:
        The launches, for build_kernels.
    Raises:
        RuntimeError: entered inside of itself, or with TRITON_INTERPRET=1, where nothing is built.
    """
    if _register.INTERPRET:
        raise RuntimeError("dry_run: with TRITON_INTERPRET=1 kernels are not built; unset it")
    if _register.collecting:
        raise RuntimeError("dry_run: entered already")
    with importlib.import_module("fastres.kernels._launch").record() as launches, _Zeros():
        _register.collecting = True
        try:
            yield launches
        finally:
            _register.collecting = False


def build_kernels(
    launches: Sequence[Any], target: str | None = None, threads: int | None = None
) -> int:
    """Build what the launches of a dry_run would run, into Triton's cache.

    Args:
        launches: of dry_run.
        target: "sm_80", "sm_90", "sm_100" or "gfx942", with no GPU needed; None, this machine's.
        threads: how many are built at once; None, as many as a ThreadPoolExecutor has.
    Returns:
        How many different binaries the launches take; those in the cache cost nothing.
    """
    return int(importlib.import_module("fastres.kernels._aot").build_all(launches, target, threads))


class _Zeros(TorchDispatchMode):
    """Zeros where there would be memory that no kernel has written."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastres" or func.overloadpacket.__name__ in ALLOCATIONS:
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    t.zero_()
        return out
