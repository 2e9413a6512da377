"""How many warps of a kernel a multiprocessor holds at once, from what the compiler made of it.

It is the limit by resources: how many there are in a run depends on the grid as well.
"""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """An SM, or a compute unit, whose wavefronts are called warps here. Shared memory in bytes.

    Both vendors have four schedulers on it, each with 512 registers a lane, in portions of eight.
    """

    warps: int
    blocks: int
    shared: int
    shared_portion: int
    # What the driver takes of every block's share.
    shared_reserved: int


SCHEDULERS = 4
REGISTERS, REGISTERS_PORTION = 512, 8
# Of an AMD scheduler, for all its waves; each takes one portion more, for the trap handler.
SCALAR_REGISTERS, SCALAR_PORTION = 800, 16

# NVIDIA: CUDA C++ Programming Guide, table of technical specifications by compute capability; for
# the portions, cuda_occupancy.h of the CUDA toolkit. AMD: LLVM's AMDGPU backend (GCNSubtarget,
# AMDGPUBaseInfo) and the CDNA 3 instruction set's reference guide.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * KIB, 128, KIB),
    "sm_90": Multiprocessor(64, 32, 228 * KIB, 128, KIB),
    "sm_100": Multiprocessor(64, 32, 228 * KIB, 128, KIB),
    "gfx942": Multiprocessor(32, 16, 64 * KIB, 512, 0),
}


@dataclass(frozen=True)
class Occupancy:
    """Resident warps, out of how many, and by what they are held at that ("" where by nothing)."""

    warps: int
    most: int
    limited_by: str

    @property
    def share(self) -> float:
        return self.warps / self.most


def occupancy(
    target: str, warps: int, registers: int, shared: int, scalar_registers: int = 0
) -> Occupancy:
    """Of blocks of so many warps, with registers for each thread and shared memory for a block."""
    limits = MULTIPROCESSORS[target]
    most = limits.warps
    warps_by_registers = SCHEDULERS * (REGISTERS // _portions(registers, REGISTERS_PORTION))
    scalars = _portions(scalar_registers, SCALAR_PORTION) + SCALAR_PORTION
    warps_by_scalars = SCHEDULERS * (SCALAR_REGISTERS // scalars) if scalar_registers else most
    # AMD's limit is one of barriers, which a block of one wave does not need.
    blocks_limit = most if target.startswith("gfx") and warps == 1 else limits.blocks
    blocks = {
        "threads": most // warps,
        "registers": warps_by_registers // warps,
        "scalar registers": warps_by_scalars // warps,
        "shared memory": limits.shared
        // _portions(shared + limits.shared_reserved, limits.shared_portion),
        "blocks": blocks_limit,
    }
    least = min(blocks, key=lambda name: blocks[name])
    resident = min(blocks[least] * warps, most)
    return Occupancy(resident, most, "" if resident == most else least)


def _portions(amount: int, portion: int) -> int:
    """The amount as it is handed out: whole portions, one at the least."""
    return max(-(-amount // portion), 1) * portion
