"""The counters against traffic that is known, and the whole step against what is started."""

import collections
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton", reason="counts what Triton's interpreter executes")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts what Triton's interpreter executes"
)

import step_account  # noqa: E402  # after the line that may skip this file
from _inductor_schedule import NotCounted  # noqa: E402  # as above
from _step_count import Account, Traffic, counted  # noqa: E402  # as above
from run_main import run_main  # noqa: E402  # as above

from fastres.ops import batch_norm_relu, cast  # noqa: E402  # as above


@pytest.mark.parametrize("numel", [8192, 5003])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_moves_four_bytes_and_two(numel: int, dtype: torch.dtype) -> None:
    """To the byte, where the last block is masked as well."""
    x, y = torch.randn(numel), torch.empty(numel, dtype=dtype)
    with counted() as account:
        cast(x, y)
    assert account.kernels == {"_cast_fwd_kernel": Traffic(1, 4 * numel, 4 * numel, 2 * numel)}
    assert account.calls == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_norm_relu_moves_what_its_docstring_says(dtype: torch.dtype) -> None:
    """Forward x twice and y; backward dy and x twice, and dx; and the partials between them."""
    N, C, H, W = 4, 16, 16, 16
    x = torch.randn(N, C, H, W).to(dtype, memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(C, requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)
    with counted() as account:
        y = batch_norm_relu(x, None, None, weight, bias, training=True)
        torch.autograd.grad(y, (x, weight, bias), dy)
    assert set(account.kernels) == {
        "_moments_kernel", "_batch_norm_relu_fwd_kernel",
        "_batch_norm_relu_sums_bwd_kernel", "_batch_norm_relu_bwd_kernel",
    }  # fmt: skip
    moments, fwd, sums, bwd = account.kernels.values()
    tensor, vector = x.nbytes, 4 * C
    assert all(traffic.launches == 1 for traffic in account.kernels.values())
    partials = moments.written
    assert partials == sums.written > 0 and partials % (2 * vector) == 0
    assert moments.read == moments.loaded == tensor
    assert (fwd.read, fwd.written) == (tensor + partials + 2 * vector, tensor + 2 * vector)
    assert sums.read == 2 * tensor + 4 * vector
    assert (bwd.read, bwd.written) == (
        2 * tensor + partials + 4 * vector,
        tensor + 2 * vector,
    )
    # Every program merges the partials: the caches serve all but the first.
    programs = N * H * W * C // 4096
    assert fwd.loaded - fwd.read == (programs - 1) * (partials + 2 * vector)


def test_calls_of_pytorch() -> None:
    x = torch.randn(4, 3, 8, 8)
    conv = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    projection = torch.nn.Conv2d(3, 5, 1, bias=False)
    one = torch.zeros(())
    with counted() as account, torch.no_grad():
        x.view(4, -1).t().detach()[:2].reshape(2, 2, 2).unsqueeze(0)
        torch.empty(100).resize_(10)
        x.sum().item()
        x + one.expand(4, 3, 8, 8)
        conv(x)
        projection(x)
        torch.empty_like(x).copy_(x).relu_()
        torch.zeros(0) + 1
    n = x.nbytes
    y = 4 * 5 * 8 * 8 * 4
    read = 2 * n + conv.weight.nbytes + projection.weight.nbytes
    assert account.calls == {
        "sum": Traffic(1, n, n, 4),
        "add": Traffic(1, n + 4, n + 4, n),
        "convolution": Traffic(2, read, read, 2 * y),
        "copy_": Traffic(1, n, n, n),
        "relu_": Traffic(1, n, n, n),
    }
    assert account.conv_outputs == y
    assert account.total.launches == 6


def test_a_step_counts_every_launch_that_the_interpreter_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every method: the counts are those of tests/train/test_main.py."""
    import triton.runtime.interpreter as interpreter

    started: collections.Counter[str] = collections.Counter()
    call = interpreter.GridExecutor.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        started[self.fn.__name__] += 1
        return call(self, *args, **kwargs)

    train_step = step_account.Trainer.train_step

    def from_here_on(self: Any, index: torch.Tensor, step: int) -> Any:
        started.clear()
        return train_step(self, index, step)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counting)
    monkeypatch.setattr(step_account.Trainer, "train_step", from_here_on)
    account = step_account.account_of(
        "fused", 4, depth=8, width=4, precision="pure-fp16", drop_prob=0.5, drop_mode="subset",
        meprop_ratio=0.5,
    )  # fmt: skip
    launches = {name: traffic.launches for name, traffic in account.kernels.items()}
    assert launches == started
    for name in ("_moments_kernel", "_update_running_kernel", "_batch_norm_relu_sums_bwd_kernel"):
        assert launches[name] == 7
    assert launches["_stochastic_depth_add_fwd_kernel"] == launches["_draw_subset_kernel"] == 3
    assert launches["_meprop_sums_kernel"] == 9
    assert (launches["_unscale_fwd_kernel"], launches["_sgd_step_fwd_kernel"]) == (1, 2)


def test_a_compiled_step_is_eagers_but_for_what_inductor_fuses() -> None:
    compiled, eager = (
        step_account.account_of(
            name, 2, 16, depth=8, units=2, width=4, precision="bf16", channels_last=True
        )
        for name in ("compile", "eager")
    )
    assert compiled.conv_outputs == eager.conv_outputs
    ours = {name: compiled.kernels.pop(f"inductor: {name}") for name in ("pointwise", "reduction")}
    assert all(traffic.launches >= 5 for traffic in ours.values())  # five BatchNorms each way
    assert compiled.kernels == eager.kernels
    same = {"convolution", "convolution_backward", "mm", "addmm", "_fused_sgd_", "nll_loss_forward"}
    assert all(compiled.calls[name] == eager.calls[name] for name in same)
    # Of each of the model's layers nothing is left, and no gradient is copied to lie otherwise.
    assert compiled.calls.keys() < eager.calls.keys()
    gone = {"native_batch_norm", "native_batch_norm_backward", "relu_", "threshold_backward", "add"}
    assert not gone & compiled.calls.keys() and gone < eager.calls.keys()
    assert compiled.total.written < eager.total.written


def test_the_program_says_why_a_compiled_step_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def account_of(provider: str, *_: Any, **__: Any) -> Account:
        if provider == "compile":
            raise NotCounted("another Inductor")
        return Account(calls={"add": Traffic(1, 8, 8, 4)}, conv_outputs=4)

    monkeypatch.setattr(step_account, "account_of", account_of)
    file = tmp_path / "step.json"
    flags = ("--small", "--json", file, "--provider", "compile", "eager")
    done = run_main(step_account, *flags)
    assert done.returncode == 0, done.stderr
    *table, words = done.stdout.splitlines()
    assert words == f"torch.compile: not counted with torch {torch.__version__}: another Inductor"
    assert "eager: launches" in table[0] and table[-1].startswith("total")
    first, *others = json.loads(file.read_text())["rows"]
    assert first["provider"] == "compile" and "another Inductor" in first["not_measured"]
    assert {row["provider"] for row in others} == {"eager"}


def test_the_program_puts_fused_beside_eager(tmp_path: Path) -> None:
    # What a graph of the fused units' step holds is that step, and what the host else tells it.
    providers = ("fused units graph", "fused", "eager")
    file = tmp_path / "step.json"
    done = run_main(step_account, "--small", "--json", file, "--provider", *providers)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["benchmark"] == "step_account" and content["small"] is True
    totals = {row["provider"]: row for row in content["rows"] if row["name"] == "total"}
    assert totals.keys() == set(providers)
    for provider, total in totals.items():
        rows = [row for row in content["rows"] if row["provider"] == provider]
        assert sum(row["launches"] for row in rows if row["by"] != "all") == total["launches"]
        parts = sum(row["passes"] for row in rows if row["by"] != "all")
        assert parts == pytest.approx(total["passes"])
    names: dict[str, set[str]] = {provider: set() for provider in totals}
    for row in content["rows"]:
        names[row["provider"]].add(row["name"])
    assert "_batch_norm_relu_bwd_kernel" in names["fused"] - names["eager"]
    assert {"native_batch_norm", "relu_"} <= names["eager"] - names["fused"]
    launches = {row["name"]: row["launches"] for row in content["rows"] if row["by"] == "triton"}
    # Three units, two of them with a projection: two forward; backward one for both gradients of
    # the first's convolutions and of the second's conv2, and for each of the others two.
    units = {"fwd": 6, "bwd": 3, "dgrad": 3, "wgrad": 3, "dx": 3}
    assert {name: launches[f"_norm_relu_conv2d_{name}_kernel"] for name in units} == units
    # Moments come with what is normalised; without fused units each of seven BatchNorms takes its.
    ends = ("stem_conv2d_fwd", "stem_conv2d_wgrad", "classifier_cross_entropy_fwd")
    for name in (*ends, "classifier_cross_entropy_bwd"):
        assert launches[f"_{name}_kernel"] == 1
    (row,) = [row for row in content["rows"] if row["name"] == "_moments_kernel"]
    assert (row["provider"], row["launches"]) == ("fused", 7)
    # A pass is the same bytes, by whichever kernels.
    passes = [row["bytes_per_image"] / row["passes"] for row in totals.values()]
    assert passes == pytest.approx(passes[:1] * 3)
    # The ReLU in the BatchNorm's kernels is a pass less each way, at any size.
    assert totals["fused"]["passes"] < totals["eager"]["passes"]
    assert "total" in done.stdout.splitlines()[-1]


def test_a_depth_that_there_is_not() -> None:
    done = run_main(step_account, "--depth", "9")
    assert done.returncode == 2 and done.stderr.startswith("error: --depth 9: expected 6n + 2")
