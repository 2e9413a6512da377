"""norm_relu_conv2d and preact_unit under PyTorch's tracers: opcheck, compile, export, no GPU."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.norm_relu_conv2d_equality import few_programs
from tolerances import COMPILED_ATOL
from torch import Tensor, nn

from fastres.ops import (
    MePropConv2d,
    Norm,
    NormReLUConv2d,
    PreActUnit,
    StepGenerator,
    StochasticDepth,
    _register,
    preact_unit,
)
from fastres.ops.preact_unit_module import plain_conv

ROOT = Path(__file__).resolve().parents[2]
NHWC = torch.channels_last


def _leaf(*shape: int, device: str) -> Tensor:
    v = torch.randn(*shape, device=device)
    return v.to(memory_format=NHWC).requires_grad_() if v.dim() == 4 else v.requires_grad_()


def _stats(C: int, device: str) -> tuple[Tensor, Tensor]:
    return torch.zeros(C, device=device), torch.ones(C, device=device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_opcheck_of_the_convolution_ops(device: str, training: bool) -> None:
    ops = torch.ops.fastres
    x, weight = _leaf(2, 16, 3, 3, device=device), _leaf(16, 16, 1, 1, device=device)
    norm = _leaf(16, device=device), None
    stats = _stats(16, device)
    row_scale = torch.ones(2, device=device)
    given = (None, None) if training else stats
    # The last two: no process group.
    options, alone = (row_scale, 0.5, 1, 1e-5), ("", 1)
    residual = None if training else _leaf(2, 16, 3, 3, device=device)
    with few_programs():
        torch.library.opcheck(
            ops.norm_relu_conv2d.default, (x, *given, *norm, weight, residual, *options, *alone)
        )
        detached = [v.detach() for v in (x, x, norm[0])]
        torch.library.opcheck(
            ops.norm_relu_conv2d_backward.default,
            (*detached, None, *stats, weight.detach(), *options, training, *alone),
        )


@pytest.mark.parametrize("kind", ["identity", "subset", "projection", "eval"])
def test_opcheck_of_the_unit_ops(device: str, kind: str) -> None:
    ops, project = torch.ops.fastres, kind == "projection"
    K, stride, N = (32, 2, 2) if project else (16, 1, 2)
    x = _leaf(N, 16, 3, 3, device=device)
    weights = _leaf(K, 16, 3, 3, device=device), _leaf(K, K, 3, 3, device=device)
    shortcut = _leaf(K, 16, 1, 1, device=device) if project else None
    stats1, stats2 = _stats(16, device), _stats(K, device)
    given1, given2 = (stats1, stats2) if kind == "eval" else ((None, None), (None, None))
    norm1 = _leaf(16, device=device), _leaf(16, device=device)
    norm2 = (None, None) if kind == "identity" else (_leaf(K, device=device), None)
    index = position = None
    if kind == "subset":
        index = torch.tensor([1], device=device)
        position = torch.tensor([-1, 0], device=device)
    row_scale = torch.ones(N, device=device) if kind == "eval" else None
    kept = [5, 16, 16] if kind == "identity" else [K] * 3
    with few_programs():
        torch.library.opcheck(
            ops.preact_unit.default,
            (x, None, 0, index, position, *given1, *norm1, weights[0], *given2, *norm2, weights[1],
             shortcut, row_scale, 2.0, stride, 1e-5, 1e-5, kind != "eval", kept,
             "", 1),
        )  # fmt: skip
        size = (3 - 1) // stride + 1
        dy = torch.randn(N, K, size, size, device=device)
        h = torch.randn_like(dy[: N if index is None else 1]).to(memory_format=NHWC)
        vectors = [v if v is None else v.detach() for v in (*norm1, *norm2)]
        matrices = [v if v is None else v.detach() for v in (*weights, shortcut)]
        torch.library.opcheck(
            ops.preact_unit_backward.default,
            (dy, x.detach(), h, index, position, *stats1, *vectors[:2], matrices[0], *stats2,
             *vectors[2:], *matrices[1:], row_scale, 2.0, stride, 1e-5, 1e-5, kind != "eval", True,
             kept, "", 1),
        )  # fmt: skip


class _Net(nn.Module):
    """Two units that hand moments on, and a convolution behind."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        generator = StepGenerator(1)
        drops = [mode and StochasticDepth(0.5, mode, generator.unit(0.5)) for _ in range(2)]
        self.first = PreActUnit(16, 32, 2, drop=drops[0])
        self.second = PreActUnit(32, 32, drop=drops[1])
        self.last = NormReLUConv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, moments = self.first(x, None, True)
        y, _ = self.second(y, moments, True)
        return self.last(y)


