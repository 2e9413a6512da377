"""What "right" means for sgd_step: parameters, momentum and half copy after it, against fp64."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ops.gradient_lists import Gradient, make
from tolerances import EPS, EPSILONS, store_error, store_floor
from torch import Tensor

from fastres.ops import flat_offsets, sgd_step
from fastres.ops.sgd_step import overflow_of, sgd_step_reference


@dataclass(frozen=True)
class Case:
    gradients: list[Gradient] = field(default_factory=list)
    lr: float = 0.1
    lr_on_device: bool = False
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    half: torch.dtype | None = None
    grad_scale: float | None = None
    found_inf: float | None = None
    finds: bool = False
    steps: int = 2


def buffers(case: Case, device: str) -> dict[str, Any]:
    """Random flat buffers for a case, with zeros between the parameters, and the rest."""
    sizes = [torch.Size(gradient.shape).numel() for gradient in case.gradients]
    offsets, total = flat_offsets(sizes)
    generator = torch.Generator().manual_seed(1)

    def flat() -> Tensor:
        v = torch.zeros(total)
        for size, offset in zip(sizes, offsets, strict=True):
            v[offset : offset + size] = torch.randn(size, generator=generator)
        return v.to(device)

    param = flat()
    return {
        "grads": make(case.gradients, device),
        "sizes": sizes,
        "param": param,
        "momentum_buffer": flat() if case.momentum else None,
        "half": None if case.half is None else param.to(case.half),
    }


def run(case: Case, t: dict[str, Any]) -> None:
    """case.steps steps in place. On a CPU gradients are overwritten: each step gets new ones."""
    device = t["param"].device

    def scalar(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, device=device)

    overflow = overflow_of(t["param"], t["momentum_buffer"]) if case.finds else None
    for _ in range(case.steps):
        grads = [None if grad is None else grad.clone() for grad in t["grads"]]
        sgd_step(
            grads, t["sizes"], t["param"], t["momentum_buffer"],
            lr=torch.tensor(case.lr, device=device) if case.lr_on_device else case.lr,
            momentum=case.momentum, weight_decay=case.weight_decay, nesterov=case.nesterov,
            maximize=case.maximize, half=t["half"], grad_scale=scalar(case.grad_scale),
            found_inf=scalar(case.found_inf), overflow=overflow,
        )  # fmt: skip
        if overflow is not None and bool(overflow.found_inf) != overflows(t["grads"]):
            raise AssertionError(f"found_inf is off: it is {float(overflow.found_inf)}")


def overflows(grads: list[Tensor | None]) -> bool:
    return any(grad is not None and not bool(grad.isfinite().all()) for grad in grads)


def check(case: Case, device: str) -> None:
    """Raise AssertionError unless sgd_step is right on this case."""
    t = buffers(case, device)
    before = {n: t[n].clone() for n in ("param", "momentum_buffer", "half") if t[n] is not None}
    run(case, t)
    if case.found_inf or (case.finds and overflows(t["grads"])):
        for name, kept in before.items():
            if not torch.equal(t[name].view(torch.uint8), kept.view(torch.uint8)):
                raise AssertionError(f"{name} is off: a skipped step wrote it")
        return
    offsets, _ = flat_offsets(t["sizes"])
    between = torch.ones_like(t["param"], dtype=torch.bool)
    scale = None if case.grad_scale is None else torch.tensor(case.grad_scale, device=device)
    for i, (grad, size, offset) in enumerate(zip(t["grads"], t["sizes"], offsets, strict=True)):
        part = slice(offset, offset + size)
        between[part] = False
        if grad is None:
            for name, kept in before.items():
                if not torch.equal(t[name][part], kept[part]):
                    raise AssertionError(f"{name} {i} is off: it has no gradient")
            continue
        g = grad.as_strided((size,), (1,)).double()
        p, momentum = before["param"][part].double(), before.get("momentum_buffer")
        m = None if momentum is None else momentum[part].double()
        # The size of the terms before they cancel, by the same recurrence in absolute values.
        worst = replace(case, maximize=False)
        p_size, m_size = p.abs(), None if m is None else m.abs()
        for _ in range(case.steps):
            p, m = sgd_step_reference(
                g, p, m, case.lr, case.momentum, case.weight_decay, case.nesterov, case.maximize,
                scale,
            )  # fmt: skip
            p_size, m_size = sgd_step_reference(
                g.abs(), p_size, m_size, -case.lr, worst.momentum, worst.weight_decay,
                worst.nesterov, False, scale,
            )  # fmt: skip
        _compare(f"param {i}", t["param"][part], p, EPSILONS * EPS * p_size)
        if m is not None and m_size is not None:
            _compare(f"momentum_buffer {i}", t["momentum_buffer"][part], m, EPSILONS * EPS * m_size)
        if case.half is not None:
            rounded = t["param"][part].double()
            allowed = store_error(case.half) * rounded.abs() + store_floor(case.half)
            _compare(f"half {i}", t["half"][part], rounded, allowed)
    for name, flat in t.items():
        if name in before and not bool((flat[between] == 0).all()):
            raise AssertionError(f"{name} is off between the parameters")


def _compare(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    right = ((got.double() - want).abs() <= allowed) | (got.isnan() & want.isnan())
    right |= got == want.to(got.dtype)
    if not bool(right.all()):
        raise AssertionError(f"{name} is off by {(got.double() - want).abs().max()}")
