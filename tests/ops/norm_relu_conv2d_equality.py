"""What "right" means for norm_relu_conv2d: a case, its tensors, and the check against fp64.

How far a result may be off is found by running the reference in fp64 once more with noise: whatever
the op computes in fp32 is then off by EPSILONS epsilons, and whatever it rounds to its storage type
by ROUNDINGS roundings, of random sign. So the condition of each result (a mean far above the
spread, a BatchNorm's backward that cancels, a long sum) comes out of the reference itself.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ops import batch_norm_relu_equality as batch_norm
from ops.batch_norm_relu_equality import LAYOUTS, plain
from tolerances import EPS, EPSILONS, ROUNDINGS, TIMES_TORCH, store_error, store_floor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.ops import Norm, _register, norm_relu_conv2d
from fastres.ops._norm import norm_relu_reference
from fastres.ops.norm_relu_conv2d import norm_relu_conv2d_reference

ROWS = (0, 2, 3)
DRAWS = 3
# Fewer values than these of a channel, and the noise of the whole tensor says more than theirs.
FEW = 16
VALUES = ("normal", "large_mean", "constant", "zeros", "integers", "huge")
# Of the weight: dense in either format, or neither.
WEIGHT_LAYOUTS = ("nchw", "nhwc", "sliced_n", "transposed", "expanded_c")
LEAVES = ("x", "norm_weight", "norm_bias", "weight", "residual")
RUNNING = ("running_mean", "running_var")

Given = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (2, 16, 5, 6)
    K: int = 32
    taps: int = 3
    stride: int = 1
    x_layout: str = "nhwc"
    dy_layout: str = "nhwc"
    residual_layout: str | None = None
    weight_layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    # Whether the norm's tensors, and the convolutions' weights, are of x's dtype.
    half_norm: bool = False
    half_weight: bool = False
    norm_weight: bool = True
    norm_bias: bool = True
    training: bool = True
    running: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    scale: float = 1.0
    row_scale: bool = False
    values: str = "normal"
    zero_weight: bool = False
    seed: int = 0

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        N, _, H, W = self.shape
        return N, self.K, (H - 1) // self.stride + 1, (W - 1) // self.stride + 1


def overflows(case: Any) -> bool:
    """Whether a factor passes fp16's largest number: running statistics do not tame huge values.

    PyTorch's own stored tensor would be infinite, too, but their sums in another order.
    """
    in_training = case.training in (True, (True, True))
    return case.dtype == torch.float16 and case.values == "huge" and not in_training


class Maker:
    """Draws a case's tensors, the same ones on every device."""

    def __init__(self, case: Any, device: str) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def x(self) -> Tensor:
        case = self.case
        like = batch_norm.Case(shape=case.shape, values=case.values, dtype=case.dtype)
        return self.image(batch_norm.values_of(like, self.draw), case.x_layout)

    def image(self, v: Tensor, layout: str) -> Tensor:
        return LAYOUTS[layout](v.to(self.device, self.case.dtype))

    def vector(self, C: int, wanted: bool, positive: bool = False) -> Tensor | None:
        v = self.draw((C,))
        v = 0.5 + v.abs() if positive else v
        return v.to(self.device, self._dtype(self.case.half_norm)) if wanted else None

    def weight(self, K: int, C: int, taps: int) -> Tensor:
        v = self.draw((K, C, taps, taps)) / (C * taps * taps) ** 0.5
        v = torch.zeros_like(v) if self.case.zero_weight else v
        return LAYOUTS[self.case.weight_layout](
            v.to(self.device, self._dtype(self.case.half_weight))
        )

    def row_scale(self) -> Tensor | None:
        """1.5, or for some samples 0, as stochastic depth has it."""
        kept = (self.draw(self.case.shape[:1]) > -0.5).float() * 1.5
        return kept.to(self.device) if self.case.row_scale else None

    def _dtype(self, half: bool) -> torch.dtype:
        return self.case.dtype if half else torch.float32


def tensors(case: Case, device: str) -> Given:
    """The op's tensors and dy for a case."""
    make, C = Maker(case, device), case.shape[1]
    residual = make.draw(case.out_shape)
    layout = case.residual_layout
    return {
        "x": make.x(),
        "dy": make.image(make.draw(case.out_shape), case.dy_layout),
        "residual": None if layout is None else make.image(residual, layout),
        "weight": make.weight(case.K, C, case.taps),
        "norm_weight": make.vector(C, case.norm_weight),
        "norm_bias": make.vector(C, case.norm_bias),
        "running_mean": make.vector(C, case.running),
        "running_var": make.vector(C, case.running, positive=True),
        "row_scale": make.row_scale(),
    }


def tensor_of(t: Given, name: str) -> Tensor:
    v = t[name]
    assert v is not None, name
    return v


def double(t: Given) -> Given:
    """In fp64, but for whole numbers."""
    return {n: v.double() if v is not None and v.is_floating_point() else v for n, v in t.items()}


