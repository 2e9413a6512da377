"""What "right" means for preact_unit: a case, its tensors, and the check against fp64.

The rule is that of norm_relu_conv2d_equality. The reference goes on from the op's own h, which it
checks beside the others: a rounding of what is stored between the convolutions is then no error of
what follows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ops.batch_norm_relu_equality import plain
from ops.norm_relu_conv2d_equality import (
    DRAWS,
    Given,
    Maker,
    Noise,
    Watch,
    compare,
    double,
    exact_norm_relu,
    gradients,
    leaves_of,
    mask_of,
    tensor_of,
)
from tolerances import EPS, EPSILONS
from torch import Tensor

from fastres.ops import BatchMoments, Norm, _register, preact_unit, takes_kernels
from fastres.ops._norm import norm_relu_reference
from fastres.ops.preact_unit import preact_unit_reference

LEAVES = (
    "x", "norm1_weight", "norm1_bias", "weight1", "norm2_weight", "norm2_bias", "weight2",
    "shortcut_weight",
)  # fmt: skip
RUNNING = ("running_mean1", "running_var1", "running_mean2", "running_var2")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (3, 16, 5, 6)
    K: int = 16
    stride: int = 1
    project: bool = False
    x_layout: str = "nhwc"
    dy_layout: str = "nhwc"
    weight_layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    half_norm: bool = False
    half_weight: bool = False
    norm_weight: bool = True
    norm_bias: bool = True
    # Of norm1 and of norm2.
    training: tuple[bool, bool] = (True, True)
    running: bool = True
    momentum: float = 0.1
    eps: tuple[float, float] = (1e-5, 1e-5)
    scale: float = 1.0
    row_scale: bool = False
    # The share of the samples that take the branch, in an order of their own; None is no index.
    picked: float | None = None
    # meProp's channels of conv1, conv2 and the projection; None is all.
    kept: tuple[int, int, int] | None = None
    # Whether x's moments come with it.
    moments: bool = False
    values: str = "normal"
    zero_weight: bool = False
    seed: int = 0

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        N, _, H, W = self.shape
        return N, self.K, (H - 1) // self.stride + 1, (W - 1) // self.stride + 1

    @property
    def taken(self) -> int:
        return round(self.shape[0] * (1.0 if self.picked is None else self.picked))

    @property
    def seen1(self) -> int:
        """Values of a channel that norm1 sees."""
        N, _, H, W = self.shape
        return (N if self.project else self.taken) * H * W

    @property
    def seen2(self) -> int:
        _, _, OH, OW = self.out_shape
        return self.taken * OH * OW


def tensors(case: Case, device: str) -> Given:
    make, C, K = Maker(case, device), case.shape[1], case.K
    index = position = None
    if case.picked is not None:
        index = torch.randperm(case.shape[0], generator=make.generator)[: case.taken].to(device)
        position = torch.full(case.shape[:1], -1, device=device)
        position[index] = torch.arange(case.taken, device=device)
    given: Given = {
        "x": make.x(),
        "dy": make.image(make.draw(case.out_shape), case.dy_layout),
        "weight1": make.weight(K, C, 3),
        "weight2": make.weight(K, K, 3),
        "shortcut_weight": make.weight(K, C, 1) if case.project else None,
        "index": index,
        "position": position,
        "row_scale": make.row_scale(),
    }
    for i, channels in ((1, C), (2, K)):
        given |= {
            f"norm{i}_weight": make.vector(channels, case.norm_weight),
            f"norm{i}_bias": make.vector(channels, case.norm_bias),
            f"running_mean{i}": make.vector(channels, case.running or not case.training[i - 1]),
            f"running_var{i}": make.vector(
                channels, case.running or not case.training[i - 1], positive=True
            ),
        }
    return given


def moments_of(x: Tensor) -> BatchMoments:
    """x's moments as a unit that made it would leave them."""
    kernels = _register._import_kernels("norm_relu_conv2d")
    found = kernels.batch_moments(x.contiguous(memory_format=torch.channels_last))
    return BatchMoments(found.partial, found.chunk)


