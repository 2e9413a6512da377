"""What "right" means for stochastic_depth_add: a case, its tensors, its draws, and the check."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from ops.augment_equality import python_philox
from ops.batch_norm_relu_equality import LAYOUTS
from tolerances import ADD_ROUNDINGS, EPS, EPSILONS, TIMES_TORCH, store_error, store_floor
from torch import Tensor

from fastres.ops import StepGenerator, UnitGenerator, _register, stochastic_depth_add
from fastres.ops._register import takes_kernels
from fastres.ops.stochastic_depth_add import stochastic_depth_add_reference

MODES: tuple[Literal["batch", "row", "subset"], ...] = ("batch", "row", "subset")
DROP_STREAM = 3


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (4, 5, 3, 4)
    p: float = 0.5
    mode: Literal["batch", "row", "subset"] = "row"
    training: bool = True
    dtype: torch.dtype = torch.float32
    branch_layout: str = "nchw"
    shortcut_layout: str = "nchw"
    dy_layout: str = "nchw"
    # NaN and Inf in everything that may not be read, or must not be passed on.
    poisoned: bool = False
    seed: int = 0
    step: int = 0
    unit: int = 0
    rank: int = 0


def generator_of(case: Case) -> UnitGenerator:
    """The case's unit, without the units before it."""
    steps = StepGenerator(case.seed, case.rank)
    steps.set_step(case.step)
    unit = UnitGenerator(steps, case.unit, case.p)
    unit.set_step(case.seed, case.step)
    return unit


def draw_of(case: Case, n: int, rank: int) -> int:
    """31 bits by the paper's Philox, in Python's integers."""
    counter = (n, case.step, DROP_STREAM, case.unit + 65536 * rank)
    return python_philox(case.seed, counter)[0] >> 1


def kept_of(case: Case) -> tuple[list[bool], float]:
    """Which samples keep their branch, and what it is scaled by."""
    N, least = case.shape[0], case.p * 2**31
    if not case.training:
        return [True] * N, 1.0
    if case.mode == "subset":
        kept = 0 if case.p == 1 else max(int(round(N * (1 - case.p), 9)), 1)
        order = sorted(range(N), key=lambda n: (draw_of(case, n, case.rank), n))
        return [n in order[:kept] for n in range(N)], N / max(kept, 1)
    if case.mode == "batch":
        kept_samples = [draw_of(case, 0, 0) >= least] * N
    else:
        kept_samples = [draw_of(case, n, case.rank) >= least for n in range(N)]
    return kept_samples, 1 / (1 - case.p) if case.p < 1 else 0.0


def tensors(case: Case, device: str) -> dict[str, Tensor]:
    """branch, shortcut and dy, the same ones on every device."""
    generator = torch.Generator().manual_seed(abs(case.seed) % 2**31)
    layouts = (case.branch_layout, case.shortcut_layout, case.dy_layout)
    made = {}
    for name, layout in zip(("branch", "shortcut", "dy"), layouts, strict=True):
        v = torch.randn(case.shape, generator=generator)
        made[name] = LAYOUTS[layout](v.to(device, case.dtype))
    if case.poisoned:
        dropped = [n for n, kept in enumerate(kept_of(case)[0]) if not kept]
        branch = made["branch"].clone()
        branch[dropped] = torch.nan
        branch[dropped, ..., :1] = torch.inf
        made["branch"] = branch
        dy = made["dy"].clone()
        dy[dropped] = torch.nan
        made["dy"] = dy
    return made


def run(op: Callable[..., Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and both gradients of op(branch, shortcut)."""
    branch, shortcut = (given[n].detach().requires_grad_() for n in ("branch", "shortcut"))
    y = op(branch, shortcut)
    dbranch, dshortcut = torch.autograd.grad(y, (branch, shortcut), given["dy"].to(y.dtype))
    return {"y": y.detach(), "dbranch": dbranch, "dshortcut": dshortcut}


def ours(case: Case) -> Callable[..., Tensor]:
    generator = generator_of(case)
    return lambda branch, shortcut: stochastic_depth_add(
        branch, shortcut, case.p, case.mode, case.training, generator
    )


def reference(case: Case, device: str) -> Callable[..., Tensor]:
    kept, scale = kept_of(case)
    mask = torch.tensor(kept, dtype=torch.bool, device=device)
    return lambda branch, shortcut: stochastic_depth_add_reference(branch, shortcut, mask, scale)


def _error(got: Tensor, want: Tensor) -> Tensor:
    same = (got == want.to(got.dtype)) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got.double() - want).abs())


def check(case: Case, device: str, op: Callable[..., Tensor] | None = None) -> None:
    """Raise AssertionError unless op is right on this case, element by element."""
    given = tensors(case, device)
    got, peer = run(op or ours(case), given), run(reference(case, device), given)
    exact = {name: v.double() for name, v in given.items()}
    want = run(reference(case, device), exact)
    kept, scale = kept_of(case)
    for name, v in got.items():
        about = f"{name} for {case}"
        assert (v.dtype, v.shape) == (case.dtype, case.shape), about
        # What is dropped is copied, or zero, to the bit; the shortcut's gradient is dy.
        exactly = {"y": given["shortcut"], "dbranch": torch.zeros_like(v), "dshortcut": given["dy"]}
        dropped = [n for n in range(len(kept)) if name == "dshortcut" or not kept[n]]
        if not torch.equal(v[dropped].nan_to_num(), exactly[name][dropped].nan_to_num()):
            raise AssertionError(f"a dropped sample is off: {about}")
        size = {
            "y": exact["shortcut"].abs() + scale * exact["branch"].abs(),
            "dbranch": scale * exact["dy"].abs(),
            "dshortcut": 0 * exact["dy"],
        }[name].nan_to_num(0.0, 0.0)
        allowed = EPSILONS * EPS * size + store_error(v.dtype) * want[name].abs()
        allowed = allowed + store_floor(v.dtype)
        if not takes_kernels(v) and v.element_size() == 2:
            allowed = allowed + ADD_ROUNDINGS * torch.finfo(v.dtype).eps / 2 * size
        error_peer = _error(peer[name], want[name]).nan_to_num(0.0)
        allowed = torch.maximum(allowed.nan_to_num(0.0), TIMES_TORCH * error_peer)
        off = _error(v, want[name])
        if not bool((off <= allowed).all()):
            raise AssertionError(f"{name} is off by {off.max()}: {about}")
    if min(case.shape) > 1 and case.shortcut_layout in ("nchw", "nhwc"):
        fmt = torch.channels_last if case.shortcut_layout == "nhwc" else torch.contiguous_format
        assert got["y"].is_contiguous(memory_format=fmt), f"y is not as the shortcut: {case}"


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks so small that a few hundred elements make several of everything."""
    kernels: Any = _register._import_kernels("stochastic_depth_add")
    with mock.patch.object(kernels, "BLOCK", 32), mock.patch.object(kernels, "BLOCK_N", 2):
        yield
