"""The MLP's benchmark at toy size: what it compares, and that a wrong network gets no speed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _comparison
import bench_meprop_mlp
import pytest
import torch
from _comparison import run_program
from _results import load
from _sheet import Sheet
from _timing import Clock
from torch import nn

from fastres.ops import MePropLinear, _register

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_register, "INTERPRET", False)
    monkeypatch.setattr(_comparison, "copy_bandwidth", lambda device, seconds: 10.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _uncompiled(op: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    return op


def test_backward_and_step_of_every_k_beside_the_dense_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mlp.json"
    argv = ["bench_meprop_mlp.py", "--small", "--device", "cpu", "--seconds", "0.001"]
    monkeypatch.setattr("sys.argv", [*argv, "--json", str(out)])
    assert run_program(bench_meprop_mlp.__doc__, "meprop_mlp", bench_meprop_mlp.bench) == 0
    rows = load(out)["rows"]
    assert len(rows) == 10 and not [row for row in rows if "median_ms" not in row]
    chosen = {(row["provider"], row["mode"], row["k"], row["pass"]) for row in rows}
    assert chosen == {
        (*network, name)
        for network in (
            ("eager", "dense", 64),
            ("compile", "dense", 64),
            *(("fastres", "unified", k) for k in (4, 16, 64)),
        )
        for name in ("backward", "step")
    }
    assert all(row["layers"] == "784-64-64-10" and row["N"] == 8 for row in rows)
    gflop = {row["k"]: row["gflop"] for row in rows if "gflop" in row}
    assert {row["pass"] for row in rows if "gflop" in row} == {"backward"}
    # A hidden layer's products by k of 64, the output layer's as they are. The first layer has
    # one product, of its weight: nobody wants the gradient of the images.
    for k in (4, 16, 64):
        products = 784 * k + 2 * 64 * k + 2 * 64 * 10
        assert gflop[k] == pytest.approx(2 * 8 * products / 1e9)


def test_the_originals_shape_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = bench_meprop_mlp._cases(CPU, False, "stages")
    assert case.about["layers"] == "784-8192-8192-10" and case.about["N"] == 50
    sweep = [case.about for case in bench_meprop_mlp._cases(CPU, False, "full")]
    assert {about["h"] for about in sweep} == {512, 2048, 8192}
    abouts = [{"provider": "fastres", "h": 8192, "mode": "unified", "k": k} for k in (8, 64, 100)]
    monkeypatch.setattr(bench_meprop_mlp, "row_text", lambda row: "")
    passes = [lambda: None] * 3
    for name, wanted in (("backward", [11.8, 9.7, None]), ("step", [None] * 3)):
        rows = bench_meprop_mlp._timed(abouts, passes, name, CPU, 1e-4)
        assert [row.get("original_speedup") for row in rows] == wanted


def _largest_dropped(self: Any, k: int) -> nn.Sequential:
    """A network whose second layer keeps the wrong columns, as many as asked for."""
    layers = list(self.dense)

    class Wrong(MePropLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.Linear.forward(self, x)
            if y.requires_grad:
                y.register_hook(self.keep)
            return y

        def keep(self, dy: torch.Tensor) -> torch.Tensor:
            least = torch.where(dy.any(0), dy.abs().sum(0), torch.inf).argsort()[: self.k]
            return torch.zeros_like(dy).index_copy_(1, least, dy[:, least])

    for i in (0, 2):
        sizes = (layers[i].in_features, layers[i].out_features)
        wrong = Wrong(*sizes, device="meta", k=k)
        wrong.weight, wrong.bias = layers[i].weight, layers[i].bias
        layers[i] = wrong
    return nn.Sequential(*layers)


@pytest.mark.parametrize("wrong", ["columns", "number", "dense"])
def test_a_wrong_network_gets_no_speed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", _uncompiled)
    sparse = bench_meprop_mlp.Mlp.sparse
    broken = {
        "columns": _largest_dropped,
        "number": lambda self, k: sparse(self, max(k - 1, 1)),
        "dense": lambda self, k: self.dense,
    }
    monkeypatch.setattr(bench_meprop_mlp.Mlp, "sparse", broken[wrong])
    rows = bench_meprop_mlp.bench(CPU, True, 0.001, "stages", Sheet())["rows"]
    failed = {row["k"] for row in rows if "failed" in row}
    # Where all is kept, these are right, but for one column less.
    assert failed >= {4, 16}
    assert all(row["provider"] == "fastres" for row in rows if "failed" in row)
    assert {row["provider"] for row in rows if "median_ms" in row} >= {"eager", "compile"}


def test_what_no_longer_fits_the_time_is_named() -> None:
    rows = bench_meprop_mlp.bench(CPU, False, 0.001, "full", Sheet(Clock(0.0)))["rows"]
    assert len(rows) == 5 and all(row["not_measured"] == "out of time" for row in rows)
