"""Time batch_norm_relu, forward and backward, beside eager PyTorch, cuDNN and torch.compile.

    python benchmarks/bench_batch_norm_relu.py [--sweep full] [--device cpu] [--small] [--json FILE]

GB/s counts the fewest bytes that the op must move (see kernels/batch_norm_relu.py), for every
provider alike, so that a share of the copy bandwidth compares them. A provider whose result is
wrong in this run gets no speed.

"eager" is whatever PyTorch picks, which on a GPU is cuDNN for fp32 and fp16 and its own kernels for
bf16; "cudnn" and "native" name the two, the first where PyTorch reaches it. --sweep stages takes
the stages of a depth-20 ResNet at two batch sizes; --sweep full takes one base shape and changes
C, the image's side and the batch size one at a time: not every combination of the three.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _comparison import LAYOUTS, Case, Op, Work, compare, compiled, dtypes, run_program, sweep_axes
from _sheet import Sheet
from torch import Tensor

from fastres.ops.batch_norm_relu import batch_norm_relu, batch_norm_relu_reference

_MOMENTUM, _EPS = 0.1, 1e-5
_BASE = {"N": 256, "C": 64, "H": 28}
_AXES = {
    "C": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "H": (8, 14, 28, 56),
    "N": (32, 64, 128, 256, 512, 1024, 2048, 4096),
}
# The channels that are checked at a time hold this many values: in fp64 a whole tensor and its
# gradients would not fit where the op itself does.
_CHECKED = 2**24


def bytes_moved(x: Tensor, residual: bool, backward: bool) -> int:
    """Fewest bytes in training: x is read twice, the statistics being needed before the output."""
    passes = 5 if backward else 3
    mask = 0 if not residual else x.numel() // 8 * (2 if backward else 1)
    return (passes + (1 if residual else 0)) * x.nbytes + mask


def make_inputs(
    N: int, C: int, H: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> dict[str, Tensor]:
    def activation() -> Tensor:
        t = torch.randn(N, C, H, H, device=device, dtype=dtype)
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


def _run(op: Op, t: dict[str, Tensor], residual: bool) -> Tensor:
    return op(
        t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], True, _MOMENTUM, _EPS,
        residual=t["residual"] if residual else None,
    )  # fmt: skip


def _gradients(y: Tensor, t: dict[str, Tensor], residual: bool) -> tuple[Tensor, ...]:
    wanted = ["x", "weight", "bias"] + (["residual"] if residual else [])
    return torch.autograd.grad(y, [t[name] for name in wanted], t["dy"], retain_graph=True)


def is_right(t: dict[str, Tensor], residual: bool, op: Op) -> bool:
    """Against fp64, where the op's own mask is 1; the tests are the ones to be exact."""
    y = _run(op, t, residual)
    found = (y, *_gradients(y, t, residual))
    N, C, H, W = y.shape
    step = max(_CHECKED // (N * H * W), 1)
    errors, sizes = [], []
    for first in range(0, C, step):
        channels = slice(first, first + step)
        exact = {
            name: _channels(v.detach(), channels).double().requires_grad_(v.requires_grad)
            for name, v in t.items()
        }
        z = batch_norm_relu_reference(
            exact["x"], None, None, exact["weight"], exact["bias"], True, relu=False,
            residual=exact["residual"] if residual else None,
        )  # fmt: skip
        y_exact = z * (_channels(y, channels) > 0)
        # What is positive and rounds to 0 may pass its gradient or not.
        near_zero = z.detach().abs() < 1e-5
        differences = []
        wanted = (y_exact, *_gradients(y_exact, exact, residual))
        with torch.no_grad():
            for a, b in zip(found, wanted, strict=True):
                difference = (_channels(a, channels) - b).abs()
                if a.dim() > 1:
                    difference.masked_fill_(near_zero, 0.0)
                differences.append(difference.max())
            errors.append(torch.stack(differences))
            sizes.append(torch.stack([b.abs().max() for b in wanted]))
    relative = torch.stack(errors).amax(0) / torch.stack(sizes).amax(0)
    # Loose bounds, to catch what is wrong and not what is rounded: ten units of the last place, or
    # of as many fp32 roundings as the statistics and the parameters' gradients have terms, which
    # walk like the square root. PyTorch's CPU adds the rows of channels_last one after another:
    # its y was off by 88 units at 262,144 terms.
    terms = N * H * W
    bound = 10 * max(torch.finfo(y.dtype).eps, terms**0.5 * torch.finfo(torch.float32).eps)
    return bool((relative < bound).all())


def _channels(t: Tensor, channels: slice) -> Tensor:
    return t[:, channels] if t.dim() > 1 else t[channels]


def _by(normalise: Callable[..., Any]) -> Op:
    """batch_norm_relu by one of PyTorch's batch norms that return their statistics too."""

    def op(
        x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor,
        training: bool, momentum: float, eps: float, residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        z = normalise(x, weight, bias, running_mean, running_var, training, momentum, eps)[0]
        return torch.relu(z if residual is None else z + residual)

    return op


def providers(x: Tensor) -> dict[str, Op]:
    made: dict[str, Op] = {"fastres": batch_norm_relu, "eager": batch_norm_relu_reference}
    if x.is_cuda:
        made["native"] = _by(torch.ops.aten.native_batch_norm)
        # bf16 values with fp32 parameters are refused there.
        if torch.version.hip is None and x.dtype != torch.bfloat16:
            made["cudnn"] = _by(torch.ops.aten.cudnn_batch_norm)
    return made | compiled(batch_norm_relu_reference)


def _make(
    sizes: dict[str, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    residual: bool,
    device: torch.device,
) -> Work:
    t = make_inputs(**sizes, dtype=dtype, layout=layout, device=device)

    def passes(op: Op) -> dict[str, Callable[[], Any]]:
        y = _run(op, t, residual)
        return {
            "forward": partial(_run, op, t, residual),
            "backward": partial(_gradients, y, t, residual),
        }

    return Work(
        providers(t["x"]),
        partial(is_right, t, residual),
        passes,
        {
            "forward": bytes_moved(t["x"], residual, False),
            "backward": bytes_moved(t["x"], residual, True),
        },
    )


def _shapes(small: bool, sweep: str) -> Iterator[tuple[dict[str, int], bool]]:
    """Sizes, and whether with a residual."""
    if small:
        yield {"N": 8, "C": 16, "H": 8}, True
    elif sweep == "full":
        yield _BASE, True
        yield from ((sizes, False) for sizes in sweep_axes(_BASE, _AXES))
    else:
        for N in (1024, 128):
            # The last is a wide late layer of other networks.
            for C, H in ((16, 32), (32, 16), (64, 8), (512, 7)):
                yield from (({"N": N, "C": C, "H": H}, residual) for residual in (False, True))


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    for dtype_name, dtype in dtypes(device).items():
        for layout_name, layout in LAYOUTS.items():
            for sizes, residual in _shapes(small, sweep):
                about = {"dtype": dtype_name, "layout": layout_name, **sizes, "residual": residual}
                # x, y, dy and dx; the residual and its gradient.
                tensors = 6 if residual else 4
                numel = sizes["N"] * sizes["C"] * sizes["H"] ** 2
                yield Case(
                    about,
                    tensors * numel * dtype.itemsize,
                    partial(_make, sizes, dtype, layout, residual, device),
                )
            if small:
                break


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every configuration by every provider; one row each, with the copy bandwidth beside them."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "batch_norm_relu", bench)


if __name__ == "__main__":
    sys.exit(main())
