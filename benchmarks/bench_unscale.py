"""Time unscale over all gradients of a ResNet beside GradScaler's op for it.

    python benchmarks/bench_unscale.py [--device cpu] [--small] [--json FILE]

The peer is torch._amp_foreach_non_finite_check_and_unscale_, once a dtype, with the norm by
torch.nn.utils.get_total_norm. Bytes: each gradient read once, and written once where it is.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _gradients import gradients
from _timing import copy_bandwidth, speed, speed_text, time_graph, time_op
from torch import Tensor

from fastres.ops import unscale

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_Found = tuple[Tensor, Tensor | None]


def peer(grads: list[Tensor], scale: Tensor, write: bool, norm: bool) -> _Found:
    """What GradScaler does; it has no check that writes nothing, and multiplies by 1 there."""
    found_inf = torch.zeros((), device=scale.device)
    inverse = scale.double().reciprocal().float() if write else torch.ones_like(scale)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        by_dtype.setdefault(grad.dtype, []).append(grad)
    for same in by_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, inverse)
    return found_inf, torch.nn.utils.get_total_norm(grads) if norm else None


def bench(device: torch.device, small: bool, seconds: float) -> dict[str, Any]:
    """Every depth, dtype and mode by every provider; a wrong result gets no speed."""
    roof = copy_bandwidth(device, seconds)
    print(f"copy bandwidth {roof:,.0f} GB/s")
    # A scale of 1: the gradients stay what they are, however often they are unscaled.
    scale = torch.ones((), device=device)
    rows: list[dict[str, Any]] = []
    for depth in (20,) if small else (20, 122):
        for dtype_name, dtype in _DTYPES.items():
            grads = gradients(depth, dtype, device)
            wanted = torch.stack([grad.double().norm() for grad in grads]).norm()
            read = sum(grad.nbytes for grad in grads)
            for write, norm in ((False, False), (True, False), (True, True)):

                def ours(
                    grads: list[Tensor] = grads, write: bool = write, norm: bool = norm
                ) -> _Found:
                    return unscale(grads, scale, write=write, norm=norm)

                def theirs(
                    grads: list[Tensor] = grads, write: bool = write, norm: bool = norm
                ) -> _Found:
                    return peer(grads, scale, write, norm)

                providers: dict[str, Callable[[], _Found]] = {"fastres": ours, "torch": theirs}
                for name, fn in providers.items():
                    about = {"provider": name, "depth": depth, "dtype": dtype_name}
                    about |= {"write": write, "norm": norm}
                    found_inf, total = fn()
                    # fp16 norms of PyTorch are rounded to fp16 one by one.
                    right = not bool(found_inf) and (
                        total is None or bool((total / wanted - 1).abs() < 1e-3)
                    )
                    if not right:
                        print(f"{about}: wrong result, no speed reported")
                        rows.append(about | {"right": False})
                        continue
                    moved = 2 * read if write else read
                    timing = time_op(fn, device, seconds)
                    row = about | {"right": True, **speed(timing, moved, roof)}
                    if device.type == "cuda":
                        row["graph"] = speed(time_graph(fn, seconds), moved, roof)
                    rows.append(row)
                    mode = f"{'in place' if write else 'check'}{', norm' if norm else ''}"
                    print(f"{name:8} {dtype_name} depth={depth:<4} {mode:15} {speed_text(row)}")
    return {"copy_gb_per_s": roof, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="one small network")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing, a figure")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results = environment() | bench(torch.device(args.device), args.small, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
