"""What classifier_cross_entropy refuses, in words, and leaves as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastres.ops import BatchMoments, Norm, _register, classifier_cross_entropy

CHANGED = dict[str, Any]


def _norm(**changes: Any) -> Norm:
    return Norm(torch.zeros(16), torch.ones(16), training=True)._replace(**changes)


def _wrong() -> Iterator[tuple[CHANGED, str]]:
    yield {"x": torch.zeros(2, 16)}, r"^norm: x: expected \[N, C, H, W\], got shape \[2, 16\]"
    yield {"x": torch.zeros(2, 16, 4, 4).double()}, "^norm: x: expected one of .*, got .*float64"
    one = r"^norm: x: expected more than 1 value per channel in training, got shape \[1, 16, 1, 1\]"
    yield {"x": torch.zeros(1, 16, 1, 1), "target": torch.zeros(1, dtype=torch.int64)}, one
    none = _norm(running_mean=None, running_var=None, training=False)
    yield {"norm": none}, "^norm: .*needed where training=False, got None"
    yield {"norm": _norm(weight=torch.ones(8))}, r"^norm: weight: expected \[16\] on cpu, got \[8\]"
    yield {"norm": _norm(momentum=None)}, "^norm: momentum: expected a float, got None"
    for shape in ((10, 8), (10,), (0, 16), (10, 16, 1)):
        words = rf"^weight: expected \[classes, 16\], got \[{', '.join(map(str, shape))}\]"
        yield {"weight": torch.zeros(shape)}, words
    many = r"^weight: expected at most 128 classes, got 129; take batch_norm_relu"
    yield {"weight": torch.zeros(129, 16)}, many
    for C in (24, 528):
        words = rf"^x: expected channels in multiples of 16, at most 512, got {C}; take"
        wide = {"x": torch.zeros(2, C, 4, 4), "weight": torch.zeros(10, C)}
        yield wide | {"norm": Norm(None, None, training=True)}, words
    yield {"bias": torch.zeros(9)}, r"^bias: expected \[10\], got \[9\]"
    for name, v in (("weight", torch.zeros(10, 16)), ("bias", torch.zeros(10))):
        words = f"^{name}: expected torch.float32 or torch.float32 on cpu, got torch.float"
        yield {name: v.half()}, words + "16 on cpu"
        yield {name: v.to("meta")}, words + "32 on meta"
    target = torch.zeros(2, dtype=torch.int64)
    words = r"^target: expected \[2\], torch.int64 on cpu, got "
    yield {"target": target[:1]}, words + r"\[1\], torch.int64 on cpu"
    yield {"target": target[:, None]}, words + r"\[2, 1\], torch.int64 on cpu"
    yield {"target": target.int()}, words + r"\[2\], torch.int32 on cpu"
    yield {"target": target.to("meta")}, words + r"\[2\], torch.int64 on meta"
    for smoothing in (-0.1, 1.5, float("nan")):
        words = f"^label_smoothing: expected 0 to 1, got {smoothing}"
        yield {"label_smoothing": smoothing}, words
    words = r"^moments: expected partial \[2, P, 16\], torch.float32 on cpu, .*, got "
    yield {"moments": BatchMoments(torch.zeros(2, 3, 32))}, words + r"\[2, 3, 32\], torch.float32"
    yield {"moments": BatchMoments(torch.zeros(2, 16))}, words + r"\[2, 16\], torch.float32"


@pytest.mark.parametrize(("change", "words"), list(_wrong()))
def test_it_refuses_in_words(change: CHANGED, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Also where a GPU is: on CPU tensors these are the kernels' own demands.
    monkeypatch.setattr(_register, "INTERPRET", True)
    right: CHANGED = {
        "x": torch.zeros(2, 16, 4, 4),
        "norm": _norm(),
        "weight": torch.zeros(10, 16),
        "bias": torch.zeros(10),
        "target": torch.zeros(2, dtype=torch.int64),
    }
    given = right | change
    with pytest.raises(ValueError, match=words):
        classifier_cross_entropy(**given)
    mean, var = given["norm"].running_mean, given["norm"].running_var
    assert mean is None or (not mean.any() and bool((var == 1).all()))


def test_a_cpu_takes_any_channels_and_classes(native: None) -> None:
    """Sixteens, and the most that are served, are the kernels' demand alone."""
    weight, target = torch.randn(200, 3), torch.tensor([199, 0])
    loss, logits = classifier_cross_entropy(
        torch.randn(2, 3, 4, 4), Norm(None, None, training=True), weight, None, target
    )
    assert loss.isfinite() and logits.shape == (2, 200)


def test_the_registered_op_refuses_a_tensor_that_has_no_kernels(native: None) -> None:
    x, weight = torch.zeros(2, 16, 4, 4), torch.zeros(10, 16)
    with pytest.raises(ValueError, match="on cpu: call fastres.ops.classifier_cross_entropy"):
        torch.ops.fastres.classifier_cross_entropy(
            x, None, 0, None, None, None, None, weight, None, torch.zeros(2).long(), 0.0, 1e-5, True
        )


def test_a_backward_of_what_kept_nothing_is_refused_in_words(device: str) -> None:
    x = torch.zeros(2, 16, 4, 4, device=device).to(memory_format=torch.channels_last)
    weight = torch.zeros(10, 16, device=device, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    loss, *_ = torch.ops.fastres.classifier_cross_entropy(
        x, None, 0, None, None, None, None, weight, None, target, 0.0, 1e-5, False
    )
    with pytest.raises(RuntimeError, match="with_gradient=False and kept nothing for a backward"):
        loss.backward()
