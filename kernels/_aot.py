"""Build recorded launches ahead of time, with no GPU present, and read what the compiler made."""

import functools
import gc
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import create_function_from_signature

from ._launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Build:
    """What one kernel became on one target. Registers and spilled bytes are those of a thread.

    Scalar registers, of which AMD has a file apart, are those of a wave.

    Instructions are counted where they stand in the code, not as often as they run: those that
    multiply matrices (tensor), and loads and stores of global memory, all and those of 128 bits or
    more. AMD's scalar loads, one value for a whole wave, are no part of it.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    scalar_registers: int
    spilled: int
    shared: int
    tensor: int
    loads: int
    loads_128: int
    stores: int
    stores_128: int
    seconds: float


@dataclass(frozen=True)
class _Code:
    """How a vendor's disassembly is read: an instruction's line, and the names that count."""

    line: re.Pattern[str]
    tensor: re.Pattern[str]
    loads: re.Pattern[str]
    stores: re.Pattern[str]
    wide: re.Pattern[str]

    def count(self, code: str) -> dict[str, int]:
        names = self.line.findall(code)
        loads = [name for name in names if self.loads.match(name)]
        stores = [name for name in names if self.stores.match(name)]
        return {
            "tensor": sum(self.tensor.match(name) is not None for name in names),
            "loads": len(loads),
            "loads_128": sum(self.wide.search(name) is not None for name in loads),
            "stores": len(stores),
            "stores_128": sum(self.wide.search(name) is not None for name in stores),
        }


_SASS = _Code(
    # An address, perhaps a predicate, the instruction.
    line=re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M),
    # HMMA, HGMMA, IMMA, QGMMA, UTCHMMA, ...
    tensor=re.compile(r"[A-Z]*MMA\b"),
    # Straight to registers, to shared memory, through a generic address, and by TMA.
    loads=re.compile(r"(LDG|LDGSTS|LD|UTMALDG)\b"),
    stores=re.compile(r"(STG|ST|UTMASTG)\b"),
    wide=re.compile(r"\.(128|256)\b|^UTMA"),
)
_GCN = _Code(
    line=re.compile(r"^\s+([a-z]\w+)", re.M),
    tensor=re.compile(r"v_s?mfma"),
    loads=re.compile(r"(global|buffer|flat)_load_"),
    stores=re.compile(r"(global|buffer|flat)_store_"),
    wide=re.compile(r"dwordx4|b128"),
)


@dataclass(frozen=True)
class Specialized:
    """A kernel with the types and constants under which Triton would compile it for a launch."""

    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> tuple[str, ...]:
        """The same for launches that run the same binary."""
        return self.source.name, self.source.hash(), str(sorted(self.options.items(), key=str))


def specialized(launch: Launch, target: str | GPUTarget) -> Specialized:
    """What Triton's own JIT makes of the launch's arguments: types, ==1, divisible by 16, None.

    It is asked through the functions that it launches with (Triton 3.6 to 3.9), so that what is
    built is what would run. A meta tensor counts as aligned, as PyTorch's allocators align.
    """
    kernel = launch.kernel
    if isinstance(kernel, InterpretedFunction):
        raise RuntimeError(
            f"{kernel.__name__} was imported with TRITON_INTERPRET=1 and cannot be compiled: "
            "build in a process without it"
        )
    backend = make_backend(TARGETS[target] if isinstance(target, str) else target)
    kwargs = {**launch.constexprs, "num_warps": launch.num_warps}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**kwargs, "debug": False}, bound, specialization, options
    )
    return Specialized(ASTSource(kernel, signature, constants, attributes), options.__dict__)


def build_all(
    launches: Iterable[Launch], target: str | None = None, threads: int | None = None
) -> int:
    """Compile all that the launches run, several at a time, into Triton's cache.

    Args:
        target: one of TARGETS; None, this machine's GPU.
        threads: at work at once, for the compiler leaves Python to the others; None, as many as a
            ThreadPoolExecutor has.
    Returns:
        How many binaries it was.
    """
    gpu = triton.runtime.driver.active.get_current_target() if target is None else TARGETS[target]
    found = {what.key: what for what in (specialized(launch, gpu) for launch in launches)}

    def compile_one(what: Specialized) -> None:
        triton.compile(what.source, target=gpu, options=what.options)

    # Collections would go through all of PyTorch's objects for every few that a build makes.
    collects = gc.isenabled()
    gc.disable()
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(compile_one, found.values()))
    finally:
        if collects:
            gc.enable()
    return len(found)


def build(launch: Launch, target: str) -> Build:
    """Compile the launch's kernel for `target`, one of TARGETS.

    A kernel that Triton's cache holds takes no time; TRITON_ALWAYS_COMPILE=1 makes it.
    """
    start = time.perf_counter()
    what = specialized(launch, target)
    compiled = triton.compile(what.source, target=TARGETS[target], options=what.options)
    seconds = time.perf_counter() - start
    read = _read_cubin if "cubin" in compiled.asm else _read_amdgcn
    found = read(compiled.asm)
    return Build(
        what.source.name, target, launch.num_warps, shared=compiled.metadata.shared,
        seconds=seconds, **found,
    )  # fmt: skip


def _read_cubin(asm: dict[str, Any]) -> dict[str, int]:
    """Stack and local memory are where NVIDIA's compiler spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _printed("cuobjdump", "--dump-resource-usage", file.name)
        code = _printed("nvdisasm", "--print-code", file.name)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    figures = {"registers": int(found["REG"]), "scalar_registers": 0, "spilled": spilled}
    return figures | _SASS.count(code)


def _printed(tool: str, *arguments: str) -> str:
    """What a tool prints that comes with Triton."""
    command = [_path(tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def _path(tool: str) -> str:
    return str(getattr(triton.knobs.nvidia, tool).path)


def _read_amdgcn(asm: dict[str, Any]) -> dict[str, int]:
    """Vector registers, and bytes of scratch memory, where AMD's compiler spills to.

    Scalar registers it spills to lanes of vector ones first, which costs no memory.
    """
    found = {
        name: int(count)
        for name, count in re.findall(
            r"^\s*\.((?:[vs]gpr_count|private_segment_fixed_size)):\s+(\d+)\s*$",
            asm["amdgcn"],
            re.M,
        )
    }
    figures = {
        "registers": found["vgpr_count"],
        "scalar_registers": found["sgpr_count"],
        "spilled": found["private_segment_fixed_size"],
    }
    return figures | _GCN.count(asm["amdgcn"])
