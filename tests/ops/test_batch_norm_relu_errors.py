"""What batch_norm_relu refuses, in words."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastres.ops import _register, batch_norm_relu


def _wrong() -> Iterator[tuple[dict[str, Any], str]]:
    x, v = torch.zeros(2, 3, 4, 4), torch.ones(3)
    yield {"x": torch.zeros(2, 3)}, r"x: expected \[N, C, H, W\], got shape \[2, 3\]"
    yield {"x": x.int()}, r"x: expected one of .*float32.* on cpu, got torch.int32"
    yield {"x": x.double()}, r"x: expected one of .* on cpu, got torch.float64"
    residual = r"residual: expected x's \[2, 3, 4, 4\], torch.float32 on cpu, got "
    yield {"residual": x[:1]}, residual + r"\[1, 3, 4, 4\], torch.float32 on cpu"
    yield {"residual": x.half()}, residual + r"\[2, 3, 4, 4\], torch.float16 on cpu"
    yield {"residual": x.to("meta")}, residual + r"\[2, 3, 4, 4\], torch.float32 on meta"
    yield {"running_var": None}, "running_mean and running_var: expected both or neither, got one"
    none = {"running_mean": None, "running_var": None}
    yield none | {"training": False}, "needed where training=False, got None"
    one = r"x: expected more than 1 value per channel in training, got shape \[1, 3, 1, 1\]"
    yield {"x": x[:1, :, :1, :1]}, one
    for name in ("running_mean", "running_var", "weight", "bias"):
        yield {name: torch.ones(4)}, rf"{name}: expected \[3\] on cpu, got \[4\] on cpu"
        yield {name: v.to("meta")}, rf"{name}: expected \[3\] on cpu, got \[3\] on meta"
        yield {name: v.half()}, rf"{name}: expected torch.float32, got torch.float16"
    index = torch.tensor([1, 0])
    yield {"residual": x, "index": index}, "residual and index: expected one of the two at most"
    for wrong in (index[None], index.int(), index.to("meta")):
        yield (
            {"index": wrong},
            rf"index: expected \[s\] in torch.int64 on cpu, got .*{wrong.device}",
        )
    few = {"x": x[..., :1, :1], "index": index[:1]}
    yield few, r"more than 1 value per channel in training, got shape \[1, 3, 1, 1\]"
    for name in ("running_mean", "running_var"):
        yield {name: torch.ones(6)[::2]}, rf"{name}: expected contiguous, got stride \(2,\)"
    yield {"momentum": None}, "momentum: expected a float, got None"
    for eps in (0.0, -1.0, float("nan")):
        yield {"eps": eps}, f"eps: expected a positive number in training, got {eps}"


@pytest.mark.parametrize(("change", "words"), list(_wrong()))
def test_wrong_input_is_refused_in_words(
    change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also where a GPU is: on CPU tensors these are the kernels' own demands.
    monkeypatch.setattr(_register, "INTERPRET", True)
    v = torch.ones(3)
    right: dict[str, Any] = {
        "x": torch.zeros(2, 3, 4, 4),
        "running_mean": v,
        "running_var": v,
        "training": True,
    }
    with pytest.raises(ValueError, match=words):
        batch_norm_relu(**(right | change))


def test_fp64_wants_fp64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own batch_norm mixes fp32 parameters with half precision only."""
    monkeypatch.setattr(_register, "INTERPRET", False)
    x, v = torch.zeros(2, 3, 4, 4).double(), torch.ones(3)
    with pytest.raises(ValueError, match="weight: expected torch.float64, got torch.float32"):
        batch_norm_relu(x, None, None, v, training=True)


def test_the_registered_op_refuses_a_tensor_that_has_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_register, "INTERPRET", False)
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="got a tensor on cpu: call fastres.ops.batch_norm_relu"):
        torch.ops.fastres.batch_norm_relu(x, *[None] * 6, 1e-5, True)
