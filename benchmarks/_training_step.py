"""The training step that the benchmarks time, fused and as its peers take it, and what it needs.

Every provider takes the same data path; they differ in the network and in how PyTorch runs it, and
the peers step by torch's fused SGD and GradScaler, without LossScaler's care for the running
statistics of a skipped step. On a GPU the mixed-precision ones use fp16 with loss scaling.
"""

import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _results import Row
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from config import Config  # noqa: E402  # found by the line above
from trainer import Trainer, set_precision_and_determinism  # noqa: E402  # as above
from workers import Workers  # noqa: E402  # as above

from fastres.amp import LossScaler  # noqa: E402  # as above
from fastres.data import Splits  # noqa: E402  # as above


def providers(device: torch.device) -> dict[str, tuple[dict[str, Any], str | None]]:
    """Settings of the run, and torch.compile's mode, by name; the report's baseline first.

    In the order of their worth, should the time run out: what compiles longest comes last.
    """
    half = "fp16" if device.type == "cuda" else "fp32"  # halves are 10 times slower on a CPU
    amp: dict[str, Any] = {"precision": half}
    fused = amp | {"fused": True}
    every: dict[str, tuple[dict[str, Any], str | None]] = {
        "eager fp32 NCHW": ({"channels_last": False}, None),
        f"eager {half} channels_last": (amp, None),
        f"fused {half} channels_last": (fused, None),
    }
    if device.type == "cuda":
        units, graph = fused | {"fused_units": True}, {"cuda_graph": True}
        every[f"fused units graph {half} channels_last"] = (units | graph, None)
        every[f"fused graph {half} channels_last"] = (fused | graph, None)
        every[f"fused units {half} channels_last"] = (units, None)
        # PyTorch's own layers by our graph: what of ours is the graph's, and what the kernels'.
        every[f"eager graph {half} channels_last"] = (amp | graph, None)
    every[f"compile {half} channels_last"] = (amp, "default")
    if device.type == "cuda":
        every[f"compile graph {half} channels_last"] = (amp | graph, "default")
        every[f"compile reduce-overhead {half} channels_last"] = (amp, "reduce-overhead")
    every[f"fused compile {half} channels_last"] = (fused, "default")
    if device.type == "cuda":
        every[f"fused compile reduce-overhead {half} channels_last"] = (fused, "reduce-overhead")
        every[f"compile max-autotune {half} channels_last"] = (amp, "max-autotune")
    return every


# Of the gradients of a new network none overflows with it, so that the first step is taken.
_INIT_SCALE = 1024.0


class _TorchScaler(torch.amp.GradScaler):
    def watch(self, model: nn.Module) -> None:
        """What LossScaler does in a skipped step is no part of GradScaler."""


class _Fused(Trainer):
    def make_scaler(self) -> LossScaler:
        return LossScaler(init_scale=_INIT_SCALE, enabled=self.half == torch.float16)


class _Peer(Trainer):
    def make_scaler(self) -> Any:
        enabled = self.half == torch.float16
        return _TorchScaler(self.workers.device.type, init_scale=_INIT_SCALE, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """As GradScaler's users do."""
        self.scaler.scale(loss).backward(self._one)


class Step:
    """The training steps of a run, one a call, on the same images each time."""

    def __init__(self, trainer: Trainer, mode: str | None) -> None:
        self.trainer = trainer
        self._captured = mode in ("reduce-overhead", "max-autotune")
        self._index = torch.arange(trainer.config.batch_size, device=trainer.workers.device)
        self._number = itertools.count()

    def __call__(self) -> Tensor:
        if self._captured:
            torch.compiler.cudagraph_mark_step_begin()
        loss, _ = self.trainer.train_step(self._index, next(self._number))
        return loss


class _GraphedStep(Step):
    """By --cuda-graph: epoch 0 again and again, its images in their own order."""

    def __init__(self, trainer: Trainer, mode: str | None) -> None:
        super().__init__(trainer, mode)
        self._losses = trainer.losses.each.unbind()

    def __call__(self) -> Tensor:
        trainer, step = self.trainer, self.trainer.device_step
        assert step is not None
        place = next(self._number) % trainer.steps_per_epoch
        if place == 0:
            every = torch.arange(len(trainer.data.train), device=trainer.workers.device)
            step.begin_epoch(0, every)
        step()
        return self._losses[place]


def images(batch_size: int, device: torch.device) -> int:
    """Images to train on: on a GPU several batches, so that an epoch's beginning weighs little."""
    return batch_size * (8 if device.type == "cuda" else 1)


def make_step(
    device: torch.device, data: Splits, settings: dict[str, Any], mode: str | None, **model: Any
) -> Step:
    """settings and model: what differs from Config's defaults; mode: torch.compile's, or None."""
    config = Config(dataset="synthetic", **settings, **model)
    set_precision_and_determinism(config)
    trainer = (_Fused if config.fused else _Peer)(config, Workers(0, 1, 0, device), data)
    if mode is not None:
        trainer.model.compile(mode=mode, dynamic=False)
    trainer.network.train()
    return (_GraphedStep if config.cuda_graph else Step)(trainer, mode)


def first_update(step: Step) -> Tensor:
    """What the first step adds to the parameters, flat, in fp32."""
    before = [p.detach().clone() for p in step.trainer.model.parameters()]
    step()
    after = step.trainer.model.parameters()
    pairs = zip(after, before, strict=True)
    return torch.cat([(a.detach().float() - b.float()).flatten() for a, b in pairs])


def needs(step: Step) -> Row:
    """What a warm step needs beside time: memory, and, on a GPU, launches and the host's time.

    saved_bytes: storages kept for the backward that are neither parameters nor the data set; not of
        a replayed graph, which keeps what its step kept without it.
    peak_memory_bytes: of PyTorch's allocator, the model, its optimizer and the data in it.
    reserved_bytes: what the allocator holds: the pools of CUDA graphs show in this one alone.
    host_ms: until the step has been handed to the GPU, which is then still at it.
    kernels: what the GPU ran, copies among it; launches: calls by which the host started them.
    """
    found: Row = {}
    if not step.trainer.config.cuda_graph:
        found["saved_bytes"] = saved_bytes(step)
    if step.trainer.workers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["host_ms"] = _host_ms(step)
        found |= _launches(step)
    return found


def saved_bytes(step: Step) -> int:
    trainer = step.trainer
    known = {t.untyped_storage().data_ptr() for t in trainer.model.state_dict().values()}
    known |= {
        t.untyped_storage().data_ptr()
        for t in (trainer.data.train.images, trainer.data.train.labels)
    }
    # A storage that is kept until the backward is not given away before it.
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(kept.values())


def _host_ms(step: Step, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def _launches(step: Step) -> Row:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.events() or []
    # An annotation of the host's shows on the device too, and is no kernel.
    kernels = sum(
        e.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(e, "is_user_annotation", False)
        for e in events
    )
    # As the runtimes and drivers name the calls: cudaLaunchKernelExC, cuLaunchKernelEx, hip...
    started = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")
    launches = sum(
        e.name.startswith(("cu", "hip")) and any(s in e.name for s in started) for e in events
    )
    # A profiler that may not listen to the device sees nothing: that is no figure.
    return {"kernels": kernels, "launches": launches} if kernels else {}
