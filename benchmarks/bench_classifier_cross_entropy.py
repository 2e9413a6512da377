"""Time a network's end, norm to loss, forward and backward, beside eager PyTorch and torch.compile.

    python benchmarks/bench_classifier_cross_entropy.py [--sweep full] [--device cpu] [--small]

"fastres" is the end as one op; "layers" batch_norm_relu and PyTorch's pooling, linear layer and
cross entropy; "eager" and "compile" are PyTorch's own layers. All of them run under autocast where
the dtype is a half, on activations in channels_last and fp32 weights.

GB/s counts the fewest bytes that the end must move (see kernels/classifier_cross_entropy.py, and
the activation once more for its moments), for every provider alike, so that a share of the copy
bandwidth compares them. A provider whose result is wrong in this run gets no speed. The end of a
depth-20 ResNet at batch 128 and 1024; --sweep full adds wider ones, and other numbers of classes.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _comparison import Case, Op, Work, compare, compiled, dtypes, run_program, sweep_axes
from _sheet import Sheet
from torch import Tensor, nn

from fastres.models.resnet import PlainBatchNormReLU2d
from fastres.ops import BatchNormReLU2d, Norm, classifier_cross_entropy

# C and H of the last stage.
_BASE = {"N": 128, "C": 64, "H": 8, "classes": 10}
_AXES = {"N": (128, 1024), "C": (128, 512), "classes": (100,), "H": (7, 32)}
_SMOOTHING = 0.1


def bytes_moved(x: Tensor, classes: int, backward: bool) -> int:
    """Fewest bytes: x as often as it must be read, dx, and what is kept of each sample."""
    channels, kept = 8 * x.shape[0] * x.shape[1], 4 * x.shape[0] * classes
    # x for its moments and for the loss, or x and dx.
    return 2 * x.nbytes + channels + (kept if backward else 2 * kept)


class _End(nn.Module):
    """What follows the units; fused: as one op."""

    def __init__(self, norm_relu: type[nn.BatchNorm2d], C: int, classes: int, fused: bool) -> None:
        super().__init__()
        self.bn, self.fc, self.fused = norm_relu(C), nn.Linear(C, classes), fused
        torch.nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        torch.nn.init.normal_(self.bn.bias)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        half = x.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(x.device.type, dtype=x.dtype if half else None, enabled=half):
            if self.fused:
                fc = self.fc.weight, self.fc.bias
                norm = Norm.of(self.bn)
                return classifier_cross_entropy(x, norm, *fc, target, _SMOOTHING)[0]
            logits = self.fc(self.bn(x).mean((2, 3)))
            return F.cross_entropy(logits, target, label_smoothing=_SMOOTHING)


def make_inputs(
    N: int, C: int, H: int, classes: int, dtype: torch.dtype, device: torch.device
) -> tuple[_End, Tensor, Tensor]:
    """The end, x and target."""
    end = _End(BatchNormReLU2d, C, classes, True).to(device)
    x = torch.randn(N, C, H, H, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    return end, x, torch.randint(classes, (N,), device=device)


def providers(end: _End) -> dict[str, Op]:
    """By name Modules that all hold the same weights."""

    def alike(norm_relu: type[nn.BatchNorm2d]) -> _End:
        other = _End(norm_relu, end.fc.in_features, end.fc.out_features, False)
        other.load_state_dict(end.state_dict())
        return other.to(end.fc.weight.device)

    plain = alike(PlainBatchNormReLU2d)
    made: dict[str, Any] = {"fastres": end, "layers": alike(BatchNormReLU2d), "eager": plain}
    return made | compiled(plain)


def _gradients(loss: Tensor, op: Any, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [x, *op.parameters()], retain_graph=True)


def is_right(end: _End, x: Tensor, target: Tensor, op: Any) -> bool:
    """Against fp64; the tests are the ones to be exact."""
    exact = _End(PlainBatchNormReLU2d, end.fc.in_features, end.fc.out_features, False)
    exact.load_state_dict(end.state_dict())
    exact.to(x.device, torch.float64)
    loss, x64 = op(x, target), x.detach().double().requires_grad_()
    found = (loss, *_gradients(loss, op, x))
    loss64 = exact(x64, target)
    wanted = (loss64, *_gradients(loss64, exact, x64))
    # By norms: where a ReLU's input is within rounding of 0 its gradient passes or does not.
    with torch.no_grad():
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(errors) < 50 * torch.finfo(x.dtype).eps ** 0.75


def _make(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Work:
    end, x, target = make_inputs(**sizes, dtype=dtype, device=device)

    def passes(op: Any) -> dict[str, Callable[[], Any]]:
        loss = op(x, target)
        return {"forward": partial(op, x, target), "backward": partial(_gradients, loss, op, x)}

    return Work(
        providers(end),
        partial(is_right, end, x, target),
        passes,
        {
            name: bytes_moved(x, sizes["classes"], name == "backward")
            for name in ("forward", "backward")
        },
    )


def _shapes(small: bool, sweep: str) -> Iterator[dict[str, int]]:
    if small:
        yield {"N": 8, "C": 16, "H": 4, "classes": 10}
    elif sweep == "full":
        yield from sweep_axes(_BASE, _AXES)
    else:
        yield from sweep_axes(_BASE, {"N": _AXES["N"]})


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    for dtype_name, dtype in dtypes(device).items():
        for sizes in _shapes(small, sweep):
            numel = sizes["N"] * sizes["C"] * sizes["H"] ** 2
            # x, dx, what the layers keep and move, and x and more in fp64.
            yield Case(
                {"dtype": dtype_name, "layout": "NHWC", **sizes},
                numel * (8 * dtype.itemsize + 4 * 8),
                partial(_make, sizes, dtype, device),
            )


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every configuration by every provider; one row each, with the copy bandwidth beside them."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "classifier_cross_entropy", bench)


if __name__ == "__main__":
    sys.exit(main())
