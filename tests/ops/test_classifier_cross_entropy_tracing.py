"""classifier_cross_entropy under PyTorch's tracers: opcheck, compile, export, and no GPU."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import COMPILED_ATOL
from torch import Tensor, nn

from fastres.ops import Norm, PreActUnit, _register, classifier_cross_entropy

ROOT = Path(__file__).resolve().parents[2]
NHWC = torch.channels_last


def _leaf(*shape: int, device: str) -> Tensor:
    v = torch.randn(*shape, device=device)
    return v.to(memory_format=NHWC).requires_grad_() if v.dim() == 4 else v.requires_grad_()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_opcheck(device: str, training: bool) -> None:
    ops = torch.ops.fastres
    x, weight = _leaf(3, 16, 3, 3, device=device), _leaf(4, 16, device=device)
    norm, bias = (_leaf(16, device=device), None), None if training else _leaf(4, device=device)
    stats = torch.zeros(16, device=device), torch.ones(16, device=device)
    given = (None, None) if training else stats
    target = torch.tensor([3, 0, 1], device=device)
    args = x, None, 0, *given, *norm, weight, bias, target, 0.1, 1e-5
    torch.library.opcheck(ops.classifier_cross_entropy.default, (*args, True))
    args = tuple(v.detach() if isinstance(v, Tensor) else v for v in args)
    torch.library.opcheck(ops.classifier_cross_entropy.default, (*args, False))
    kept = ops.classifier_cross_entropy(*args, True)[4:]
    x, weight, bias = args[0], args[7], args[8]
    dloss = torch.tensor(2.0, device=device)
    torch.library.opcheck(
        ops.classifier_cross_entropy_backward.default,
        (dloss, x, args[5], None, *stats, weight, bias, *kept, 1e-5, training),
    )


class _Net(nn.Module):
    """A unit that hands its moments on, and the end of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.bn, self.fc = PreActUnit(16, 16), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y, moments = self.unit(x, None, True)
        fc = self.fc.weight, self.fc.bias
        return classifier_cross_entropy(y, Norm.of(self.bn), *fc, target, 0.1, moments)


def _step(f: Any, net: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    loss, logits = f(x, target)
    grads = torch.autograd.grad(loss, [x, *net.parameters()])
    return [loss, logits, *grads, *(v.clone() for v in net.buffers())]


def test_compiles_in_one_graph(path: str, device: str) -> None:
    """With a second batch size; the state, too, is what eager code leaves."""
    torch._dynamo.reset()
    net = _Net().to(device)
    other = copy.deepcopy(net)
    compiled: Any = torch.compile(other, fullgraph=True, backend="aot_eager")
    for batch in (4, 3):
        x = torch.randn(batch, 16, 4, 4, device=device).to(memory_format=NHWC)
        target = torch.arange(batch, device=device)
        want, got = _step(net, net, x, target), _step(compiled, other, x, target)
        for a, b in zip(got, want, strict=True):
            atol = COMPILED_ATOL * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=COMPILED_ATOL, atol=atol)


def test_exports_with_a_batch_of_any_size(path: str, device: str) -> None:
    net = _Net().to(device).eval()
    x, target = torch.randn(4, 16, 4, 4, device=device), torch.arange(4, device=device)
    batch = {0: torch.export.Dim("batch", min=2, max=512)}
    with torch.no_grad():
        exported = torch.export.export(net, (x, target), dynamic_shapes=(batch, batch))
        got, want = exported.module()(x[:3], target[:3]), net(x[:3], target[:3])
    torch.testing.assert_close(got, want)


_FWD, _BWD = "_classifier_cross_entropy_fwd_kernel", "_classifier_cross_entropy_bwd_kernel"
# What each kernel writes; PyTorch finds it in the kernel's IR, and takes all else as only read.
WRITTEN = {
    "_moments_kernel": {"partial_ptr"},
    "_update_running_kernel": {"running_mean_ptr", "running_var_ptr", "num_batches_tracked_ptr"},
    _FWD: {
        "mean_ptr", "var_ptr", "logits_ptr", "loss_ptr", "dlogits_ptr", "pooled_ptr", "da_ptr",
        "sums_ptr",
    },
    _BWD: {"dx_ptr", "dnorm_weight_ptr", "dnorm_bias_ptr", "dweight_ptr", "dbias_ptr"},
}  # fmt: skip


def _trace() -> list[list[tuple[str, list[str]]]]:
    """The kernels in the graphs of forward and backward, with symbolic sizes."""
    import triton
    from ops.test_preact_unit_tracing import _kernels_of, _StandInDriver
    from torch._dynamo.backends.common import aot_autograd

    # See there.
    triton.runtime.driver.set_active(_StandInDriver())
    for name in ("_register", "classifier_cross_entropy"):
        sys.modules[f"fastres.ops.{name}"].takes_kernels = lambda x: True  # type: ignore[attr-defined]  # a module's function
    assert not _register.INTERPRET
    graphs: list[list[tuple[str, list[str]]]] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(_kernels_of(graph.graph))
        return graph.forward

    bn, fc = nn.BatchNorm2d(16), nn.Linear(16, 10)

    def end(x: Tensor, target: Tensor) -> Tensor:
        return classifier_cross_entropy(x, Norm.of(bn), fc.weight, fc.bias, target)[0]

    compiled: Any = torch.compile(
        end,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
        fullgraph=True,
        dynamic=True,
    )
    x = torch.randn(4, 16, 8, 8, dtype=torch.bfloat16).to(memory_format=NHWC).requires_grad_()
    # Both graphs are there before the first kernel is launched, which fails for want of a GPU.
    try:
        compiled(x, torch.arange(4))
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
    graphs = json.loads(done.stdout.splitlines()[-1])
    names = [[name for name, _ in graph] for graph in graphs]
    assert names == [["_moments_kernel", _FWD, "_update_running_kernel"], [_BWD]]
    for name, written in (launch for graph in graphs for launch in graph):
        assert written and set(written) <= WRITTEN[name], name


@pytest.mark.gpu
def test_compiled_by_inductor_on_a_gpu() -> None:
    torch._dynamo.reset()
    net = _Net().to("cuda")
    other = copy.deepcopy(net)
    x = torch.randn(8, 16, 16, 16, device="cuda").to(memory_format=NHWC)
    target = torch.arange(8, device="cuda") % 4
    want = _step(net, net, x, target)
    got = _step(torch.compile(other, fullgraph=True), other, x, target)
    # The loss is a sum of partials, which Inductor may take in another order.
    torch.testing.assert_close(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


@pytest.mark.gpu
@pytest.mark.huge(20)  # x, dx and more of 2^31 fp16 elements
def test_past_2_to_the_31_elements() -> None:
    """A batch whose second half repeats its first, past 2^31 elements: so do logits and dx."""
    half = torch.randn(2**16 + 1, 16, 32, 32, device="cuda", dtype=torch.float16)
    x = torch.cat([half, half]).to(memory_format=NHWC).requires_grad_()
    assert x.numel() > 2**31
    weight = torch.randn(10, 16, device="cuda")
    target = torch.arange(len(half), device="cuda").repeat(2) % 10
    norm = Norm(None, None, training=True)
    loss, logits = classifier_cross_entropy(x, norm, weight, None, target)
    (dx,) = torch.autograd.grad(loss, x, torch.tensor(2.0**20, device="cuda"))
    assert torch.equal(logits[: len(half)], logits[len(half) :])
    assert torch.equal(dx[: len(half)], dx[len(half) :]) and bool(dx.any())


if __name__ == "__main__":
    print(json.dumps(_trace()))
