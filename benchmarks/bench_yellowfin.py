"""Time a step of YellowFin, alone and under LossScaler, beside torch's fused SGD and Adam.

    python benchmarks/bench_yellowfin.py [--sweep full] [--device cpu] [--small] [--json FILE]

"step" is optimizer.step(); "scaled step" is LossScaler's step and update. Host work counts, so both
are timed by the wall clock, on a GPU with the device's last kernel waited for. Bytes: gradient,
parameter, momentum and mean gradient read, the last three written.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from _comparison import Case, Op, Work, compare, run_program
from _gradients import gradients, shapes
from _sheet import Sheet
from torch import Tensor, nn

from fastres.amp import LossScaler
from fastres.optim import YellowFin

_MAKE: dict[str, Any] = {
    "fastres": lambda params, fused: YellowFin(params, weight_decay=1e-4),
    "sgd": lambda params, fused: torch.optim.SGD(
        params, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=fused
    ),
    "adam": lambda params, fused: torch.optim.Adam(params, weight_decay=1e-4, fused=fused),
}


class Training:
    """Parameters with gradients, an optimizer, and a scaler for it.

    Plainly: by PyTorch's loop over the parameters, or, for YellowFin, with all of them in one.
    """

    def __init__(self, name: str, depth: int, device: torch.device, plainly: bool = False) -> None:
        torch.manual_seed(0)
        self.name = name
        values = [torch.randn(shape, device=device) for shape in shapes(depth)]
        grads = gradients(depth, torch.float32, device)
        if plainly and name == "fastres":
            values, grads = ([torch.cat([t.flatten() for t in ts])] for ts in (values, grads))
        self.params = [nn.Parameter(value) for value in values]
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        self.optimizer: torch.optim.Optimizer = _MAKE[name](self.params, not plainly)
        self.scaler = LossScaler(init_scale=1.0)
        self.scaler.scale(torch.zeros((), device=device))

    def step(self) -> None:
        self.optimizer.step()

    def scaled(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params])


def _make(depth: int, name: str, device: torch.device) -> Work:
    take = {"step": Training.step, "scaled step": Training.scaled}[name]

    def provider(optimizer: str) -> Op:
        made: list[Training] = []  # of this provider alone, made when it first runs

        def step() -> Training:
            if not made:
                made.append(Training(optimizer, depth, device))
            take(made[0])
            return made[0]

        return step

    def check(op: Op) -> bool:
        op()
        got = op()
        wanted = Training(got.name, depth, device, plainly=True)
        for _ in range(2):
            wanted.step()
        return torch.allclose(got.weights(), wanted.weights(), rtol=1e-5, atol=1e-5)

    moved = 7 * sum(4 * torch.Size(shape).numel() for shape in shapes(depth))
    providers = {optimizer: provider(optimizer) for optimizer in _MAKE}
    return Work(providers, check, lambda op: {name: op}, {name: moved}, host=True)


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    for depth in (8,) if small else (20, 56, 110, 122) if sweep == "full" else (20, 122):
        numel = sum(torch.Size(shape).numel() for shape in shapes(depth))
        for name in ("step", "scaled step"):
            # Of every provider and of what it is checked by: parameter, gradient and state.
            yield Case(
                {"depth": depth, "pass": name},
                2 * 7 * 4 * numel,
                partial(_make, depth, name, device),
            )


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every depth by every optimizer; a wrong result gets no speed."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "yellowfin", bench, seconds=0.2)


if __name__ == "__main__":
    sys.exit(main())
