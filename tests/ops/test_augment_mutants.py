"""Kernels broken on purpose: the check of the ordinary tests must fail for each of them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from ops.augment_equality import check, data

from fastres.ops import _register, augment

SOURCE = Path(__file__).resolve().parents[2] / "kernels" / "augment.py"

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


def _check(path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The kernel in the file at path, on images of two tiles and one index out of range."""
    spec = importlib.util.spec_from_file_location("fastres.kernels.mutant", path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(_register, "_import_kernels", lambda stem: mutant)
    images, mean, std = data(8, 3, 20, 20, device=device)
    index = torch.tensor([*range(8), 8], device=device)
    y = augment(images, index, mean, std, seed=2, epoch=3)
    check(y[:8], images, index[:8], mean, std, seed=2, epoch=3)
    assert y[8].isnan().all(), "y is not NaN"


def test_the_unbroken_kernel_passes(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    _check(SOURCE, monkeypatch, device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    old, changed = MUTANTS[name]
    source = SOURCE.read_text()
    assert source.count(old) == 1, "the kernel was rewritten: rewrite its mutant"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, changed))
    with pytest.raises(AssertionError, match="y is not"):
        _check(path, monkeypatch, device)
