"""Build recorded launches ahead of time, with no GPU present, and read what the compiler made."""

import functools
import re
import subprocess
import tempfile
import time
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
    """What one kernel became on one target. Registers and spilled bytes are those of a thread."""

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    seconds: float


@dataclass(frozen=True)
class Specialized:
    """A kernel with the types and constants under which Triton would compile it for a launch."""

    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> tuple[str, ...]:
        """The same for launches that run the same binary."""
        return self.source.name, self.source.hash(), str(sorted(self.options.items(), key=str))


def specialized(launch: Launch, target: str) -> Specialized:
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
    backend = make_backend(TARGETS[target])
    kwargs = {**launch.constexprs, "num_warps": launch.num_warps}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**kwargs, "debug": False}, bound, specialization, options
    )
    return Specialized(ASTSource(kernel, signature, constants, attributes), options.__dict__)


def build(launch: Launch, target: str) -> Build:
    """Compile the launch's kernel for `target`, one of TARGETS.

    A kernel that Triton's cache holds takes no time; TRITON_ALWAYS_COMPILE=1 makes it.
    """
    start = time.perf_counter()
    what = specialized(launch, target)
    compiled = triton.compile(what.source, target=TARGETS[target], options=what.options)
    seconds = time.perf_counter() - start
    read = _read_cubin if "cubin" in compiled.asm else _read_amdgcn
    registers, spilled = read(compiled.asm)
    return Build(what.source.name, target, registers, spilled, compiled.metadata.shared, seconds)


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers, and bytes of local memory: stack is where NVIDIA's compiler spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


@functools.cache
def _cuobjdump() -> str:
    return str(triton.knobs.nvidia.cuobjdump.path)


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    """Vector registers, and four bytes for each register, vector or scalar, that was spilled."""
    found = {
        name: int(count)
        for name, count in re.findall(r"^\s*\.(\w+_count):\s+(\d+)\s*$", asm["amdgcn"], re.M)
    }
    spilled = found["vgpr_spill_count"] + found["sgpr_spill_count"]
    return found["vgpr_count"], 4 * spilled
