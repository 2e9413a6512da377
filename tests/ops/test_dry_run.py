"""dry_run and build_kernels: what is collected, what is left as it is, what is built."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastres.ops import (
    BatchNormReLU2d,
    PreActUnit,
    _register,
    build_kernels,
    cast,
    dry_run,
    sgd_step,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernels are built. They were imported interpreted, but none is launched."""
    monkeypatch.setattr(_register, "INTERPRET", False)


@pytest.mark.usefixtures("outside_the_interpreter")
def test_nothing_is_launched_and_everything_collected() -> None:
    torch.manual_seed(0)
    unit = PreActUnit(16, 16)
    norm = BatchNormReLU2d(16)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    before = {name: t.clone() for name, t in unit.state_dict().items()}
    with dry_run() as launches:
        y = norm(unit(x))
        assert not y.any()  # zeros, which nobody wrote
        y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in unit.parameters())
    names = [launch.kernel.__name__ for launch in launches]
    assert names.count("_norm_relu_conv2d_fwd_kernel") == 2
    assert names.count("_norm_relu_conv2d_dx_kernel") == 1
    assert any("batch_norm_relu" in name for name in names)
    assert all(torch.equal(t, before[name]) for name, t in unit.state_dict().items())
    # And afterwards the path of a CPU again.
    assert norm(unit(x)).any() and not _register.collecting


@pytest.mark.usefixtures("outside_the_interpreter")
def test_what_is_written_in_place_stays() -> None:
    flat, out = torch.ones(16), torch.ones(16, dtype=torch.float16)
    with dry_run() as launches:
        sgd_step([torch.ones(16)], [16], flat, lr=0.1)
        cast(2 * flat, out)
    assert flat.tolist() == out.tolist() == [1.0] * 16 and len(launches) == 2


@pytest.mark.usefixtures("outside_the_interpreter")
def test_what_is_refused() -> None:
    with dry_run(), pytest.raises(RuntimeError, match="dry_run: entered already"), dry_run():
        pass
    with pytest.raises(ZeroDivisionError), dry_run():
        raise ZeroDivisionError
    assert not _register.collecting


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
@pytest.mark.usefixtures("outside_the_interpreter")
def test_kernels_that_were_imported_for_the_interpreter_are_not_built() -> None:
    with dry_run() as launches:
        cast(torch.ones(3), torch.empty(3, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="imported with TRITON_INTERPRET=1 and cannot"):
        build_kernels(launches, "sm_90")


def test_the_interpreter_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_register, "INTERPRET", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 kernels are not built"), dry_run():
        pass


_BUILDS = """
import torch, triton
from fastres.ops import build_kernels, cast, dry_run
made = []
triton.knobs.compilation.listener = lambda **about: made.append(about["cache_hit"])
source, out = torch.ones(4096), torch.empty(4096, dtype=torch.float16)
with dry_run() as launches:
    for _ in range(3):
        cast(source, out)
    cast(out, source)
counts = [build_kernels(launches, "sm_90", threads) for threads in (2, 1)]
assert counts == [2, 2] and len(launches) == 4, (counts, len(launches))
assert made == [False, False, True, True], made
"""


def test_each_binary_is_built_once(tmp_path: Path) -> None:
    """In earnest, for a GPU that is not here, into an empty cache; then found there."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _BUILDS], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


@pytest.mark.gpu
def test_a_first_step_finds_its_kernels_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model: Any = nn.Sequential(PreActUnit(16, 16), BatchNormReLU2d(16)).cuda()
    x = torch.randn(3, 16, 9, 9, device="cuda").to(memory_format=torch.channels_last)
    with dry_run() as launches:
        model(x).sum().backward()
    model.zero_grad()
    assert build_kernels(launches) >= 8
    hits: list[bool] = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda **about: hits.append(about["cache_hit"])
    )
    model(x).sum().backward()
    assert hits and all(hits)
    assert all(bool(p.grad.any()) for p in model.parameters())
