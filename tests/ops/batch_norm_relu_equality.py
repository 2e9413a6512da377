"""What "right" means for batch_norm_relu: a case, its tensors, and the check against fp64."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from tolerances import EPS, EPSILONS, TIMES_TORCH, store_error, store_floor, sum_epsilons
from torch import Tensor

from fastres.ops import _register
from fastres.ops.batch_norm_relu import batch_norm_relu, batch_norm_relu_reference

ROWS = (0, 2, 3)
SHARED = ("_tiles", "_moments")
LEAVES = ("x", "weight", "bias", "residual")
GRADS = {"x": "dx", "weight": "dweight", "bias": "dbias", "residual": "dresidual"}


def _sliced(dim: int, fmt: torch.memory_format) -> Callable[[Tensor], Tensor]:
    def layout(v: Tensor) -> Tensor:
        size, index = list(v.shape), [slice(None)] * 4
        size[dim], index[dim] = 2 * size[dim] + 1, slice(1, None, 2)
        # NaN in the gaps: what is read from there shows.
        base = torch.full(size, torch.nan, dtype=v.dtype, device=v.device)
        return base.contiguous(memory_format=fmt)[tuple(index)].copy_(v)

    return layout


def _transposed(fmt: torch.memory_format) -> Callable[[Tensor], Tensor]:
    return lambda v: v.transpose(2, 3).contiguous(memory_format=fmt).transpose(2, 3)


def _offset(v: Tensor) -> Tensor:
    """A dense tensor that starts one element into its storage: no 16-byte alignment."""
    base = torch.full((v.numel() + 1,), torch.nan, dtype=v.dtype, device=v.device)
    return base[1:].view(v.shape).copy_(v)


_NCHW, _NHWC = torch.contiguous_format, torch.channels_last
# Each takes dense values to a tensor of that layout; the expanded ones repeat a part of them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda v: v.contiguous(),
    "nhwc": lambda v: v.contiguous(memory_format=torch.channels_last),
    "offset": _offset,
    "sliced_n": _sliced(0, _NCHW),
    "sliced_c": _sliced(1, _NCHW),
    "sliced_h": _sliced(2, _NCHW),
    "sliced_w": _sliced(3, _NCHW),
    "nhwc_sliced_n": _sliced(0, _NHWC),
    "nhwc_sliced_c": _sliced(1, _NHWC),
    "nhwc_sliced_h": _sliced(2, _NHWC),
    "nhwc_sliced_w": _sliced(3, _NHWC),
    "transposed": _transposed(_NCHW),
    "nhwc_transposed": _transposed(_NHWC),
    "expanded_n": lambda v: v[:1].expand_as(v),
    "expanded_c": lambda v: v[:, :1].expand_as(v),
    "expanded_hw": lambda v: v[:, :, :1, :1].expand_as(v),
    "expanded": lambda v: v[:1, :1, :1, :1].expand_as(v),
}

VALUES = ("normal", "large_mean", "constant", "zeros", "integers", "huge", "denormal")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (2, 5, 3, 4)
    x_layout: str = "nchw"
    dy_layout: str = "nchw"
    residual_layout: str | None = None
    dtype: torch.dtype = torch.float32
    half_params: bool = False
    weight: bool = True
    bias: bool = True
    training: bool = True
    running: bool = True
    relu: bool = True
    eps: float = 1e-5
    momentum: float = 0.1
    values: str = "normal"
    seed: int = 0
    # The share of the samples that an index takes, in an order of its own; None is no index.
    picked: float | None = None

    @property
    def taken(self) -> int:
        """Samples of y."""
        return self.shape[0] if self.picked is None else round(self.picked * self.shape[0])


def values_of(case: Case, draw: Callable[..., Tensor]) -> Tensor:
    N, C, H, W = case.shape
    spread = draw(case.shape)
    match case.values:
        case "normal":
            return spread * (0.5 + draw((C, 1, 1)).abs()) + draw((C, 1, 1))
        case "large_mean":
            return spread + 1e3
        case "constant":
            return draw((1, C, 1, 1)).expand(case.shape)
        case "zeros":
            return torch.zeros_like(spread)
        case "integers":
            return spread.round()
        case "huge":
            return (1e4 * spread).clamp(-6e4, 6e4)
        case "denormal":
            if case.dtype == torch.bfloat16:
                # Triton's interpreter converts bf16 subnormals wrongly (measured): the smallest
                # normal numbers then.
                return spread.sign() * 1.5e-38
            return spread * (1e-40 if case.dtype == torch.float32 else 1e-6)
    raise ValueError(case.values)


def tensors(case: Case, device: str) -> dict[str, Tensor | None]:
    """The op's tensors and dy for a case, the same ones on every device."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    def placed(v: Tensor, layout: str) -> Tensor:
        return LAYOUTS[layout](v.to(device, case.dtype))

    def vector(v: Tensor) -> Tensor:
        return v.to(device, case.dtype if case.half_params else torch.float32)

    C = case.shape[1]
    x = placed(values_of(case, draw), case.x_layout)
    dy = placed(draw((case.taken, *case.shape[1:])), case.dy_layout)
    residual, weight, bias = draw(case.shape), draw((C,)), draw((C,))
    running_mean, running_var = draw((C,)), 0.5 + draw((C,)).abs()
    index = None
    if case.picked is not None:
        index = torch.randperm(case.shape[0], generator=generator)[: case.taken].to(device)
    return {
        "x": x,
        "index": index,
        "dy": dy,
        "residual": placed(residual, case.residual_layout) if case.residual_layout else None,
        "weight": vector(weight) if case.weight else None,
        "bias": vector(bias) if case.bias else None,
        "running_mean": vector(running_mean) if case.running else None,
        "running_var": vector(running_var) if case.running else None,
    }


