"""The first convolution of an image network, with the BatchNorm moments of its output.

    y = conv2d(x, weight, padding=1)

Read from the top: the reference, the registered op with its backward, the function, the Module.
Source: Jung et al. 2018, arXiv:1807.01702, for the moments in a convolution's epilogue.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops._autocast import autocast_dtype, without_autocast
from fastres.ops._register import kernels, register_autograd, register_op, takes_kernels
from fastres.ops.norm_relu_conv2d import as_dense
from fastres.ops.preact_unit import BatchMoments

# Channels of an image: 9 of each make one side of a product, whose other side is a block of K.
MOST_CHANNELS = 4
MOST_OUTPUTS, OUTPUTS = 128, 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def stem_conv2d_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition of stem_conv2d's y, in PyTorch's own ops."""
    return F.conv2d(x, weight.to(x.dtype), padding=1)


@register_op("stem_conv2d")
def _forward(x: Tensor, weight: Tensor, with_moments: bool) -> tuple[Tensor, Tensor]:
    """y, and the partial of its moments, empty without with_moments; x: dense in NCHW or NHWC."""
    return kernels("stem_conv2d", x).stem_conv2d_fwd(x, weight, with_moments)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, with_moments: bool) -> tuple[Tensor, Tensor]:
    return kernels("stem_conv2d", x).empty_outputs(x, weight, with_moments)


@register_op("stem_conv2d_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, with_dx: bool, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dweight; empty is what is not asked for."""
    dx, dweight = dy.new_empty(0), dy.new_empty(0)
    if with_dx:
        found, _, _ = torch.ops.aten.convolution_backward.default(
            dy, x, weight.to(x.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [True, False, False],
        )  # fmt: skip
        # In which layout PyTorch's own kernels leave it depends on which of them ran.
        dx = torch.empty_like(x).copy_(found)
    if with_dweight:
        dweight = kernels("stem_conv2d", x).stem_conv2d_bwd(dy, x, weight)
    return dx, dweight


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, with_dx: bool, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if with_dx else dy.new_empty(0)
    return dx, torch.empty_like(weight) if with_dweight else dy.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


@without_autocast
def _autograd_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    if dy is None or not any(wanted):
        return None, None, None
    grads = torch.ops.fastres.stem_conv2d_backward.default(dy, *ctx.saved_tensors, *wanted)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), None


register_autograd(_forward, _autograd_backward, _setup_context)


def stem_conv2d(
    x: Tensor, weight: Tensor, with_moments: bool = False
) -> tuple[Tensor, BatchMoments | None]:
    """A network's first convolution, 3x3 at stride 1, and the moments of its output.

    y = conv2d(x, weight, padding=1)

    On a GPU it runs in Triton, one kernel forward: a BatchNorm behind it need not read y for its
    statistics. Backward a kernel takes the weight's gradient and another sums it; x's gradient,
    which images seldom need, is PyTorch's own convolution's, and only where it is asked for. On a
    CPU it is PyTorch's own conv2d.

    Args:
        x: [N, C, H, W], fp32, fp16 or bf16; copied first unless dense in NCHW or channels_last. On
            a GPU C is 1 to 4.
        weight: [K, C, 3, 3], in fp32 or x's dtype. On a GPU K is a multiple of 16, at most 128.
        with_moments: whether to return the moments of y, for the preact_unit that follows.
    Returns:
        y [N, K, H, W] in x's dtype and on a GPU in channels_last; under autocast in its dtype; and
        its moments, None unless asked for or on a CPU. Arithmetic in fp32, but for the products'
        factors, which have x's dtype.
    Raises:
        ValueError: a shape, dtype or device that does not fit.
    Source: Jung et al. 2018, arXiv:1807.01702.
    """
    x = x.to(autocast_dtype(x))
    takes = takes_kernels(x)
    _check(x, weight, takes)
    if not takes or x.numel() == 0:
        return stem_conv2d_reference(x, weight), None
    y, partial = torch.ops.fastres.stem_conv2d.default(as_dense(x), as_dense(weight), with_moments)
    return y, BatchMoments(partial) if with_moments else None


def _check(x: Tensor, weight: Tensor, takes: bool) -> None:
    """Raise ValueError unless the two fit each other; takes: whether kernels run it."""
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got shape {list(x.shape)}")
    if x.dtype not in _DTYPES and (takes or x.dtype != torch.float64):
        allowed = [*_DTYPES] if takes else [*_DTYPES, torch.float64]
        raise ValueError(f"x: expected one of {allowed} on {x.device}, got {x.dtype}")
    C, shape = x.shape[1], list(weight.shape)
    if len(shape) != 4 or shape[1:] != [C, 3, 3]:
        raise ValueError(f"weight: expected [K, {C}, 3, 3], got {shape}")
    if takes and not _serves(C, shape[0]):
        raise ValueError(
            f"weight: expected at most {MOST_CHANNELS} channels, and at most {MOST_OUTPUTS} "
            f"outputs in multiples of {OUTPUTS}, got {shape}; take F.conv2d for it"
        )
    if weight.device != x.device or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"weight: expected {x.dtype} or torch.float32 on {x.device}, got {weight.dtype} on "
            f"{weight.device}"
        )


def _serves(in_channels: int, out_channels: int) -> bool:
    return 1 <= in_channels <= MOST_CHANNELS and (
        0 < out_channels <= MOST_OUTPUTS and out_channels % OUTPUTS == 0
    )


class StemConv2d(nn.Conv2d):
    """nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False), trained by stem_conv2d.

    Args:
        in_channels: 1 to 4, and out_channels: a multiple of 16, at most 128, for the op. Others
            take nn.Conv2d's own path, which `print` shows.
        device, dtype: as nn.Conv2d's.

    The same state_dict as nn.Conv2d's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, 1, 1, bias=False, device=device, dtype=dtype)
        self.fused = _serves(in_channels, out_channels)

    def forward(  # type: ignore[override]  # with moments a pair
        self, x: Tensor, with_moments: bool = False
    ) -> Tensor | tuple[Tensor, BatchMoments | None]:
        """[N, C, H, W] to [N, K, H, W].

        Args:
            with_moments: return y and in training its moments, for the next unit, or None where
                there are none.
        """
        if not self.fused:
            y = super().forward(x)
            return (y, None) if with_moments else y
        y, moments = stem_conv2d(x, self.weight, with_moments and self.training)
        return (y, moments) if with_moments else y

    def extra_repr(self) -> str:
        fused = "fused" if self.fused else "unfused: its shape is not served"
        return f"{super().extra_repr()}, {fused}"
