"""What a trace of torch.profiler says of the steps in it: each kernel's time, bytes and GB/s."""

import bisect
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
OUTSIDE = "(Python, autograd, waiting)"


@dataclass(frozen=True)
class Line:
    """A kernel as one operator launches it; without a GPU, an operator."""

    kernel: str
    op: str
    """The operator; empty where none launched it."""
    calls: float
    """In a step."""
    ms: list[float]
    """In each of the steps."""
    share: float
    """Of a step: of the device's busy time, or without a GPU of the host's; the steps' median."""
    bytes: float | None
    """Of the operator's arguments and results in a step; see OperatorBytes."""
    gb_per_s: float | None
    """Those bytes over the median time of all kernels of the operator."""


@dataclass(frozen=True)
class Table:
    """Lines, the longest first, and what they are a part of."""

    lines: list[Line]
    on_device: bool
    step_ms: list[float]
    """On the host's clock, from a step's first phase to its last."""
    busy: float
    """Share of that time in which the device ran something, or the host an operator."""
    phases: dict[str, list[float]]
    """ms on the host, by phase, in each step."""


def read(
    path: Path,
    marks: Mapping[str, str],
    bytes_a_call: Callable[[str], float | None],
    counted: set[str],
) -> Table:
    """The table of a trace whose steps are marked "step".

    Args:
        path: Chrome's JSON.
        marks: names of the phases within a step, and what the table calls them.
        bytes_a_call: of an operator; None where they are not known.
        counted: the operators whose bytes are known: what they call is theirs.
    """
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    # On a GPU every annotation is there a second time, as gpu_user_annotation.
    annotations = [e for e in events if e.get("cat") == "user_annotation"]
    steps = sorted((e for e in annotations if e["name"] == "step"), key=_start)
    starts = [_start(e) for e in steps]

    def step_of(time: float) -> int | None:
        i = bisect.bisect_right(starts, time) - 1
        return i if i >= 0 and time < _end(steps[i]) else None

    step_ms = [e["dur"] / 1000 for e in steps]  # the host's, who runs ahead of a device
    phases: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    for name, label in marks.items():
        for e in annotations:
            step = step_of(_start(e))
            if e["name"] == name and step is not None:
                phases[label][step] += e["dur"] / 1000
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    owners = _owners(ops, counted)
    on_device = any(e.get("cat") in _ON_DEVICE for e in events)
    times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(steps))
    calls: dict[tuple[str, str], int] = defaultdict(int)
    op_calls: dict[str, int] = defaultdict(int)
    threads = {e["tid"] for e in steps}
    for op, (owner, self_time) in zip(ops, owners, strict=True):
        step = step_of(_start(op))
        if step is None:
            continue
        op_calls[op["name"]] += op is owner
        # The time of threads beside the steps' own is not a part of the steps' time.
        of_engine = owner["name"].startswith("autograd::engine::")
        if not on_device and op["tid"] in threads and not of_engine:
            key = (owner["name"], owner["name"])
            times[key][step] += self_time / 1000
            calls[key] += op is owner
    if on_device:
        firsts: dict[int, float] = {}
        last = 0.0
        launched_by = {op["args"].get("External id"): i for i, op in enumerate(ops)}
        for e in events:
            if e.get("cat") not in _ON_DEVICE:
                continue
            i = launched_by.get(e.get("args", {}).get("External id"))
            op_name = "" if i is None else owners[i][0]["name"]
            # A kernel may run after the step that launched it; it is that step's all the same.
            step = step_of(_start(e) if i is None else _start(ops[i]))
            if step is not None:
                key = (e["name"], op_name)
                times[key][step] += e["dur"] / 1000
                calls[key] += 1
                firsts[step] = min(firsts.get(step, _start(e)), _start(e))
                last = max(last, _end(e))
    if on_device:
        step_ms = _device_steps(firsts, last, step_ms)
    busy = [sum(ms[i] for ms in times.values()) for i in range(len(steps))]
    whole = busy if on_device else step_ms
    of_op: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    for (_, name), ms in times.items():
        of_op[name] = [a + b for a, b in zip(of_op[name], ms, strict=True)]
    lines = []
    for (kernel, name), ms in times.items():
        each = bytes_a_call(name)
        moved = None if each is None else each * op_calls[name] / len(steps)
        took = statistics.median(of_op[name])
        speed = moved / took / 1e6 if moved and took else None
        n = calls[kernel, name] / len(steps)
        lines.append(Line(kernel, name, n, ms, _share(ms, whole), moved, speed))
    if not on_device and steps:
        rest = [total - part for total, part in zip(step_ms, busy, strict=True)]
        lines.append(Line(OUTSIDE, "", 0, rest, _share(rest, whole), None, None))
    lines.sort(key=lambda line: -line.share)
    return Table(lines, on_device, step_ms, _share(busy, step_ms), dict(phases))