def merged(moments: BatchMoments, chunk: int, values: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of so many values a channel, in fp64."""
    means, squares = moments.partial.double()
    rows = [min(chunk, values - p * chunk) for p in range(len(means))]
    weight = torch.tensor(rows, device=means.device, dtype=torch.float64)[:, None] / values
    assert bool((weight > 0).all())
    mean = (means * weight).sum(0)
    return mean, squares.sum(0) / values + ((means - mean) ** 2 * weight).sum(0)


def run(
    op: Callable[..., Any],
    case: Case,
    given: Given,
    needs: Any = LEAVES,
    fused: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """y, the gradients of the leaves in `needs`, and the running statistics after the call.

    fused: whether op is called as preact_unit is, else as its reference.
    """
    t, leaves = leaves_of(given, RUNNING, needs)
    norms = [
        Norm(
            t[f"running_mean{i}"], t[f"running_var{i}"], t[f"norm{i}_weight"], t[f"norm{i}_bias"],
            case.training[i - 1], case.momentum, case.eps[i - 1],
        )
        for i in (1, 2)
    ]  # fmt: skip
    args = (
        t["x"], norms[0], t["weight1"], norms[1], t["weight2"], t["shortcut_weight"], case.stride,
        case.scale, t["row_scale"], t["index"],
    )  # fmt: skip
    if not fused:
        y = op(*args, kept=case.kept, **options)
    else:
        x = tensor_of(t, "x")
        given_moments = moments_of(x.detach()) if case.moments and takes_kernels(x) else None
        y, moments = op(
            *args, t["position"], kept=case.kept, moments=given_moments, with_moments=case.moments
        )
        if moments is not None:
            check_moments(y.detach(), moments)
    results = {"y": y.detach()} | gradients(y, leaves, t["dy"])
    return results | {name: v for name in RUNNING if (v := t[name]) is not None}


def check_moments(y: Tensor, moments: BatchMoments) -> None:
    """What a unit leaves for the next one are the moments of what it stored."""
    values = y.double().transpose(0, 1).flatten(1)
    chunk = _register._import_kernels("preact_unit").moments_chunk(y)
    mean, var = merged(moments, chunk, values.shape[1])
    # A variance is off by the mean's own rounding, too.
    reach = EPSILONS * EPS * values.abs().amax(1)
    off = mean - values.mean(1)
    if not bool((off.abs() <= reach).all()):
        raise AssertionError(f"the mean that comes with y is off by {off}")
    want = values.var(1, correction=0)
    off = var - want
    if not bool((off.abs() <= reach * (want.sqrt() + reach)).all()):
        raise AssertionError(f"the variance that comes with y is off by {off}")


@dataclass(frozen=True)
class Own:
    """What a run of the unit made on its way: the masks of its ReLUs, and h."""

    masks: tuple[Tensor, Tensor]
    h: Tensor


def run_fused(
    case: Case, given: Given, op: Callable[..., Any]
) -> tuple[dict[str, Tensor], Own | None]:
    with Watch("preact_unit") as seen:
        got = run(op, case, given, fused=True)
    if not seen.args:
        return got, None
    x, index = seen.args[0], seen.args[3]
    mean1, var1, weight1, bias1, _, mean2, var2, weight2, bias2 = seen.args[5:14]
    _, _, h, *batch = seen.out
    if mean1 is None:
        mean1, var1 = batch[:2]
    if mean2 is None:
        mean2, var2 = batch[2:]
    x = x if index is None or case.project else x[index]
    masks = (
        mask_of(x, mean1, var1, weight1, bias1, case.eps[0]),
        mask_of(h, mean2, var2, weight2, bias2, case.eps[1]),
    )
    return got | {"h": h}, Own(masks, h)


def run_peer(case: Case, given: Given) -> tuple[dict[str, Tensor], Own]:
    """PyTorch's own ops."""
    seen: list[tuple[Tensor, Tensor]] = []

    def norm_relu(x: Tensor, norm: Norm) -> Tensor:
        a = norm_relu_reference(x, norm)
        seen.append((x.detach(), ~(a.detach() <= 0)))
        return a

    got = run(preact_unit_reference, case, plain(given), norm_relu=norm_relu)
    (_, mask1), (h, mask2) = seen
    return got | {"h": h}, Own((mask1, mask2), h)


def exact(case: Case, given: Given, own: Own, noise: Noise | None = None) -> dict[str, Tensor]:
    """The reference in fp64 with given masks, going on from a given h; and noise if any."""
    hs: list[Tensor] = []
    calls = 0

    def norm_relu(x: Tensor, norm: Norm) -> Tensor:
        nonlocal calls
        mask, calls = own.masks[calls], calls + 1
        if calls == 2:
            # Its values are the op's, its gradient goes back to what they came of.
            x = x if noise is None else noise(x, stored=True)
            hs.append(x.detach())
            x = x + (own.h.double() - x).detach()
        return exact_norm_relu(x, norm, mask, noise)

    t = double(plain(given))
    rough = dict(t)
    if noise is not None:
        rough["dy"] = noise(tensor_of(t, "dy"), stored=True)

    def op(x: Tensor, norm1: Norm, *args: Any, kept: Any) -> Tensor:
        weight1, norm2, weight2, shortcut_weight, stride, scale, row_scale, index = args
        if noise is not None:
            weight1, weight2 = noise(weight1, stored=True), noise(weight2, stored=True)
            if shortcut_weight is not None:
                shortcut_weight = noise(shortcut_weight, stored=True)
        y = preact_unit_reference(
            x,
            norm1,
            weight1,
            norm2,
            weight2,
            shortcut_weight,
            stride,
            scale,
            row_scale,
            index,
            kept,
            norm_relu,
        )
        return y if noise is None else y + (noise(y.detach(), stored=True) - y.detach())

    return run(op, case, rough) | {"h": hs[0]}


def check(case: Case, device: str, op: Callable[..., Any] = preact_unit) -> None:
    """Raise AssertionError unless op is right on this case."""
    given = tensors(case, device)
    got, own = run_fused(case, given, op)
    if own is None:
        peer = run(preact_unit_reference, case, plain(given))
        for name in got:
            assert torch.equal(got[name], peer[name]), name
        return
    peer, own_peer = run_peer(case, given)
    assert got["y"].is_contiguous(memory_format=torch.channels_last)
    want, want_peer = exact(case, given, own), exact(case, given, own_peer)
    noisy = [exact(case, given, own, Noise(i, case.dtype)) for i in range(DRAWS)]
    compare(case, got, want, noisy, peer, want_peer)
    left = _left(given)
    if left is not None and not case.project:
        for name, source in (("y", "x"), ("dx", "dy")):
            if not torch.equal(got[name][left], tensor_of(given, source)[left]):
                raise AssertionError(f"{name} is off where no sample took the branch, for {case}")


def _left(given: Given) -> Tensor | None:
    """The samples that did not take the branch."""
    position = given["position"]
    return None if position is None else position < 0
