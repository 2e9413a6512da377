"""The ops' benchmarks at toy size: right providers are timed beside their peers, wrong ones not."""

import importlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import _comparison
import _meprop_ratios
import bench_batch_norm_relu
import bench_cast
import pytest
import torch
import torch.nn.functional as F
from _comparison import AUTOTUNE, Case, Work, compare, run_program, sweep_axes
from _results import load
from _sheet import Sheet
from _timing import Clock
from torch import Tensor

from fastres.ops import _register, meprop_linear
from fastres.ops.meprop_linear import meprop_linear_reference

CPU = torch.device("cpu")
COMPILED = {"compile", f"compile {AUTOTUNE}"}
# What each benchmark compares, and the passes that it times.
OPS = {
    "batch_norm_relu": ({"fastres", "eager", *COMPILED}, {"forward", "backward"}),
    "stochastic_depth_add": (
        {"fastres", "eager", "torchvision", "torchvision compile", *COMPILED},
        {"forward", "backward"},
    ),
    "preact_unit": ({"fastres", "layers", "eager", *COMPILED}, {"forward", "backward"}),
    "norm_relu_conv2d": ({"fastres", "eager", *COMPILED}, {"forward", "backward"}),
    "stem_conv2d": ({"fastres", "eager", *COMPILED}, {"forward", "backward"}),
    "classifier_cross_entropy": (
        {"fastres", "layers", "eager", *COMPILED},
        {"forward", "backward"},
    ),
    "augment": ({"fastres", "eager", *COMPILED}, {"forward"}),
    "cast": ({"fastres", "eager", *COMPILED}, {"forward"}),
    "unscale": ({"fastres", "eager", *COMPILED}, {"forward"}),
    "update_scale": ({"fastres", "eager", *COMPILED}, {"forward"}),
    "sgd_step": ({"fastres", "fused", "foreach", *COMPILED}, {"step", "scaled step"}),
    "yellowfin": ({"fastres", "sgd", "adam"}, {"step", "scaled step"}),
    "meprop_linear": ({"fastres", "eager", *COMPILED}, {"backward", "selection"}),
    "meprop_conv2d": ({"fastres", "eager", *COMPILED}, {"backward", "selection"}),
    "stochastic_depth_unit": ({"fastres", "eager"}, {"step"}),
}
# Without GB/s: what does other things than move a tensor's bytes.
WITHOUT_BYTES = {("meprop_linear", "backward"), ("meprop_conv2d", "backward")}


