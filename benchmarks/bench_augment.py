"""Time augment beside the same steps in eager PyTorch and torch.compile.

    python benchmarks/bench_augment.py [--sweep full] [--device cpu] [--small] [--json FILE]

The peer gathers, pads, crops, mirrors and normalises the batch with PyTorch's indexing, from the
same draws. Bytes: every pixel read once as a byte, every output written once. --sweep full takes
one base shape and changes the batch size and the image's side one at a time.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _comparison import (
    DTYPES,
    LAYOUTS,
    Case,
    Op,
    Work,
    compare,
    compiled,
    run_program,
    sweep_axes,
)
from _sheet import Sheet
from torch import Tensor

# The CPU's path is a few PyTorch ops on any device: the strongest eager peer there is.
from fastres.ops.augment import _native as eager
from fastres.ops.augment import augment

_BASE = {"N": 1024, "H": 32}
_AXES = {"N": (32, 64, 128, 256, 512, 1024, 2048, 4096), "H": (8, 14, 28, 32, 56)}
_PADDING = 4
_IMAGES = 50_000


def _make(
    N: int, H: int, images: int, dtype: torch.dtype, layout: str, device: torch.device
) -> Work:
    pixels = torch.randint(0, 256, (images, 3, H, H), dtype=torch.uint8, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    mean, std = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    index = torch.randint(images, (N,), device=device)
    args = (pixels, index, mean, std)

    def draw(op: Op, dtype: torch.dtype) -> Callable[[], Tensor]:
        """The op with all that _native takes: seed, epoch, padding, flip, dtype, layout."""
        return partial(op, *args, 0, 0, _PADDING, True, dtype, layout == "NHWC")

    def fused(*args: Any) -> Tensor:
        return augment(*args[:4], dtype=dtype, memory_format=LAYOUTS[layout])

    def check(op: Op) -> bool:
        y, wanted = draw(op, dtype)(), draw(eager, torch.float32)()
        # Half a unit of the last place for the cast, and as much again for a compiler's own order
        # of the normalisation.
        return y.is_contiguous(memory_format=LAYOUTS[layout]) and torch.allclose(
            y.float(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6
        )

    providers: dict[str, Op] = {"fastres": fused, "eager": eager, **compiled(eager)}
    # Of a crop that lies s pixels off, on either side, H - s are pixels of the image.
    inside = sum(H - abs(s) for s in range(-_PADDING, _PADDING + 1)) / (2 * _PADDING + 1)
    moved = round(N * 3 * (inside**2 + H * H * dtype.itemsize))
    return Work(providers, check, lambda op: {"forward": draw(op, dtype)}, {"forward": moved})


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    layouts, names = ["NHWC"], ["fp32", "fp16"]
    sizes: list[dict[str, int]] = [{"N": N, "H": 32} for N in (128, 1024, 4096)]
    if small:
        sizes, names = [{"N": 16, "H": 32}], ["fp32"]
    elif sweep == "full":
        sizes, names, layouts = list(sweep_axes(_BASE, _AXES)), list(DTYPES), list(LAYOUTS)
    images = 200 if small else _IMAGES
    for name in names:
        for layout in layouts:
            for size in sizes:
                pixels = 3 * size["H"] ** 2
                yield Case(
                    {"dtype": name, "layout": layout, **size},
                    pixels * (images + size["N"] * DTYPES[name].itemsize),
                    partial(_make, **size, images=images, dtype=DTYPES[name], layout=layout,
                            device=device),
                )  # fmt: skip


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every batch size and dtype by every provider; a wrong result gets no speed."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "augment", bench)


if __name__ == "__main__":
    sys.exit(main())
