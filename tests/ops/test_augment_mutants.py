"""Kernels broken on purpose: the check of the ordinary tests must fail for each of them."""

from pathlib import Path

import pytest
import torch
from ops.augment_equality import check, data
from ops.kernel_mutants import take

from fastres.ops import augment

# Each makes the kernel wrong in one place, without reading outside an image.
MUTANTS = {
    "mirrors one column off": ("W - 1 - w, w)", "W - 1 - tl.maximum(w, 1), w)"),
    "mirrors by another bit": ("(mirror >> 31) != 0", "(mirror >> 30) % 2 != 0"),
    "swaps top and left": ("top, left, mirror, _ =", "left, top, mirror, _ ="),
    "never crops at the far edge": ("top, 2 * PADDING + 1)", "top, 2 * PADDING)"),
    "loses a row": ("(h < rows)", "(h < rows - 1)"),
    "loses a column": ("(w >= 0)", "(w > 0)"),
    "ignores the epoch": ("tl.zeros([], tl.int64) + epoch", "tl.zeros([], tl.int64)"),
    "leaves the last tile unwritten": ("mask=ok)\n", "mask=ok & (element < BLOCK))\n"),
    "takes red for every channel": ("element % C\n", "element % C * 0\n"),
    "drops the small part of 1/255": (" + pixel * LOW", ""),
    "invents an image that is not there": ("where(found, y,", "where(b >= 0, y,"),
}


def _check(device: str) -> None:
    """On images of two tiles and one index out of range."""
    images, mean, std = data(8, 3, 20, 20, device=device)
    index = torch.tensor([*range(8), 8], device=device)
    y = augment(images, index, mean, std, seed=2, epoch=3)
    check(y[:8], images, index[:8], mean, std, seed=2, epoch=3)
    assert y[8].isnan().all(), "y is not NaN"


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "augment")
    _check(device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    old, changed = MUTANTS[name]
    take(tmp_path, monkeypatch, "augment", old, changed)
    with pytest.raises(AssertionError, match="y is not"):
        _check(device)
