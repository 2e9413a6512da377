"""meProp's two selections on both paths: which elements, which channels, ties, NaN, layouts."""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.batch_norm_relu_equality import LAYOUTS
from ops.meprop_equality import (
    DTYPES,
    VALUES,
    channels_reference,
    check_channels,
    check_row,
    drawn,
    small_blocks,
)
from tolerances import EPS, EPSILONS, sum_epsilons
from torch import Tensor

from fastres.ops._meprop import select_channels, select_row

SELECTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., None]]] = {
    "row": (select_row, check_row),
    "channels": (select_channels, check_channels),
}


def _width(selection: str, shape: tuple[int, ...]) -> int:
    return shape[1] if selection == "channels" else shape[1] * shape[2] * shape[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
@given(data=st.data())
def test_equals_the_reference(
    path: str, selection: str, dtype: torch.dtype, device: str, data: st.DataObject
) -> None:
    """Any shape and layout, k from 1 to all: the very elements that a stable sort puts first."""
    small = st.integers(1, 5)
    C = data.draw(st.one_of(st.integers(1, 20), st.just(70)), label="C")
    shape = (data.draw(st.integers(0, 3), label="N"), C, data.draw(small), data.draw(small))
    width = _width(selection, shape)
    k = data.draw(st.one_of(st.just(1), st.just(width), st.integers(1, width)), label="k")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    values = drawn(shape, data.draw(st.sampled_from(VALUES), label="values"), generator)
    dy = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)), label="layout")](
        values.to(device, dtype)
    )
    select, check = SELECTIONS[selection]
    with small_blocks() if data.draw(st.booleans(), label="small blocks") else nullcontext():
        check(select, dy, k)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_layouts(path: str, selection: str, layout: str, device: str) -> None:
    select, check = SELECTIONS[selection]
    generator = torch.Generator().manual_seed(3)
    dy = LAYOUTS[layout](drawn((3, 6, 4, 5), "integers", generator).to(device))
    with small_blocks():
        for k in (1, 4, 6):
            check(select, dy, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_of_equals_the_lowest_index_is_kept(
    path: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    """In (C, H, W) order, whichever way they lie in memory."""
    dy = LAYOUTS[layout](torch.ones(2, 5, 3, 2, device=device, dtype=dtype))
    dy[:, 2] = -1.0
    for k in range(1, 31):
        kept = (select_row(dy, k).flatten(1) != 0).tolist()
        assert kept == 2 * [[index < k for index in range(30)]]
    for k in range(1, 6):
        assert select_channels(dy, k).tolist() == list(range(k))
    dy[:, 1] = 2.0
    dy[:, 4] = -2.0
    assert [select_channels(dy, k).tolist() for k in (1, 2, 3)] == [[1], [1, 4], [0, 1, 4]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_largest_and_infinity_next(path: str, dtype: torch.dtype, device: str) -> None:
    """Every NaN alike, whatever its sign and payload."""
    dy = torch.ones(1, 6, 1, 2, device=device, dtype=dtype)
    dy[0, 2], dy[0, 3, 0, 1], dy[0, 4, 0, 0], dy[0, 5] = 8.0, -torch.inf, torch.nan, -torch.nan
    dy[0, 5, 0, 1] = torch.inf
    integers = dy.view(torch.int32 if dtype == torch.float32 else torch.int16)
    integers[0, 5, 0, 0] |= 5  # another payload
    order = [(4, 0), (5, 0), (3, 1), (5, 1), (2, 0), (2, 1), (0, 0)]
    for k in range(1, 8):
        kept = (select_row(dy, k) != 0).nonzero()[:, [1, 3]].tolist()
        assert sorted(map(tuple, kept)) == sorted(order[:k])
    # Channels 4 and 5 have NaN in their sums, 3 infinity.
    ordered = [[4], [4, 5], [3, 4, 5], [2, 3, 4, 5], [0, 2, 3, 4, 5]]
    assert [select_channels(dy, k).tolist() for k in range(1, 6)] == ordered


def test_small_numbers_are_told_apart(path: str, device: str) -> None:
    """By their bits: subnormals too, which a GPU's arithmetic may flush to zero."""
    for dtype in DTYPES:
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        dy = torch.tensor([0.0, 3.0, -4.0, 1.0, 2.0], dtype=torch.float64).mul(least).to(dtype)
        dy = dy.to(device).view(1, 5, 1, 1)
        for k, kept in ((1, [2]), (2, [1, 2]), (3, [1, 2, 4]), (4, [1, 2, 3, 4])):
            integers = select_row(dy, k).view(torch.int32 if dtype.itemsize == 4 else torch.int16)
            assert integers.flatten().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_channels_of_any_values_to_fp32s_rounding(
    path: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    """No channel is left out whose sum is larger than a kept one's by more than rounding."""
    dy = LAYOUTS[layout](torch.randn(4, 70, 9, 9).to(device, dtype))
    sums = dy.double().abs().sum((0, 2, 3))
    for k in (1, 20, 69):
        index = select_channels(dy, k)
        assert index.tolist() == sorted(set(index.tolist())) and len(index) == k
        left = torch.ones_like(sums, dtype=torch.bool).index_fill(0, index, False)
        slack = (EPSILONS + sum_epsilons(4 * 81)) * EPS * sums.max()
        assert sums[index].min() >= sums[left].max() - slack


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced_c", "nhwc_sliced_c"])
def test_64_bit_offsets(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that tensors of 2^30 elements and more take, on small ones."""
    kernels: Any = importlib.import_module("fastres.kernels.meprop")
    launch = kernels.launch

    def wide(*args: Any, **constexprs: Any) -> None:
        launch(*args, **constexprs | ({"WIDE": True} if "WIDE" in constexprs else {}))

    monkeypatch.setattr(kernels, "launch", wide)
    dy = LAYOUTS[layout](drawn((3, 6, 4, 5), "integers", torch.Generator()).to(device))
    with small_blocks():
        check_row(select_row, dy, 40)
        check_channels(select_channels, dy, 4)


def test_many_channels(path: str, device: str) -> None:
    """More than one block of them, in blocks of their true size."""
    dy = drawn((5, 2500, 1, 1), "integers", torch.Generator().manual_seed(1)).to(device)
    for k in (1, 1100, 2499):
        check_channels(select_channels, dy, k)
        check_row(select_row, dy[:2], k)


def test_two_runs_are_bitwise_the_same(path: str, device: str) -> None:
    dy = torch.randn(4, 40, 9, 9, device=device)
    for select in (select_row, select_channels):
        assert torch.equal(select(dy, 7), select(dy, 7))


def test_an_empty_batch(path: str, device: str) -> None:
    dy = torch.zeros(0, 6, 2, 2, device=device)
    assert select_row(dy, 5).shape == dy.shape
    assert select_channels(dy, 3).tolist() == channels_reference(dy, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "expanded_n", "sliced_w", "offset"])
def test_opcheck(path: str, layout: str, device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        dy = LAYOUTS[layout](torch.randn(2, 5, 3, 4, device=device).to(dtype))
        torch.library.opcheck(torch.ops.fastres.meprop_select_row.default, (dy, 7))
        torch.library.opcheck(torch.ops.fastres.meprop_select_channels.default, (dy, 3))
