"""Convolution kernels broken on purpose: the ordinary check must fail for each of them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from ops import kernel_mutants, norm_relu_conv2d_equality, preact_unit_equality
from ops.norm_relu_conv2d_equality import Case as Conv
from ops.norm_relu_conv2d_equality import small_tiles
from ops.preact_unit_equality import Case

# Three tiles of 32 pixels, one to a chunk, the last in part; in fp32 one block of 16 channels. One
# convolution takes the interpreter half the time of a unit.
CASE = Case(shape=(3, 16, 5, 5))
CONV = Conv(shape=(3, 16, 5, 5), K=16, row_scale=True, seed=2)
# Six tiles, two to a chunk.
TILES = Case(shape=(4, 16, 7, 6), moments=True)
CONV_TILES = Conv(shape=(4, 16, 7, 6), K=16)
CONV_BLOCKS = Conv(shape=(2, 32, 3, 4))
CONV_STRIDED = Conv(shape=(2, 16, 5, 6), K=16, stride=2)
PROJECTED = Case(shape=(2, 16, 5, 6), K=16, stride=2, project=True, kept=(5, 9, 3))
PICKED = Case(shape=(5, 16, 3, 3), picked=0.6)
# Of two chunks, two tiles to a chunk of the projection and one to a chunk of conv1.
PICKED_PROJECTED = Case(shape=(5, 16, 7, 6), K=16, stride=2, project=True, picked=0.4)
HALF = Case(shape=(3, 16, 5, 5), dtype=torch.float16, moments=True)

# File, the text to replace (once in the file), what takes its place, and the case that tells.
MUTANTS: dict[str, tuple[str, str, str, Case | Conv]] = {
    "the forward misses a tap": (
        "_conv_forward",
        "for tap in tl.static_range(TAPS * TAPS):",
        "for tap in tl.static_range(TAPS * TAPS - 1):",
        CONV,
    ),
    "the forward misses a block of channels": (
        "_conv_forward",
        "for c_start in tl.range(0, C, BLOCK_C, num_stages=1):",
        "for c_start in tl.range(0, C - BLOCK_C, BLOCK_C, num_stages=1):",
        CONV_BLOCKS,
    ),
    "the zeros around the image are normalised": (
        "_normalize",
        "return tl.where(inside & passes(z), z, 0.0)",
        "return tl.where(passes(z), z, 0.0)",
        CONV,
    ),
    "the forward's first sample is always the first": (
        "_conv_forward",
        "y *= tl.load(row_scale_ptr + first + n,",
        "y *= tl.load(row_scale_ptr + n,",
        CONV,
    ),
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
    "the moments miss the last partial": (
        "_moments",
        "count = 0.0\n    for p_start in range(0, P, BLOCK_P):",
        "count = 0.0\n    for p_start in range(0, P - 1, BLOCK_P):",
        CONV,
    ),
    "the backward's sums miss the last partial": (
        "_moments",
        "total = tl.zeros_like(c).to(tl.float32)\n    for p_start in range(0, P, BLOCK_P):",
        "total = tl.zeros_like(c).to(tl.float32)\n    for p_start in range(0, P - 1, BLOCK_P):",
        CONV,
    ),
    "the slab's last chunk is lost": (
        "_conv_dx",
        "sum_partials(slab_ptr, t, t < size, size, chunks, BLOCK_P)",
        "sum_partials(slab_ptr, t, t < size, size, chunks - 1, BLOCK_P)",
        CONV_TILES,
    ),
    "the mask forgets the bias": (
        "_conv_dgrad",
        "kept = passes(x * z_scale[None, :] + z_bias[None, :]) & mc_ok",
        "kept = passes(x * z_scale[None, :]) & mc_ok",
        CONV,
    ),
    "the mask is that of the sum": (
        "_conv_dgrad",
        "kept = passes(x * z_scale[None, :] + z_bias[None, :]) & mc_ok",
        "kept = passes(acc) & mc_ok",
        CONV,
    ),
    "the dgrad's taps are the forward's": (
        "_conv_dgrad",
        "out_y + (odd_y - tap_y) // STRIDE,",
        "out_y + (odd_y + tap_y) // STRIDE,",
        CONV,
    ),
    "the dgrad misses a block of channels": (
        "_conv_dgrad",
        "for k_start in tl.range(0, KEPT, BLOCK_K, num_stages=1):",
        "for k_start in tl.range(0, KEPT - BLOCK_K, BLOCK_K, num_stages=1):",
        CONV_BLOCKS,
    ),
    "the parities' rows and columns are exchanged": (
        "_conv_dgrad",
        "in_y, in_x = out_y * STRIDE + odd_y, out_x * STRIDE + odd_x",
        "in_y, in_x = out_y * STRIDE + odd_x, out_x * STRIDE + odd_y",
        CONV_STRIDED,
    ),
    "a parity's partial replaces another's": (
        "_conv_dgrad",
        "row = pid * tl.num_programs(2) + parity",
        "row = pid * tl.num_programs(2) + parity // 2",
        CONV_STRIDED,
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
    "BatchNorm's backward has no slope": (
        "_conv_gradient",
        "slope = rstd * rstd * (sum_dzh / ROWS)",
        "slope = 0.0 * mean_dz",
        CONV,
    ),
    "the mean of dz is its sum": (
        "_conv_gradient",
        "mean_dz = sum_dz / ROWS",
        "mean_dz = sum_dz",
        CONV,
    ),
    "BatchNorm's backward is applied outside the image": (
        "_conv_gradient",
        "g = tl.where(ok, g * h_scale[None, :], 0.0)",
        "g = g * h_scale[None, :]",
        CASE,
    ),
    "the norm's dweight is not normalised": (
        "_conv_gradient",
        "dweight = (sum_dzh * rstd)",
        "dweight = sum_dzh",
        CONV,
    ),
    "the dgrad forgets row_scale": (
        "_conv_dgrad",
        "*out.tensors, out.dweight, out.dbias, out.row_scale, out.order, weight,",
        "*out.tensors, out.dweight, out.dbias, None, out.order, weight,",
        CONV,
    ),
    "the wgrad forgets row_scale": (
        "_conv_wgrad",
        "*out.tensors, out.row_scale, out.order,",
        "*out.tensors, None, out.order,",
        CONV,
    ),
    "the wgrad's taps are in reverse": (
        "_conv_wgrad",
        "at = at[:, None] + ((tap - PAD) * C + c)[None, :]",
        "at = at[:, None] + ((PAD - tap) * C + c)[None, :]",
        CONV,
    ),
    "the wgrad keeps its last tile alone": (
        "_conv_wgrad",
        "acc = product(tl.trans(a), operand(g, dtype), acc)",
        "acc = product(tl.trans(a), operand(g, dtype), tl.zeros_like(acc))",
        CONV_TILES,
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
        "if SUBSET and projection:",
        "if SUBSET and tap_row > TAPS:",
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
        "dx = tl.where(dz_ok, dx * scale[None, :], 0.0)",
        "dx = dx * scale[None, :]",
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
# Of the kernel that leaves both gradients of a convolution.
_BOTH = "_conv_backward"
MUTANTS |= {
    "both gradients' row of taps meets the wrong row of pixels": (
        _BOTH,
        "samples, at + W * K,",
        "samples, at,",
        CONV,
    ),
    "both gradients reach past the row's end": (_BOTH, "& (g_x >= 0) & (g_x < W)", "", CONV),
    "both gradients' taps are in reverse": (
        _BOTH,
        "k * weight_stride_k + (2 - j) * weight_stride_w",
        "k * weight_stride_k + (j % 3) * weight_stride_w",
        CONV,
    ),
    "both gradients: the mask forgets the bias": (
        _BOTH,
        "kept = passes(z) & mc_ok",
        "kept = passes(v * z_scale[None, :]) & mc_ok",
        CONV,
    ),
    "both gradients: the weight's is of what ReLU stopped": (
        _BOTH,
        "operand(tl.where(kept, z, 0.0), dtype)",
        "operand(tl.where(mc_ok, z, 0.0), dtype)",
        CONV,
    ),
    "both gradients: the weight's is the last tile's alone": (
        _BOTH,
        "product(a, g, dweight)",
        "product(a, g, tl.zeros_like(dweight))",
        CONV_TILES,
    ),
    "both gradients: the weight's rows of taps are exchanged": (
        _BOTH,
        "tl.store(slab_ptrs + weight_stride_h, dweight1, mask=slab_ok)",
        "tl.store(slab_ptrs + weight_stride_h, dweight0, mask=slab_ok)",
        CONV,
    ),
    "both gradients: the sum is of dz * z": (
        _BOTH,
        "tl.where(mc_ok, dz * v, 0.0)",
        "tl.where(mc_ok, dz * z, 0.0)",
        CONV,
    ),
    "both gradients forget row_scale": (
        _BOTH,
        "out.dweight, out.dbias, out.row_scale, weight,",
        "out.dweight, out.dbias, None, weight,",
        CONV,
    ),
    "both gradients take dy's first samples": (
        _BOTH,
        "samples_at(g_ptr, g_index_ptr, first, n, ok, H * W * K)",
        "samples_at(g_ptr, None, first, n, ok, H * W * K)",
        PICKED,
    ),
    "both gradients in evaluation are the training's": (
        _BOTH,
        "TRAINING=out.training",
        "TRAINING=True",
        Case(shape=(2, 16, 2, 2), training=(True, False)),
    ),
}


def check(case: Case | Conv, device: str) -> None:
    if isinstance(case, Conv):
        norm_relu_conv2d_equality.check(case, device)
    else:
        preact_unit_equality.check(case, device)


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    kernel_mutants.take(tmp_path, monkeypatch, "preact_unit")
    for case, both in dict.fromkeys((case, file == _BOTH) for file, *_, case in MUTANTS.values()):
        with small_tiles(fuses=both):
            check(case, device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    kernel_mutants.take(tmp_path, monkeypatch, *MUTANTS[name][:3])
    both = MUTANTS[name][0] == _BOTH
    with small_tiles(fuses=both), pytest.raises(AssertionError, match="is off"):
        check(MUTANTS[name][3], device)
