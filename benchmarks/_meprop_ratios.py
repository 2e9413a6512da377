"""How meProp's benchmarks time a backward at several ratios beside the dense one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from _comparison import Case, compiled, made, row_text, run_cases, wanted
from _results import Row, WrongResult, measured
from _sheet import Sheet
from _timing import Timing, percentiles, speed, time_op
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastres.ops._meprop import count_kept, select_channels, select_row

RATIOS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64)
_MODES = ("unified", "row")
# All of these are timed in turn, and so live at once.
PASSES = 3 + len(_MODES) * len(RATIOS)


def gradient(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """dy of few bits, whose sums no order changes: near ties would else be any channel's."""
    return ((torch.randn(*shape, device=device) * 32).round() / 32).to(dtype)


@dataclass(frozen=True)
class Layer:
    """A layer: its tensors, its dense op, meProp's op and reference, and the width by mode."""

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
    device: torch.device, cases: Iterable[Case], small: bool, seconds: float, sheet: Sheet
) -> dict[str, Any]:
    """Rows of the dense backward by every peer, and of meProp's by mode and ratio.

    cases: of Layers.
    """
    ratios = (1.0, 1 / 4) if small else RATIOS
    return run_cases(
        device, cases, seconds, sheet,
        lambda case, roof: _rows(case, ratios, device, seconds, roof, sheet),
    )  # fmt: skip


def _rows(
    case: Case,
    ratios: tuple[float, ...],
    device: torch.device,
    seconds: float,
    roof: float,
    sheet: Sheet,
) -> list[Row]:
    layer, row = made(case)
    if layer is None:
        return [row]
    abouts: list[Row] = []
    backwards: list[Callable[[], tuple[Tensor, ...]]] = []
    dense, rows = wanted({"eager": layer.dense, **compiled(layer.dense)}, case.about, sheet)
    chosen: list[tuple[str, Callable[..., Tensor], str, float]] = [
        (name, op, "dense", 1.0) for name, op in dense.items()
    ]
    for mode in _MODES:
        chosen += [
            ("fastres", partial(layer.op, ratio=ratio, mode=mode), mode, ratio) for ratio in ratios
        ]
    for name, op, mode, ratio in chosen:
        about: Row = {"provider": name, **case.about, "mode": mode, "ratio": ratio}
        about |= {"pass": "backward", "timer": "wall clock"}
        ys: list[Tensor] = []
        row = measured(about, partial(_check, layer, op, mode, ratio, ys))
        if ys:
            abouts.append(about)
            backwards.append(partial(layer.backward, ys[0]))
        else:
            rows.append(row)

    timings: list[Timing] = []

    def time() -> Row:
        timings.extend(time_in_turn(backwards, device, seconds))
        return {}

    row = measured(case.about | {"pass": "backward"}, time)
    if len(timings) != len(abouts):
        return [*rows, row]
    gflop: dict[tuple[str, float], float] = {}
    dense_ms = min(
        (t.median_ms for a, t in zip(abouts, timings, strict=True) if a["mode"] == "dense"),
        default=None,
    )
    for about, backward, timing in zip(abouts, backwards, timings, strict=True):
        mode, ratio = about["mode"], about["ratio"]
        # A compiled backward does the dense one's work, out of the counter's sight.
        if about["provider"] in ("eager", "fastres"):
            with FlopCounterMode(display=False) as counter:
                backward()
            gflop[mode, ratio] = counter.get_total_flops() / 1e9
        row = about | timing.as_dict()
        if (mode, ratio) in gflop:
            row["gflop"] = gflop[mode, ratio]
        if dense_ms is not None:
            row["speedup"] = dense_ms / timing.median_ms
        rows.append(row)
        print(row_text(row), flush=True)
        if mode != "dense" and ratio < 1:
            select = partial(_time_selection, layer, mode, ratio, device, seconds / 4, roof)
            rows.append(measured(about | {"pass": "selection"}, select))
            if "median_ms" in rows[-1]:
                print(row_text(rows[-1]), flush=True)
    return rows


def _check(
    layer: Layer, op: Callable[..., Tensor], mode: str, ratio: float, ys: list[Tensor]
) -> Row:
    """Put op's output into ys if its gradients are within rounding of the reference's."""
    y = op(*layer.leaves)
    reference = "unified" if mode == "dense" else mode
    k = count_kept(None, ratio, layer.width[reference], "")
    # By the norm of each. Sums have rounding errors that walk as the root of their terms.
    dy, weight = layer.dy, layer.weight
    terms = max(dy.numel() // dy.shape[1], weight.numel() // weight.shape[1])
    bound = torch.finfo(y.dtype).eps * max(16, terms**0.5)
    # cuDNN takes tf32 for fp32 convolutions, of a precision that depends on the algorithm.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = layer.backward(y)
        want = layer.backward(layer.reference(*layer.leaves, k, reference))
    for a, b in zip(got, want, strict=True):
        if not bool((a.float() - b.float()).norm() <= bound * b.float().norm()):
            raise WrongResult
    ys.append(y)
    return {}


def time_in_turn(
    passes: list[Callable[[], Any]], device: torch.device, seconds: float
) -> list[Timing]:
    """Wall time of each, one call of every one after the other, for `seconds` times their number.

    Host work counts: a backward that is shorter than its launches is no faster for it.
    """
    times: list[list[float]] = [[] for _ in passes]
    for fn in passes:
        fn()
    end = perf_counter() + seconds * len(passes)
    while times and (perf_counter() < end or len(times[-1]) < 5):
        for found, fn in zip(times, passes, strict=True):
            _synchronize(device)
            start = perf_counter()
            fn()
            _synchronize(device)
            found.append(1000 * (perf_counter() - start))
    return [percentiles(found) for found in times]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _time_selection(
    layer: Layer, mode: str, ratio: float, device: torch.device, seconds: float, roof: float
) -> Row:
    """The selection alone: dy is read once, and for "row" written once."""
    dy = layer.dy if layer.dy.dim() == 4 else layer.dy[:, :, None, None]
    k = count_kept(None, ratio, layer.width[mode], "")
    select = select_row if mode == "row" else select_channels
    timing = time_op(lambda: select(dy, k), device, seconds)
    timer = "wall clock" if device.type != "cuda" else "events, cold L2"
    return {"timer": timer} | speed(timing, dy.nbytes * (2 if mode == "row" else 1), roof)
