"""The processes of a run: one, or those that torchrun started."""

import datetime
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from errors import TrainError
from torch import Tensor

from fastres.data import DataError

T = TypeVar("T")

# Longer than it takes to download and decode a data set while the other ranks wait.
_TIMEOUT = datetime.timedelta(minutes=20)


def usable_cpus() -> int:
    """Cores that this process may run on; macOS does not tell, and there it is all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def end_process(status: int, world_size: int | None = None) -> NoReturn:
    """The last call of a program that may be one of several processes: exit with a status.

    Where DistributedDataParallel was, gloo's threads outlive the process group, and one that lets
    go of a tensor while Python closes down aborts the process (pytorch/pytorch#190489). So among
    several, Python is not closed down. world_size: torchrun's unless given.
    """
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def count_gpus(device: str) -> int:
    """GPUs to compute on; 0 stands for the CPU. device: "auto", "cpu" or "cuda".

    Raises:
        TrainError: "cuda", and there is none.
    """
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise TrainError(
            "--device cuda: PyTorch finds no GPU here; pass --device cpu, or check the driver "
            "and that torch is a GPU build"
        )
    return gpus


@dataclass(frozen=True)
class Workers:
    """This process among the others, and the device that it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "Workers":
        """Meet the other processes. device: "auto", "cpu" or "cuda".

        Raises:
            TrainError: there is no GPU, or there are fewer than processes on this machine.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        gpus = count_gpus(device)
        if gpus == 0:
            target = torch.device("cpu")
            # torchrun gives each process a single thread; the machine may have more to share out.
            if os.environ.get("OMP_NUM_THREADS", "1") == "1" and world_size > 1:
                torch.set_num_threads(max(1, usable_cpus() // local_world_size))
        else:
            if local_world_size > gpus:
                raise TrainError(
                    f"{local_world_size} processes on this machine and {gpus} GPU(s): pass "
                    f"--nproc_per_node {gpus} to torchrun, or --device cpu to train/main.py"
                )
            target = torch.device("cuda", local_rank)
            torch.cuda.set_device(target)
        if world_size > 1:
            backend = "nccl" if target.type == "cuda" else "gloo"
            # NCCL wants to know the device before its first collective.
            bound = target if target.type == "cuda" else None
            dist.init_process_group(backend, timeout=_TIMEOUT, device_id=bound)
        return cls(rank, world_size, local_rank, target)

    def leave(self) -> None:
        """Part from the other processes; nothing collective may follow."""
        if dist.is_initialized():
            # NCCL waits until no CUDA graph holds its collectives; a run leaves them in cycles.
            gc.collect()
            dist.destroy_process_group()

    @property
    def device_name(self) -> str:
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else "CPU"

    def hardware(self) -> dict[str, Any]:
        """What computes, and so what times are of."""
        return {
            "processes": self.world_size,
            "device": self.device.type,
            "device_name": self.device_name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes files for all."""
        return self.rank == 0

    def say(self, line: str) -> None:
        if self.leads:
            print(line, flush=True)

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns; where it fails on one rank, fail on all with that rank's line.

        Without this a rank that finds a damaged file would leave the others in a collective.
        """
        value, problem = None, None
        try:
            value = action()
        except (TrainError, DataError) as error:
            problem = str(error)
        problems: list[str | None] = [problem]
        if self.world_size > 1:
            problems = [None] * self.world_size
            dist.all_gather_object(problems, problem)
        first = next((p for p in problems if p is not None), None)
        if first is not None:
            raise TrainError(first)
        return value  # type: ignore[return-value]  # None only where action returned None

    def agree(self, value: object, what: str) -> None:
        """Raise TrainError on every process unless all have the same value."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        if any(v != values[0] for v in values):
            raise TrainError(
                f"{what} differs between the processes ({values}): give them one file system"
            )

    def leader_first(self, action: Callable[[], T]) -> T:
        """Run `action` on one process of each machine, then on the rest, which find it cached."""
        value = self.together(action if self.local_rank == 0 else lambda: None)
        rest = self.together(action if self.local_rank != 0 else lambda: None)
        return value if self.local_rank == 0 else rest  # type: ignore[return-value]  # as above

    def sum_(self, t: Tensor) -> Tensor:
        """Sum t over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(t)
        return t

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace float tensors by their mean over the processes, in one collective."""
        wanted = [t for t in tensors if t.is_floating_point()]
        if self.world_size == 1 or not wanted:
            return
        flat = torch.cat([t.detach().reshape(-1).float() for t in wanted])
        flat = self.sum_(flat) / self.world_size
        for t, mean in zip(wanted, flat.split([t.numel() for t in wanted]), strict=True):
            t.copy_(mean.view_as(t))

    def peak_memory(self) -> int:
        """In bytes: of this process's GPU, or what it had resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
