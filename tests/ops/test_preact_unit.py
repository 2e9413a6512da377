"""preact_unit against its reference in fp64: shapes, layouts, dtypes, modes, values, corners."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.batch_norm_relu_equality import LAYOUTS
from ops.norm_relu_conv2d_equality import VALUES, WEIGHT_LAYOUTS, few_programs
from ops.preact_unit_equality import Case, check

HALF = [torch.float16, torch.bfloat16]


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Case:
    channels = st.sampled_from([16, 32, 48])
    project = draw(st.booleans())
    C = draw(channels)
    sampling = draw(st.sampled_from(["all", "row", "subset"]))
    layouts = st.sampled_from(list(LAYOUTS))
    case = Case(
        shape=(draw(st.integers(1, 4)), C, draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        K=draw(channels) if project else C,
        stride=draw(st.sampled_from([1, 2])) if project else 1,
        project=project,
        x_layout=draw(layouts),
        dy_layout=draw(layouts),
        weight_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        dtype=draw(st.sampled_from(dtypes)),
        half_norm=draw(st.booleans()),
        half_weight=draw(st.booleans()),
        norm_weight=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        training=(draw(st.booleans()), draw(st.booleans())),
        running=draw(st.booleans()),
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0])),
        eps=(draw(st.sampled_from([1e-5, 0.1])), draw(st.sampled_from([1e-5, 1e-3]))),
        scale=draw(st.sampled_from([1.0, 2.5, 0.0])),
        row_scale=sampling == "row",
        picked=draw(st.sampled_from([0.25, 0.5, 1.0])) if sampling == "subset" else None,
        moments=draw(st.booleans()),
        values=draw(st.sampled_from(VALUES)),
        zero_weight=draw(st.sampled_from([False, False, False, True])),
        seed=draw(st.integers(0, 2**16)),
    )
    # One value per channel is an error in training.
    trains1, trains2 = case.training
    trains = (trains1 and case.seen1 != 1, trains2 and case.seen2 != 1)
    return dataclasses.replace(case, training=trains)


@pytest.mark.parametrize("dtypes", [[torch.float32], HALF], ids=["fp32", "half"])
@given(data=st.data())
def test_equals_the_reference(device: str, dtypes: list[torch.dtype], data: st.DataObject) -> None:
    with few_programs():
        check(data.draw(cases(dtypes)), device)
