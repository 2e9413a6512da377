"""StemConv2d in nn.Conv2d's place, and stem_conv2d under PyTorch's tracers, without a GPU."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.norm_relu_conv2d_equality import few_programs
from tolerances import COMPILED_ATOL, MODEL_RELATIVE
from torch import Tensor, nn

from fastres.ops import PreActUnit, StemConv2d, _register, stem_conv2d

ROOT = Path(__file__).resolve().parents[2]
NHWC = torch.channels_last


def _x(device: str, N: int = 3, C: int = 3) -> Tensor:
    return torch.randn(N, C, 5, 6, device=device).to(memory_format=NHWC)


@pytest.mark.parametrize(("C", "K"), [(1, 16), (3, 16), (4, 128), (5, 16), (3, 12), (3, 144)])
def test_equals_conv2d_of_its_state(path: str, device: str, C: int, K: int) -> None:
    """Of shapes that are served and of others: y, the weight's gradient, and the state."""
    stem, conv = StemConv2d(C, K).to(device), nn.Conv2d(C, K, 3, 1, 1, bias=False).double()
    assert stem.fused == (C <= 4 and K in (16, 128))
    assert ("unfused: its shape is not served" in repr(stem)) != stem.fused
    conv.load_state_dict(stem.state_dict())
    x = _x(device, C=C)
    y, moments = stem(x, True)
    assert (moments is not None) == (stem.fused and path == "kernels")
    want = conv(x.double().cpu())
    assert torch.equal(stem(x), y)
    for one in (y, want):
        one.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).cos().to(one))
    for got, exact in ((y, want), (stem.weight.grad, conv.weight.grad)):
        assert got is not None and exact is not None
        assert (got.cpu() - exact).abs().max() <= MODEL_RELATIVE * exact.abs().max()


def test_draws_its_weight_as_conv2d_does() -> None:
    torch.manual_seed(1)
    weight = nn.Conv2d(3, 16, 3, 1, 1, bias=False).weight
    torch.manual_seed(1)
    assert torch.equal(StemConv2d(3, 16).weight, weight)


def test_leaves_no_moments_in_evaluation(device: str) -> None:
    stem = StemConv2d(3, 16).to(device)
    x = _x(device)
    y, moments = stem.eval()(x, True)
    assert moments is None and torch.equal(y, stem.train()(x))


def test_copies_and_pickles(device: str) -> None:
    stem = StemConv2d(3, 16).to(device).to(memory_format=NHWC)
    x = _x(device)
    for other in (copy.deepcopy(stem), pickle.loads(pickle.dumps(stem))):
        assert torch.equal(other(x), stem(x)) and repr(other) == repr(stem)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck(device: str, wanted: tuple[bool, bool]) -> None:
    ops = torch.ops.fastres
    x, weight = _x(device, 2), torch.randn(16, 3, 3, 3, device=device)
    leaves = [v.clone().requires_grad_(w) for v, w in zip((x, weight), wanted, strict=True)]
    torch.library.opcheck(ops.stem_conv2d.default, (*leaves, wanted[0]))
    dy = torch.randn(2, 16, 5, 6, device=device)
    torch.library.opcheck(ops.stem_conv2d_backward.default, (dy, x, weight, *wanted))


class _Net(nn.Module):
    """A stem that hands its moments to a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = StemConv2d(3, 16), PreActUnit(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y, moments = self.stem(x, True)
        return self.unit(y, moments)


def _step(f: Any, net: nn.Module, x: Tensor) -> list[Tensor]:
    y = f(x)
    dy = torch.linspace(-1, 1, y.numel(), device=x.device).view(y.shape)
    return [y, *torch.autograd.grad(y, list(net.parameters()), dy)]


def test_compiles_in_one_graph(path: str, device: str) -> None:
    """With a second batch size."""
    torch._dynamo.reset()
    net = _Net().to(device)
    other = copy.deepcopy(net)
    compiled: Any = torch.compile(other, fullgraph=True, backend="aot_eager")
    for batch in (4, 3):
        x = _x(device, batch)
        with few_programs():
            want, got = _step(net, net, x), _step(compiled, other, x)
        for a, b in zip(got, want, strict=True):
            atol = COMPILED_ATOL * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=COMPILED_ATOL, atol=atol)


def test_exports_with_a_batch_of_any_size(path: str, device: str) -> None:
    net, x = StemConv2d(3, 16).to(device).eval(), _x(device, 4)
    batch = {0: torch.export.Dim("batch", min=2, max=512)}
    with torch.no_grad():
        exported = torch.export.export(net, (x,), dynamic_shapes=(batch,))
        torch.testing.assert_close(exported.module()(x[:3]), net(x[:3]))


# By the kernel what it writes; PyTorch finds it in the kernel's IR.
WRITTEN = {
    "_stem_conv2d_fwd_kernel": ["partial_ptr", "y_ptr"],
    "_stem_conv2d_wgrad_kernel": ["slab_ptr"],
    "_sum_partials_kernel": ["sums_ptr"],
}


def _trace() -> list[list[tuple[str, list[str]]]]:
    """The kernels in the graphs of forward and backward, with symbolic sizes."""
    import triton
    from ops.test_preact_unit_tracing import _kernels_of, _StandInDriver
    from torch._dynamo.backends.common import aot_autograd

    triton.runtime.driver.set_active(_StandInDriver())
    for name in ("_register", "stem_conv2d"):
        sys.modules[f"fastres.ops.{name}"].takes_kernels = lambda x: True  # type: ignore[attr-defined]  # a module's function
    assert not _register.INTERPRET
    graphs: list[list[tuple[str, list[str]]]] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(_kernels_of(graph.graph))
        return graph.forward

    compiled: Any = torch.compile(
        StemConv2d(3, 16),
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
        fullgraph=True,
        dynamic=True,
    )
    # Both graphs are there before the first kernel is launched, which fails for want of a GPU.
    try:
        compiled(_x("cpu", 4), True)
    except AttributeError as error:
        assert "_StandInDriver" in str(error), error
    return graphs


def test_traces_to_its_kernels_without_a_gpu() -> None:
    """In two graphs with symbolic sizes, each kernel's writes recognised."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    forward, backward = json.loads(done.stdout.splitlines()[-1])
    found = [*forward, *backward]
    assert [name for name, _ in found] == list(WRITTEN) and len(forward) == 1
    assert dict(found) == WRITTEN


@pytest.mark.gpu
@pytest.mark.huge(40)  # x, y, dy and more of 2^31 fp16 elements
def test_past_2_to_the_31_elements() -> None:
    """A batch whose second half repeats its first, past 2^31 elements of y."""
    half = torch.randn(2**16 + 1, 3, 32, 32, device="cuda", dtype=torch.float16)
    x = torch.cat([half, half]).to(memory_format=NHWC)
    weight = torch.randn(16, 3, 3, 3, device="cuda", requires_grad=True)
    y, _ = stem_conv2d(x, weight, True)
    assert y.numel() > 2**31 and torch.equal(y[: len(half)], y[len(half) :])
    dy = torch.zeros_like(y)
    dy[-1] = 1
    (dweight,) = torch.autograd.grad(y, weight, dy)
    (want,) = torch.autograd.grad(stem_conv2d(half[-1:], weight)[0].sum(), weight)
    torch.testing.assert_close(dweight, want)


if __name__ == "__main__":
    print(json.dumps(_trace()))