def plain(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values, dense: PyTorch's own CPU batch_norm backward is wrong for some strides.

    With x [1, C, 1, W] contiguous and dy of strides (C*W, 1, C*W, C) it is off by the size of dx in
    evaluation (measured, torch 2.15).
    """
    return {name: None if v is None else v.contiguous() for name, v in given.items()}


def run(
    op: Callable[..., Tensor], case: Case, given: dict[str, Tensor | None], needs: Any = LEAVES
) -> dict[str, Tensor]:
    """y, the gradients of the leaves in `needs`, and the running statistics after the call."""
    t = {name: None if v is None else v.detach() for name, v in given.items()}
    for name in ("running_mean", "running_var"):
        t[name] = None if (v := t[name]) is None else v.clone()
    leaves = {name: v.requires_grad_() for name in needs if (v := t[name]) is not None}
    y = op(
        t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"],
        case.training, case.momentum, case.eps, t["residual"], case.relu, t["index"],
    )  # fmt: skip
    results = {"y": y.detach()}
    if leaves:
        grads = torch.autograd.grad(y, list(leaves.values()), t["dy"])
        results |= dict(zip((GRADS[name] for name in leaves), grads, strict=True))
    running = {name: v for name in ("running_mean", "running_var") if (v := t[name]) is not None}
    return results | running


def mask_of(y: Tensor) -> Tensor:
    """Where the ReLU that made y lets the gradient pass; NaN passes, as in torch.relu.

    The op goes by what it stores as y, which differs only where fp16 underflows to zero (3e-8).
    """
    return ~(y <= 0)


def _double(v: Tensor | None) -> Tensor | None:
    """In fp64; an index stays as it is."""
    return v.double() if v is not None and v.is_floating_point() else v


def exact(case: Case, given: dict[str, Tensor | None], mask: Tensor | None) -> dict[str, Tensor]:
    """The reference in fp64 with a given ReLU mask, and `z`, what the ReLU saw."""
    t = {name: _double(v) for name, v in plain(given).items()}
    zs = []

    def op(*args: Any) -> Tensor:
        args = (*args[:-2], False, args[-1])
        z = batch_norm_relu_reference(*args)
        zs.append(z.detach())
        return z if mask is None else torch.where(mask, z, 0.0)

    return run(op, case, t) | {"z": zs[0]}


def _largest(v: Tensor) -> Tensor:
    """max|v| by channel, of [N, C, H, W] or [C]."""
    return v.abs().amax(ROWS) if v.dim() == 4 else v.abs()


def condition_scales(
    case: Case, given: dict[str, Tensor | None], mask: Tensor | None
) -> dict[str, Tensor]:
    """By channel, the size of each result's terms before they cancel. From [N, C, H, W] in fp64."""
    t = {name: _double(v) for name, v in given.items()}
    x, dy, residual = t["x"], t["dy"], t["residual"]
    assert x is not None and dy is not None
    x = x if t["index"] is None else x[t["index"]]
    one = torch.ones_like(x[0, :, 0, 0])
    weight, bias = t["weight"], t["bias"]
    w, b = one if weight is None else weight.abs(), 0 * one if bias is None else bias.abs()
    mean, var = x.mean(ROWS), x.var(ROWS, correction=0)
    if not case.training:
        assert t["running_mean"] is not None and t["running_var"] is not None
        mean, var = t["running_mean"], t["running_var"]
    rstd = (var + case.eps).rsqrt()
    xhat = (x - mean[:, None, None]) * rstd[:, None, None]
    # Below the smallest normal number an epsilon is no smaller than there.
    normal = torch.finfo(torch.float32).smallest_normal
    reach = torch.maximum(_largest(x), mean.abs()).clamp(min=normal)
    # xhat is off by EPS * size; var by EPS * reach^2 * EPS beside its own rounding, rstd with it.
    size = reach * rstd
    size, spread = size * (1 + EPS * size**2), _largest(xhat)
    rstd = rstd * (1 + EPS * size**2)
    dz = (dy if mask is None else torch.where(mask, dy, 0.0)).abs()
    dx = _largest(dz)
    # What the rounding of a sum over all rows adds, in EPSILONS.
    walk = 1 + sum_epsilons(x.numel() // x.shape[1]) / EPSILONS
    if case.training:
        mean_dz, slope = walk * dz.mean(ROWS), walk * (dz * xhat.abs()).mean(ROWS)
        dx = dx + mean_dz + size * (spread * mean_dz + slope)
    scales = {
        "y": w * size + b + (0.0 if residual is None else _largest(residual)),
        "dx": w * rstd * dx,
        "dweight": walk * size * dz.sum(ROWS),
        "dbias": walk * dz.sum(ROWS),
        # A copy of dy or a zero: nothing may be off.
        "dresidual": 0 * one,
    }
    if t["running_mean"] is not None and t["running_var"] is not None:
        scales["running_mean"] = t["running_mean"].abs() + reach
        # Welford's variance has the condition number reach / std (Chan, Golub, LeVeque 1983): one
        # epsilon of reach * std, where the two-pass variance of PyTorch on a CPU has its square.
        variance = (spread / rstd) ** 2 + EPS * reach**2 + reach * var.sqrt() / EPSILONS
        scales["running_var"] = t["running_var"].abs() + 2 * walk * variance
    return scales


def _errors(got: Tensor, want: Tensor) -> Tensor:
    """max|got - want| by channel; an overflow to infinity that storing makes of want is none."""
    return _largest(torch.where(got == want.to(got.dtype), 0.0, (got.double() - want).abs()))


def _formats(t: Tensor) -> tuple[bool, bool]:
    return t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)


def check(case: Case, device: str, op: Callable[..., Tensor] = batch_norm_relu) -> None:
    """Raise AssertionError unless op is right on this case."""
    given = tensors(case, device)
    got, peer = run(op, case, given), run(batch_norm_relu_reference, case, plain(given))
    assert got.keys() == peer.keys()
    for name in got:
        assert (got[name].dtype, got[name].shape) == (peer[name].dtype, peer[name].shape), name
    x = given["x"]
    assert x is not None
    if x.numel() == 0 or case.taken == 0:
        for name in got:
            assert torch.equal(got[name], peer[name]), name
        return
    if case.picked is not None and min(case.shape) > 1 and case.x_layout in ("nchw", "nhwc"):
        fmt = _NHWC if case.x_layout == "nhwc" else _NCHW
        for name in ("y", "dx"):
            assert got[name].is_contiguous(memory_format=fmt), f"{name}: {got[name].stride()}"
    elif case.picked is None and 1 not in case.shape[1:]:
        # A dimension of size 1 has no order in memory; there PyTorch goes by its idle stride.
        in_place = run(batch_norm_relu_reference, case, given)
        for name in ("y", "dx"):
            assert _formats(got[name]) == _formats(in_place[name]), f"{name}: {got[name].stride()}"
    if (index := given["index"]) is not None:
        left = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill_(0, index, False)
        if bool(got["dx"][left].ne(0).any()):
            raise AssertionError(f"dx is off where no sample was taken, for {case}")
    mask, mask_peer = (mask_of(got["y"]), mask_of(peer["y"])) if case.relu else (None, None)
    want, want_peer = exact(case, given, mask), exact(case, given, mask_peer)
    scales = condition_scales(case, given, mask)
    for name in got:
        dtype, by_channel = got[name].dtype, _largest(want[name])
        store = 0.0 if name == "dresidual" else store_error(dtype)
        allowed = EPSILONS * EPS * scales[name] + store * by_channel + store_floor(dtype)
        # PyTorch keeps rstd in the parameters' dtype on a CPU: past fp16's largest its y is NaN,
        # which allows nothing.
        error_peer = _errors(peer[name], want_peer[name]).nan_to_num(0.0)
        allowed = torch.maximum(allowed, TIMES_TORCH * error_peer)
        off = _errors(got[name], want[name])
        if not bool((off <= allowed).all()):
            raise AssertionError(f"{name} is off by {off}, allowed {allowed}, for {case}")
    if mask is not None:
        # A sign that flips within rounding of zero is no error; any other is.
        slack = (EPSILONS * EPS * scales["y"] + store_floor(case.dtype))[:, None, None]
        sure = want["z"].abs() > slack
        if not bool((mask == (want["z"] > 0))[sure].all()):
            raise AssertionError(f"the ReLU's mask is wrong for {case}")


@contextmanager
def small_tiles(stem: str = "batch_norm_relu") -> Iterator[None]:
    """Tiles and limits so small that a few hundred rows make several of everything.

    A chunk is then several tiles, and there are more partials than one BLOCK_P.
    """
    kernels = _register._import_kernels(stem)
    # 512 elements: 8 rows of 64 channels, the fewest that fill a byte of the bitmask.
    limits = {"TILE": 512, "MAX_PROGRAMS": 4, "MAX_CHUNKS": 3, "BLOCK_P": 2}
    with ExitStack() as stack:
        for module in (kernels, *(sys.modules[f"{kernels.__package__}.{n}"] for n in SHARED)):
            for name, limit in limits.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, limit))
        yield
