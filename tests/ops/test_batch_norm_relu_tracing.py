"""batch_norm_relu as a triton_op: traced without a GPU, and what only a GPU can show."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.batch_norm_relu_equality import Case, run, tensors
from torch import Tensor

from fastres.ops import BatchNormReLU2d, batch_norm_relu

ROOT = Path(__file__).resolve().parents[2]
# What each kernel writes; PyTorch finds it in the kernel's IR, and takes all else as only read.
FORWARD = {
    "_moments_kernel": ["partial_ptr"],
    "_batch_norm_relu_fwd_kernel": ["mean_ptr", "var_ptr", "y_ptr", "mask_ptr"],
    "_update_running_kernel": ["running_mean_ptr", "running_var_ptr", "num_batches_tracked_ptr"],
}
BACKWARD = {
    "_batch_norm_relu_sums_bwd_kernel": ["partial_ptr"],
    "_batch_norm_relu_bwd_kernel": ["dx_ptr", "dresidual_ptr", "dweight_ptr", "dbias_ptr"],
}


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


def _trace() -> dict[str, Any]:
    """The kernels in the graphs of forward and backward, and whether their sizes are symbols."""
    import triton
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from fastres.ops import _register

    def step(x: Tensor, residual: Tensor, module: BatchNormReLU2d) -> Tensor:
        return module(x, residual)

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 16, 8, 8, device="cuda")
        module = BatchNormReLU2d(16, device="cuda")
        fake = make_fx(step, tracing_mode="fake")(x, x, module)
        y = fake(x, x, module)
    on_cuda = [str(node.target) for node in fake.graph.nodes if "fastres" in str(node.target)]

    # Autograd's engine will not start for a CUDA tensor without a device, so the backward is
    # traced on CPU tensors that are sent down the kernels' path.
    triton.runtime.driver.set_active(_StandInDriver())
    for name in ("fastres.ops._register", "fastres.ops.batch_norm_relu"):
        sys.modules[name].takes_kernels = lambda x: True  # type: ignore[attr-defined]  # a module's function
    assert not _register.INTERPRET
    graphs: list[dict[str, list[str]]] = []
    symbolic: list[bool] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(_kernels_of(graph.graph))
        inputs = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
        images = [v for v in inputs if isinstance(v, Tensor) and v.dim() == 4]
        symbolic.extend(isinstance(v.shape[0], torch.SymInt) for v in images)
        return graph.forward

    compiled: Any = torch.compile(
        step, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True, dynamic=True
    )
    # Both graphs are there before the first kernel is launched, which fails for want of a GPU.
    try:
        compiled(
            *(torch.randn(4, 16, 8, 8).requires_grad_() for _ in range(2)), BatchNormReLU2d(16)
        )
    except AttributeError as error:
        assert "_StandInDriver" in str(error), error
    return {
        "on_cuda": on_cuda,
        "y": [str(y.device), list(y.shape)],
        "graphs": graphs,
        "symbolic": all(symbolic),
    }


def test_traces_to_its_kernels_without_a_gpu() -> None:
    """In one graph with symbolic sizes, forward and backward, each kernel's writes recognised."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    traced = json.loads(done.stdout.splitlines()[-1])
    assert traced["on_cuda"] == [
        "fastres.batch_norm_relu.default",
        "fastres.batch_norm_update_stats.default",
    ]
    assert traced["y"] == ["cuda:0", [4, 16, 8, 8]]
    assert traced["graphs"] == [FORWARD, BACKWARD]
    assert traced["symbolic"]


@pytest.mark.gpu
@pytest.mark.parametrize("residual_layout", [None, "nhwc"])
def test_compiled_by_inductor_on_a_gpu(residual_layout: str | None) -> None:
    case = Case(shape=(8, 16, 32, 32), x_layout="nhwc", residual_layout=residual_layout)
    given = tensors(case, "cuda")
    torch._dynamo.reset()
    want = run(batch_norm_relu, case, given)
    got = run(torch.compile(batch_norm_relu, fullgraph=True), case, given)
    # The same kernels with the same arguments.
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.gpu
def test_saved_on_the_cpu_and_back() -> None:
    case = Case(shape=(4, 20, 6, 8), x_layout="nhwc", residual_layout="nhwc")
    given = tensors(case, "cuda")
    want = run(batch_norm_relu, case, given)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        got = run(batch_norm_relu, case, given)
    assert torch.equal(got["dresidual"], want["dresidual"])
    torch.testing.assert_close(got["dx"], want["dx"])


@pytest.mark.gpu
@pytest.mark.huge(40)  # x, y, dy and dx of 2^31 fp16 elements, and room
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=str)
def test_past_2_to_the_31_elements(fmt: torch.memory_format) -> None:
    """A batch whose second half repeats its first, past 2^31 elements: so do y and dx."""
    half = torch.randn(2**15 + 1, 32, 32, 32, device="cuda", dtype=torch.float16)
    x = torch.cat([half, half]).to(memory_format=fmt).requires_grad_()
    assert x.numel() > 2**31
    weight, bias = torch.rand(32, device="cuda"), torch.rand(32, device="cuda")
    y = batch_norm_relu(x, None, None, weight, bias, training=True)
    want = batch_norm_relu(half.to(memory_format=fmt), None, None, weight, bias, training=True)
    # The statistics are those of the half, up to fp32's rounding: one ulp of fp16 at most.
    torch.testing.assert_close(y[: len(half)], want, rtol=1e-3, atol=1e-3)
    assert torch.equal(y[: len(half)], y[len(half) :])
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(dx[: len(half)], dx[len(half) :])
    assert dx.isfinite().all()


if __name__ == "__main__":
    print(json.dumps(_trace()))
