"""What the host does for an op beside its kernels' launches."""

from typing import Any

import pytest
import torch
import triton
from torch._library import utils
from torch.autograd import forward_ad

from fastres.kernels._integers import cdiv, next_power_of_2
from fastres.ops import MePropLinear, batch_norm_relu
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


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which torch.func.jvp uses
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_is_refused_in_words(frozen: bool, device: str) -> None:
    """PyTorch would find no derivative, and take it for zero."""
    linear = MePropLinear(8, 6, k=2).to(device).requires_grad_(not frozen)
    x = torch.randn(3, 8, device=device)
    with pytest.raises(NotImplementedError, match="meprop_linear has no forward-mode derivative"):
        torch.func.jvp(linear, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        assert linear(x).shape == (3, 6)  # nothing to differentiate by
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            linear(forward_ad.make_dual(x, torch.ones_like(x)))


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
