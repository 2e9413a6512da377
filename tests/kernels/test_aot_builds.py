"""Every kernel builds for four GPU targets with no GPU present, and spills no registers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}

# 32,768 values in one warp: no target has the registers to hold them across the sum.
SPILLING = """
import sys
import torch, triton, triton.language as tl
from fastres.kernels import _aot
from fastres.kernels._launch import launch, record

@triton.jit
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    tl.store(x_ptr + lanes, x - tl.sum(x, 0))

with record() as launches:
    x = torch.empty(32768, device="meta")
    launch(_spilling_kernel, (1,), x, BLOCK=32768, num_warps=1)
for target in sys.argv[1:]:
    print(target, _aot.build(launches[0], target).spilled)
"""


def _without_interpreter(*command: str) -> str:
    """Run Python in a process whose kernels are compiled, not interpreted."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _defined() -> set[str]:
    """Every kernel of kernels/*.py: a triton.jit function that is named _*_kernel."""
    jitted = re.compile(r"^@triton\.jit\b.*\ndef (_\w+_kernel)\(", re.M)
    files = (ROOT / "kernels").glob("*.py")
    return {name for file in files for name in jitted.findall(file.read_text())}


def test_every_kernel_builds_everywhere_and_none_spills(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """One dtype, each kernel in its usual forms; benchmarks/kernel_builds.py builds the rest."""
    rows_file = tmp_path / "builds.json"
    program = str(ROOT / "benchmarks" / "kernel_builds.py")
    table = _without_interpreter(program, "--few", "--dtype", "fp16", "--json", str(rows_file))
    print(table)
    rows = json.loads(rows_file.read_text())["builds"]
    registers: dict[str, int] = {}
    for row in rows:
        name = f"{row['kernel']} {row['target']}"
        registers[name] = max(registers.get(name, 0), row["registers"])
    for name, most in registers.items():
        record_property(f"registers of {name}", most)
    assert "_batch_norm_relu_fwd_kernel" in _defined()
    assert registers.keys() == {f"{name} {target}" for name in _defined() for target in TARGETS}
    assert [row for row in rows if row["spilled"]] == []
    assert all(0 < row["registers"] <= 512 for row in rows)


def test_a_spill_is_seen(tmp_path: Path) -> None:
    """A spilling kernel, so that no spills above means none, not that nobody can tell."""
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    # One of each vendor: the reading differs by that.
    printed = _without_interpreter(str(script), "sm_90", "gfx942")
    seen = dict(line.split() for line in printed.splitlines())
    assert seen.keys() == {"sm_90", "gfx942"}
    assert all(int(spilled) > 0 for spilled in seen.values()), seen


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
def test_an_interpreted_kernel_is_refused_in_words() -> None:
    import torch

    from fastres.kernels import _aot, batch_norm_relu
    from fastres.kernels._launch import record

    x = torch.empty(2, 16, 4, 4, device="meta")
    with record() as launches:
        batch_norm_relu.batch_norm_relu_fwd(x, None, None, None, None, None, 1e-5, True)
    assert [launch.kernel.__name__ for launch in launches] == [
        "_moments_kernel",
        "_batch_norm_relu_fwd_kernel",
    ]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 and cannot be compiled"):
        _aot.build(launches[0], "sm_90")
