"""Kernels broken on purpose: the check of the ordinary tests must fail for each of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ops.gradient_lists import Gradient, small_blocks
from ops.kernel_mutants import take
from ops.sgd_step_equality import Case, check

CASE = Case(
    [Gradient((40,)), Gradient((5,), None), Gradient((3, 7), torch.float16), Gradient((3,))],
    weight_decay=0.1,
    nesterov=True,
    half=torch.float16,
    grad_scale=4.0,
    found_inf=0.0,
)
SKIPPED = replace(CASE, found_inf=1.0)
PLAIN = replace(CASE, nesterov=False)
FINDS = replace(CASE, found_inf=None, finds=True)
# Met by a program in the middle, so that others have stepped before it and after it.
_BROKEN = Gradient((3, 7), torch.float16, values="inf")
OVERFLOWS = replace(FINDS, gradients=[*CASE.gradients[:2], _BROKEN, CASE.gradients[3]])

# The text to replace (once in the file), what takes its place, and the case that tells.
MUTANTS: dict[str, tuple[str, str, Case]] = {
    "steps on an overflow": (
        "tl.load(found_inf_ptr) == 0.0",
        "tl.load(found_inf_ptr) >= 0.0",
        SKIPPED,
    ),
    "never steps": ("tl.load(found_inf_ptr) == 0.0", "tl.load(found_inf_ptr) != 0.0", CASE),
    "takes another gradient for a missing one": (
        "steps = address != 0",
        "steps = address != 1\n    if address == 0:\n        address = tl.load(grads_ptr)",
        CASE,
    ),
    "does not unscale": ("g *= inverse", "g *= 1.0 + 0.0 * inverse", CASE),
    "forgets weight decay": ("g += weight_decay * p", "g += 0.0 * p", CASE),
    "decays the parameter upwards": ("g += weight_decay * p", "g -= weight_decay * p", CASE),
    "forgets momentum": ("            m = momentum * m + g", "            m = 0.0 * m + g", CASE),
    "keeps the old momentum": (
        "tl.store(momentum_ptr + flat + lanes, m,",
        "tl.store(momentum_ptr + flat + lanes, m - g,",
        CASE,
    ),
    "Nesterov looks back": ("g += momentum * m", "g = momentum * m", CASE),
    "no Nesterov is Nesterov": (
        "                g = m\n",
        "                g += momentum * m\n",
        PLAIN,
    ),
    "climbs": ("p -= lr * g", "p += lr * g", CASE),
    "the half copy is the old one": (
        "tl.store(half_ptr + flat + lanes, p.to(",
        "tl.store(half_ptr + flat + lanes, (p + lr * g).to(",
        CASE,
    ),
    "leaves a part of sixteen": ("(count + 15) // 16 * 16", "count // 16 * 16", CASE),
    "every parameter is the first": (
        "tl.multiple_of(offset + start, 16)",
        "tl.multiple_of(start, 16)",
        CASE,
    ),
    "every block is the first": (
        "tl.multiple_of(offset + start, 16)",
        "tl.multiple_of(offset, 16)",
        CASE,
    ),
    "sees no NaN": ('tl.abs(g) < float("inf"), 0, 1)', "tl.abs(g) < 1e38, 0, 0)", OVERFLOWS),
    "overflows at any gradient": ('tl.abs(g) < float("inf")', "tl.abs(g) < 1e-3", FINDS),
    "puts nothing back": ("            if overflowed:", "            if arrived < 0:", OVERFLOWS),
    "puts everything back": ("            if overflowed:", "            if arrived > 0:", FINDS),
    "puts back what it wrote": (
        "tl.store(before_ptr + flat + lanes, p, mask=ok)",
        "tl.store(before_ptr + flat + lanes, p - lr * g, mask=ok)",
        OVERFLOWS,
    ),
    "puts momentum where the parameters are": (
        "tl.store(before_ptr + total + flat + lanes, m, mask=ok)",
        "tl.store(before_ptr + flat + lanes, m, mask=ok)",
        OVERFLOWS,
    ),
    "forgets the half copy of what it puts back": (
        "tl.store(half_ptr + at + lanes, p.to(half_ptr.dtype.element_ty), mask=ok)",
        "pass",
        OVERFLOWS,
    ),
    "forgets the last block of what it puts back": (
        "tl.range(0, P,",
        "tl.range(0, P - 1,",
        OVERFLOWS,
    ),
    "the first to arrive is the last": ("== P:", "== 1:", OVERFLOWS),
    "keeps the ticket": ("tl.store(ticket_ptr, 0)", "pass", replace(OVERFLOWS, steps=3)),
    "maximizes": ("if MAXIMIZE:", "if not MAXIMIZE:", CASE),
}


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "sgd_step")
    with small_blocks("sgd_step"):
        for case in (CASE, SKIPPED, PLAIN, FINDS, OVERFLOWS):
            check(case, device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    old, changed, case = MUTANTS[name]
    take(tmp_path, monkeypatch, "sgd_step", old, changed)
    with small_blocks("sgd_step"), pytest.raises(AssertionError, match="is off"):
        check(case, device)
