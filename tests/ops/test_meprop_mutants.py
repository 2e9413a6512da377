"""Selections broken on purpose: the checks of the ordinary tests must fail for each of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ops.batch_norm_relu_equality import LAYOUTS
from ops.kernel_mutants import KERNELS, take
from ops.meprop_equality import check_channels, check_row, drawn, small_blocks

from fastres.ops._meprop import select_channels, select_row

# The text to replace (once in kernels/meprop.py, or else in _moments.py) and what takes its place.
MUTANTS: dict[str, tuple[str, str]] = {
    "the sign counts": ("bitcast=True) & 0x7FFFFFFF", "bitcast=True)"),
    "NaNs are told apart": ("return tl.minimum(bits, INFINITY + 1)", "return bits"),
    "NaN is infinity": ("tl.minimum(bits, INFINITY + 1)", "tl.minimum(bits, INFINITY)"),
    "the histogram counts past the end": (
        "mask=ok & ((key >> 8) == found)",
        "mask=((key >> 8) == found)",
    ),
    "the histogram forgets the digits before": (
        "mask=ok & ((key >> 8) == found)",
        "mask=ok",
    ),
    "the last digit is not looked at": (
        "shift = 8 * (DIGITS - 1 - done)",
        "shift = 8 * tl.maximum(DIGITS - 1 - done, 1)",
    ),
    "a block's counts replace the last one's": ("counts += tl.histogram", "counts = tl.histogram"),
    "what lies above is not taken off": ("wanted -= tl.sum(", "wanted -= 0 * tl.sum("),
    "ties are all kept": ("    if equal > ties:", "    if equal < 0:"),
    "ties go to the highest index": ("last -= from_end", "last = from_end"),
    "ties go by the order in memory": (
        "return (p % C) * S + p // C if CHANNELS_LAST else p",
        "return p",
    ),
    "the k-th is dropped": ("keep = keep | ((key == threshold) &", "keep = keep & ("),
    "dy is read as if it were dense": (
        "p * stride_c if FLAT else (p // C) * stride_s + (p % C) * stride_c",
        "p * stride_c",
    ),
    "every example is the first": ("row_ptr = dy_ptr + n * dy_stride_n", "row_ptr = dy_ptr"),
    "sums keep their sign": (
        "tl.abs(tl.load(dy_ptr + offsets, mask=ok, other=0.0).to(tl.float32))",
        "tl.load(dy_ptr + offsets, mask=ok, other=0.0).to(tl.float32)",
    ),
    "the sums miss a row of the last tile": (
        "ok = tile_mask(m < end, c_ok, M_AXIS)",
        "ok = tile_mask(m < end - 1, c_ok, M_AXIS)",
    ),
    "the sums of a chunk are its last tile's": ("total += tl.abs(", "total = tl.abs("),
    "the merge forgets the last partial": (
        "sum_partials(partial_ptr + batch * P * C, c, c_ok, C, P, BLOCK_P)",
        "sum_partials(partial_ptr + batch * P * C, c, c_ok, C, P - 1, BLOCK_P)",
    ),
    "every block's places begin at 0": ("    before += ", "    before += 0 * "),
}  # fmt: skip


def _gradients(device: str) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    for shape, values, layout in (
        ((2, 35, 3, 2), "integers", "nhwc"),
        ((3, 35, 3, 2), "grid", "nhwc_sliced_c"),
        ((3, 35, 3, 2), "grid", "nchw"),
    ):
        dy = drawn(shape, values, generator)
        dy[0, 7, 1, 1], dy[0, 30, 1, 1], dy[1, 3, 0, 0], dy[1, 2, 0, 0] = (
            torch.nan, -torch.nan, torch.inf, -torch.inf,
        )  # fmt: skip
        dy.view(torch.int32)[0, 30, 1, 1] |= 5  # another payload
        yield LAYOUTS[layout](dy.to(device))
    # Many channels of nearly equal sums, all finite.
    yield drawn((9, 70, 2, 2), "grid", generator).to(device)
    yield drawn((40, 60, 1, 1), "integers", generator).to(device)


def _check_all(device: str) -> None:
    with small_blocks():
        for dy in _gradients(device):
            C = dy.shape[1]
            for k in (1, C // 3, C - 1):
                check_channels(select_channels, dy, k)
                check_row(select_row, dy[:2], k)


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "meprop")
    _check_all(device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    old, changed = MUTANTS[name]
    file = "meprop" if old in (KERNELS / "meprop.py").read_text() else "_moments"
    take(tmp_path, monkeypatch, file, old, changed)
    with pytest.raises(AssertionError, match=r"other (elements|channels) are kept"):
        _check_all(device)
