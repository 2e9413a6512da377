"""Kernels broken on purpose: the check of the ordinary tests must fail for each of them."""

from pathlib import Path

import pytest
from ops.kernel_mutants import take
from ops.stochastic_depth_add_equality import Case, check, small_blocks

# Two blocks a sample, the second in part; samples of both kinds; no number that is 0 or 1.
ROW = Case(shape=(6, 5, 3, 3), seed=2, step=5, unit=7, rank=3)
BATCH = Case(shape=(6, 5, 3, 3), mode="batch", seed=7, step=5, unit=7, rank=3)
SUBSET = Case(shape=(7, 5, 3, 3), mode="subset", seed=2, step=5, unit=7, rank=3)
POISONED = Case(shape=(6, 5, 3, 3), seed=2, step=5, unit=7, rank=3, poisoned=True)
MIXED = Case(shape=(6, 5, 3, 3), seed=2, step=5, branch_layout="nhwc")

# The text to replace (once in the file), what takes its place, and the case that tells.
MUTANTS: dict[str, tuple[str, str, Case]] = {
    "a dropped branch is multiplied by zero": (
        "    if kept:\n        offsets = element if FLAT else s * branch_stride_s",
        "    scale = tl.where(kept, scale, 0.0)\n    if True:\n"
        "        offsets = element if FLAT else s * branch_stride_s",
        POISONED,
    ),
    "a dropped sample's dy is multiplied by zero": (
        "    if kept:\n        s, c = _split",
        "    scale = tl.where(kept, scale, 0.0)\n    if True:\n        s, c = _split",
        POISONED,
    ),
    "a kept branch is not scaled": ("y += tl.cast(scale, tl.float32) * branch", "y += branch", ROW),
    "a kept dy is not scaled": ("dbranch = tl.cast(scale, tl.float32) * dy", "dbranch = dy", ROW),
    "the survivors are the dropped": (
        "_draw(key_ptr, n if ROW else n * 0, unit, ROW) >= threshold",
        "_draw(key_ptr, n if ROW else n * 0, unit, ROW) < threshold",
        ROW,
    ),
    "the backward draws for another unit": (
        "_draw(key_ptr, j if ROW else j * 0, unit, ROW)",
        "_draw(key_ptr, j if ROW else j * 0, unit + 1, ROW)",
        ROW,
    ),
    "a batch is drawn by sample": (
        "_draw(key_ptr, n if ROW else n * 0, unit, ROW)",
        "_draw(key_ptr, n, unit, ROW)",
        BATCH,
    ),
    "ranks share their draws": ("if WITH_RANK:", "if False:", ROW),
    "the step is forgotten": ("n.to(tl.uint32), step, STREAM", "n.to(tl.uint32), 0, STREAM", ROW),
    "the draws are another purpose's": ("tl.constexpr(3)", "tl.constexpr(1)", ROW),
    "the last element is left out": (
        "ok = element < size\n    s, c = _split(",
        "ok = element < size - 1\n    s, c = _split(",
        ROW,
    ),
    "dy is read in the order of dbranch": (
        "offsets = element if FLAT else s * dy_stride_s + c * dy_stride_c",
        "offsets = element",
        MIXED,
    ),
    "the branch is read in the order of y": (
        "offsets = element if FLAT else s * branch_stride_s + c * branch_stride_c",
        "offsets = element",
        MIXED,
    ),
    "only one of two layouts is asked for": (
        "FLAT=all(_flat(rows, C, S, channels_last) for rows in (branch_rows, shortcut_rows))",
        "FLAT=any(_flat(rows, C, S, channels_last) for rows in (branch_rows, shortcut_rows))",
        MIXED,
    ),
    "the subset ranks by the first samples only": (
        "for m_start in range(0, N, BLOCK_N):",
        "for m_start in range(0, BLOCK_N, BLOCK_N):",
        SUBSET,
    ),
    "the subset counts samples past the last": (
        "tl.where(m < N, other,",
        "tl.where(m >= 0, other,",
        SUBSET,
    ),
    "the subset keeps one too few": (
        "taken = position < kept",
        "taken = position < kept - 1",
        SUBSET,
    ),
}


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "stochastic_depth_add")
    with small_blocks():
        for case in dict.fromkeys(case for *_, case in MUTANTS.values()):
            check(case, device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    old, changed, case = MUTANTS[name]
    take(tmp_path, monkeypatch, "stochastic_depth_add", old, changed)
    with small_blocks(), pytest.raises(AssertionError, match="is off"):
        check(case, device)