def _step(f: Any, net: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = f(x)
    dy = torch.linspace(-1, 1, y.numel(), device=x.device).view(y.shape)
    grads = torch.autograd.grad(y, [x, *net.parameters()], dy)
    return [y, *grads, *(v.clone() for v in net.buffers())]


# Inductor takes ten seconds and more to build each of these: one is enough.
@pytest.mark.parametrize(
    ("backend", "mode"), [("aot_eager", None), ("aot_eager", "subset"), ("inductor", None)]
)
def test_compiles_in_one_graph(path: str, mode: Any, backend: str, device: str) -> None:
    """With a second batch size; the state, too, is what eager code leaves."""
    torch._dynamo.reset()
    net = _Net(mode).to(device)
    other = copy.deepcopy(net)
    compiled: Any = torch.compile(other, fullgraph=True, backend=backend)
    for batch in (4, 3) if backend == "aot_eager" else (4,):
        x = torch.randn(batch, 16, 4, 4, device=device).to(memory_format=NHWC)
        with few_programs():
            want, got = _step(net, net, x), _step(compiled, other, x)
        for a, b in zip(got, want, strict=True):
            atol = COMPILED_ATOL * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=COMPILED_ATOL, atol=atol)


def test_exports_with_a_batch_of_any_size(path: str, device: str) -> None:
    net = _Net(None).to(device).eval()
    x = torch.randn(4, 16, 4, 4, device=device)
    batch = {0: torch.export.Dim("batch", min=2, max=512)}
    with torch.no_grad():
        exported = torch.export.export(net, (x,), dynamic_shapes=(batch,))
        torch.testing.assert_close(exported.module()(x[:3]), net(x[:3]))


_FWD, _DGRAD = "_norm_relu_conv2d_fwd_kernel", "_norm_relu_conv2d_dgrad_kernel"
_WGRAD, _DX = "_norm_relu_conv2d_wgrad_kernel", "_norm_relu_conv2d_dx_kernel"
_BWD = "_norm_relu_conv2d_bwd_kernel"
_SELECT = "_norm_relu_conv2d_select_kernel"
# Two kernels forward, one more for the moments of x, one for a projection beside a subset, and that
# of the running statistics; backward five, one less for each convolution of which one leaves both
# gradients, and meProp one more.
FORWARD = ["_moments_kernel", _FWD, _FWD, "_update_two_running_kernel"]
PICKED = ["_moments_kernel", _FWD, _FWD, _FWD, "_update_two_running_kernel"]
FUSED = [_BWD, _BWD, _DX]
SPLIT = [_WGRAD, _DGRAD, _WGRAD, _DGRAD, _DX]
PROJECTED = [_BWD, _WGRAD, _DGRAD, _DX]
MEPROP = [_SELECT, _WGRAD, _DGRAD, _SELECT, _SELECT, _WGRAD, _DGRAD, _DX]
# By what is traced: whether there is a projection, whether a subset, whether meProp, the dtype, and
# what is launched.
TRACED: list[tuple[bool, bool, bool, torch.dtype, list[list[str]]]] = [
    (False, False, False, torch.bfloat16, [FORWARD, FUSED]),
    (False, False, False, torch.float32, [FORWARD, SPLIT]),
    (True, False, False, torch.bfloat16, [FORWARD, PROJECTED]),
    (True, False, True, torch.bfloat16, [FORWARD, MEPROP]),
    (True, True, False, torch.float32, [PICKED, SPLIT]),
]
# What each kernel writes; PyTorch finds it in the kernel's IR, and takes all else as only read.
WRITTEN = {
    "_moments_kernel": {"partial_ptr"},
    "_update_two_running_kernel": {
        f"{name}{i}_ptr"
        for name in ("running_mean", "running_var", "num_batches_tracked")
        for i in (1, 2)
    },
    _FWD: {"y_ptr", "shortcut_ptr", "y_partial_ptr", "mean_ptr", "var_ptr"},
    _DGRAD: {"dz_ptr", "partial_ptr", "dh_weight_ptr", "dh_bias_ptr"},
    _BWD: {"dz_ptr", "partial_ptr", "dh_weight_ptr", "dh_bias_ptr", "slab_ptr"},
    # Places in the slab and in order are found by way of others, which PyTorch takes for writes: it
    # copies K numbers, and K for each chunk.
    _WGRAD: {"slab_ptr", "order_ptr", "shortcut_slab_ptr", "shortcut_order_ptr"},
    _SELECT: {"partial_ptr", "dh_weight_ptr", "dh_bias_ptr", "ticket_ptr", "order_ptr"},
    _DX: {"dx_ptr", "dnorm_weight_ptr", "dnorm_bias_ptr", "dweight_ptr"},
}


