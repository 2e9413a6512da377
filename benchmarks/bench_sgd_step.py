"""Time a step of FusedSGD, alone and under LossScaler, beside torch's SGD and GradScaler.

    python benchmarks/bench_sgd_step.py [--sweep full] [--device cpu] [--small] [--json FILE]

"step" is optimizer.step(); "scaled step" is the scaler's step and update: check, unscale, step and
the next scale. "fused" and "foreach" are PyTorch's own SGDs, "compile" the latter's step compiled:
not under GradScaler, which asks the host about every step, and not the deep networks' on a CPU,
where a loop is compiled for each parameter. Host work counts, so both are timed by the wall clock,
on a GPU with the device's last kernel waited for. Bytes: gradient, parameter and momentum read, the
last two written.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from _comparison import COMPILED, Case, Op, Work, compare, run_program
from _gradients import gradients, shapes
from _sheet import Sheet
from torch import Tensor, nn

from fastres.amp import LossScaler
from fastres.optim import FusedSGD

_SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}


class Training:
    """Parameters with gradients, an optimizer, and a scaler for it."""

    def __init__(self, optimizer: str, depth: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes(depth)]
        for p, grad in zip(self.params, gradients(depth, torch.float32, device), strict=True):
            p.grad = grad
        self.scaler: Any
        if optimizer == "fastres":
            self.optimizer: torch.optim.Optimizer = FusedSGD(self.params, **_SGD)
            self.scaler = LossScaler(init_scale=1.0)
        else:
            fused, foreach = optimizer == "fused", optimizer == "foreach"
            self.optimizer = torch.optim.SGD(self.params, fused=fused, foreach=foreach, **_SGD)
            self.scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
        self.scaler.scale(torch.zeros((), device=device))

    def step(self) -> None:
        self.optimizer.step()

    def scaled(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params])


_STEPS = {"step": Training.step, "scaled step": Training.scaled}


def _step_of(training: Training) -> Op:
    def step() -> None:
        training.optimizer.step()

    return step


def _make(depth: int, name: str, device: torch.device) -> Work:
    wanted = Training("for-loop", depth, device)
    for _ in range(2):
        _STEPS[name](wanted)

    def provider(optimizer: str, mode: str | None = None) -> Op:
        steps: list[Op] = []
        trainings: list[Training] = []  # of this provider alone, made when it first runs

        def step() -> Training:
            if not trainings:
                training = Training(optimizer, depth, device)
                fn: Op = partial(_STEPS[name], training)
                if mode is not None:
                    # Dynamo takes functions, and an optimizer's step inside of one.
                    fn = torch.compile(_step_of(training), dynamic=False, mode=mode)
                trainings.append(training)
                steps.append(fn)
            steps[0]()
            return trainings[0]

        return step

    def check(op: Op) -> bool:
        op()
        return torch.allclose(op().weights(), wanted.weights(), rtol=1e-5, atol=1e-5)

    providers = {optimizer: provider(optimizer) for optimizer in ("fastres", "fused", "foreach")}
    if name == "step" and (device.type == "cuda" or depth <= 20):
        providers |= {key: provider("foreach", mode) for key, mode in COMPILED.items()}
    moved = 5 * sum(p.nbytes for p in wanted.params)
    return Work(providers, check, lambda op: {name: op}, {name: moved}, host=True)


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    for depth in (8,) if small else (20, 56, 110, 122) if sweep == "full" else (20, 122):
        numel = sum(torch.Size(shape).numel() for shape in shapes(depth))
        for name in _STEPS:
            # Parameter, gradient and momentum, of the reference and of a provider.
            yield Case(
                {"depth": depth, "pass": name}, 6 * 4 * numel, partial(_make, depth, name, device)
            )


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every depth by every provider; a wrong result gets no speed."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "sgd_step", bench, seconds=0.2)


if __name__ == "__main__":
    sys.exit(main())
