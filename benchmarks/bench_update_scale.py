"""Time the loss scale's update beside GradScaler's op for it, and that compiled.

    python benchmarks/bench_update_scale.py [--sweep full] [--device cpu] [--small] [--json FILE]

"eager" is torch._amp_update_scale_ with what LossScaler does beside it, in PyTorch's own calls: a
floor of the scale and two counters. A few bytes move; what is timed is launches.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _comparison import Case, Op, Work, compare, compiled, run_program
from _sheet import Sheet
from torch import Tensor

from fastres.ops import update_scale


def eager(scale: Tensor, growth_tracker: Tensor, skipped: Tensor, found_inf: Tensor) -> None:
    found = found_inf.to(torch.int32)
    skipped[1].add_(found)
    skipped[0].add_(1).mul_(found)
    torch._amp_update_scale_(scale, growth_tracker, found_inf, 2.0, 0.5, 2000)
    scale.clamp_(min=1.0)


def fastres(scale: Tensor, growth_tracker: Tensor, skipped: Tensor, found_inf: Tensor) -> None:
    update_scale(scale, growth_tracker, skipped, found_inf)


def _make(device: torch.device) -> Work:
    def state() -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.full((), 65536.0, device=device),
            torch.zeros((), dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
        )

    def check(op: Op) -> bool:
        got, wanted = state(), state()
        for overflowed in (1.0, 0.0, 1.0, 1.0):
            found_inf = torch.tensor(overflowed, device=device)
            op(*got, found_inf)
            eager(*wanted, found_inf)
        return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    def passes(op: Op) -> dict[str, Callable[[], Any]]:
        return {"forward": partial(op, *state(), torch.zeros((), device=device))}

    providers: dict[str, Op] = {"fastres": fastres, "eager": eager, **compiled(eager)}
    return Work(providers, check, passes, {"forward": 36}, graph=False)


def _cases(device: torch.device) -> Iterator[Case]:
    yield Case({}, 64, partial(_make, device))


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """The one case by every provider; a wrong result gets no speed."""
    return compare(device, _cases(device), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "update_scale", bench)


if __name__ == "__main__":
    sys.exit(main())