class _StandInDriver:
    """PyTorch asks Triton's driver for a target, to read a kernel's IR; no GPU is behind it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def _kernels_of(graph: torch.fx.Graph) -> list[tuple[str, list[str]]]:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    found = []
    for node in graph.nodes:
        if "kernel_idx" in node.kwargs:
            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            # PyTorch wraps a kernel that is launched with num_warps in an autotuner of one choice.
            name = getattr(kernel, "fn", kernel).__name__
            found.append((name, sorted(node.kwargs["tensors_to_clone"])))
    return found


def _trace(
    shortcut: bool, subset: bool, meprop: bool, dtype: torch.dtype
) -> list[list[tuple[str, list[str]]]]:
    """The kernels in the graphs of forward and backward, with symbolic sizes."""
    import triton
    from torch._dynamo.backends.common import aot_autograd

    # Autograd's engine will not start for a CUDA tensor without a device, so the backward is
    # traced on CPU tensors that are sent down the kernels' path.
    triton.runtime.driver.set_active(_StandInDriver())
    for name in ("_register", "preact_unit", "preact_unit_module"):
        sys.modules[f"fastres.ops.{name}"].takes_kernels = lambda x: True  # type: ignore[attr-defined]  # a module's function
    assert not _register.INTERPRET
    graphs: list[list[tuple[str, list[str]]]] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(_kernels_of(graph.graph))
        return graph.forward

    def conv(*sizes: int) -> nn.Conv2d:
        if not meprop:
            return plain_conv(*sizes)
        C, K, size, stride, padding = sizes
        return MePropConv2d(C, K, size, stride, padding, bias=False, k=4)

    drop = StochasticDepth(0.5, "subset", StepGenerator(1).unit(0.5)) if subset else None
    unit = PreActUnit(16, 16, 2 if shortcut else 1, conv=conv, drop=drop)
    compiled: Any = torch.compile(
        unit,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
        fullgraph=True,
        dynamic=True,
    )
    x = torch.randn(4, 16, 8, 8, dtype=dtype).to(memory_format=NHWC).requires_grad_()
    # Both graphs are there before the first kernel is launched, which fails for want of a GPU.
    try:
        compiled(x)
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
    traced = [json.loads(line) for line in done.stdout.splitlines()[-len(TRACED) :]]
    for graphs, (*_, kernels) in zip(traced, TRACED, strict=True):
        assert [[name for name, _ in graph] for graph in graphs] == kernels
        for name, written in (launch for graph in graphs for launch in graph):
            assert written and set(written) <= WRITTEN[name], name


@pytest.mark.gpu
def test_compiled_by_inductor_on_a_gpu() -> None:
    torch._dynamo.reset()
    net = _Net(None).to("cuda")
    other = copy.deepcopy(net)
    x = torch.randn(8, 16, 16, 16, device="cuda").to(memory_format=NHWC)
    want = _step(net, net, x)
    got = _step(torch.compile(other, fullgraph=True), other, x)
    # The same kernels with the same arguments.
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.huge(60)  # x, h, y, dy, dx and more of 2^31 fp16 elements
@pytest.mark.parametrize("picked", [False, True], ids=["all", "subset"])
def test_past_2_to_the_31_elements(picked: bool) -> None:
    """A batch whose second half repeats its first, past 2^31 elements: so do y and dx."""
    half = torch.randn(2**16 + 1, 16, 32, 32, device="cuda", dtype=torch.float16)
    x = torch.cat([half, half]).to(memory_format=NHWC).requires_grad_()
    assert x.numel() > 2**31
    weights = [torch.randn(16, 16, 3, 3, device="cuda") / 12 for _ in range(2)]
    norm = Norm(None, None, training=True)
    subset: dict[str, Any] = {}
    if picked:
        # Samples far apart, each with an offset of its own.
        subset["index"] = torch.arange(0, len(x), 1000, device="cuda")
        subset["position"] = torch.full((len(x),), -1, device="cuda")
        subset["position"][subset["index"]] = torch.arange(len(subset["index"]), device="cuda")
    y, _ = preact_unit(x, norm, weights[0], norm, weights[1], **subset)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    if picked:
        left = subset["position"] < 0
        assert torch.equal(y[left][-100:], x[left][-100:])
        assert torch.equal(dx[left][-100:], y[left][-100:])
    else:
        assert torch.equal(y[: len(half)], y[len(half) :])
        assert torch.equal(dx[: len(half)], dx[len(half) :])


if __name__ == "__main__":
    for projects, subset, meprop, dtype, _ in TRACED:
        print(json.dumps(_trace(projects, subset, meprop, dtype)))