def leaves_of(given: Given, running: tuple[str, ...], needs: Any) -> tuple[Given, Given]:
    """Detached tensors, the running ones copied, and of them those that need a gradient."""
    t: Given = {name: None if v is None else v.detach() for name, v in given.items()}
    for name in running:
        t[name] = None if (v := t[name]) is None else v.clone()
    return t, {name: v.requires_grad_() for name in needs if (v := t.get(name)) is not None}


def gradients(y: Tensor, leaves: Given, dy: Tensor | None) -> dict[str, Tensor]:
    if not leaves:
        return {}
    got = torch.autograd.grad(y, [v for v in leaves.values() if v is not None], dy)
    return {f"d{name}": g for name, g in zip(leaves, got, strict=True)}


def run(
    op: Callable[..., Tensor], case: Case, given: Given, needs: Any = LEAVES
) -> dict[str, Tensor]:
    """y, the gradients of the leaves in `needs`, and the running statistics after the call."""
    t, leaves = leaves_of(given, RUNNING, needs)
    norm = Norm(
        t["running_mean"], t["running_var"], t["norm_weight"], t["norm_bias"], case.training,
        case.momentum, case.eps,
    )  # fmt: skip
    args = t["x"], norm, t["weight"], t["residual"], case.stride, case.scale, t["row_scale"]
    y = op(*args)
    results = {"y": y.detach()} | gradients(y, leaves, t["dy"])
    return results | {name: v for name in RUNNING if (v := t[name]) is not None}


class Watch(TorchDispatchMode):
    """Keeps what the fused op was last called with, and what it returned."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = getattr(torch.ops.fastres, name).default
        self.args: tuple[Any, ...] = ()
        self.out: tuple[Tensor, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is self.op:
            self.args, self.out = args, out
        return out


def mask_of(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Where the op's own ReLU lets x pass, by the very arithmetic of its kernels."""

    def by_channel(v: Tensor) -> Tensor:
        return v.detach().float()[:, None, None]

    scale = 1 / (var.float() + eps).sqrt()
    scale = by_channel(scale if weight is None else scale * weight.float())
    offset = 0.0 if bias is None else by_channel(bias)
    centred = x.detach().float() - by_channel(mean)
    if x.is_cuda:
        # Compiled, the product and the sum are one operation, whose sign fp64 tells; where they are
        # two, the sign may differ where the sum is a rounding from 0.
        centred, scale = centred.double(), scale.double()
    return ~(centred * scale + offset <= 0)


