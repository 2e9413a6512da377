"""Every kernel builds for four GPU targets with no GPU present, and is no worse than it was."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _kernel_baseline import worse
from _occupancy import occupancy

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}

# A copy whose lanes lie side by side, one whose lanes lie apart, and 32,768 values in one warp: no
# target has the registers to hold them across the sum.
KERNELS = """
import dataclasses, json, sys
import torch, triton, triton.language as tl
from fastres.kernels import _aot
from fastres.kernels._launch import launch, record

@triton.jit
def _copy_kernel(x_ptr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    lanes = tl.arange(0, BLOCK) * STEP
    tl.store(x_ptr + lanes, tl.load(x_ptr + lanes) + 1)

@triton.jit
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    tl.store(x_ptr + lanes, x - tl.sum(x, 0))

@triton.jit
def _product_kernel(x_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    at = x_ptr + lanes[:, None] * BLOCK + lanes[None, :]
    x = tl.load(at).to(tl.float16)
    tl.store(at, tl.dot(x, x))

x = torch.empty(32768, device="meta")
with record() as launches:
    launch(_copy_kernel, (1,), x, BLOCK=2048, STEP=1, num_warps=4)
    launch(_copy_kernel, (1,), x, BLOCK=2048, STEP=3, num_warps=4)
    launch(_spilling_kernel, (1,), x, BLOCK=32768, num_warps=1)
    launch(_product_kernel, (1,), x, BLOCK=64, num_warps=4)
for target in sys.argv[1:]:
    print(json.dumps([dataclasses.asdict(_aot.build(one, target)) for one in launches]))
"""


# Before 2.15 Inductor types a number from Python fp64, where eager and later ones type it fp32.
FP64_NUMBERS = """
import sys
sys.path.insert(0, "benchmarks")
import _kernel_variants as variants
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend
from fastres.kernels import _aot

backend = make_backend(_aot.TARGETS["sm_90"])
context = ir.context()
ir.load_dialects(context)
backend.load_dialects(context)
for task in variants.tasks(list(variants.OPS), ["fp16"], ["sm_90"], small=True):
    what = _aot.specialized(variants.launch_of(task), "sm_90")
    numbers = [name for name, kind in what.source.signature.items() if kind == "fp32"]
    if not numbers:
        continue
    signature = what.source.signature | dict.fromkeys(numbers, "fp64")
    source = ASTSource(what.source.fn, signature, what.source.constants, what.source.attrs)
    options = backend.parse_options(what.options)
    made = source.make_ir(
        _aot.TARGETS["sm_90"], options, backend.get_codegen_implementation(options),
        backend.get_module_map(), context,
    )
    computed = [
        line.strip() for line in str(made).splitlines()
        if "f64" in line and "arith." in line
        and not any(ok in line for ok in ("arith.truncf", "arith.cmpf", "arith.constant"))
    ]
    # Inductor never launches this one: its op is opaque.
    if task.kernel != "_sgd_step_fwd_kernel":
        print(task.kernel, computed)
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
    jitted = re.compile(r"^@triton\.jit\b(?:\([^)]*\))?\ndef (_\w+_kernel)\(", re.M)
    files = (ROOT / "kernels").glob("*.py")
    return {name for file in files for name in jitted.findall(file.read_text())}


def test_every_kernel_builds_everywhere_and_none_is_worse(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """One configuration each, beside the baseline; .ci/run does it for all of them."""
    rows_file = tmp_path / "builds.json"
    program = str(ROOT / "benchmarks" / "kernel_report.py")
    said = _without_interpreter(program, "--small", "--check", "--json", str(rows_file))
    print(said)
    rows = json.loads(rows_file.read_text())["rows"]
    for row in rows:
        name = f"{row['kernel']} {row['target']}"
        record_property(f"registers of {name}", row["registers"])
    assert "_batch_norm_relu_fwd_kernel" in _defined()
    assert {(row["kernel"], row["target"]) for row in rows} == {
        (name, target) for name in _defined() for target in TARGETS
    }
    assert not [row["kernel"] for row in rows if row["spilled"]]
    for row in rows:
        assert 0 < row["registers"] <= 512
        assert 0 < row["resident_warps"] <= row["most_warps"]
        assert row["loads_128"] <= row["loads"] and row["stores_128"] <= row["stores"]
        assert row["stores"] > 0  # a kernel that stores nothing is one whose code was not read
        # A block is resident whole.
        assert row["resident_warps"] % row["warps"] == 0


@pytest.fixture(scope="module")
def deliberate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """KERNELS built, by target; one of each vendor: the reading differs by that."""
    script = tmp_path_factory.mktemp("deliberate") / "kernels.py"
    script.write_text(KERNELS)
    targets = ("sm_90", "gfx942")
    lines = _without_interpreter(str(script), *targets).splitlines()
    rows = {target: json.loads(line) for target, line in zip(targets, lines, strict=True)}
    for target, builds in rows.items():
        for row in builds:
            parts = ("warps", "registers", "shared", "scalar_registers")
            held = occupancy(target, *(row[part] for part in parts))
            row["resident_warps"] = held.warps
    return rows


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_spill_is_seen(deliberate: dict[str, list[dict[str, Any]]], target: str) -> None:
    """So that no spills above means none, not that nobody can tell."""
    copy, _, spilling, _ = deliberate[target]
    assert copy["spilled"] == 0 and spilling["spilled"] > 0
    (line,) = worse(spilling | {"spilled": 0}, spilling)
    assert f"spills {spilling['spilled']} bytes a thread, 0 before" in line


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_scalar_accesses_are_seen(deliberate: dict[str, list[dict[str, Any]]], target: str) -> None:
    copy, apart, _, _ = deliberate[target]
    # 2,048 fp32 elements by four warps of 32 or 64 threads, four to an access of 128 bits.
    threads = 4 * {"sm_90": 32, "gfx942": 64}[target]
    each = 2048 // threads
    for what in ("loads", "stores"):
        assert copy[what] == copy[f"{what}_128"] == each // 4
        assert apart[what] == each and apart[f"{what}_128"] == 0
    loads, stores = worse(copy, apart)[:2]
    assert loads == f"0 of {each} global loads of 128 bits, {each // 4} of {each // 4} before"
    assert stores == f"0 of {each} global stores of 128 bits, {each // 4} of {each // 4} before"
    assert worse(copy, copy) == []


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_tensor_cores_are_seen(deliberate: dict[str, list[dict[str, Any]]], target: str) -> None:
    copy, _, _, product = deliberate[target]
    assert copy["tensor"] == 0 and product["tensor"] > 0
    (line,) = worse(product, product | {"tensor": 0})
    assert line == f"no tensor-core instruction, {product['tensor']} before"


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


def test_a_number_from_python_may_come_as_fp64() -> None:
    """No kernel computes in fp64 then, nor fails to build."""
    said = _without_interpreter("-c", FP64_NUMBERS).splitlines()
    assert {line.split()[0] for line in said} >= {
        "_batch_norm_relu_fwd_kernel",
        "_classifier_cross_entropy_fwd_kernel",
        "_stochastic_depth_add_fwd_kernel",
        "_update_running_kernel",
    }
    assert not [line for line in said if not line.endswith(" []")]
