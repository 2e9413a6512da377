"""Time stochastic_depth_add, forward and backward, beside eager PyTorch, torchvision and compilers.

    python benchmarks/bench_stochastic_depth_add.py [--sweep full] [--device cpu] [--small]
                                                    [--json FILE]

"eager" and "compile" are torch.where over the sum, drawn by torch.rand; "torchvision" is its
stochastic_depth and an add. GB/s counts the fewest bytes that the op must move (see
kernels/stochastic_depth_add.py) for the share that was kept, for every provider alike; one whose
result is wrong gets no speed. In mode "batch" a forward keeps everything or nothing, so that its
median is the likelier one's and has no GB/s; its backward is that of a batch that was kept.
--sweep full takes one base shape and changes C, the image's side and the batch size one at a time.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from _comparison import LAYOUTS, Case, Op, Work, compare, compiled, dtypes, run_program, sweep_axes
from _sheet import Sheet
from torch import Tensor

from fastres.ops.stochastic_depth_add import stochastic_depth_add, subset_size

Mode = Literal["batch", "row", "subset"]

_MODES: tuple[Mode, ...] = ("row", "batch", "subset")
_BASE = {"N": 256, "C": 64, "H": 28}
_AXES = {
    "C": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "H": (8, 14, 28, 56),
    "N": (32, 64, 128, 256, 512, 1024, 2048, 4096),
}
# The samples that are checked at a time hold this many values: in fp64 whole tensors would not fit
# where the op itself does.
_CHECKED = 2**24


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
    # Where it is not installed, that costs this provider alone.
    from torchvision.ops import stochastic_depth

    return shortcut + stochastic_depth(branch, p, mode)


def bytes_moved(branch: Tensor, p: float, mode: Mode) -> dict[str, int]:
    """With a share 1 - p kept: shortcut and y and the kept branch; or dbranch and the kept dy."""
    if p == 0:
        return {"forward": 3 * branch.nbytes}  # and dbranch is dy itself
    if mode == "batch":
        return {"backward": 2 * branch.nbytes}
    kept = round((1 - p) * branch.nbytes)
    return {"forward": 2 * branch.nbytes + kept, "backward": branch.nbytes + kept}


def is_right(branch: Tensor, shortcut: Tensor, dy: Tensor, p: float, mode: Mode, op: Op) -> bool:
    """Each sample dropped or kept, and y and the gradient as that has it; the draws are its own."""
    y = op(branch, shortcut)
    dbranch, dshortcut = torch.autograd.grad(y, (branch, shortcut), dy)
    N = len(branch)
    scale = N / subset_size(N, p) if mode == "subset" else 1 / (1 - p)
    # A loose bound, to catch what is wrong and not what is rounded: ten units of the last place.
    bound = 10 * torch.finfo(branch.dtype).eps
    step = max(_CHECKED // branch[0].numel(), 1)
    kept_samples = 0
    with torch.no_grad():
        for first in range(0, N, step):
            part = slice(first, first + step)
            kept = (dbranch[part] != 0).flatten(1).any(1)[:, None, None, None]
            kept_samples += int(kept.sum())
            wanted, added = shortcut[part].double(), scale * branch[part].double()
            for found, exact in (
                (y[part], torch.where(kept, wanted + added, wanted)),
                (dbranch[part], torch.where(kept, scale * dy[part].double(), 0.0)),
                (dshortcut[part], dy[part].double()),
            ):
                if not torch.allclose(found.double(), exact, rtol=bound, atol=bound):
                    return False
    if mode == "subset":
        return kept_samples == subset_size(N, p)
    # Eight deviations of as many draws.
    draws = N if mode == "row" else 1
    return abs(kept_samples / N - (1 - p)) <= 8 * (p * (1 - p) / draws) ** 0.5


def providers(p: float, mode: Mode) -> dict[str, Op]:
    where = partial(eager_where, p=p, mode=mode)
    made: dict[str, Op] = {"fastres": partial(stochastic_depth_add, p=p, mode=mode), "eager": where}
    if mode != "subset":
        vision = partial(torchvision_add, p=p, mode=mode)
        made["torchvision"] = vision
        made["torchvision compile"] = torch.compile(vision, dynamic=False)
    return made | compiled(where)


def _make(
    sizes: dict[str, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    p: float,
    mode: Mode,
    device: torch.device,
) -> Work:
    shape = (sizes["N"], sizes["C"], sizes["H"], sizes["H"])
    branch, shortcut, dy = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
        for _ in range(3)
    )
    leaves = branch.requires_grad_(), shortcut.requires_grad_()

    def passes(op: Op) -> dict[str, Callable[[], Any]]:
        def backward(y: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, leaves, dy, retain_graph=True)

        y = op(*leaves)
        # Of a thousand batches at p = 0.8 none is kept once in 10^97 runs.
        for _ in range(1000 if mode == "batch" else 0):
            if bool(backward(y)[0].any()):
                break
            y = op(*leaves)
        return {"forward": partial(op, *leaves), "backward": partial(backward, y)}

    return Work(
        providers(p, mode),
        partial(is_right, *leaves, dy, p, mode),
        passes,
        bytes_moved(branch, p, mode),
    )


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    for dtype_name, dtype in dtypes(device).items():
        for layout, sizes, p, mode in _settings(small, sweep):
            about = {"dtype": dtype_name, "layout": layout, **sizes, "mode": mode, "p": p}
            # branch, shortcut and y; dy and dbranch.
            nbytes = 5 * sizes["N"] * sizes["C"] * sizes["H"] ** 2 * dtype.itemsize
            make = partial(_make, sizes, dtype, LAYOUTS[layout], p, mode, device)
            yield Case(about, nbytes, make)


def _settings(small: bool, sweep: str) -> Iterator[tuple[str, dict[str, int], float, Mode]]:
    """Layout, sizes, p and mode."""
    if small:
        yield "NHWC", {"N": 16, "C": 16, "H": 8}, 0.5, "row"
    elif sweep == "full":
        for layout in LAYOUTS:
            yield from ((layout, sizes, 0.5, "row") for sizes in sweep_axes(_BASE, _AXES))
            yield from ((layout, _BASE, p, mode) for p in (0.2, 0.8) for mode in _MODES)
    else:
        # The first stage of a ResNet on 32x32 images, at a small and a large batch.
        for N in (1024, 128):
            for mode in _MODES:
                for p in (0.0, 0.2, 0.5, 0.8):
                    yield "NHWC", {"N": N, "C": 16, "H": 32}, p, mode


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every configuration by every provider; one row each, with the copy bandwidth beside them."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "stochastic_depth_add", bench)


if __name__ == "__main__":
    sys.exit(main())
