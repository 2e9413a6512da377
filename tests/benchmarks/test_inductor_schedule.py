"""What Inductor schedules against what is known to the byte, and what it must not count."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Inductor schedules its kernels for Triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts what Triton's interpreter executes"
)

from _inductor_schedule import NotCounted, compiled_account  # noqa: E402  # may be skipped
from _step_count import Traffic  # noqa: E402  # as above


class _Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(x) + 1).sum()


def _training(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward, and nothing else that starts a kernel."""

    def step() -> None:
        model.zero_grad()
        x.grad = None
        model(x).backward(dy)

    return step


def test_pointwise_and_sum_are_one_kernel_each_way() -> None:
    n = 256
    x, model = torch.randn(n, requires_grad=True), _Sum()
    account = compiled_account(model, _training(model, x, torch.ones(())))
    # For the backward the forward keeps whether x is positive, a byte each.
    assert account.kernels == {
        "inductor: reduction": Traffic(1, 4 * n, 4 * n, 4 + n),
        "inductor: pointwise": Traffic(1, 4 + n, 4 + n, 4 * n),
    }
    assert account.calls == {}
    assert account.conv_outputs == 0
    assert x.grad is not None and x.grad.shape == x.shape


def test_convolution_and_batch_norm() -> None:
    """So few images that a program holds a channel: BatchNorm is one kernel each way."""
    N, C, K, side = 2, 16, 32, 8
    model = nn.Sequential(nn.Conv2d(C, K, 3, padding=1, bias=False), nn.BatchNorm2d(K))
    model = model.to(memory_format=torch.channels_last)
    x, dy = (
        torch.randn(N, channels, side, side).to(memory_format=torch.channels_last)
        for channels in (C, K)
    )
    account = compiled_account(model, _training(model, x, dy))
    w, y, vector = 4 * 9 * C * K, 4 * N * K * side**2, 4 * K
    # Running statistics, weight and bias, and written: statistics for the backward, and running.
    forward = Traffic(1, y + 4 * vector, y + 4 * vector, y + 4 * vector)
    # dy, the convolution's output, its statistics and the weight; dx and two other gradients.
    backward = Traffic(1, 2 * y + 3 * vector, 2 * y + 3 * vector, y + 2 * vector)
    forward.add(backward)
    assert account.kernels == {
        "inductor: reduction": forward,
        "inductor: pointwise": Traffic(1, 8, 8, 8),  # num_batches_tracked
    }
    assert account.calls == {
        "convolution": Traffic(1, x.nbytes + w, x.nbytes + w, y),
        "convolution_backward": Traffic(1, y + x.nbytes + w, y + x.nbytes + w, w),
    }
    assert account.conv_outputs == y


def test_a_model_that_is_not_compiled() -> None:
    class Eager(_Sum):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model, x = Eager(), torch.randn(8, requires_grad=True)
    with pytest.raises(NotCounted, match="^0 graphs ran forward, and 0 backward$"):
        compiled_account(model, _training(model, x, torch.ones(())))


def test_an_inductor_that_is_not_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    monkeypatch.delattr(GraphLowering, "compile_to_module")
    model, x = _Sum(), torch.randn(8, requires_grad=True)
    with pytest.raises(NotCounted, match="^AttributeError: .*compile_to_module"):
        compiled_account(model, _training(model, x, torch.ones(())))
    assert "forward" not in vars(model)  # the model is as it was


def test_a_layer_whose_kernels_are_not_known() -> None:
    class Grouped(_Sum):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.conv(x))

    model, x = Grouped(), torch.randn(1, 8, 8, 8)
    with pytest.raises(NotCounted, match="^NotCounted: a convolution in groups"):
        compiled_account(model, _training(model, x, torch.ones(())))