@pytest.fixture(autouse=True)
def _as_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's own paths, as the programs take them; and nobody looks at the bandwidth here."""
    monkeypatch.setattr(_register, "INTERPRET", False)
    monkeypatch.setattr(_comparison, "copy_bandwidth", lambda device, seconds: 10.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at toy size more of them wait for each other
    yield
    torch.set_num_threads(threads)


def _uncompiled(op: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    return op


@pytest.mark.parametrize("op", OPS)
def test_every_bench_times_fastres_and_its_peers(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two are compiled in earnest. The rest would cost a minute, and show no more.
    if op not in ("batch_norm_relu", "meprop_linear"):
        monkeypatch.setattr(torch, "compile", _uncompiled)
    found = importlib.import_module(f"bench_{op}").bench(CPU, True, 0.001, "stages", Sheet())
    rows = found["rows"]
    providers, passes = OPS[op]
    assert not [row for row in rows if "failed" in row or "not_measured" in row]
    assert {row["provider"] for row in rows} == providers
    assert {row["pass"] for row in rows} == passes
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["n"] >= 3
        assert row["timer"] == "wall clock"
        assert all(v is None or isinstance(v, str | int | float) for v in row.values())  # flat
        if op != "stochastic_depth_unit" and (op, row["pass"]) not in WITHOUT_BYTES:
            assert row["gb_per_s"] > 0
            assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / found["copy_gb_per_s"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sweep", ["stages", "full"])
def test_what_no_longer_fits_the_time_is_named(op: str, sweep: str) -> None:
    bench = importlib.import_module(f"bench_{op}").bench
    rows = bench(CPU, False, 0.001, sweep, Sheet(Clock(0.0)))["rows"]
    assert rows
    assert all(row["not_measured"] == "out of time" for row in rows)
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)  # no case twice


@pytest.mark.parametrize("op", ["batch_norm_relu", "stochastic_depth_add", "meprop_conv2d"])
def test_the_full_sweep_has_every_axis_dtype_and_layout(op: str) -> None:
    cases = importlib.import_module(f"bench_{op}")._cases
    abouts = [case.about for case in cases(torch.device("cuda"), False, "full")]
    values = {key: {about[key] for about in abouts} for key in ("N", "C", "H", "dtype", "layout")}
    assert values["C"] >= {16, 32, 64, 128, 256, 512, 1024, 2048}
    assert {min(values["H"]), max(values["H"])} == {8, 56}
    assert {min(values["N"]), max(values["N"])} == {32, 4096}
    assert values["dtype"] == {"fp32", "fp16", "bf16"} and values["layout"] == {"NHWC", "NCHW"}


def test_axes_change_one_at_a_time() -> None:
    base = {"N": 2, "C": 4}
    assert list(sweep_axes(base, {"N": (1, 2), "C": (4, 8)})) == [
        base, {"N": 1, "C": 4}, {"N": 2, "C": 8},
    ]  # fmt: skip


def _case(providers: dict[str, Callable[[], Any]], nbytes: int = 8) -> Case:
    """A case whose right result is 1."""
    work = Work(providers, lambda op: op() == 1, lambda op: {"forward": op}, {"forward": 10**6})
    return Case({"N": 1}, nbytes, lambda: work)


def _raise(error: BaseException) -> None:
    raise error


def test_a_provider_that_fails_costs_only_its_own_rows() -> None:
    providers: dict[str, Callable[[], Any]] = {
        "wrong": lambda: 2,
        "large": partial(_raise, torch.OutOfMemoryError("CUDA out of memory. Tried ...")),
        "broken": partial(_raise, KeyError("key")),
        "right": lambda: 1,
    }
    rows = {
        row["provider"]: row for row in compare(CPU, [_case(providers)], 0.001, Sheet())["rows"]
    }
    assert rows["wrong"]["failed"] == "wrong result"
    assert rows["large"]["not_measured"] == "out of memory"
    assert rows["broken"]["failed"] == "KeyError: 'key'"
    assert rows["right"]["gb_per_s"] == pytest.approx(1 / rows["right"]["median_ms"])
    assert [name for name, row in rows.items() if "median_ms" in row] == ["right"]


def test_what_has_failed_before_is_tried_again_at_the_end() -> None:
    tried: list[int] = []

    def case(n: int) -> Case:
        def make() -> Work:
            tried.append(n)
            return Work({"right": lambda: 1}, lambda op: op() == 1, lambda op: {"forward": op})

        return Case({"N": n}, 8, make)

    earlier = [{"N": 1, "failed": "KeyError: 'key'"}, {"N": 2, "not_measured": "out of time"}]
    compare(CPU, [case(n) for n in (1, 2, 3)], 0.001, Sheet(earlier=earlier))
    assert tried == [2, 3, 1]


def test_rows_that_were_not_asked_for_are_kept(tmp_path: Path) -> None:
    """With --go-on and other cases than before; those that are measured anew are replaced."""
    failed, kept, other = ({"N": 1, "failed": "x"}, {"N": 2, "ms": 1.0}, {"N": 3, "ms": 2.0})
    path = tmp_path / "rows.json"
    sheet = Sheet(path=path, earlier=[failed, kept, other])
    assert not sheet.known({"N": 1}) and sheet.known({"N": 2})
    assert json.loads(path.read_text())["rows"] == [kept, other]
    sheet.add([{"N": 1, "ms": 3.0}])
    assert sheet.last == {"N": 1, "ms": 3.0} and sheet.rows == [kept, sheet.last, other]
    assert json.loads(path.read_text())["rows"] == sheet.rows


def test_peers_that_are_autotuned_may_be_left_out_and_asked_for_later() -> None:
    name = f"compile {AUTOTUNE}"
    sheet = Sheet()
    sheet.autotunes = False
    rows = compare(CPU, [_case({"right": lambda: 1, name: lambda: 1})], 0.001, sheet)["rows"]
    left = [row for row in rows if row["provider"] == name]
    assert left == [{"provider": name, "N": 1, "not_measured": "left out"}]
    again = Sheet(earlier=rows)
    again.autotunes = False
    assert again.known({"N": 1}) and again.rows == rows
    assert not Sheet(earlier=rows).known({"N": 1})


def test_a_case_without_memory_costs_only_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make() -> Work:
        made.append("large")
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_comparison, "free_memory", lambda device: 1000)
    cases = [
        _case({"right": lambda: 1}, nbytes=1001),
        Case({"N": 2}, 8, make),
        _case({"right": lambda: 1}, nbytes=1000),
    ]
    rows = compare(CPU, cases, 0.001, Sheet())["rows"]
    assert rows[:2] == [{"N": n, "not_measured": "out of memory"} for n in (1, 2)]
    assert made == ["large"]
    assert rows[2]["provider"] == "right" and "median_ms" in rows[2]


def test_free_memory_of_this_machine_is_known() -> None:
    free = _comparison.free_memory(CPU)
    if not Path("/proc/meminfo").exists():
        pytest.skip("only Linux tells")
    assert free is not None and free > 2**20


def test_a_wrong_op_gets_no_speed_and_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", _uncompiled)
    monkeypatch.setattr(bench_cast, "cast", lambda source, out: out.copy_(source).mul_(2))
    out = tmp_path / "cast.json"
    argv = ["bench_cast.py", "--small", "--device", "cpu", "--seconds", "0.001", "--json", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    assert run_program(bench_cast.__doc__, "cast", bench_cast.bench) == 1
    rows = load(out)["rows"]
    ours = [row for row in rows if row["provider"] == "fastres"]
    assert len(ours) == 2
    assert all(row["failed"] == "wrong result" and "median_ms" not in row for row in ours)
    assert all("median_ms" in row for row in rows if row["provider"] == "eager")
    captured = capsys.readouterr()
    assert captured.err.count("failed: provider=fastres") == 2
    assert not [line for line in captured.out.splitlines() if line.startswith("fastres")]


def _wrong_mask(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Right forward, but every gradient passes."""

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        y = op(*args, **kwargs)
        z = op(*args, **kwargs, relu=False)
        return z + (y - z).detach()

    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_batch_norm_relus_check(
    dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five channels of 8*4*4 values at a time, and one that is left.
    monkeypatch.setattr(bench_batch_norm_relu, "_CHECKED", 5 * 128)
    t = bench_batch_norm_relu.make_inputs(8, 16, 4, dtype, layout, CPU)
    right = bench_batch_norm_relu.batch_norm_relu_reference
    is_right = partial(bench_batch_norm_relu.is_right, t, True)
    assert is_right(right)
    assert not is_right(_wrong_mask(right))
    assert not is_right(lambda *args, **kwargs: right(*args, **kwargs) * 1.2)

    def without_last_channel(*args: Any, **kwargs: Any) -> Tensor:
        y = right(*args, **kwargs)
        return torch.cat([y[:, :-1], y[:, -1:] * 0.5], 1)

    assert not is_right(without_last_channel)
    assert not is_right(lambda *args, **kwargs: right(*args, **kwargs) * torch.nan)


def test_meprops_check_refuses_other_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", _uncompiled)
    calls = []

    def op(x: Tensor, weight: Tensor, bias: Tensor, ratio: float, mode: str) -> Tensor:
        calls.append(mode)
        # The mode that was not asked for: as many gradients, but others.
        return meprop_linear(
            x, weight, bias, ratio=ratio, mode="row" if mode == "unified" else "unified"
        )

    def make() -> _meprop_ratios.Layer:
        x, weight = torch.randn(16, 32), torch.randn(32, 32)
        return _meprop_ratios.Layer(
            x.requires_grad_(), weight.requires_grad_(), torch.randn(32).requires_grad_(),
            _meprop_ratios.gradient(16, 32, device=CPU, dtype=torch.float32),
            {"unified": 32, "row": 32}, F.linear, op, meprop_linear_reference,
        )  # fmt: skip

    rows = _meprop_ratios.time_ratios(CPU, [Case({"N": 16}, 8, make)], True, 0.001, Sheet())["rows"]
    assert set(calls) == {"unified", "row"}
    wrong = [row for row in rows if "failed" in row]
    assert {(row["mode"], row["ratio"]) for row in wrong} == {("unified", 0.25), ("row", 0.25)}
    # Where all is kept, and in the dense peers, there is nothing to get wrong.
    assert {row["ratio"] for row in rows if "median_ms" in row} == {1.0}


def test_a_step_of_another_loss_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter((2.0, 2.1, 2.5, 2.6, float("nan")))  # eager, fastres, and three modes

    def make_step(*_: Any, **__: Any) -> Callable[[], Tensor]:
        loss = torch.tensor(next(losses))
        return lambda: loss

    bench_unit = importlib.import_module("bench_stochastic_depth_unit")
    monkeypatch.setattr(bench_unit, "make_step", make_step)
    rows = bench_unit.bench(CPU, True, 0.001, "stages", Sheet())["rows"]
    wrong = [(row["provider"], row["mode"]) for row in rows if "failed" in row]
    assert wrong == [("fastres", "none"), ("fastres", "row")]
    assert all("time_ratio" not in row for row in rows)  # beside a step that is not right


@pytest.mark.gpu
def test_on_a_gpu_the_forward_is_timed_in_both_ways() -> None:
    found = bench_batch_norm_relu.bench(torch.device("cuda"), True, 0.01, "stages", Sheet())
    rows = found["rows"]
    assert not [row for row in rows if "failed" in row or "not_measured" in row]
    assert {row["provider"] for row in rows} >= {"fastres", "eager", "native", *COMPILED}
    assert {(row["pass"], row["timer"]) for row in rows} == {
        ("forward", "events, cold L2"),
        ("forward", "CUDA graph, warm L2"),
        ("backward", "events, cold L2"),
    }
