"""What meProp saves a whole MLP: its backward and its training step, beside the dense ones.

    python benchmarks/bench_meprop_mlp.py [--sweep full] [--device cpu] [--small] [--json FILE]

The original's shape: 784-8192-8192-10, ReLU, a minibatch of 50, Adam, k of the columns of both
hidden layers, "unified", fp32; without its dropout, on random images. It reports a backward 11.8,
9.7 and 3.6 times as fast with k = 8, 64 and 512 (Wei et al. 2017, arXiv:1709.05804), which stands
in the rows of ours as original_speedup. The dense networks, eager and compiled, and the sparse
ones share their parameters and take turns; speedup is over the eager one. Forward and optimizer
are as dense as ever: a step gains less than its backward. --sweep full changes width and minibatch
one at a time.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _comparison import Case, made, row_text, run_cases, run_program, sweep_axes
from _meprop_ratios import time_in_turn
from _results import Row, WrongResult, measured
from _sheet import Sheet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.ops import MePropLinear

_PIXELS, _CLASSES = 784, 10
_BASE = {"N": 50, "h": 8192}
_AXES = {"h": (512, 2048, 8192), "N": (50, 512, 4096)}
_ORIGINAL = {8: 11.8, 64: 9.7, 512: 3.6}


@dataclass(frozen=True)
class Mlp:
    """Two hidden layers and an output layer, their optimizer, and a minibatch."""

    dense: nn.Sequential
    optimizer: torch.optim.Optimizer
    x: Tensor
    target: Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.dense.parameters())

    def sparse(self, k: int) -> nn.Sequential:
        """The same parameters under meProp; the output layer stays dense."""
        layers: list[nn.Module] = list(self.dense)
        for i in (0, 2):
            linear = layers[i]
            assert isinstance(linear, nn.Linear)
            sizes = (linear.in_features, linear.out_features)
            layers[i] = MePropLinear(*sizes, device="meta", k=k)
            layers[i].weight, layers[i].bias = linear.weight, linear.bias
        return nn.Sequential(*layers)

    def loss(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(network(self.x), self.target)

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.parameters, retain_graph=True)

    def step(self, network: Callable[[Tensor], Tensor]) -> None:
        self.optimizer.zero_grad()
        self.loss(network).backward()
        self.optimizer.step()


def _make(N: int, h: int, device: torch.device) -> Mlp:
    dense = nn.Sequential(
        nn.Linear(_PIXELS, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, _CLASSES)
    ).to(device)
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-5, fused=True)
    x = torch.rand(N, _PIXELS, device=device)
    return Mlp(dense, optimizer, x, torch.arange(N, device=device) % _CLASSES)


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    sizes = [_BASE]
    if small:
        sizes = [{"N": 8, "h": 64}]
    elif sweep == "full":
        sizes = list(sweep_axes(_BASE, _AXES))
    for size in sizes:
        N, h = size["N"], size["h"]
        layers = f"{_PIXELS}-{h}-{h}-{_CLASSES}"
        about = {"dtype": "fp32", "N": N, "h": h, "layers": layers, "optimizer": "Adam"}
        # Parameters, two moments of each, and two sets of gradients; little beside them.
        nbytes = 4 * 5 * (_PIXELS + h + _CLASSES) * h
        yield Case(about, nbytes, partial(_make, N, h, device))


def _rows(case: Case, ks: tuple[int, ...], device: torch.device, seconds: float) -> list[Row]:
    mlp, row = made(case)
    if mlp is None:
        return [row]
    h = case.about["h"]
    networks: list[tuple[str, str, int, Any]] = [
        ("eager", "dense", h, mlp.dense),
        ("compile", "dense", h, torch.compile(mlp.dense, dynamic=False)),
    ]
    networks += [("fastres", "unified", k, mlp.sparse(k)) for k in (*ks, h) if k <= h]
    rows: list[Row] = []
    abouts: list[Row] = []
    right: list[Any] = []
    for provider, mode, k, network in networks:
        about = {"provider": provider} | case.about | {"mode": mode, "k": k}
        row = measured(about, partial(_check, mlp, network, k))
        if "failed" in row or "not_measured" in row:
            rows.append(row)
        else:
            abouts.append(about)
            right.append(network)
    # In this order: a step changes the parameters that a recorded graph has kept.
    for name, passes_of in (("backward", _backwards), ("step", _steps)):
        found: list[Row] = []

        def time(found: list[Row] = found, passes_of: Any = passes_of, name: str = name) -> Row:
            found.extend(_timed(abouts, passes_of(mlp, right), name, device, seconds))
            return {}

        row = measured(case.about | {"pass": name}, time)
        rows += found or [row]
    return rows


def _backwards(mlp: Mlp, networks: list[Any]) -> list[Callable[[], Any]]:
    return [partial(mlp.backward, mlp.loss(network)) for network in networks]


def _steps(mlp: Mlp, networks: list[Any]) -> list[Callable[[], Any]]:
    return [partial(mlp.step, network) for network in networks]


def _timed(
    abouts: list[Row],
    passes: list[Callable[[], Any]],
    name: str,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    timings = time_in_turn(passes, device, seconds)
    dense_ms = next(
        (t.median_ms for a, t in zip(abouts, timings, strict=True) if a["provider"] == "eager"),
        None,
    )
    rows: list[Row] = []
    for about, fn, timing in zip(abouts, passes, timings, strict=True):
        row = about | {"pass": name, "timer": "wall clock"}
        if name == "backward" and about["mode"] != "dense" and about["h"] == _BASE["h"]:
            original = _ORIGINAL.get(about["k"])
            row |= {} if original is None else {"original_speedup": original}
        row |= timing.as_dict()
        # A compiled pass, and meProp's forward, do the dense one's work out of the counter's sight.
        if name == "backward" and about["provider"] != "compile":
            with FlopCounterMode(display=False) as counter:
                fn()
            row["gflop"] = counter.get_total_flops() / 1e9
        if dense_ms is not None:
            row["speedup"] = dense_ms / timing.median_ms
        rows.append(row)
        print(row_text(row), flush=True)
    return rows


def _check(mlp: Mlp, network: Any, k: int) -> Row:
    """Raise WrongResult unless the hidden gradients are the dense ones where k columns are kept.

    The second hidden layer's alone: what reaches the first one has passed the second one's k.
    """
    inner, out, hidden = mlp.dense[:2], mlp.dense[4], mlp.dense[2]
    assert isinstance(out, nn.Linear) and isinstance(hidden, nn.Linear)
    loss = mlp.loss(network)
    got, want = mlp.backward(loss), mlp.backward(mlp.loss(mlp.dense))
    first, second = (grad.flatten(1).any(1) for grad in (got[0], got[2]))
    with torch.no_grad():
        y = hidden(inner(mlp.x))
    y.requires_grad_()
    (dy,) = torch.autograd.grad(F.cross_entropy(out(F.relu(y)), mlp.target), y)
    sums = dy.abs().sum(0)
    # ReLU leaves some columns without any gradient, which count among the k.
    right = int(second.sum()) == min(k, int((sums > 0).sum())) and int(first.sum()) <= k
    if right and not bool(second.all()):
        # Sums in another order differ in their last bits.
        right = bool(sums[second].min() >= (1 - 1e-5) * sums[~second].max())
    kept = torch.where(second[:, None], want[2], 0.0)
    bound = 16 * torch.finfo(y.dtype).eps * max(mlp.x.shape[0], 16) ** 0.5
    close = [(got[2], kept), *zip(got[3:], want[3:], strict=True)]
    if k == hidden.out_features:
        close = list(zip(got, want, strict=True))
    for a, b in close:
        right = right and bool((a - b).norm() <= bound * b.norm())
    if not right:
        raise WrongResult
    return {}


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Backward and step of the whole network by k; a wrong gradient gets no speed."""
    ks = (4, 16) if small else tuple(_ORIGINAL)
    cases = _cases(device, small, sweep)
    return run_cases(
        device, cases, seconds, sheet, lambda case, _: _rows(case, ks, device, seconds)
    )


def main() -> int:
    return run_program(__doc__, "meprop_mlp", bench, seconds=2.0)


if __name__ == "__main__":
    sys.exit(main())
