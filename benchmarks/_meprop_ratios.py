"""How meProp's benchmarks time a backward at several ratios beside the dense one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _timing import Timing, percentiles, time_op
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastres.ops._meprop import count_kept, select_channels, select_row

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = ("layout", "N", "in", "out", "C", "H")
RATIOS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64)


def gradient(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """dy of few bits, whose sums no order changes: near ties would else be any channel's."""
    return ((torch.randn(*shape, device=device) * 32).round() / 32).to(dtype)


@dataclass(frozen=True)
class Case:
    """A layer: its tensors, its dense op, meProp's op and reference, and the width by mode."""

    about: dict[str, Any]
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    width: dict[str, int]
    dense: Callable[..., Tensor]
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.bias

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy, retain_graph=True)


def time_ratios(
    case: Case, ratios: tuple[float, ...], device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """A row for the dense backward and one for each mode and ratio."""
    rows: list[dict[str, Any]] = []
    ys = {("dense", 1.0): case.dense(*case.leaves)}
    for mode in ("unified", "row"):
        for ratio in ratios:
            about = case.about | {"mode": mode, "ratio": ratio}
            y = case.op(*case.leaves, ratio=ratio, mode=mode)
            if _is_right(case, y, count_kept(None, ratio, case.width[mode], ""), mode):
                ys[mode, ratio] = y
            else:
                print(f"{about}: wrong gradients, no speed reported")
                rows.append(about | {"right": False})
    passes: dict[Any, Any] = {key: partial(case.backward, y) for key, y in ys.items()}
    timings = _time_in_turn(passes, device, seconds)
    dense_ms = timings["dense", 1.0].median_ms
    for (mode, ratio), timing in timings.items():
        with FlopCounterMode(display=False) as counter:
            case.backward(ys[mode, ratio])
        row = case.about | {"mode": mode, "ratio": ratio, "right": True, **timing.as_dict()}
        row |= {"gflop": counter.get_total_flops() / 1e9, "speedup": dense_ms / timing.median_ms}
        if mode != "dense" and ratio < 1:
            row["select"] = _time_selection(case, mode, ratio, device, seconds)
        rows.append(row)
        print(_text(row))
    return rows


def _is_right(case: Case, y: Tensor, k: int, mode: str) -> bool:
    """Gradients within rounding of the reference's, by the norm of each."""
    got = case.backward(y)
    want = case.backward(case.reference(*case.leaves, k, mode))
    eps = torch.finfo(y.dtype).eps
    return all(
        bool((a.float() - b.float()).norm() <= 16 * eps * b.float().norm())
        for a, b in zip(got, want, strict=True)
    )


def _time_in_turn(
    passes: dict[Any, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[Any, Timing]:
    """Wall time of each, one call of every one after the other, for `seconds` times their number.

    Host work counts: a backward that is shorter than its launches is no faster for it.
    """
    times: dict[Any, list[float]] = {key: [] for key in passes}
    for fn in passes.values():
        fn()
    end = time.perf_counter() + seconds * len(passes)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for key, fn in passes.items():
            _synchronize(device)
            start = time.perf_counter()
            fn()
            _synchronize(device)
            times[key].append(1000 * (time.perf_counter() - start))
    return {key: percentiles(found) for key, found in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _time_selection(
    case: Case, mode: str, ratio: float, device: torch.device, seconds: float
) -> dict[str, float]:
    dy = case.dy if case.dy.dim() == 4 else case.dy[:, :, None, None]
    k = count_kept(None, ratio, case.width[mode], "")
    select = select_row if mode == "row" else select_channels
    timing = time_op(lambda: select(dy, k), device, seconds / 4)
    moved = dy.nbytes * (2 if mode == "row" else 1)
    return timing.as_dict() | {"gb_per_s": moved / timing.median_ms / 1e6}


def _text(row: dict[str, Any]) -> str:
    names = [f"{name}={value}" for name, value in row.items() if name in SIZES]
    text = (
        f"{row['mode']:7} ratio {row['ratio']:<8.4g} {row['dtype']} {' '.join(names)}  "
        f"{row['median_ms']:9.3f} ms [{row['low_ms']:.3f}, {row['high_ms']:.3f}] "
        f"{row['gflop']:8.3f} GFLOP  {row['speedup']:5.2f}x dense"
    )
    if "select" in row:
        select = row["select"]
        text += f"  (selection {select['median_ms']:.3f} ms, {select['gb_per_s']:.1f} GB/s)"
    return text
