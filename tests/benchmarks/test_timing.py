"""How an op is timed on a GPU, with one that is made up."""

from typing import Any

import _timing
import pytest
import torch


class Gpu:
    """What is asked of a GPU, in its order; a call of the op takes the device 2 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.waits: list[int] = []
        self.ms = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.asked.append("event")
                self.at = gpu.ms

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        class Flushed:
            def zero_(self) -> None:
                gpu.asked.append("flush")
                gpu.ms += 1

        def sleep(cycles: int) -> None:
            gpu.asked.append("wait")
            gpu.waits.append(cycles)
            gpu.ms += 5

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Flushed())

    def op(self) -> None:
        self.asked.append("op")
        self.ms += 2


def test_the_device_alone_is_timed_and_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    clock = iter(range(10**6))
    # Every look at the host's clock a second after the one before: an op is handed over in one.
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(clock))
    timing = _timing.time_op(gpu.op, torch.device("cuda"), 0.1)
    assert (timing.median_ms, timing.low_ms, timing.high_ms) == (2.0, 2.0, 2.0)
    assert timing.n == _timing._LEAST_REPEATS
    measured = gpu.asked[-5 * timing.n :]
    assert measured == ["flush", "wait", "event", "op", "event"] * timing.n
    assert min(gpu.waits) > _timing._CYCLES