class Noise:
    """Makes a tensor, and the gradient that comes back to it, off by what an op is allowed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, v: Tensor, stored: bool = False) -> Tensor:
        amount = EPSILONS * EPS + (ROUNDINGS * store_error(self.dtype) if stored else 0.0)
        v = self._off(v, amount)
        if v.requires_grad:
            v.register_hook(lambda dv: self._off(dv, amount))
        return v

    def _off(self, v: Tensor, amount: float) -> Tensor:
        signs = torch.randint(0, 2, v.shape, generator=self.generator).to(v.device) * 2 - 1
        return v * (1 + amount * signs)


def exact_norm_relu(x: Tensor, norm: Norm, mask: Tensor, noise: Noise | None) -> Tensor:
    """relu(norm(x)) in fp64 by a given mask."""
    if noise is not None:
        x = noise(x)
    z = F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training,
        norm.momentum or 0.0, norm.eps,
    )  # fmt: skip
    a = torch.where(mask, z, 0.0)
    return a if noise is None else noise(a, stored=True)


def exact(case: Case, given: Given, mask: Tensor, noise: Noise | None = None) -> dict[str, Tensor]:
    """The reference in fp64 with a given ReLU mask, and noise if any."""

    def op(x: Tensor, norm: Norm, weight: Tensor, residual: Tensor | None, *others: Any) -> Tensor:
        stride, scale, row_scale = others
        a = exact_norm_relu(x, norm, mask, noise)
        weight = weight if noise is None else noise(weight, stored=True)
        y = scale * F.conv2d(a, weight, None, stride, weight.shape[2] // 2)
        y = y if row_scale is None else y * row_scale[:, None, None, None]
        y = y if noise is None else noise(y, stored=True)
        y = y if residual is None else y + residual
        # The sum is stored, too; its gradient is handed on as it is.
        return y if noise is None else y + (noise(y.detach(), stored=True) - y.detach())

    return run(op, case, double(plain(given)))


def _errors(got: Tensor, want: Tensor) -> Tensor:
    """|got - want|; an overflow to infinity that storing makes of want is no error."""
    return torch.where(got == want.to(got.dtype), 0.0, (got.double() - want).abs())


def _largest(name: str, v: Tensor) -> Tensor:
    """max|v| by channel of an activation with values enough, else of the whole tensor."""
    if name in ("y", "h", "dx") and v.numel() >= FEW * v.shape[1]:
        return v.abs().amax(ROWS)
    return v.abs().amax()


def compare(
    case: Any,
    got: dict[str, Tensor],
    want: dict[str, Tensor],
    noisy: list[dict[str, Tensor]],
    peer: dict[str, Tensor],
    want_peer: dict[str, Tensor],
    copied: tuple[str, ...] = (),
) -> None:
    """Raise AssertionError unless got is as near to want as the rule has it.

    noisy: the reference with noise, several times; peer, want_peer: PyTorch's own results, and what
    they should be; copied: results in which nothing may be off.
    """
    assert got.keys() == peer.keys() == want.keys(), (got.keys(), peer.keys())
    for name, v in got.items():
        assert (v.dtype, v.shape) == (peer[name].dtype, peer[name].shape), name
        if name in copied:
            assert torch.equal(v, peer[name]), f"{name} is off by more than 0, for {case}"
            continue
        reach = max(EPSILONS * EPS, store_error(v.dtype))
        spread = torch.stack([_largest(name, n[name] - want[name]) for n in noisy]).amax(0)
        allowed = spread + reach * _largest(name, want[name]) + store_floor(v.dtype)
        error_peer = _largest(name, _errors(peer[name], want_peer[name])).nan_to_num(0.0)
        allowed = torch.maximum(allowed, TIMES_TORCH * error_peer)
        off = _largest(name, _errors(v, want[name]))
        if not bool((off <= allowed).all()):
            raise AssertionError(f"{name} is off by {off}, allowed {allowed}, for {case}")


def _peer_mask(case: Case, given: Given) -> Tensor:
    t, _ = leaves_of(plain(given), RUNNING, ())
    norm = Norm(
        t["running_mean"], t["running_var"], t["norm_weight"], t["norm_bias"], case.training,
        case.momentum, case.eps,
    )  # fmt: skip
    return ~(norm_relu_reference(tensor_of(t, "x"), norm) <= 0)


def check(case: Case, device: str, op: Callable[..., Tensor] = norm_relu_conv2d) -> None:
    """Raise AssertionError unless op is right on this case."""
    given = tensors(case, device)
    with Watch("norm_relu_conv2d") as seen:
        got = run(op, case, given)
    peer = run(norm_relu_conv2d_reference, case, plain(given))
    x = tensor_of(given, "x")
    if x.numel() == 0:
        for name in got:
            assert torch.equal(got[name], peer[name]), name
        return
    assert got["y"].is_contiguous(memory_format=torch.channels_last)
    _, mean, var, weight, bias = seen.args[:5]
    mean, var = seen.out[1:] if case.training else (mean, var)
    mask, mask_peer = mask_of(x, mean, var, weight, bias, case.eps), _peer_mask(case, given)
    want, want_peer = exact(case, given, mask), exact(case, given, mask_peer)
    noisy = [exact(case, given, mask, Noise(i, case.dtype)) for i in range(DRAWS)]
    compare(case, got, want, noisy, peer, want_peer, copied=("dresidual",))


# In which one kernel leaves both gradients of a convolution, in fp32, too: there what it may be off
# by is least.
_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def few_programs() -> Iterator[None]:
    """Tiles of their true size, but one program for the sums of many a weight's gradient."""
    fused = {"FUSED_DTYPES": _FUSED_DTYPES}
    with limited({"_conv_dx": {"BLOCK": 2048}, "_conv_backward": fused}):
        yield


@contextmanager
def small_tiles(fuses: bool = True) -> Iterator[None]:
    """Tiles and limits so small that some hundred pixels make several of everything.

    fuses: whether one kernel leaves both gradients of a convolution where it can.

    A chunk is then several tiles, there are more partials than one BLOCK_P, and in fp32 more than
    one block of 16 channels on either side of a product.
    """
    shared = {"BLOCK_P": 2}
    fused = {"FUSED_DTYPES": _FUSED_DTYPES if fuses else ()}
    with limited(
        {
            "_conv": {"BLOCK_M": 64, "MAX_CHUNKS": 3} | shared,
            "_conv_forward": shared,
            "_conv_dgrad": shared,
            "_conv_wgrad": {"PROGRAMS": 9, "BLOCK_C": 16} | shared,
            "_conv_dx": {"BLOCK_C": 16, "BLOCK": 2048} | shared,
            "_conv_backward": {"BLOCK_M": 32, "WARPS": 16} | fused | shared,
            "_conv_select": shared,
            "_moments": {"MAX_CHUNKS": 3, "MERGE_BLOCK_C": 16} | shared,
            "_tiles": {"TILE": 512, "MAX_PROGRAMS": 4},
        }
    ):
        yield


@contextmanager
def limited(limits: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Other values for constants of the kernels' modules."""
    package = _register._import_kernels("preact_unit").__package__
    with ExitStack() as stack:
        for module, values in limits.items():
            for name, value in values.items():
                stack.enter_context(
                    mock.patch.object(sys.modules[f"{package}.{module}"], name, value)
                )
        yield
