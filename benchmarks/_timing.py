"""How the benchmarks time: medians with their spread."""

import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.benchmark import timer as waiting_clock

# Fewer have no spread to speak of, more tell nothing new.
_LEAST_REPEATS = 10
_MOST_REPEATS = 1000
# Bytes that no GPU's L2 cache holds beside anything else.
_FLUSHED = 2**28
# Of a GPU's clock in a second, for torch.cuda._sleep; a slower one waits the longer.
_CYCLES = 2e9


class Clock:
    """How much of a run's time is left. What no longer fits is named, not dropped in silence."""

    def __init__(self, minutes: float = float("inf")) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self, most: float) -> float:
        """Seconds that something may still take, one at the least."""
        return max(min(most, self._end - time.monotonic()), 1.0)

    def has(self, seconds: float, for_what: str) -> bool:
        left = self._end - time.monotonic()
        if left < seconds:
            print(f"{for_what}: not measured, {max(left, 0):.0f} s are left", flush=True)
        return left >= seconds


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of n repeats, and the 20th and 80th percentile around it."""

    median_ms: float
    low_ms: float
    high_ms: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentiles(times_ms: Sequence[float]) -> Timing:
    ordered = sorted(times_ms)
    last = len(ordered) - 1
    low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Timing(statistics.median(ordered), low, high, len(ordered))


def time_op(fn: Callable[[], Any], device: torch.device, seconds: float) -> Timing:
    """Time one op. On a GPU by events around each call, the L2 cache flushed before it.

    There the GPU is kept waiting until the host has handed it the whole call, as where the host
    runs ahead: what the host takes is no part of the figure, and shows in time_wall alone.
    """
    if device.type != "cuda":
        return time_wall(fn, seconds)
    fn()  # what is built at the first call
    wait = round(_CYCLES * (1.5 * max(_handing_over(fn) for _ in range(5)) + 5e-5))
    flushed = torch.empty(_FLUSHED, dtype=torch.int8, device=device)
    start = time.perf_counter()
    _device_ms(fn, 3, flushed, wait)
    each = (time.perf_counter() - start) / 3
    n = min(max(round(seconds / each), _LEAST_REPEATS), _MOST_REPEATS)
    _device_ms(fn, -(-n // 4), flushed, wait)
    return percentiles(_device_ms(fn, n, flushed, wait))


def _handing_over(fn: Callable[[], Any]) -> float:
    """Seconds that a call takes on the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _device_ms(fn: Callable[[], Any], n: int, flushed: torch.Tensor, wait: int) -> list[float]:
    """Milliseconds of the device for each of n calls; wait: cycles before each."""
    events = []
    for _ in range(n):
        flushed.zero_()
        torch.cuda._sleep(wait)
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        fn()
        events[-1][1].record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def time_graph(fn: Callable[[], Any], seconds: float) -> Timing:
    """Time one op on a GPU inside a CUDA graph: no launch cost, and a warm L2 cache."""
    from triton.testing import do_bench_cudagraph

    return percentiles(do_bench_cudagraph(fn, rep=int(1000 * seconds), return_mode="all"))


def time_wall(fn: Callable[[], Any], seconds: float) -> Timing:
    """Time something whose host work counts too, a training step above all, by the wall clock.

    Calls go in blocks, at whose end a GPU is waited for: of a millisecond or more where there is
    none, so that reading the clock costs nothing, else of 50, since it takes what the host sends
    ahead while it still computes, as in a run. There are three blocks at the least, for a spread.
    """
    timer = timeit.Timer(fn, timer=waiting_clock)
    block = 0.05 if torch.cuda.is_available() else 1e-3
    calls = max(round(block / max(min(timer.repeat(3, 1)), 1e-9)), 1)
    times_ms: list[float] = []
    end = time.perf_counter() + seconds
    while len(times_ms) < 3 or time.perf_counter() < end:
        times_ms.append(1000 * timer.timeit(calls) / calls)
    return percentiles(times_ms)


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written: the roof for the ops."""
    numel = 2**28 if device.type == "cuda" else 2**24
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    timing = time_op(lambda: target.copy_(source), device, seconds)
    return 2 * source.nbytes / timing.median_ms / 1e6


def speed(timing: Timing, bytes_moved: int | None, roof: float) -> dict[str, Any]:
    """A timing, the GB/s it makes of the fewest bytes, and the share of the copy bandwidth."""
    if not bytes_moved:
        return timing.as_dict()
    gb_per_s = bytes_moved / timing.median_ms / 1e6
    return timing.as_dict() | {"gb_per_s": gb_per_s, "share_of_copy": gb_per_s / roof}
