"""What "right" means for stem_conv2d: a case, its tensors, and the check against fp64.

By the rule of norm_relu_conv2d_equality.py; the moments by that of preact_unit_equality.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from ops.batch_norm_relu_equality import plain
from ops.norm_relu_conv2d_equality import (
    DRAWS,
    Given,
    Maker,
    Noise,
    compare,
    double,
    gradients,
    leaves_of,
    limited,
    tensor_of,
)
from ops.preact_unit_equality import check_moments
from torch import Tensor

from fastres.ops import stem_conv2d
from fastres.ops.stem_conv2d import stem_conv2d_reference

LEAVES = ("x", "weight")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (2, 3, 5, 6)
    K: int = 16
    x_layout: str = "nhwc"
    dy_layout: str = "nhwc"
    weight_layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    # Whether the weight is of x's dtype.
    half_weight: bool = False
    # Whether y's moments come with it.
    moments: bool = True
    values: str = "normal"
    zero_weight: bool = False
    seed: int = 0


def tensors(case: Case, device: str) -> Given:
    """x, weight and dy of a case."""
    make, (N, C, H, W) = Maker(case, device), case.shape
    return {
        "x": make.x(),
        "weight": make.weight(case.K, C, 3),
        "dy": make.image(make.draw((N, case.K, H, W)), case.dy_layout),
    }


def run(
    op: Callable[..., Any], case: Case, given: Given, needs: Any = LEAVES, fused: bool = False
) -> dict[str, Tensor]:
    """y and the gradients of the leaves in `needs`.

    fused: whether op is called as stem_conv2d is, else as its reference.
    """
    t, leaves = leaves_of(given, (), needs)
    if not fused:
        y = op(t["x"], t["weight"])
    else:
        y, moments = op(t["x"], t["weight"], case.moments)
        if moments is not None:
            assert case.moments
            check_moments(y.detach(), moments)
    return {"y": y.detach()} | gradients(y, leaves, t["dy"])


def exact(case: Case, given: Given, noise: Noise | None = None) -> dict[str, Tensor]:
    """The reference in fp64, and noise if any."""

    def off(v: Tensor) -> Tensor:
        """v, rounded once; its gradient is handed on as it is."""
        return v if noise is None else v + (noise(v.detach(), stored=True) - v.detach())

    def op(x: Tensor, weight: Tensor) -> Tensor:
        return off(F.conv2d(x if noise is None else noise(x), off(weight), padding=1))

    return run(op, case, double(plain(given)))


def check(case: Case, device: str, op: Callable[..., Any] = stem_conv2d) -> None:
    """Raise AssertionError unless op is right on this case."""
    given = tensors(case, device)
    got = run(op, case, given, fused=True)
    peer = run(stem_conv2d_reference, case, plain(given))
    if tensor_of(given, "x").numel() == 0:
        for name in got:
            assert torch.equal(got[name], peer[name]), name
        return
    assert got["y"].is_contiguous(memory_format=torch.channels_last)
    want = exact(case, given)
    noisy = [exact(case, given, Noise(i, case.dtype)) for i in range(DRAWS)]
    compare(case, got, want, noisy, peer, want)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles and limits so small that some hundred pixels make several of everything.

    A chunk is then several tiles, and there are more partials than one BLOCK_P.
    """
    small = {"_conv": {"BLOCK_M": 64, "MAX_CHUNKS": 3}, "_moments": {"BLOCK_P": 2}}
    with limited(small):
        yield
