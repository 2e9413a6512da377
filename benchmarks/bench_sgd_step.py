"""Time a step of FusedSGD, alone and under LossScaler, beside torch's SGD and GradScaler.

    python benchmarks/bench_sgd_step.py [--device cpu] [--small] [--json FILE]

"step" is optimizer.step(); "scaled" is the scaler's step and update: check, unscale, step and the
next scale. Host work counts, so both are timed by the wall clock, on a GPU with the device's last
kernel waited for. Bytes: gradient, parameter and momentum read, the last two written.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _gradients import gradients, shapes
from _timing import copy_bandwidth, speed, speed_text, time_wall
from torch import Tensor, nn

from fastres.amp import LossScaler
from fastres.optim import FusedSGD

_SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}


class Training:
    """Parameters with gradients, an optimizer, and a scaler for it."""

    def __init__(self, optimizer: str, depth: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes(depth)]
        self.grads = gradients(depth, torch.float32, device)
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad.clone()
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

    def after_two_steps(self, step: Callable[["Training"], None]) -> Tensor:
        for _ in range(2):
            step(self)
        return torch.cat([p.detach().flatten() for p in self.params])


def bench(device: torch.device, small: bool, seconds: float) -> dict[str, Any]:
    """Every depth by every provider; a wrong result gets no speed."""
    roof = copy_bandwidth(device, seconds)
    print(f"copy bandwidth {roof:,.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for depth in (20,) if small else (20, 122):
        for direction, step in (("step", Training.step), ("scaled", Training.scaled)):
            wanted = Training("for-loop", depth, device).after_two_steps(step)
            for name in ("fastres", "fused", "foreach"):
                training = Training(name, depth, device)
                about = {"provider": name, "depth": depth, "what": direction}
                if not torch.allclose(training.after_two_steps(step), wanted, 1e-5, 1e-5):
                    print(f"{about}: wrong result, no speed reported")
                    rows.append(about | {"right": False})
                    continue

                def fn(
                    training: Training = training, step: Callable[[Training], None] = step
                ) -> None:
                    step(training)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)

                moved = 5 * sum(p.nbytes for p in training.params)
                row = about | {"right": True, **speed(time_wall(fn, seconds), moved, roof)}
                rows.append(row)
                print(f"{name:8} depth={depth:<4} {direction:7} {speed_text(row)}")
    return {"copy_gb_per_s": roof, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="one small network")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing, a figure")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results = environment() | bench(torch.device(args.device), args.small, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
