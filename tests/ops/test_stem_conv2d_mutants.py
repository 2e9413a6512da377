"""The stem's kernels broken on purpose: the ordinary check must fail for each of them."""

from pathlib import Path

import pytest
import torch
from ops import kernel_mutants
from ops.stem_conv2d_equality import Case, check, small_tiles

# Nine tiles, three to a chunk; in the other three tiles, the last in part.
TILES = Case(shape=(4, 3, 9, 8))
CASE = Case(shape=(3, 3, 5, 5))
HALF = Case(shape=(3, 3, 5, 5), dtype=torch.float16)
NCHW = Case(shape=(3, 3, 5, 5), x_layout="nchw")
BLOCKS = Case(shape=(2, 3, 3, 4), K=80, moments=False)

# File, the text to replace (once in the file), what takes its place, and the case that tells.
_STEM = "stem_conv2d"
MUTANTS: dict[str, tuple[str, str, str, Case]] = {
    "a patch misses its last tap": (_STEM, "lanes < 9 * C", "lanes < 8 * C", CASE),
    "a patch's rows and columns are exchanged": (
        _STEM,
        "((tap_y - 1) * W + tap_x - 1)",
        "((tap_x - 1) * W + tap_y - 1)",
        CASE,
    ),
    "a patch reaches past the row's end": (_STEM, "& (in_x >= 0) & (in_x < W)", "", CASE),
    "a patch reaches into the next sample": (_STEM, "& (in_y >= 0) & (in_y < H)", "", CASE),
    "NCHW is read as NHWC": (
        _STEM,
        "nhwc = x.is_contiguous(memory_format=torch.channels_last)",
        "nhwc = True",
        NCHW,
    ),
    "every sample is the chunk's first": (
        _STEM,
        "at = (samples + (y * W + x) * STRIDE_W)[:, None]",
        "at = (0 * samples + (y * W + x) * STRIDE_W)[:, None]",
        CASE,
    ),
    "the forward's last block of K is its first": (
        _STEM,
        "k_ok = k < K\n    weight_at, weight_ok",
        "k_ok = k < BLOCK_K\n    weight_at, weight_ok",
        BLOCKS,
    ),
    "the moments are of what is not rounded": (
        _STEM,
        "tl.zeros([BLOCK_M, BLOCK_K], tl.float32)).to(dtype)",
        "tl.zeros([BLOCK_M, BLOCK_K], tl.float32))",
        HALF,
    ),
    "the moments count pixels past the end": (
        _STEM,
        "count = tl.minimum(end - m_start, BLOCK_M)",
        "count = tl.minimum(end, 0) + BLOCK_M",
        CASE,
    ),
    "the moments take pixels past the end": (
        "_moments",
        "spread = tl.where(ok, v - tile_mean[None, :], 0.0)",
        "spread = v - tile_mean[None, :]",
        CASE,
    ),
    "a chunk's moments are those of its last tile": (
        "_moments",
        "delta = tile_mean - mean\n    mean += delta * (count / total)",
        "delta = tile_mean - mean\n    mean = tile_mean",
        TILES,
    ),
    "a chunk's squares replace another's": (
        _STEM,
        "(chunks + pid) * K",
        "(chunks + pid // 2) * K",
        TILES,
    ),
    "the moments are in other chunks than a unit's": (
        _STEM,
        "cut, K = moments_pixels(y.shape, y.dtype), weight.shape[0]",
        "cut, K = pixels(y.numel() // y.shape[1], 128, P=partial.shape[1]), weight.shape[0]",
        TILES,
    ),
    "the weight's gradient is the last tile's alone": (
        _STEM,
        "product(tl.trans(a), operand(dy, dtype), acc)",
        "product(tl.trans(a), operand(dy, dtype), tl.zeros_like(acc))",
        TILES,
    ),
    "the weight's gradient is of its first block of K": (
        _STEM,
        "k_ok = k < K\n    acc",
        "k_ok = k < BLOCK_K\n    acc",
        BLOCKS,
    ),
    "the slab's last chunk is lost": (
        _STEM,
        "merged_sums(slab[None], dweight)",
        "merged_sums(slab[None, :-1], dweight)",
        TILES,
    ),
    "the weight's gradient lies as a contiguous weight would": (
        _STEM,
        "slab.stride(0), *weight.stride()",
        "slab.stride(0), *weight.contiguous().stride()",
        Case(shape=(2, 3, 3, 4), weight_layout="nhwc"),
    ),
    "the sum of the slab misses its last block": (
        "_moments",
        "total = tl.zeros_like(c).to(tl.float32)\n    for p_start in range(0, P, BLOCK_P):",
        "total = tl.zeros_like(c).to(tl.float32)\n    for p_start in range(0, P - 1, BLOCK_P):",
        TILES,
    ),
}


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    kernel_mutants.take(tmp_path, monkeypatch, _STEM)
    for case in dict.fromkeys(case for *_, case in MUTANTS.values()):
        with small_tiles():
            check(case, device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    file, old, changed, case = MUTANTS[name]
    kernel_mutants.take(tmp_path, monkeypatch, file, old, changed)
    with small_tiles(), pytest.raises(AssertionError, match="is off"):
        check(case, device)
