"""A convolution's kernels broken on purpose: the ordinary check must fail for each of them."""

from pathlib import Path

import pytest
from ops.conv_mutants import BOTH, see_that_a_copy_passes, see_that_it_fails
from ops.norm_relu_conv2d_equality import Case, check

# Three tiles of 32 pixels, one to a chunk, the last in part; in fp32 one block of 16 channels.
CASE = Case(shape=(3, 16, 5, 5), K=16, row_scale=True, seed=2)
# Six tiles, two to a chunk.
TILES = Case(shape=(4, 16, 7, 6), K=16)
BLOCKS = Case(shape=(2, 32, 3, 4))
STRIDED = Case(shape=(2, 16, 5, 6), K=16, stride=2)
SCALED = Case(shape=(3, 16, 5, 5), K=16, scale=0.5)

# File, the text to replace (once in the file), what takes its place, and the case that tells.
MUTANTS: dict[str, tuple[str, str, str, Case]] = {
    "the forward misses a tap": (
        "_conv_forward",
        "for tap in tl.static_range(TAPS * TAPS):",
        "for tap in tl.static_range(TAPS * TAPS - 1):",
        CASE,
    ),
    "the forward misses a block of channels": (
        "_conv_forward",
        "for c_start in tl.range(0, C, BLOCK_C, num_stages=1):",
        "for c_start in tl.range(0, C - BLOCK_C, BLOCK_C, num_stages=1):",
        BLOCKS,
    ),
    "the zeros around the image are normalised": (
        "_normalize",
        "tl.maximum(tl.where(inside, z, outside), 0.0,",
        "tl.maximum(z, 0.0,",
        CASE,
    ),
    "the forward's first sample is always the first": (
        "_conv_forward",
        "y *= tl.load(row_scale_ptr + first + n,",
        "y *= tl.load(row_scale_ptr + n,",
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
    "the slab's last chunk is lost": (
        "_conv_dx",
        "sum_partials(slab_ptr, t, t < size, size, chunks, BLOCK_P)",
        "sum_partials(slab_ptr, t, t < size, size, chunks - 1, BLOCK_P)",
        TILES,
    ),
    "the mask forgets the bias": (
        "_conv_dgrad",
        "kept = passes(x * z_scale[None, :] + z_bias[None, :]) & mc_ok",
        "kept = passes(x * z_scale[None, :]) & mc_ok",
        CASE,
    ),
    "the mask is that of the sum": (
        "_conv_dgrad",
        "kept = passes(x * z_scale[None, :] + z_bias[None, :]) & mc_ok",
        "kept = passes(acc) & mc_ok",
        CASE,
    ),
    "the dgrad's taps are the forward's": (
        "_conv_dgrad",
        "out_y + (odd_y - tap_y) // STRIDE,",
        "out_y + (odd_y + tap_y) // STRIDE,",
        CASE,
    ),
    "the dgrad misses a block of channels": (
        "_conv_dgrad",
        "for k_start in tl.range(0, KEPT, BLOCK_K, num_stages=1):",
        "for k_start in tl.range(0, KEPT - BLOCK_K, BLOCK_K, num_stages=1):",
        BLOCKS,
    ),
    "the parities' rows and columns are exchanged": (
        "_conv_dgrad",
        "in_y, in_x = out_y * STRIDE + odd_y, out_x * STRIDE + odd_x",
        "in_y, in_x = out_y * STRIDE + odd_x, out_x * STRIDE + odd_y",
        STRIDED,
    ),
    "a parity's partial replaces another's": (
        "_conv_dgrad",
        "row = pid * tl.num_programs(2) + parity",
        "row = pid * tl.num_programs(2) + parity // 2",
        STRIDED,
    ),
    "BatchNorm's backward has no slope": (
        "_conv_gradient",
        "slope = -scale * (rstd * rstd * (sum_dzh / ROWS))",
        "slope = 0.0 * scale",
        CASE,
    ),
    "the mean of dz is its sum": (
        "_conv_gradient",
        "offset = -scale * (sum_dz / ROWS)",
        "offset = -scale * sum_dz",
        CASE,
    ),
    "the slope goes by h, the offset by h - mean": (
        "_conv_gradient",
        " - slope * mean",
        "",
        CASE,
    ),
    "the norm's dweight is not normalised": (
        "_conv_gradient",
        "dweight = (sum_dzh * rstd)",
        "dweight = sum_dzh",
        CASE,
    ),
    "the dgrad forgets row_scale": (
        "_conv_dgrad",
        "*out.tensors, out.dweight, out.dbias, out.row_scale, out.order, weight,",
        "*out.tensors, out.dweight, out.dbias, None, out.order, weight,",
        CASE,
    ),
    "the dgrad forgets scale": ("_conv_dgrad", "acc * tl.cast(scale, tl.float32)", "acc", SCALED),
    "the wgrad forgets scale": ("_conv_wgrad", "acc * tl.cast(scale, tl.float32)", "acc", SCALED),
    "the wgrad forgets row_scale": (
        "_conv_wgrad",
        "*out.tensors, out.row_scale, out.order,",
        "*out.tensors, None, out.order,",
        CASE,
    ),
    "the wgrad's taps are in reverse": (
        "_conv_wgrad",
        "at = at[:, None] + ((tap - PAD) * C + c)[None, :]",
        "at = at[:, None] + ((PAD - tap) * C + c)[None, :]",
        CASE,
    ),
    "the wgrad keeps its last tile alone": (
        "_conv_wgrad",
        "acc = product(tl.trans(a), g, acc)",
        "acc = product(tl.trans(a), g, tl.zeros_like(acc))",
        TILES,
    ),
}
MUTANTS |= {
    "both gradients' row of taps meets the wrong row of pixels": (
        BOTH,
        "samples, at + W * K,",
        "samples, at,",
        CASE,
    ),
    "both gradients reach past the row's end": (BOTH, "& (g_x >= 0) & (g_x < W)", "", CASE),
    "both gradients' taps are in reverse": (
        BOTH,
        "k * weight_stride_k + (2 - j) * weight_stride_w",
        "k * weight_stride_k + (j % 3) * weight_stride_w",
        CASE,
    ),
    "both gradients: the mask forgets the bias": (
        BOTH,
        "kept = passes(z) & mc_ok",
        "kept = passes(v * z_scale[None, :]) & mc_ok",
        CASE,
    ),
    "both gradients: the weight's is of what ReLU stopped": (
        BOTH,
        "operand(tl.where(kept, z, zero), dtype)",
        "operand(tl.where(mc_ok, z, zero), dtype)",
        CASE,
    ),
    "both gradients: the weight's is the last tile's alone": (
        BOTH,
        "product(a, g, dweight)",
        "product(a, g, tl.zeros_like(dweight))",
        TILES,
    ),
    "both gradients: the weight's rows of taps are exchanged": (
        BOTH,
        "tl.store(slab_ptrs + weight_stride_h, dweight1 * scale, mask=slab_ok)",
        "tl.store(slab_ptrs + weight_stride_h, dweight0 * scale, mask=slab_ok)",
        CASE,
    ),
    "both gradients: the sum is of dz * z": (
        BOTH,
        "tl.where(mc_ok, dz * v, 0.0)",
        "tl.where(mc_ok, dz * z, 0.0)",
        CASE,
    ),
    "both gradients: the input's forgets scale": (BOTH, "acc *= scale", "acc *= 1.0", SCALED),
    "both gradients: the weight's forgets scale": (BOTH, "dweight2 * scale", "dweight2", SCALED),
    "both gradients forget row_scale": (
        BOTH,
        "out.dweight, out.dbias, out.row_scale, weight,",
        "out.dweight, out.dbias, None, weight,",
        CASE,
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
