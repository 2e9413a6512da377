"""meProp's ops under PyTorch's tracers: opcheck, torch.compile, export, and without a GPU."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.meprop_equality import MODES
from tolerances import COMPILED_ATOL
from torch import Tensor, nn

from fastres.ops import MePropConv2d, MePropLinear, _register

ROOT = Path(__file__).resolve().parents[2]
NHWC = torch.channels_last


def _leaf(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_the_linear_op(path: str, mode: str, device: str) -> None:
    for shape, dtype in (((4, 5), torch.float32), ((2, 3, 5), torch.float32), ((0, 5), torch.half)):
        x, weight = _leaf(*shape, device=device, dtype=dtype), _leaf(7, 5, device=device)
        weight = weight.detach().to(dtype).requires_grad_()
        bias = None if len(shape) == 3 else _leaf(7, device=device, dtype=dtype)
        torch.library.opcheck(torch.ops.fastres.meprop_linear.default, (x, weight, bias, 3, mode))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_the_convolution_op(path: str, mode: str, groups: int, device: str) -> None:
    for fmt in (torch.contiguous_format, NHWC):
        x, weight = torch.randn(2, 4, 5, 6), torch.randn(8, 4 // groups, 3, 3)
        leaves = [v.to(device, memory_format=fmt).requires_grad_() for v in (x, weight)]
        bias = _leaf(8, device=device) if groups == 1 else None
        torch.library.opcheck(
            torch.ops.fastres.meprop_conv2d.default,
            (*leaves, bias, [1, 2], [1, 0], [1, 1], groups, 3, mode),
        )


class _Net(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv = MePropConv2d(3, 8, 3, padding=1, ratio=0.4, mode=mode)
        self.linear = MePropLinear(8, 6, k=2, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)))


def _grads(f: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor, dtype: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        y = f(x)
    dy = torch.linspace(-1, 1, y.numel(), device=x.device, dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, [x, *net.parameters()], dy)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_in_one_graph(path: str, mode: str, backend: str, device: str) -> None:
    """With a second batch size, under autocast and without, and with a share set afterwards."""
    torch._dynamo.reset()
    net = _Net(mode).to(device).to(memory_format=NHWC)
    compiled: Any = torch.compile(net, fullgraph=True, backend=backend)
    steps: list[Any] = [(4, None, 0.4)]
    if backend == "aot_eager":
        # Inductor takes ten seconds and more to build each of these.
        steps += [(6, None, 0.4), (4, torch.bfloat16, 0.4), (4, None, 1.0)]
    for batch, dtype, ratio in steps:
        net.conv.ratio = ratio
        x = torch.randn(batch, 3, 5, 4, device=device).to(memory_format=NHWC)
        got, want = _grads(compiled, net, x, dtype), _grads(net, net, x, dtype)
        for a, b in zip(got, want, strict=True):
            # Under autocast the graph may keep in fp32 what eager code rounds to bf16 between ops.
            eps = 4 * torch.finfo(dtype).eps * b.abs().max().item() if dtype else COMPILED_ATOL
            torch.testing.assert_close(a, b, rtol=COMPILED_ATOL, atol=eps)


def test_exports_with_a_batch_of_any_size(path: str, device: str) -> None:
    net = _Net("unified").to(device)
    x = torch.randn(4, 3, 5, 4, device=device)
    batch = {0: torch.export.Dim("batch", min=2, max=512)}
    exported = torch.export.export(net, (x,), dynamic_shapes=(batch,))
    torch.testing.assert_close(exported.module()(x[:3]), copy.deepcopy(net)(x[:3]))


# What each kernel writes; PyTorch finds it in the kernel's IR, and takes all else as only read.
CHANNELS = {
    "_meprop_sums_kernel": ["partial_ptr"],
    "_sum_partials_kernel": ["sums_ptr"],
    # index's places are found by way of sums, which PyTorch takes for a write: it copies C numbers.
    "_meprop_channels_kernel": ["sums_ptr", "index_ptr"],
}
ROW = {"_meprop_row_kernel": ["selected_ptr"]}


class _StandInDriver:
    """PyTorch asks Triton's driver for a target, to read a kernel's IR; no GPU is behind it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def _kernels_of(graph: torch.fx.Graph) -> dict[str, list[str]]:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    found = {}
    for node in graph.nodes:
        if "kernel_idx" in node.kwargs:
            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            # PyTorch wraps a kernel that is launched with num_warps in an autotuner of one choice.
            found[getattr(kernel, "fn", kernel).__name__] = node.kwargs["tensors_to_clone"]
    return found


def _trace(mode: str) -> list[dict[str, list[str]]]:
    """The kernels in the graphs of forward and backward, of a convolution with symbolic sizes."""
    import triton
    from torch._dynamo.backends.common import aot_autograd

    # Autograd's engine will not start for a CUDA tensor without a device, so the backward is
    # traced on CPU tensors that are sent down the kernels' path.
    triton.runtime.driver.set_active(_StandInDriver())
    for name in ("fastres.ops._register", "fastres.ops._meprop"):
        sys.modules[name].takes_kernels = lambda x: True  # type: ignore[attr-defined]  # a module's function
    assert not _register.INTERPRET
    graphs: list[dict[str, list[str]]] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(_kernels_of(graph.graph))
        return graph.forward

    module = MePropConv2d(3, 16, 3, k=5, mode=mode)
    compiled: Any = torch.compile(
        module,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
        fullgraph=True,
        dynamic=True,
    )
    # The first kernel is launched, and fails for want of a GPU, once both graphs are there.
    try:
        compiled(torch.randn(64, 3, 16, 16).requires_grad_()).sum().backward()
    except AttributeError as error:
        assert "_StandInDriver" in str(error), error
    return graphs


def test_traces_to_its_kernels_without_a_gpu() -> None:
    """The selections' kernels are in the backward's graph, each kernel's writes recognised."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[{}, CHANNELS], [{}, ROW]]


@pytest.mark.gpu
@pytest.mark.huge(24)  # dy and dx of 2^31 fp16 elements, and room
@pytest.mark.parametrize("mode", MODES)
def test_past_2_to_the_31_elements(mode: str) -> None:
    """Selections from a gradient past 2^31 elements equal those from its parts."""
    from fastres.ops._meprop import select_channels, select_row

    half = torch.randn(2**15 + 1, 32, 32, 32, device="cuda", dtype=torch.float16)
    dy = torch.cat([half, half])
    assert dy.numel() > 2**31
    if mode == "row":
        got = select_row(dy, 100)
        assert torch.equal(got[: len(half)], got[len(half) :])
        assert torch.equal(got[-2:], select_row(half[-2:], 100))
    else:
        dy[:, 7] *= 2
        dy[-1, 30] = torch.inf
        assert select_channels(dy, 2).tolist() == [7, 30]


if __name__ == "__main__":
    print(json.dumps([_trace(mode) for mode in MODES]))
