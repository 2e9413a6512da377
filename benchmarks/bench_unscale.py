"""Time unscale over all gradients of a ResNet beside GradScaler's op for it, and that compiled.

    python benchmarks/bench_unscale.py [--sweep full] [--device cpu] [--small] [--json FILE]

"eager" is torch._amp_foreach_non_finite_check_and_unscale_, once a dtype, with the norm by
torch.nn.utils.get_total_norm. Bytes: each gradient read once, and written once where it is.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _comparison import DTYPES, Case, Op, Work, compare, compiled, run_program
from _gradients import gradients, shapes
from _sheet import Sheet
from torch import Tensor

from fastres.ops import unscale


def peer(
    grads: list[Tensor], scale: Tensor, write: bool, norm: bool
) -> tuple[Tensor, Tensor | None]:
    """What GradScaler does; it has no check that writes nothing, and multiplies by 1 there."""
    found_inf = torch.zeros((), device=scale.device)
    inverse = scale.double().reciprocal().float() if write else torch.ones_like(scale)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        by_dtype.setdefault(grad.dtype, []).append(grad)
    for same in by_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, inverse)
    return found_inf, torch.nn.utils.get_total_norm(grads) if norm else None


def fastres(
    grads: list[Tensor], scale: Tensor, write: bool, norm: bool
) -> tuple[Tensor, Tensor | None]:
    return unscale(grads, scale, write=write, norm=norm)


def _make(depth: int, dtype: torch.dtype, write: bool, norm: bool, device: torch.device) -> Work:
    # A scale of 1: the gradients stay what they are, however often they are unscaled.
    scale = torch.ones((), device=device)
    grads = gradients(depth, dtype, device)
    infinite = [grad.clone() for grad in grads]
    infinite[len(grads) // 2].view(-1)[-1] = torch.inf

    def check(op: Op) -> bool:
        wanted = torch.stack([grad.double().norm() for grad in grads]).norm()
        kept = [grad.clone() for grad in grads]
        found_inf, total = op(grads, scale, write, norm)
        # PyTorch rounds the norm of each fp16 gradient to fp16, and of each bf16 one to bf16.
        near = total is None or bool((total / wanted - 1).abs() < torch.finfo(dtype).eps + 1e-5)
        return (
            near
            and not bool(found_inf)
            and bool(op(infinite, scale, write, False)[0])
            and all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
        )

    def passes(op: Op) -> dict[str, Callable[[], Any]]:
        return {"forward": partial(op, grads, scale, write, norm)}

    moved = sum(grad.nbytes for grad in grads) * (2 if write else 1)
    providers: dict[str, Op] = {"fastres": fastres, "eager": peer, **compiled(peer)}
    # A graph keeps the addresses of every call that it holds, and has room for those of a step's.
    return Work(providers, check, passes, {"forward": moved}, graph=False)


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    full = sweep == "full"
    for depth in (8,) if small else (20, 56, 110, 122) if full else (20, 122):
        numel = sum(torch.Size(shape).numel() for shape in shapes(depth))
        for name in ("fp16",) if small else ("fp16", "fp32", "bf16") if full else ("fp16", "fp32"):
            dtype = DTYPES[name]
            for write, norm in ((False, False), (True, False), (True, True)):
                about = {"dtype": name, "depth": depth, "write": write, "norm": norm}
                make = partial(_make, depth, dtype, write, norm, device)
                if not small or norm:
                    yield Case(about, 3 * numel * dtype.itemsize, make)


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every depth, dtype and mode by every provider; a wrong result gets no speed."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "unscale", bench)


if __name__ == "__main__":
    sys.exit(main())
