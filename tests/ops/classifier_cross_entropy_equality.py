"""What "right" means for classifier_cross_entropy: a case, its tensors, and the check against fp64.

The rule is that of norm_relu_conv2d_equality.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ops import norm_relu_conv2d_equality
from ops.batch_norm_relu_equality import plain
from ops.norm_relu_conv2d_equality import (
    DRAWS,
    RUNNING,
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
from ops.preact_unit_equality import moments_of
from tolerances import ROUNDINGS, store_error
from torch import Tensor

from fastres.ops import Norm, _register, classifier_cross_entropy, takes_kernels
from fastres.ops._norm import norm_relu_reference
from fastres.ops.classifier_cross_entropy import classifier_cross_entropy_reference

LEAVES = ("x", "norm_weight", "norm_bias", "weight", "bias")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (3, 16, 3, 5)
    classes: int = 10
    smoothing: float = 0.0
    x_layout: str = "nhwc"
    dtype: torch.dtype = torch.float32
    # Whether the norm's tensors, and the classifier's, are of x's dtype.
    half_norm: bool = False
    half_weight: bool = False
    norm_weight: bool = True
    norm_bias: bool = True
    bias: bool = True
    training: bool = True
    running: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    # Whether x's moments come with it.
    moments: bool = False
    # What comes to the loss.
    dloss: float = 1.0
    # A factor of the weight: the larger, the surer the classifier is.
    sure: float = 1.0
    values: str = "normal"
    seed: int = 0


def tensors(case: Case, device: str) -> Given:
    make, (N, C) = Maker(case, device), case.shape[:2]
    dtype = case.dtype if case.half_weight else torch.float32
    weight, bias = case.sure * make.draw((case.classes, C)), make.draw((case.classes,))
    return {
        "x": make.x(),
        "weight": weight.to(device, dtype),
        "bias": bias.to(device, dtype) if case.bias else None,
        "target": torch.randint(case.classes, (N,), generator=make.generator).to(device),
        "dloss": torch.tensor(case.dloss, device=device),
        "norm_weight": make.vector(C, case.norm_weight),
        "norm_bias": make.vector(C, case.norm_bias),
        "running_mean": make.vector(C, case.running),
        "running_var": make.vector(C, case.running, positive=True),
    }


def run(op: Callable[..., Any], case: Case, given: Given, needs: Any = LEAVES) -> dict[str, Tensor]:
    """loss, logits, the gradients of `needs`, and the running statistics after the call."""
    t, leaves = leaves_of(given, RUNNING, needs)
    norm = Norm(
        t["running_mean"], t["running_var"], t["norm_weight"], t["norm_bias"], case.training,
        case.momentum, case.eps,
    )  # fmt: skip
    x, options = tensor_of(t, "x"), {}
    if op is classifier_cross_entropy and case.moments and takes_kernels(x):
        options["moments"] = moments_of(x.detach())
    loss, logits = op(x, norm, t["weight"], t["bias"], t["target"], case.smoothing, **options)
    assert not logits.requires_grad
    results = {"loss": loss.detach(), "logits": logits} | gradients(loss, leaves, t["dloss"])
    return results | {name: v for name in RUNNING if (v := t[name]) is not None}


class _OneSided(Noise):
    """Noise whose roundings of a are of one sign over all of a channel's pixels.

    So are those of equal values, and those of Triton's interpreter, which truncates to bf16: what
    pooling does not average out.
    """

    def __call__(self, v: Tensor, stored: bool = False) -> Tensor:
        v = super().__call__(v, stored)
        if not stored:
            return v
        sizes = (*v.shape[:2], 1, 1)
        signs = torch.randint(-1, 1, sizes, generator=self.generator).to(v.device)
        return v * (1 + ROUNDINGS * store_error(self.dtype) * signs)


def exact(case: Case, given: Given, mask: Tensor, noise: Noise | None = None) -> dict[str, Tensor]:
    """The reference in fp64 with a given ReLU mask, and noise if any."""

    def rough(v: Tensor) -> Tensor:
        return v if noise is None else noise(v)

    def op(
        x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, target: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        pooled = rough(exact_norm_relu(x, norm, mask, noise).mean((2, 3)))
        logits = rough(F.linear(pooled, rough(weight), bias))
        most = logits.detach().amax(1, keepdim=True)
        e = rough((logits - most).exp())
        log_p = logits - (e.sum(1, keepdim=True).log() + most)
        wanted = F.one_hot(target, case.classes) * (1 - smoothing) + smoothing / case.classes
        return rough(-(wanted * log_p).sum(1).mean()), logits.detach()

    return run(op, case, double(plain(given)))


def _peer_mask(case: Case, given: Given) -> Tensor:
    t, _ = leaves_of(plain(given), RUNNING, ())
    norm = Norm(
        t["running_mean"], t["running_var"], t["norm_weight"], t["norm_bias"], case.training,
        case.momentum, case.eps,
    )  # fmt: skip
    return ~(norm_relu_reference(tensor_of(t, "x"), norm) <= 0)


def check(case: Case, device: str) -> None:
    """Raise AssertionError unless the op is right on this case."""
    given = tensors(case, device)
    with Watch("classifier_cross_entropy") as seen:
        got = run(classifier_cross_entropy, case, given)
    peer = run(classifier_cross_entropy_reference, case, plain(given))
    x = tensor_of(given, "x")
    if x.numel() == 0:
        for name in got:
            assert torch.equal(got[name].nan_to_num(), peer[name].nan_to_num()), name
        return
    mean, var, weight, bias = seen.args[3:7]
    mean, var = seen.out[2:4] if case.training else (mean, var)
    mask, mask_peer = mask_of(x, mean, var, weight, bias, case.eps), _peer_mask(case, given)
    want, want_peer = exact(case, given, mask), exact(case, given, mask_peer)
    noisy = [exact(case, given, mask, _OneSided(i, case.dtype)) for i in range(DRAWS)]
    compare(case, got, want, noisy, peer, want_peer)


@contextmanager
def few_programs() -> Iterator[None]:
    """Tiles of their true size, but one program for a class's share of dweight."""
    with mock.patch.object(_register._import_kernels("classifier_cross_entropy"), "BLOCK_W", 128):
        yield


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles and limits so small that a few samples make several of everything."""
    kernels = _register._import_kernels("classifier_cross_entropy")
    limits: dict[str, Any] = {"MAX_PROGRAMS": 2, "TILE": 128, "BLOCK_P": 2}
    limits |= {"BLOCK_C": 16, "BLOCK_W": 16, "BLOCK_N": 2}
    with norm_relu_conv2d_equality.small_tiles(), mock.patch.multiple(kernels, **limits):
        yield
