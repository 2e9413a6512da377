"""The whole step's benchmark: its rows, its fits and its roofline, at toy size."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_step
import pytest
import torch
import trainer
from _growth import exponents
from _roofline import Ceilings, roofline, work
from _sheet import Sheet
from _timing import Clock
from _training_step import make_step, providers, saved_bytes
from device_step import DeviceStep
from run_main import run_main

from fastres.data import split, synthetic
from fastres.ops import BatchNormReLU2d, _register

CPU = torch.device("cpu")
SIZES = [{"batch_size": b, "depth": 8, "width": 4} for b in (8, 16)]


@pytest.fixture(autouse=True)
def _as_the_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's own paths, as the program takes them; and no step's settings left."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_register, "INTERPRET", False)
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)  # at toy size more of them wait for each other
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return run_main(bench_step, "--device", "cpu", "--small", *flags)


def test_rows_of_every_provider(tmp_path: Path) -> None:
    """Compiled in earnest, two of them."""
    out = tmp_path / "step.json"
    done = run("--provider", "channels_last", "--batch-size", "8", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["benchmark"] == "step" and found["small"] and found["format"] == 2
    assert [row["compiled"] for row in found["rows"]] == [None, None, "default", "default"]
    for row in found["rows"]:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["n"] >= 1
        assert row["images_per_second"] == pytest.approx(
            1000 * row["batch_size"] / row["median_ms"]
        )
        assert row["share_of_roofline"] == pytest.approx(row["roofline_ms"] / row["median_ms"])
        assert row["saved_bytes"] > 0 and row["flops"] > 0
    # One model, one batch: every provider's loss is one loss.
    assert len({round(row["loss"], 3) for row in found["rows"]}) == 1
    assert "of roofline" in done.stdout


def test_what_does_not_fit_in_memory_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(
        device: Any, data: Any, settings: dict[str, Any], *rest: Any, **model: Any
    ) -> Any:
        if settings["batch_size"] == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return make_step(device, data, settings, *rest, **model)

    monkeypatch.setattr(bench_step, "make_step", too_large)
    rows = bench_step.bench(CPU, SIZES, 0.01, Sheet(), "eager fp32 channels_last")["rows"]
    assert [row.get("not_measured") for row in rows] == [None, "out of memory"]
    assert rows[0]["images_per_second"] > 0


@pytest.mark.parametrize("what", ["optimizer", "backward"])
def test_a_step_that_is_wrong_has_no_speed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastres.models import ResNet
    from fastres.optim import FusedSGD

    if what == "optimizer":
        monkeypatch.setattr(FusedSGD, "step", lambda self: None)
    else:
        forward = ResNet.forward

        def detached(self: ResNet, x: torch.Tensor) -> torch.Tensor:
            y = forward(self, x)
            fused = any(isinstance(m, BatchNormReLU2d) for m in self.modules())
            return y.detach() + 0 * y + self.fc.bias - self.fc.bias.detach() if fused else y

        monkeypatch.setattr(ResNet, "forward", detached)
    uncompiled = {name: how for name, how in providers(CPU).items() if how[1] is None}
    monkeypatch.setattr(bench_step, "providers", lambda device: uncompiled)
    rows = bench_step.bench(CPU, SIZES[:1], 0.01, Sheet(), "fp32 channels_last")["rows"]
    by_name = {row["provider"]: row for row in rows}
    assert by_name["fused fp32 channels_last"]["failed"] == "wrong result"
    assert "median_ms" in by_name["eager fp32 channels_last"]


def test_what_was_measured_before_is_kept_and_growth_is_of_all(tmp_path: Path) -> None:
    path, flags = tmp_path / "step.json", ("--provider", "eager fp32 NCHW", "--go-on")
    run(*flags, "--batch-size", "8", "--json", str(path))
    (before,) = json.loads(path.read_text())["rows"]
    done = run(*flags, "--json", str(path))
    content = json.loads(path.read_text())
    assert content["finished"] and content["rows"][0] == before and len(content["rows"]) == 2
    assert {row["axis"] for row in content["growth"]} == {"batch_size"}
    assert "time grows with batch_size ^" in done.stdout


def test_out_of_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_step.bench(CPU, SIZES[:1], 0.01, Sheet(Clock(0.0)), "eager")["rows"]
    assert {row["not_measured"] for row in rows} == {"out of time"} and len(rows) == 2
    assert "not measured, 0 s are left" in capsys.readouterr().out


def test_what_compiles_longest_and_what_has_failed_come_last() -> None:
    """So that no size goes without the rest when the time runs out."""
    cuda = torch.device("cuda")
    names = list(providers(cuda))
    failed = {"provider": names[0], "compiled": None, **SIZES[0], "failed": "RuntimeError: no"}
    order = bench_step._in_order(cuda, SIZES, Sheet(earlier=[failed]))
    assert len(order) == 2 * len(names)
    assert order[-1] == (names[0], None, SIZES[0])
    modes = [mode for _, mode, _ in order[:-1]]
    assert modes[-2:] == ["max-autotune"] * 2 and modes.count(None) == modes.index("default")
    assert {name for name, mode, _ in order[: modes.index("default")]} >= {
        "fused units graph fp16 channels_last", "eager fp16 channels_last",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name in providers(torch.device("cuda")) if " graph " in name]
)
def test_a_graphed_provider_steps_through_its_epochs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same calls without a graph, which needs a GPU; what compiles is left uncompiled."""
    monkeypatch.setattr(trainer, "GraphedStep", DeviceStep)
    settings = providers(torch.device("cuda"))[name][0] | {"batch_size": 8, "precision": "fp32"}
    data = split(synthetic(16, 20))
    step = make_step(CPU, data, settings, None, depth=8, width=4)
    losses = [step() for _ in range(5)]
    assert all(loss.shape == () for loss in losses)
    # Two steps an epoch; what the first one found was overwritten by the third and the fifth.
    assert step.trainer.losses.each.tolist() == [float(losses[4]), float(losses[3])]
    assert 0 < float(step()) < 10


