"""The most memory that a call takes at once, on a CPU too."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_memory(fn: Callable[[], Any], device: torch.device) -> int:
    """Bytes that fn() has allocated at its worst moment, beside what there was before it.

    Of PyTorch's allocator, which tells of every tensor and buffer: on a GPU it keeps the maximum
    itself; on a CPU its profiler lists all that is taken and given back, in order. What a library
    allocates by itself, as oneDNN does for some convolutions, is not among it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory that they lie in, each byte once."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
