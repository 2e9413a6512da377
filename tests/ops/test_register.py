"""What the host does for an op beside its kernels' launches."""

from typing import Any

import pytest
import torch
import triton
from torch._library import utils

from fastres.kernels._integers import cdiv, next_power_of_2
from fastres.ops import batch_norm_relu
from fastres.ops._register import register_autograd


def test_no_call_completes_its_arguments(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """PyTorch's way to do so takes longer than the whole rest of a unit's call."""

    def completed(*_: Any) -> Any:
        raise AssertionError("fill_defaults")

    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    monkeypatch.setattr(utils, "fill_defaults", completed)
    batch_norm_relu(x, None, None, training=True).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with torch.no_grad():
        assert not batch_norm_relu(x, None, None, training=True).requires_grad


def test_arguments_with_defaults_are_refused() -> None:
    @torch.library.custom_op("fastres_tests::with_defaults", mutates_args=())
    def op(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return x * scale

    with pytest.raises(AssertionError):
        register_autograd(op, lambda ctx, dy: (dy, None), lambda ctx, inputs, output: None)


def test_integers_are_tritons() -> None:
    for n in range(1, 300):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, b) for b in range(1, 40)] == [triton.cdiv(n, b) for b in range(1, 40)]
