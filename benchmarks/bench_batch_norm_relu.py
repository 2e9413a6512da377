"""Time batch_norm_relu, forward and backward, beside eager PyTorch and torch.compile.

    python benchmarks/bench_batch_norm_relu.py [--device cpu] [--small] [--json FILE]

GB/s counts the fewest bytes that the op must move (see kernels/batch_norm_relu.py), for every
provider alike, so that a share of the copy bandwidth compares them. A provider whose result is
wrong in this run gets no speed.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _timing import Clock, copy_bandwidth, speed, speed_text, time_graph, time_op
from torch import Tensor

from fastres.ops.batch_norm_relu import batch_norm_relu, batch_norm_relu_reference

# The stages of a depth-20 ResNet, and a wide late layer: (C, H = W).
_FULL = ((128, 1024), ((16, 32), (32, 16), (64, 8), (512, 7)))
_SMALL = ((8,), ((16, 8),))
# The one that trains first, in case the time runs out.
_DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}


def bytes_moved(x: Tensor, residual: bool, backward: bool) -> int:
    """Fewest bytes in training: x is read twice, the statistics being needed before the output."""
    passes = 5 if backward else 3
    mask = 0 if not residual else x.numel() // 8 * (2 if backward else 1)
    return (passes + (1 if residual else 0)) * x.nbytes + mask


def make_inputs(
    N: int, C: int, H: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> dict[str, Tensor]:
    def activation() -> Tensor:
        t = torch.randn(N, C, H, H, device=device).to(dtype)
        return t.contiguous(memory_format=layout)

    return {
        "x": activation().requires_grad_(),
        "residual": activation().requires_grad_(),
        "dy": activation(),
        "weight": torch.rand(C, device=device).add_(0.5).requires_grad_(),
        "bias": torch.randn(C, device=device).requires_grad_(),
        "running_mean": torch.zeros(C, device=device),
        "running_var": torch.ones(C, device=device),
    }


def run(op: Callable[..., Tensor], t: dict[str, Tensor], residual: bool) -> Tensor:
    return op(
        t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], True,
        residual=t["residual"] if residual else None,
    )  # fmt: skip


def gradients(y: Tensor, t: dict[str, Tensor], residual: bool) -> tuple[Tensor, ...]:
    wanted = ["x", "weight", "bias"] + (["residual"] if residual else [])
    return torch.autograd.grad(y, [t[name] for name in wanted], t["dy"], retain_graph=True)


def is_right(op: Callable[..., Tensor], t: dict[str, Tensor], residual: bool) -> bool:
    """Against fp64, where the op's own mask is 1; the tests are the ones to be exact."""
    exact = {name: v.detach().double().requires_grad_(v.requires_grad) for name, v in t.items()}
    y = run(op, t, residual)
    z = batch_norm_relu_reference(
        exact["x"], None, None, exact["weight"], exact["bias"], True, relu=False,
        residual=exact["residual"] if residual else None,
    )  # fmt: skip
    wanted = z * (y > 0)
    pairs = zip(
        (y, *gradients(y, t, residual)),
        (wanted, *gradients(wanted, exact, residual)),
        strict=True,
    )
    # Loose bounds, to catch what is wrong and not what is rounded: ten units of the last place. The
    # parameters' gradients are sums whose terms cancel, of as many roundings as they have terms.
    ulp = torch.finfo(t["x"].dtype).eps
    terms = y.numel() // y.shape[1]
    with torch.no_grad():
        return all(
            float((a.double() - b).abs().max() / b.abs().max())
            < 10 * (ulp if a.dim() > 1 else max(ulp, terms**0.5 * torch.finfo(a.dtype).eps))
            for a, b in pairs
        )


def bench(device: torch.device, small: bool, seconds: float, clock: Clock) -> dict[str, Any]:
    """Every configuration by every provider; one row each, with the copy bandwidth beside them."""
    batch_sizes, widths = _SMALL if small else _FULL
    roof = copy_bandwidth(device, seconds)
    print(f"copy bandwidth {roof:,.0f} GB/s")
    torch._functorch.config.donated_buffer = False  # a graph is walked back more than once here
    rows: list[dict[str, Any]] = []
    for dtype_name, dtype in _DTYPES.items():
        if device.type == "cpu" and dtype != torch.float32:
            continue  # half precision on CPUs is for tests, not for speed
        for N in batch_sizes:
            for C, H in widths:
                for residual in (False, True):
                    case = (N, C, H, dtype, residual)
                    if clock.has(10, f"{dtype_name} N={N} C={C} H={H} residual={residual}"):
                        rows += bench_case(device, case, dtype_name, roof, small, seconds)
    return {"copy_gb_per_s": roof, "rows": rows}


def bench_case(
    device: torch.device,
    case: tuple[int, int, int, torch.dtype, bool],
    dtype_name: str,
    roof: float,
    small: bool,
    seconds: float,
) -> list[dict[str, Any]]:
    N, C, H, dtype, residual = case
    rows = []
    torch.compiler.reset()  # every shape compiled for itself, as a training run would
    providers: dict[str, Callable[..., Tensor]] = {
        "fastres": batch_norm_relu,
        "eager": batch_norm_relu_reference,
        "compile": torch.compile(batch_norm_relu_reference, dynamic=False),
    }
    for layout in (
        (torch.channels_last,) if small else (torch.channels_last, torch.contiguous_format)
    ):
        layout_name = "NHWC" if layout == torch.channels_last else "NCHW"
        t = make_inputs(N, C, H, dtype, layout, device)
        for name, op in providers.items():
            about = {
                "provider": name, "dtype": dtype_name, "layout": layout_name, "N": N, "C": C,
                "H": H, "residual": residual,
            }  # fmt: skip
            if not is_right(op, t, residual):
                print(f"{about}: wrong result, no speed reported")
                rows.append(about | {"right": False})
                continue
            y = run(op, t, residual)
            passes: dict[str, Callable[[], Any]] = {
                "forward": partial(run, op, t, residual),
                "backward": partial(gradients, y, t, residual),
            }
            for direction, fn in passes.items():
                timing = time_op(fn, device, seconds)
                moved = bytes_moved(t["x"], residual, direction == "backward")
                row = about | {"right": True, "pass": direction, **speed(timing, moved, roof)}
                if device.type == "cuda" and direction == "forward":
                    row["graph"] = speed(time_graph(fn, seconds), moved, roof)
                rows.append(row)
                print(
                    f"{name:8} {dtype_name} {layout_name} N={N:<5} C={C:<4} H={H:<3} "
                    f"residual={residual!s:5} {direction:8} {speed_text(row)}"
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
