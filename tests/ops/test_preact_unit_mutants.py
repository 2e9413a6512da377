"""A unit's kernels broken on purpose: the ordinary check must fail for each of them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from ops.conv_mutants import BOTH, see_that_a_copy_passes, see_that_it_fails
from ops.preact_unit_equality import Case, check

# Three tiles of 32 pixels, one to a chunk, the last in part; in fp32 one block of 16 channels. What
# one convolution tells is in test_norm_relu_conv2d_mutants.py: it takes half the time of a unit.
CASE = Case(shape=(3, 16, 5, 5))
# Six tiles, two to a chunk.
TILES = Case(shape=(4, 16, 7, 6), moments=True)
PROJECTED = Case(shape=(2, 16, 5, 6), K=16, stride=2, project=True, kept=(5, 9, 3))
PICKED = Case(shape=(5, 16, 3, 3), picked=0.6)
# Of two chunks, two tiles to a chunk of the projection and one to a chunk of conv1.
PICKED_PROJECTED = Case(shape=(5, 16, 7, 6), K=16, stride=2, project=True, picked=0.4)
HALF = Case(shape=(3, 16, 5, 5), dtype=torch.float16, moments=True)

# File, the text to replace (once in the file), what takes its place, and the case that tells.
MUTANTS: dict[str, tuple[str, str, str, Case]] = {
    "y's moments are of what is not rounded": (
        "_conv_forward",
        "        y = y.to(dtype)\n        tl.store(y_ptr + base + at, y, mask=mk_ok)",
        "        tl.store(y_ptr + base + at, y.to(dtype), mask=mk_ok)",
        HALF,
    ),
    "y's moments take pixels past the end": (
        "_moments",
        "spread = tl.where(ok, v - tile_mean[None, :], 0.0)",
        "spread = v - tile_mean[None, :]",
        CASE,
    ),
    "y's moments count pixels past the end": (
        "_conv_forward",
        "count = tl.minimum(end - m_start, BLOCK_M)",
        "count = tl.minimum(end, 0) + BLOCK_M",
        CASE,
    ),
    "a chunk's moments are those of its last tile": (
        "_moments",
        "delta = tile_mean - mean\n    mean += delta * (count / total)",
        "delta = tile_mean - mean\n    mean = tile_mean",
        TILES,
    ),
    "the dgrad forgets the projection": (
        "_conv_dgrad",
        "if parity == 0:",
        "if parity > 3:",
        PROJECTED,
    ),
    "the projection's gradient comes from every pixel": (
        "_conv_dgrad",
        "if parity == 0:",
        "if parity >= 0:",
        PROJECTED,
    ),
    "BatchNorm's backward is applied outside the image": (
        "_conv_gradient",
        "g = tl.where(ok, g, zero)",
        "g = g",
        CASE,
    ),
    "the weights' gradients overlap": (
        "preact_unit",
        "direct, shortcut_weight, slabs[2]",
        "direct, shortcut_weight, slabs[1]",
        PROJECTED,
    ),
    "the projection's gradient is of the row above": (
        "_conv_wgrad",
        "tap_row += PAD - TAPS",
        "tap_row += PAD - 1 - TAPS",
        PROJECTED,
    ),
    "the projection's gradient is of a tap beside": (
        "_conv_wgrad",
        "c_ok = c_ok & (tap == PAD)",
        "c_ok = c_ok & (tap == 0)",
        PROJECTED,
    ),
    "the projection's gradient goes by conv1's": (
        "_conv_wgrad",
        "if PROJECTS and projection:\n            base",
        "if PROJECTS and tap_row > TAPS:\n            base",
        PROJECTED,
    ),
    "the projection's gradient is of conv1's channels": (
        "_conv_wgrad",
        "k = channels_at(shortcut_order_ptr, places, places < K)",
        "k = channels_at(order_ptr, places, places < K)",
        PROJECTED,
    ),
    "the projection's gradient is of as many pixels as conv1's": (
        "_conv_wgrad",
        "tl.where(projection, SHORTCUT_M, M)",
        "M",
        PICKED_PROJECTED,
    ),
    "the projection's chunks are as long as conv1's": (
        "_conv_wgrad",
        "tl.where(projection, SHORTCUT_CHUNK, CHUNK)",
        "CHUNK",
        PICKED_PROJECTED,
    ),
    "the projection's gradient is of x in the index's order": (
        "_conv_wgrad",
        "if projection:\n                x_base",
        "if tap_row > TAPS:\n                x_base",
        # All samples are the index's: none is read past its end.
        dataclasses.replace(PICKED_PROJECTED, picked=1.0),
    ),
    "norm1's moments are of every sample, not the index's": (
        "preact_unit",
        "batch_stats(batch_moments(x, seen), x, shared)",
        "batch_stats(batch_moments(x), x, shared)",
        PICKED,
    ),
    "conv1 takes the index's samples in another order": (
        "preact_unit",
        "h_moments = conv_forward(\n        x, index,",
        "h_moments = conv_forward(\n        x, None if index is None else index.sort()[0],",
        PICKED,
    ),
    "the backward takes dy's first samples": (
        "preact_unit",
        "Output(dy, index, scale, row_scale)",
        "Output(dy, None, scale, row_scale)",
        PICKED,
    ),
    "the backward takes x's first samples": (
        "preact_unit",
        "into1 = Input(x, index, first)",
        "into1 = Input(x, None, first)",
        PICKED,
    ),
    "norm1's sums are divided by every sample": (
        "preact_unit",
        "rows1 = (branch if of_branch else N) * S",
        "rows1 = N * S",
        PICKED,
    ),
    "BatchNorm's backward reaches samples that took no branch": (
        "_conv_dx",
        "dx = tl.where(dz_ok, dx, 0.0)",
        "dx = dx",
        PICKED,
    ),
    "the shortcut's gradient is lost": (
        "preact_unit",
        "shortcut, dz_index = dy, position",
        "shortcut, dz_index = None, position",
        CASE,
    ),
    "meProp keeps the smallest channels": (
        "_conv_select",
        "- c)[None, :] > ((key.to(tl.int64)",
        "- c)[None, :] < ((key.to(tl.int64)",
        PROJECTED,
    ),
    "meProp puts channels in order before all sums are there": (
        "_conv_select",
        "== tl.num_programs(0) * tl.num_programs(1) - 1",
        "== 0",
        dataclasses.replace(PROJECTED, shape=(4, 16, 9, 8)),
    ),
    "meProp goes by sums of g, not of |g|": (
        "_conv_select",
        "total += tl.sum(tl.abs(operand(g, g_ptr.dtype.element_ty).to(tl.float32)), 0)",
        "total += tl.sum(operand(g, g_ptr.dtype.element_ty).to(tl.float32), 0)",
        PROJECTED,
    ),
    "meProp's wgrad is of every channel": (
        "_conv_wgrad",
        "k_ok = places < kept",
        "k_ok = places < K",
        PROJECTED,
    ),
    "meProp's dgrad takes the first channels": (
        "_conv_dgrad",
        "            k = channels_at(order_ptr, lanes, k_ok)",
        "            k = lanes",
        PROJECTED,
    ),
    "norm1's backward in evaluation is the training's": (
        "_conv_dx",
        "TRAINING=norm.training",
        "TRAINING=True",
        Case(shape=(2, 16, 2, 2), training=(False, True)),
    ),
    "norm2's backward in evaluation is the training's": (
        "_conv_dgrad",
        "TRAINING=out.training",
        "TRAINING=True",
        Case(shape=(2, 16, 2, 2), training=(True, False)),
    ),
}
MUTANTS |= {
    "both gradients take dy's first samples": (
        BOTH,
        "samples_at(g_ptr, g_index_ptr, first, n, ok, H * W * K)",
        "samples_at(g_ptr, None, first, n, ok, H * W * K)",
        PICKED,
    ),
    "both gradients in evaluation are the training's": (
        BOTH,
        "TRAINING=out.training",
        "TRAINING=True",
        Case(shape=(2, 16, 2, 2), training=(True, False)),
    ),
}


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    see_that_a_copy_passes(
        tmp_path, monkeypatch, MUTANTS.values(), lambda case: check(case, device)
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    see_that_it_fails(tmp_path, monkeypatch, MUTANTS[name], lambda case: check(case, device))
