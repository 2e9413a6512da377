"""Kernels broken on purpose: the check of the ordinary tests must fail for each of them."""

from pathlib import Path

import pytest
from ops.batch_norm_relu_equality import Case, check, small_tiles
from ops.kernel_mutants import take

# Six tiles of 64 rows, two to a chunk and so three partials, the last tile in part.
CASE = Case(shape=(5, 8, 11, 6), dy_layout="nhwc")
WITH_RESIDUAL = Case(shape=(5, 8, 11, 6), residual_layout="nhwc")
# Rows past the last one are rows again, not memory that belongs to somebody else.
EXPANDED = Case(shape=(5, 8, 11, 6), x_layout="expanded_n")
# Three of five samples, in an order of their own.
PICKED = Case(shape=(5, 8, 11, 6), picked=0.6)

# File, the text to replace (once in the file), what takes its place, and the case that tells.
MUTANTS: dict[str, tuple[str, str, str, Case]] = {
    "the moments take rows past the end": (
        "_moments",
        "ok = tile_mask(m < end, c_ok, M_AXIS)",
        "ok = tile_mask(m >= 0, c_ok, M_AXIS)",
        EXPANDED,
    ),
    "y misses its last row": (
        "batch_norm_relu",
        "ok = tile_mask(m < end, c_ok, M_AXIS)\n"
        "        x_offsets = tile_offsets(\n            m, c, S,",
        "ok = tile_mask(m < end - 1, c_ok, M_AXIS)\n"
        "        x_offsets = tile_offsets(\n            m, c, S,",
        CASE,
    ),
    "the moments miss the last partial": (
        "_moments",
        "count = 0.0\n    for p_start in range(0, P, BLOCK_P):",
        "count = 0.0\n    for p_start in range(0, P - 1, BLOCK_P):",
        CASE,
    ),
    "the backward's sums miss the last partial": (
        "_moments",
        "total = tl.zeros_like(c).to(tl.float32)\n    for p_start in range(0, P, BLOCK_P):",
        "total = tl.zeros_like(c).to(tl.float32)\n    for p_start in range(0, P - 1, BLOCK_P):",
        CASE,
    ),
    "the variance loses to a large mean": (
        "_moments",
        "return center, tl.sum(m2 + spread * (rows * spread), axis)",
        "return center, tl.sum(m2 + rows * mean * mean, axis) - count * center * center",
        Case(shape=(5, 8, 11, 6), values="large_mean"),
    ),
    "normalises by the unbiased variance": (
        "_moments",
        "return mean, m2 / count",
        "return mean, m2 / (count - 1)",
        CASE,
    ),
    "tracks the biased variance": (
        "_moments",
        "correction = count / (count - 1)",
        "correction = 1.0",
        CASE,
    ),
    "the mask forgets the residual": (
        "batch_norm_relu",
        "store_bits(mask_ptr, kept,",
        "store_bits(mask_ptr, passes((x - mean) * scale + bias),",
        WITH_RESIDUAL,
    ),
    "the mask's bits come back in reverse": (
        "_tiles",
        "(packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1",
        "(packed[:, :, None] >> (7 - tl.arange(0, 8))[None, None, :]) & 1",
        WITH_RESIDUAL,
    ),
    "the ReLU keeps the negative": (
        "_normalize",
        "return (z <= 0.0) == 0",
        "return (z >= 0.0) == 0",
        CASE,
    ),
    "the mean of dz is its sum": (
        "batch_norm_relu",
        "mean_dz = sum_dz / M",
        "mean_dz = sum_dz",
        CASE,
    ),
    "dy is read by dx's strides": (
        "batch_norm_relu",
        "tile_offsets(m, c, S, dy_stride_n, dy_stride_s, dy_stride_c, M_AXIS, FLAT)",
        "tile_offsets(m, c, S, dx_stride_n, dx_stride_s, dx_stride_c, M_AXIS, FLAT)",
        CASE,
    ),
    "the moments are of the first samples, not the index's": (
        "_moments",
        "m, c_wide, S, x_stride_n, x_stride_s, x_stride_c, M_AXIS, FLAT, index_ptr, end",
        "m, c_wide, S, x_stride_n, x_stride_s, x_stride_c, M_AXIS, FLAT",
        PICKED,
    ),
    "dx goes to the first samples, not the index's": (
        "batch_norm_relu",
        "m, c, S, dx_stride_n, dx_stride_s, dx_stride_c, M_AXIS, FLAT, index_ptr, end",
        "m, c, S, dx_stride_n, dx_stride_s, dx_stride_c, M_AXIS, FLAT",
        PICKED,
    ),
    "the backward's sums are of the first samples": (
        "batch_norm_relu",
        "m, c_wide, S, x_stride_n, x_stride_s, x_stride_c, M_AXIS, FLAT, index_ptr, end",
        "m, c_wide, S, x_stride_n, x_stride_s, x_stride_c, M_AXIS, FLAT",
        PICKED,
    ),
    "dx is not zero where no sample was taken": (
        "batch_norm_relu",
        "dx if index is None else dx.zero_(),",
        "dx,",
        PICKED,
    ),
    "the evaluation's backward is the training's": (
        "batch_norm_relu",
        "dx = scale * (dz - mean_dz - x * slope) if TRAINING else scale * dz",
        "dx = scale * (dz - sum_dz / M - x * rstd * rstd * sum_dzx / M)",
        Case(shape=(5, 8, 1, 1), training=False),
    ),
}


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "batch_norm_relu")
    with small_tiles():
        for case in dict.fromkeys(case for *_, case in MUTANTS.values()):
            check(case, device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    file, old, changed, case = MUTANTS[name]
    take(tmp_path, monkeypatch, file, old, changed)
    with small_tiles(), pytest.raises(AssertionError, match=r"is off (by|where)|mask is wrong"):
        check(case, device)