def test_a_profiler_that_fails_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: Any) -> Any:
        raise RuntimeError("CUPTI is not to be had")

    monkeypatch.setattr(bench_step, "needs", broken)
    (row,) = bench_step.bench(CPU, SIZES[:1], 0.01, Sheet(), "eager fp32 channels_last")["rows"]
    assert row["images_per_second"] > 0 and "failed" not in row
    assert row["needs_failed"] == "RuntimeError: CUPTI is not to be had"


def test_an_unknown_provider_is_named() -> None:
    done = run("--provider", "keras")
    assert done.returncode == 2 and "'keras'" in done.stderr and "eager fp32 NCHW" in done.stderr


def test_a_cold_start_is_timed_from_the_process_on(tmp_path: Path) -> None:
    flags = ["--cold", "--repeats", "1", "--provider", "eager fp32 NCHW"]
    done = run(*flags, "--json", str(tmp_path / "cold.json"))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "cold.json").read_text())["rows"]
    assert 500 < row["median_ms"] < 100_000  # importing torch alone takes longer than the lower
    assert row["n"] == 1


def test_a_cold_start_that_fails_says_why() -> None:
    size = {"batch_size": 8, "depth": 9, "width": 4}
    (row,) = bench_step.cold(CPU, size, 1, Sheet(), "eager fp32 NCHW")["rows"]
    assert "6n + 2" in row["failed"]


def test_interleaved_ratio(tmp_path: Path) -> None:
    done = run("--ratio", "3", "--json", str(tmp_path / "ratio.json"))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "ratio.json").read_text())["rows"]
    assert 0 < result["lowest"] <= result["median"] <= result["highest"] and result["n"] == 3


def test_each_size_is_swept_from_the_first_ones() -> None:
    sizes = bench_step.swept([128, 64], [20, 56], [16])
    assert [(s["batch_size"], s["depth"]) for s in sizes] == [(128, 20), (64, 20), (128, 56)]


def test_exponents_of_a_power_law() -> None:
    def row(b: int, depth: int) -> dict[str, Any]:
        fixed = {"provider": "eager", "width": 16}
        return fixed | {"batch_size": b, "depth": depth, "median_ms": 0.5 * b**0.9 * depth**1.5}

    rows = [row(b, 20) for b in (64, 128, 4096)] + [row(128, d) for d in (56, 110)]
    found = {r["axis"]: r for r in exponents([*rows, {"not_measured": "out of memory"}])}
    assert found["batch_size"]["exponent"] == pytest.approx(0.9)
    assert found["depth"]["exponent"] == pytest.approx(1.5)
    assert found["depth"]["points"] == 3 and found["depth"]["r2"] == pytest.approx(1)
    assert found["depth"]["factor_ms"] == pytest.approx(0.5 * 128**0.9)


def test_work_is_what_the_network_does() -> None:
    """Nineteen 3x3 convolutions: 16x32x32 seven times, 32x16x16 and 64x8x8 six times each."""
    found = work(128, 20, 16)
    assert found.conv_outputs == 128 * (7 * 16 * 32**2 + 6 * 32 * 16**2 + 6 * 64 * 8**2)
    assert found.parameters == 272_282
    # Two FLOPs a product, three times the forward but for the image's gradient: 2x9x3x16 a pixel.
    forward = 2 * 40_813_184
    assert found.flops == 128 * (3 * forward - 2 * 9 * 3 * 16 * 32**2)


def test_the_higher_floor_is_the_roofline() -> None:
    what = work(128, 20, 16)
    narrow = roofline(what, "fp16", Ceilings(1000.0, {"fp16": 1e6}))
    assert narrow["bound_by"] == "bytes"
    assert narrow["roofline_ms"] == pytest.approx(what.bytes_moved(2) / 1e9)
    slow = roofline(what, "fp16", Ceilings(1e9, {"fp16": 1.0}))
    assert slow["bound_by"] == "flops"
    assert slow["roofline_ms"] == pytest.approx(what.flops / 1e9)


def test_saved_bytes_are_those_of_the_batch() -> None:
    data = split(synthetic(16, 20))
    saved = [
        saved_bytes(make_step(CPU, data, {"batch_size": b}, None, depth=8, width=4))
        for b in (8, 16)
    ]
    # All but the BatchNorms' coefficients, some of which every step keeps, grows with the batch.
    assert 1.99 < saved[1] / saved[0] <= 2
    # At the least the input of each convolution and BatchNorm: twice the convolutions' outputs.
    assert saved[0] > 2 * 4 * work(8, 8, 4).conv_outputs * 0.9


@pytest.mark.gpu
def test_launches_memory_and_host_time() -> None:
    device = torch.device("cuda")
    found = bench_step.bench(device, SIZES[:1], 0.05, Sheet(), "eager fp16 channels_last")
    (row,) = found["rows"]
    assert row["kernels"] >= row["launches"] > 50
    assert row["peak_memory_bytes"] > row["saved_bytes"] > 0 and row["host_ms"] > 0
