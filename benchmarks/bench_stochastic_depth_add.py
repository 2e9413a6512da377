"""Time stochastic_depth_add, forward and backward, beside eager PyTorch, torchvision and compilers.

    python benchmarks/bench_stochastic_depth_add.py [--device cpu] [--small] [--json FILE]

"where" is torch.where over the sum, drawn by torch.rand; "torchvision" is its stochastic_depth and
an add. GB/s counts the fewest bytes that the op must move (see kernels/stochastic_depth_add.py) for
the share that was kept, for every provider alike; one whose result is wrong gets no speed.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from _environment import environment
from _timing import Clock, copy_bandwidth, speed, speed_text, time_graph, time_op
from torch import Tensor
from torchvision.ops import stochastic_depth

from fastres.ops.stochastic_depth_add import stochastic_depth_add, subset_size

Mode = Literal["batch", "row", "subset"]
Op = Callable[[Tensor, Tensor], Tensor]

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_MODES: tuple[Mode, ...] = ("row", "batch", "subset")


def eager_where(branch: Tensor, shortcut: Tensor, p: float, mode: Mode) -> Tensor:
    """The op in PyTorch's own, as one would write it."""
    N, scale = branch.shape[0], 1 / (1 - p)
    if mode == "subset":
        size = subset_size(N, p)
        kept, scale = torch.rand(N, device=branch.device).argsort() < size, N / size
    else:
        kept = torch.rand(N if mode == "row" else 1, device=branch.device) >= p
    return torch.where(kept[:, None, None, None], shortcut + scale * branch, shortcut)


def torchvision_add(branch: Tensor, shortcut: Tensor, p: float, mode: Mode) -> Tensor:
    return shortcut + stochastic_depth(branch, p, mode)


def bytes_moved(branch: Tensor, p: float, backward: bool) -> float:
    """With a share 1 - p kept: shortcut and y and the kept branch; or dbranch and the kept dy."""
    return ((1 if backward else 2) + 1 - p) * branch.nbytes


def is_right(op: Op, branch: Tensor, shortcut: Tensor, dy: Tensor, p: float, mode: Mode) -> bool:
    """Each sample dropped or kept, and y and the gradient as that has it; the draws are its own."""
    y = op(branch, shortcut)
    dbranch, dshortcut = torch.autograd.grad(y, (branch, shortcut), dy)
    N = len(branch)
    scale = N / subset_size(N, p) if mode == "subset" else 1 / (1 - p)
    kept = (dbranch != 0).flatten(1).any(1)[:, None, None, None]
    wanted = torch.where(kept, shortcut.double() + scale * branch.double(), shortcut.double())
    wanted_dbranch = torch.where(kept, scale * dy.double(), 0.0)
    # A loose bound, to catch what is wrong and not what is rounded: ten units of the last place.
    bound = 10 * torch.finfo(branch.dtype).eps
    pairs = ((y, wanted), (dbranch, wanted_dbranch), (dshortcut, dy.double()))
    near = all(torch.allclose(a.double(), b, rtol=bound, atol=bound) for a, b in pairs)
    share = kept.double().mean().item()
    if mode == "subset":
        return near and share * N == subset_size(N, p)
    # Eight deviations of as many draws.
    draws = N if mode == "row" else 1
    return near and abs(share - (1 - p)) <= 8 * (p * (1 - p) / draws) ** 0.5


def providers(p: float, mode: Mode) -> dict[str, Op]:
    peers: dict[str, Op] = {"where": partial(eager_where, p=p, mode=mode)}
    if mode != "subset":
        peers["torchvision"] = partial(torchvision_add, p=p, mode=mode)
    compiled = {f"{name} compiled": torch.compile(op, dynamic=False) for name, op in peers.items()}
    return {"fastres": partial(stochastic_depth_add, p=p, mode=mode), **peers, **compiled}


def bench(device: torch.device, small: bool, seconds: float, clock: Clock) -> dict[str, Any]:
    """Every configuration by every provider; one row each, with the copy bandwidth beside them."""
    roof = copy_bandwidth(device, seconds)
    print(f"copy bandwidth {roof:,.0f} GB/s")
    torch._functorch.config.donated_buffer = False  # a graph is walked back more than once here
    rows: list[dict[str, Any]] = []
    # The first stage of a ResNet on 32x32 images, at a small and a large batch.
    shapes = ((16, 16, 8, 8),) if small else ((128, 16, 32, 32), (1024, 16, 32, 32))
    for dtype_name, dtype in _DTYPES.items():
        if device.type == "cpu" and dtype != torch.float32:
            continue  # half precision on CPUs is for tests, not for speed
        for shape in shapes:
            for mode in _MODES:
                for p in (0.0, 0.2, 0.5, 0.8):
                    if clock.has(10, f"{dtype_name} N={shape[0]} {mode} p={p}"):
                        case = (shape, dtype, p, mode)
                        rows += bench_case(device, case, dtype_name, roof, seconds)
    return {"copy_gb_per_s": roof, "rows": rows}


def bench_case(
    device: torch.device,
    case: tuple[tuple[int, int, int, int], torch.dtype, float, Mode],
    dtype_name: str,
    roof: float,
    seconds: float,
) -> list[dict[str, Any]]:
    shape, dtype, p, mode = case
    rows = []
    torch.compiler.reset()  # every case compiled for itself, as a training run would
    branch, shortcut, dy = (
        torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        for _ in range(3)
    )
    leaves = branch.requires_grad_(), shortcut.requires_grad_()
    for name, op in providers(p, mode).items():
        about = {
            "provider": name, "dtype": dtype_name, "layout": "NHWC", "shape": list(shape),
            "mode": mode, "p": p,
        }  # fmt: skip
        if not is_right(op, *leaves, dy, p, mode):
            print(f"{about}: wrong result, no speed reported")
            rows.append(about | {"right": False})
            continue
        y = op(*leaves)
        passes: dict[str, Callable[[], Any]] = {
            "forward": partial(op, *leaves),
            "backward": partial(torch.autograd.grad, y, leaves, dy, retain_graph=True),
        }
        for direction, fn in passes.items():
            moved = round(bytes_moved(branch, p, direction == "backward"))
            timing = time_op(fn, device, seconds)
            row = about | {"right": True, "pass": direction, **speed(timing, moved, roof)}
            if device.type == "cuda" and direction == "forward":
                row["graph"] = speed(time_graph(fn, seconds), moved, roof)
            rows.append(row)
            print(
                f"{name:20} {dtype_name} N={shape[0]:<5} {mode:6} p={p} {direction:8} "
                f"{speed_text(row)}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="one small shape")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing, a figure")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results = environment() | bench(torch.device(args.device), args.small, args.seconds, Clock())
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
