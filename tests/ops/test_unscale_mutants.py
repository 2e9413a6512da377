"""Kernels broken on purpose: the check of the ordinary tests must fail for each of them."""

from pathlib import Path

import pytest
import torch
from ops.gradient_lists import Gradient, small_blocks
from ops.kernel_mutants import take
from ops.unscale_equality import check

GRADIENTS = [
    Gradient((40,)),
    Gradient((), None),
    Gradient((3, 7), torch.float16, "offset"),
    Gradient((16,), torch.bfloat16),
]
# Nine partials, two at a time: the last one is alone.
NINE = [*GRADIENTS, Gradient((33,))]
NAN = [*GRADIENTS, Gradient((33,), values="nan")]
INFINITE = [*GRADIENTS, Gradient((33,), values="-inf")]

# File, the text to replace (once in the file), what takes its place, and the case that tells.
MUTANTS: dict[str, tuple[str, str, str, list[Gradient], str]] = {
    "does not divide": (
        "unscale",
        "grad *= tl.div_rn",
        "grad *= 1.0 + 0.0 * tl.div_rn",
        GRADIENTS,
        "out",
    ),
    "overlooks NaN": (
        "unscale",
        'tl.abs(grad) < float("inf"), 0, 1',
        'tl.abs(grad) >= float("inf"), 1, 0',
        NAN,
        "check",
    ),
    "overlooks minus infinity": ("unscale", "tl.abs(grad) <", "grad <", INFINITE, "check"),
    "takes the large for infinite": (
        "unscale",
        '< float("inf"), 0, 1',
        "< 1.0, 0, 1",
        GRADIENTS,
        "check",
    ),
    "misses the last partial": (
        "unscale",
        "range(0, P, BLOCK_P)",
        "range(0, P - 1, BLOCK_P)",
        NINE,
        "check",
    ),
    "the first to arrive adds up": ("unscale", "== P - 1", "== 0", GRADIENTS, "check"),
    "measures what is scaled": (
        "unscale",
        "tl.sum(grad * grad, 0)",
        "tl.sum(grad * grad, 0) * 4",
        GRADIENTS,
        "in place",
    ),
    "a block writes one too few": (
        "_addresses",
        "tl.store(pointer + lanes, x.to(dtype), mask=lanes < count)",
        "tl.store(pointer + lanes, x.to(dtype), mask=lanes < count - 1)",
        GRADIENTS,
        "out",
    ),
    "a block reads one too few": (
        "_addresses",
        "mask=lanes < count, other=0.0",
        "mask=lanes < count - 1, other=0.0",
        GRADIENTS,
        "out",
    ),
    "every block is the first": (
        "_addresses",
        "x = tl.load(pointer + lanes, mask",
        "x = tl.load(pointer - start + lanes, mask",
        GRADIENTS,
        "out",
    ),
    "whole blocks begin anew": (
        "_addresses",
        "dtype)) + start, 16)\n        x =",
        "dtype)), 16)\n        x =",
        GRADIENTS,
        "out",
    ),
    "takes bf16 for fp16": (
        "_addresses",
        "x = _load(address, start, lanes, count, tl.bfloat16)",
        "x = _load(address, start, lanes, count, tl.float16)",
        GRADIENTS,
        "out",
    ),
    "forgets the rest of a tensor": (
        "_addresses",
        "for start in range(0, size, block)",
        "for start in range(0, size - block + 1, block)",
        GRADIENTS,
        "out",
    ),
}


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "unscale")
    with small_blocks("unscale"):
        for *_, gradients, mode in MUTANTS.values():
            check(gradients, device, mode=mode)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    file, old, changed, gradients, mode = MUTANTS[name]
    take(tmp_path, monkeypatch, file, old, changed)
    with small_blocks("unscale"), pytest.raises(AssertionError, match="is off"):
        check(gradients, device, mode=mode)
