"""Profile a few steps of a run: its phases marked for nsys and ncu, or a trace where neither is.

Ranges of the domain "fastres", nested as listed; what ends on another thread is a start/end range.
    step
        data
        forward: stem, stage1, stage2, stage3, head, and in them the operators (not if compiled)
        loss
        backward, and beside it all-reduce, start/end, a bucket each
        update: unscale (with loss scaling), optimizer
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kernel_table
import torch
import torch.distributed as dist
from errors import TrainError
from kernel_table import Table
from operator_bytes import OperatorBytes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from trainer import Trainer, unmarked

from fastres.models.resnet import PlainBatchNormReLU2d
from fastres.ops import BatchNormReLU2d, MePropConv2d, StochasticDepth
from fastres.ops.preact_unit_module import PadShortcut

DOMAIN = "fastres"
# What a run does but once is over by then: compiling, choosing algorithms, making momentum.
WARMUP = 5
# By name, what a table calls them.
PHASES = {
    "data": "data",
    "forward": "forward",
    **{name: f"forward/{name}" for name in ("stem", "stage1", "stage2", "stage3", "head")},
    "loss": "loss",
    "backward": "backward",
    "gloo:all_reduce": "backward/all-reduce",  # NCCL's is a kernel, and among the kernels
    "update": "update",
    **{name: f"update/{name}" for name in ("unscale", "optimizer")},
}

# CUPTI serves one listener, so that torch.profiler must stay away from them. Neither tool documents
# how a program is to know: these variables they set for the process that they watch.
_LISTENERS = {
    "NSYS_PROFILING_SESSION_ID": "nsys",
    "NV_NSIGHT_INJECTION_TRANSPORT_TYPE": "ncu",
    "NVTX_INJECTION64_PATH": "a tool that reads NVTX",
}
_OPS: tuple[tuple[type[nn.Module], str], ...] = (
    (BatchNormReLU2d, "batch_norm_relu"),
    (PlainBatchNormReLU2d, "batch_norm_relu"),
    (nn.BatchNorm2d, "batch_norm"),
    (MePropConv2d, "meprop_conv2d"),
    # The branch that it may drop lies inside.
    (StochasticDepth, "stochastic_depth_add"),
    (nn.Linear, "linear"),
)


def listener() -> str | None:
    """The tool that watches this process from outside, nsys or ncu, or None."""
    return next((tool for name, tool in _LISTENERS.items() if name in os.environ), None)


def load_nvtx(wanted_by: str) -> Any:
    """The nvtx package, which is needed by profiles alone.

    Raises:
        TrainError: it is not installed.
    """
    try:
        import nvtx
    except ImportError as error:
        raise TrainError(
            f"{wanted_by}: marks the phases by the nvtx package, which is not installed here "
            f'({error}); pip install "fastres[profile]"'
        ) from error
    return nvtx


class Marks:
    """The ranges open on the training thread: NVTX's, and torch.profiler's where it records."""

    def __init__(self, nvtx: Any, record: bool) -> None:
        self._nvtx, self._record = nvtx, record
        self._open: list[tuple[str, Any]] = []

    @property
    def innermost(self) -> str | None:
        return self._open[-1][0] if self._open else None

    def push(self, name: str) -> None:
        self._nvtx.push_range(name, domain=DOMAIN)
        recorded = self.recorded(name)
        recorded.__enter__()
        self._open.append((name, recorded))

    def pop(self) -> None:
        _, recorded = self._open.pop()
        recorded.__exit__(None, None, None)
        self._nvtx.pop_range(domain=DOMAIN)

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Ends what is still open inside, as hooks leave it where a forward raises."""
        depth = len(self._open)
        self.push(name)
        try:
            yield
        finally:
            while len(self._open) > depth:
                self.pop()

    def recorded(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return record_function(name) if self._record else contextlib.nullcontext()

    def start(self, name: str) -> Any:
        """Begin a range that may end on another thread."""
        return self._nvtx.start_range(name, domain=DOMAIN)

    def end(self, started: Any) -> None:
        self._nvtx.end_range(started)


class Profile:
    """Takes a trainer's phases until `steps` steps after the warm-up are recorded, then goes.

    cudaProfilerStart and Stop stand around them. Unless nsys or ncu listens, torch.profiler writes
    a trace to `path`, and the last step of the warm-up counts the operators' bytes.

    Attributes:
        path: of the trace: trace.json, and trace-rank1.json, ... of the other processes.
        table: the kernels of the trace, once it is written.
    """

    def __init__(
        self,
        trainer: Trainer,
        steps: int,
        out: Path,
        nvtx: Any,
        say: Callable[[str], None],
        warmup: int = WARMUP,
    ) -> None:
        self._trainer, self._steps, self._nvtx, self._say = trainer, steps, nvtx, say
        self._warmup, self._done = warmup, 0
        workers = trainer.workers
        self.path = out / ("trace.json" if workers.leads else f"trace-rank{workers.rank}.json")
        self.table: Table | None = None
        self._listener = listener()
        self._compiled = trainer.model._compiled_call_impl is not None
        self._bytes: OperatorBytes | None = None
        # Named here, so that what it is called with can be seen.
        self._cuda: Any = torch.cuda.profiler if workers.device.type == "cuda" else None
        self._marks: Marks | None = None
        self._profiler: Any = None
        self._hooks: list[Any] = []
        if isinstance(trainer.network, DistributedDataParallel):
            # There is no way to take it back: after the profile it is the plain all-reduce.
            trainer.network.register_comm_hook(None, self._all_reduce)
        trainer.phase = self.phase

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """The trainer's `phase` while this profile is on."""
        if name == "step":
            return self._step()
        if self._marks is None:
            return unmarked(name)
        return self._update(self._marks) if name == "update" else self._marks.range(name)

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._done == self._warmup:
            self._start()
        if self._marks is not None:
            around = self._marks.range("step")
        elif self._done == self._warmup - 1 and not (self._listener or self._compiled):
            around = self._bytes = OperatorBytes()
        try:
            with around:
                yield
        except BaseException:
            self._leave()
            raise
        self._done += 1
        if self._done == self._warmup + self._steps:
            self._finish()

    @contextlib.contextmanager
    def _update(self, marks: Marks) -> Iterator[None]:
        with marks.range("update"):
            if self._trainer.scaler.is_enabled():
                marks.push("unscale")  # until the optimizer's step begins, where it is taken
            yield

    def _start(self) -> None:
        """Record from here on: the trainer's next step is the first."""
        device = self._trainer.workers.device
        self._marks = Marks(self._nvtx, record=self._listener is None)
        self._mark_parts(self._marks)
        if self._listener is None:
            activities = [ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            else:
                # A CUDA build of PyTorch complains on stderr that it finds no GPU to trace.
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self._profiler = profile(activities=activities, record_shapes=True, acc_events=True)
            self._profiler.start()
        if self._cuda is not None:
            torch.cuda.synchronize(device)  # the warm-up's kernels stay outside
            self._cuda.start()

    def _leave(self) -> None:
        """Stop recording, and give the trainer back as it was."""
        if self._marks is not None and self._cuda is not None:
            torch.cuda.synchronize(self._trainer.workers.device)
            self._cuda.stop()
        if self._profiler is not None:
            self._profiler.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._marks = [], None
        self._trainer.phase = unmarked

    def _finish(self) -> None:
        self._leave()
        if self._listener is not None:
            self._say(f"profile  {self._steps} steps, marked for {self._listener}: no trace here")
            return
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            self._profiler.export_chrome_trace(str(part))
            counts = self._bytes or OperatorBytes()
            self.table = kernel_table.read(part, PHASES, counts.a_call, set(counts.calls))
            os.replace(part, self.path)
        except (OSError, RuntimeError) as error:
            # A run of hours is worth more than its trace.
            self._say(f"profile  {self.path}: cannot be written ({error})")
            return
        finally:
            self._profiler = None
            part.unlink(missing_ok=True)
        for line in kernel_table.text(self.table):
            self._say(line)
        self._say(f"profile  {self.path}: {self._steps} steps, for https://ui.perfetto.dev")

    def _mark_parts(self, marks: Marks) -> None:
        optimizer = self._trainer.optimizer

        def begin_optimizer(*_: Any) -> None:
            if marks.innermost == "unscale":
                marks.pop()
            marks.push("optimizer")

        self._hooks.append(optimizer.register_step_pre_hook(begin_optimizer))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: marks.pop()))
        if self._compiled:
            return  # hooks would break its graph

        def opens(module: nn.Module, name: str) -> None:
            self._hooks.append(module.register_forward_pre_hook(lambda *_: marks.push(name)))

        def closes(module: nn.Module) -> None:
            self._hooks.append(module.register_forward_hook(lambda *_: marks.pop()))

        # Hooks of a module run in the order of registration, and a stage is around its operators.
        model = self._trainer.model
        stage = len(model.units) // 3
        units = list(model.units)
        opens(model.stem, "stem")
        for i in range(3):
            opens(units[i * stage], f"stage{i + 1}")
        for path, module in model.named_modules():
            name = _op_name(path, module)
            if name is not None:
                opens(module, name)
                closes(module)
        closes(model.stem if model.stem_bn is None else model.stem_bn)
        for i in range(3):
            closes(units[(i + 1) * stage - 1])
        # The pooling, which no module does, is the head's.
        self._hooks.append(units[-1].register_forward_hook(lambda *_: marks.push("head")))
        closes(model.fc)

    def _all_reduce(
        self, state: object, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """What DDP does without a hook, bitwise, marked while the profile records.

        DDP multiplies by 1 / processes where it fills the bucket; PyTorch's own hook divides,
        which rounds otherwise unless their number is a power of two.
        """
        marks = self._marks
        if marks is None:
            return _sum_shares(bucket.buffer()).then(_first)
        started = marks.start("all-reduce")
        # In a trace the call alone: its transfer stands there by itself, as gloo's or NCCL's.
        with marks.recorded("all-reduce"):
            future = _sum_shares(bucket.buffer())

        def finish(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            marks.end(started)
            return _first(done)

        return future.then(finish)


def _sum_shares(buffer: torch.Tensor) -> torch.futures.Future[list[torch.Tensor]]:
    work = dist.all_reduce(buffer.mul_(1.0 / dist.get_world_size()), async_op=True)
    return work.get_future()


def _first(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
    return done.value()[0]


def _op_name(path: str, module: nn.Module) -> str | None:
    """The operator of a module; of a plain convolution what its unit calls it."""
    for kind, name in _OPS:
        if isinstance(module, kind):
            return name
    if not isinstance(module, nn.Conv2d | PadShortcut):
        return None
    own = next(part for part in reversed(path.split(".")) if not part.isdigit())
    return "conv" if own == "stem" else own
