"""What norm_relu_conv2d, preact_unit and their Modules refuse, in words."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastres.ops import Norm, NormReLUConv2d, PreActUnit, _register, norm_relu_conv2d, preact_unit

CHANGED = dict[str, Any]


def _norm(**changes: Any) -> Norm:
    return Norm(torch.zeros(16), torch.ones(16), training=True)._replace(**changes)


def _norms(name: str) -> Iterator[tuple[CHANGED, str]]:
    """What is wrong with a norm of 16 channels, under the name that the words give it."""
    for part in ("running_mean", "running_var", "weight", "bias"):
        wrong = _norm(**{part: torch.ones(8)})
        yield {name: wrong}, rf"^{name}: {part}: expected \[16\] on cpu, got \[8\] on cpu"
        wrong = _norm(**{part: torch.ones(16).half()})
        yield {name: wrong}, rf"^{name}: {part}: expected torch.float32, got torch.float16"
        wrong = _norm(**{part: torch.ones(16, device="meta")})
        yield {name: wrong}, rf"^{name}: {part}: expected \[16\] on cpu, got \[16\] on meta"
    yield {name: _norm(running_var=None)}, rf"^{name}: .*expected both or neither, got one"
    none = _norm(running_mean=None, running_var=None, training=False)
    yield {name: none}, rf"^{name}: .*needed where training=False, got None"
    yield {name: _norm(momentum=None)}, rf"^{name}: momentum: expected a float, got None"
    strided = _norm(running_mean=torch.ones(32)[::2])
    yield {name: strided}, rf"^{name}: running_mean: expected contiguous, got stride \(2,\)"


def _weights(name: str, K: int, C: int, taps: int) -> Iterator[tuple[CHANGED, str]]:
    shape = torch.zeros(K, C, taps, taps)
    sizes = rf"^{name}: expected \[K, {C}, h, w\] of .*{taps}x{taps}.*, got "
    yield {name: shape[:, :1]}, sizes + rf"\[{K}, 1, {taps}, {taps}\]"
    yield {name: torch.zeros(K, C, 5, 5)}, sizes + rf"\[{K}, {C}, 5, 5\]"
    yield {name: shape[0]}, sizes + rf"\[{C}, {taps}, {taps}\]"
    dtypes = rf"^{name}: expected torch.float32 or torch.float32 on cpu, got "
    yield {name: shape.half()}, dtypes + "torch.float16 on cpu"
    yield {name: shape.to("meta")}, dtypes + "torch.float32 on meta"


def _row_scales() -> Iterator[tuple[CHANGED, str]]:
    words = r"^row_scale: expected \[2\], torch.float32 on cpu, got "
    yield {"row_scale": torch.ones(3)}, words + r"\[3\], torch.float32 on cpu"
    yield {"row_scale": torch.ones(2).half()}, words + r"\[2\], torch.float16 on cpu"
    yield {"row_scale": torch.ones(2, device="meta")}, words + r"\[2\], torch.float32 on meta"


def _inputs() -> Iterator[tuple[CHANGED, str]]:
    x = torch.zeros(2, 16, 4, 4)
    yield {"x": x[0]}, r"x: expected \[N, C, H, W\], got shape \[16, 4, 4\]"
    yield {"x": x.int()}, r"x: expected one of .*float32.* on cpu, got torch.int32"
    yield {"x": x.double()}, r"x: expected one of .* on cpu, got torch.float64"
    one = r"expected more than 1 value per channel in training, got shape \[1, 16, 1, 1\]"
    yield {"x": x[:1, :, :1, :1]}, one
    yield {"stride": 3}, "^stride: expected 1 or 2, got 3"
    yield from _row_scales()


def _wrong_for_the_convolution() -> Iterator[tuple[CHANGED, str]]:
    yield from _inputs()
    yield from _norms("norm")
    yield from _weights("weight", 32, 16, 3)
    narrow = torch.zeros(8, 16, 3, 3)
    yield {"weight": narrow}, r"^weight: expected channels in multiples of 16, got \[8, 16, 3, 3\]"
    residual = torch.zeros(2, 32, 4, 4)
    words = r"^residual: expected \[2, 32, 4, 4\], torch.float32 on cpu, got "
    yield {"residual": residual[:, :16]}, words + r"\[2, 16, 4, 4\], torch.float32 on cpu"
    yield {"residual": residual.half()}, words + r"\[2, 32, 4, 4\], torch.float16 on cpu"
    yield {"residual": residual.to("meta")}, words + r"\[2, 32, 4, 4\], torch.float32 on meta"
    halved = r"^residual: expected \[2, 32, 2, 2\], .*, got \[2, 32, 4, 4\]"
    yield {"residual": residual, "stride": 2}, halved


def _wrong_for_the_unit() -> Iterator[tuple[CHANGED, str]]:
    yield from _inputs()
    yield from _norms("norm1")
    yield from _norms("norm2")
    yield from _weights("weight1", 16, 16, 3)
    yield from _weights("weight2", 16, 16, 3)
    yield from _weights("shortcut_weight", 16, 16, 1)
    yield {"weight1": torch.zeros(8, 16, 3, 3)}, "^weight1: expected channels in multiples of 16"
    wide, half = torch.zeros(32, 16, 3, 3), torch.zeros(16, 16, 3, 3).half()
    square = r"^weight2: expected \[16, 16, 3, 3\], torch.float32, got \[32, 16, 3, 3\]"
    yield {"weight2": wide}, square
    x = {"x": torch.zeros(2, 16, 4, 4).half()}
    mixed = r"^weight2: .*, torch.float32, got .*, torch.float16"
    yield x | {"weight2": half}, mixed
    projection = torch.zeros(16, 16, 1, 1)
    mixed = r"^shortcut_weight: .*, torch.float32, got .*, torch.float16"
    yield x | {"shortcut_weight": projection.half()}, mixed
    short = r"^shortcut_weight: expected \[16, 16, 1, 1\], .*, got \[32, 16, 1, 1\]"
    yield {"shortcut_weight": wide[..., :1, :1]}, short
    needed = "^shortcut_weight: needed where the shape changes, from 16 channels to 16 at stride 2"
    yield {"stride": 2}, needed
    to_32 = {
        "weight1": wide,
        "weight2": torch.zeros(32, 32, 3, 3),
        "norm2": Norm(None, None, training=True),
    }
    yield to_32, "from 16 channels to 32 at stride 1, got None"
    for kept in ([16, 16], [0, 16, 16], [16, 17, 16]):
        words = rf"^kept: expected three numbers of channels, 1 to 16, got \[{kept[0]}, {kept[1]}"
        yield {"kept": kept}, words
    index, position = torch.tensor([1]), torch.tensor([-1, 0])
    yield {"index": index}, "^index and position: expected both or neither, got one"
    yield {"position": position}, "^index and position: expected both or neither, got one"
    both = {"index": index, "position": position}
    yield both | {"row_scale": torch.ones(2)}, "^index and row_scale: expected one of the two"
    for name, v in both.items():
        words = rf"^{name}: expected one dimension of torch.int64 on cpu, got "
        yield both | {name: v[None]}, words + rf"\[1, {len(v)}\]"
        yield both | {name: v.int()}, words + r".* torch.int32 on cpu"
        yield both | {name: v.to("meta")}, words + r".* torch.int64 on meta"
    yield both | {"position": position[:1]}, r"^position: expected \[2\], got \[1\]"
    few = both | {"x": torch.zeros(2, 16, 1, 1)}
    yield few, r"^norm1: expected more than 1 value .* in training, got shape \[1, 16, 1, 1\]"
    frozen = few | {"norm1": _norm(training=False)}
    yield frozen, r"^norm2: expected more than 1 value .* in training, got shape \[1, 16, 1, 1\]"


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # Also where a GPU is: on CPU tensors these are the kernels' own demands.
    monkeypatch.setattr(_register, "INTERPRET", True)


@pytest.mark.parametrize(("change", "words"), list(_wrong_for_the_convolution()))
def test_the_convolution_refuses_in_words(change: CHANGED, words: str) -> None:
    right: CHANGED = {
        "x": torch.zeros(2, 16, 4, 4),
        "norm": _norm(),
        "weight": torch.zeros(32, 16, 3, 3),
    }
    with pytest.raises(ValueError, match=words):
        norm_relu_conv2d(**(right | change))


@pytest.mark.parametrize(("change", "words"), list(_wrong_for_the_unit()))
def test_the_unit_refuses_in_words(change: CHANGED, words: str) -> None:
    weight = torch.zeros(16, 16, 3, 3)
    right: CHANGED = {
        "x": torch.zeros(2, 16, 4, 4),
        "norm1": _norm(),
        "weight1": weight,
        "norm2": _norm(),
        "weight2": weight,
    }
    with pytest.raises(ValueError, match=words):
        preact_unit(**(right | change))


def test_the_modules_refuse_in_words() -> None:
    with pytest.raises(ValueError, match="stride: expected 1 or 2, got 4"):
        NormReLUConv2d(16, 16, stride=4)
    with pytest.raises(ValueError, match="kernel_size: expected 1 or 3, got 5"):
        NormReLUConv2d(16, 16, 5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        PreActUnit(16, 16)(torch.zeros(1, 16, 1, 1))


def test_a_cpu_takes_any_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteens are the kernels' demand alone."""
    monkeypatch.setattr(_register, "INTERPRET", False)
    y = norm_relu_conv2d(
        torch.randn(2, 3, 4, 4), Norm(None, None, training=True), torch.randn(5, 3, 3, 3)
    )
    assert y.shape == (2, 5, 4, 4)


def test_the_registered_ops_refuse_a_tensor_that_has_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_register, "INTERPRET", False)
    x, weight = torch.zeros(2, 16, 4, 4), torch.zeros(16, 16, 3, 3)
    none = [None] * 4
    with pytest.raises(ValueError, match="on cpu: call fastres.ops.norm_relu_conv2d"):
        torch.ops.fastres.norm_relu_conv2d(x, *none, weight, None, None, 1.0, 1, 1e-5, "", 1)
    with pytest.raises(ValueError, match="on cpu: call fastres.ops.preact_unit"):
        torch.ops.fastres.preact_unit(
            x, None, 0, None, None, *none, weight, *none, weight, None, None, 1.0, 1, 1e-5, 1e-5,
            False, [16, 16, 16], "", 1,
        )  # fmt: skip
