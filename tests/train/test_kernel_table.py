"""The table of a trace with known times, as a GPU would write it, and the bytes of operators."""

import json
from pathlib import Path
from typing import Any

import kernel_table
import pytest
import torch
from operator_bytes import OperatorBytes

import fastres.ops  # noqa: F401  # registers fastres::augment


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "pid": 1,
        "args": args,
    }  # fmt: skip


def op(name: str, ts: float, dur: float, number: int, tid: int = 1) -> dict[str, Any]:
    return event("cpu_op", name, ts, dur, tid, **{"External id": number})


def kernel(name: str, ts: float, dur: float, number: int, cat: str = "kernel") -> dict[str, Any]:
    return event(cat, name, ts, dur, 7, **{"External id": number})


def table(path: Path, events: list[dict[str, Any]], known: dict[str, float]) -> kernel_table.Table:
    path.write_text(json.dumps({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}))
    return kernel_table.read(path, {"forward": "forward"}, known.get, set(known))


def test_a_gpu_trace(tmp_path: Path) -> None:
    """Two steps of 1,000 us; what the first launches ends after it, and all of it counts there."""
    events = []
    for start, number in ((0.0, 0), (1000.0, 10)):
        events += [
            event("user_annotation", "step", start, 900.0),
            event("user_annotation", "forward", start + 10, 400.0),
            event("gpu_user_annotation", "step", start + 300, 1200.0),
            event("gpu_user_annotation", "forward", start + 300, 300.0),
            op("fastres::batch_norm_relu", start + 20, 100.0, number + 1),
            op("aten::empty", start + 30, 10.0, number + 2),
            op("aten::conv2d", start + 130, 100.0, number + 3),
            op("aten::convolution", start + 140, 80.0, number + 4),
            op("aten::cudnn_convolution", start + 150, 60.0, number + 5),
            # The backward is launched by another thread.
            op("fastres::batch_norm_relu_backward", start + 500, 100.0, number + 6, tid=2),
            kernel("_moments_kernel", start + 700, 100.0, number + 1),
            kernel("_fwd_kernel", start + 800, 200.0, number + 1),
            kernel("gemm", start + 1000, 300.0, number + 5),
            kernel("_bwd_kernel", start + 1300, 350.0, number + 6),
            kernel("Memset", start + 850, 50.0, 99, cat="gpu_memset"),
        ]
    # A warm-up's kernel, launched before the steps.
    events += [kernel("warm-up", 1.0, 500.0, 77), op("aten::add", -50.0, 10.0, 77)]
    known = {"fastres::batch_norm_relu": 6e5, "aten::convolution": 3e5, "aten::empty": 0.0}
    found = table(tmp_path / "trace.json", events, known)
    assert found.on_device and found.step_ms == [1.0, 0.95]  # from first kernel to first kernel
    assert found.phases == {"forward": [0.4, 0.4]}
    lines = {line.kernel: line for line in found.lines}
    assert lines.keys() == {"_moments_kernel", "_fwd_kernel", "gemm", "_bwd_kernel", "Memset"}
    assert [line.kernel for line in found.lines][:2] == ["_bwd_kernel", "gemm"]
    assert lines["_fwd_kernel"].op == lines["_moments_kernel"].op == "fastres::batch_norm_relu"
    assert lines["gemm"].op == "aten::convolution"  # whose arguments were counted
    assert lines["_bwd_kernel"].op == "fastres::batch_norm_relu_backward"
    assert lines["Memset"].op == ""
    assert lines["_fwd_kernel"].ms == pytest.approx([0.2, 0.2])
    assert lines["_fwd_kernel"].share == pytest.approx(0.2) and lines["gemm"].calls == 1
    # 600 KB by both kernels in 0.3 ms, 300 KB in 0.3 ms.
    assert lines["_fwd_kernel"].gb_per_s == pytest.approx(2.0)
    assert lines["_moments_kernel"].gb_per_s == pytest.approx(2.0)
    assert lines["gemm"].gb_per_s == pytest.approx(1.0) and lines["gemm"].bytes == 3e5
    assert lines["_bwd_kernel"].bytes is None and lines["_bwd_kernel"].gb_per_s is None
    said = "\n".join(kernel_table.text(found))
    assert "_fwd_kernel  < fastres::batch_norm_relu" in said and "2 steps of 0.975 ms" in said


def test_without_a_gpu_operators_and_the_rest_are_the_whole_step(tmp_path: Path) -> None:
    events = [
        event("user_annotation", "step", 0.0, 1000.0),
        op("aten::convolution", 100.0, 400.0, 1),
        op("aten::mkldnn_convolution", 110.0, 300.0, 2),
        op("autograd::engine::evaluate_function: AddBackward0", 600.0, 200.0, 3),
        op("aten::add", 650.0, 100.0, 4),
        op("gloo_copy", 0.0, 900.0, 5, tid=2),
    ]
    found = table(tmp_path / "trace.json", events, {"aten::convolution": 8e5, "aten::add": 1e5})
    assert not found.on_device and found.busy == pytest.approx(0.5)
    assert {line.kernel: line.ms[0] for line in found.lines} == pytest.approx(
        {"aten::convolution": 0.4, "aten::add": 0.1, kernel_table.OUTSIDE: 0.5}
    )
    assert sum(line.share for line in found.lines) == pytest.approx(1.0)
    assert {line.op: line.gb_per_s for line in found.lines} == pytest.approx(
        {"aten::convolution": 2.0, "aten::add": 1.0, "": None}
    )


def test_a_trace_without_steps_is_an_empty_table(tmp_path: Path) -> None:
    found = table(tmp_path / "trace.json", [op("aten::add", 0.0, 1.0, 1)], {})
    assert found.lines == [] and found.step_ms == [] and found.busy == 0


def test_bytes_of_arguments_and_results() -> None:
    a, b = torch.zeros(10, 8), torch.zeros(10, 8)  # 320 bytes each
    index, pixels = torch.tensor([1, 7]), torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    mean = torch.zeros(3)
    expected = {
        "aten::add": 320 + 320 + 320,
        "aten::add_": 320 + 320 + 320,  # read, read, and written in place
        "aten::copy_": 320 + 320,
        "aten::t": 0,
        "aten::empty": 0,
        "aten::mul": 4 + 320 + 320,  # an expanded tensor has one element in memory
        "aten::_foreach_add": 2 * 3 * 320,
        "aten::index": 2 * 32 + 16 + 2 * 32,  # two rows of ten
        "fastres::augment": 2 * 192 + 16 + 12 + 12 + 2 * 192 * 4,
    }
    with OperatorBytes() as counts:
        a + b  # noqa: B018  # called for the count
        a.add_(b)
        a.copy_(b)
        a.t()
        torch.empty(5)
        torch.zeros(()).expand(10, 8) * a
        torch._foreach_add([a, b], [b, a])
        a[index]
        torch.ops.fastres.augment(
            pixels, index, mean, mean + 1, 0, 0, None, 4, True, torch.float32, False
        )
    for name, size in expected.items():
        counted = counts.a_call(name)
        if name == "aten::add":  # `mean + 1` is another of them
            assert counts.calls[name] == 2 and counts.total[name] == size + 24
        else:
            assert counted == (size or None), name
    assert counts.a_call("aten::sub") is None