def _device_steps(firsts: dict[int, float], last: float, host_ms: list[float]) -> list[float]:
    """From a step's first kernel to the next step's, in ms; of the last one to its last kernel.

    firsts: when each step's first kernel began, in µs; a step without any has its host's time.
    """
    found = list(host_ms)
    begun = sorted(firsts)
    ends = [firsts[step] for step in begun[1:]] + [last]
    for step, end in zip(begun, ends, strict=True):
        found[step] = (end - firsts[step]) / 1000
    return found


def _share(part: list[float], whole: list[float]) -> float:
    return statistics.median([p / w if w else 0.0 for p, w in zip(part, whole, strict=True)] or [0])


def text(table: Table, top: int = 15) -> list[str]:
    """The table's longest lines, for a terminal."""
    step = statistics.median(table.step_ms)
    what = "the device busy" if table.on_device else "in operators"
    lines = [
        f"profile  {len(table.step_ms)} steps of {step:.3f} ms (median), {what} {table.busy:.0%}"
    ]
    lines += [
        f"  {statistics.median(ms):9.3f} ms  {statistics.median(ms) / step:5.1%}  {name}"
        for name, ms in table.phases.items()
    ]
    lines.append("a step:   share        ms   calls        MB    GB/s  ")
    lines[-1] += "kernel, and the operator that launched it" if table.on_device else "operator"
    for line in table.lines[:top]:
        moved = "" if line.bytes is None else f"{line.bytes / 1e6:.2f}"
        speed = "" if line.gb_per_s is None else f"{line.gb_per_s:.1f}"
        by = f"  < {line.op}" if table.on_device and line.op else ""
        lines.append(
            f"        {line.share:7.1%} {statistics.median(line.ms):9.3f} {line.calls:7.1f} "
            f"{moved:>9} {speed:>7}  {line.kernel[:90]}{by}"
        )
    if any(line.bytes is not None for line in table.lines):
        return [*lines, "MB: an operator's arguments and results; GB/s: those over all its kernels"]
    return [*lines, "MB and GB/s: not counted, since a compiled model does not show its operators"]


def _owners(ops: list[Event], counted: set[str]) -> list[tuple[Event, float]]:
    """Of each operator the one that it works for, and its own time in µs.

    That is the outermost operator around it whose bytes are counted; itself where there is none.
    """
    found: list[tuple[Event, float]] = [(op, 0.0) for op in ops]
    own = [op["dur"] for op in ops]
    stacks: dict[Any, list[int]] = defaultdict(list)
    for i in sorted(range(len(ops)), key=lambda i: (_start(ops[i]), -ops[i]["dur"])):
        op, stack = ops[i], stacks[ops[i]["tid"]]
        while stack and _end(ops[stack[-1]]) <= _start(op):
            stack.pop()
        owner = op
        if stack:
            own[stack[-1]] -= op["dur"]
            above = found[stack[-1]][0]
            if above["name"] in counted:
                owner = above
        found[i] = (owner, 0.0)
        stack.append(i)
    return [(owner, max(time, 0.0)) for (owner, _), time in zip(found, own, strict=True)]


def _start(event: Event) -> float:
    return event["ts"]


def _end(event: Event) -> float:
    return event["ts"] + event["dur"]
