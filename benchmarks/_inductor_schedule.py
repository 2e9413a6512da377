"""What torch.compile makes of a model's step for a GPU, without one: scheduled, and not built.

Dynamo and AOTAutograd trace the model on the CPU as ever. The graphs' tensors are then said to lie
on a GPU, an H200 (sm_90), as fake ones, which have a shape and no memory. Inductor lowers, fuses
and schedules each graph for it, and is stopped before it writes the kernels down. What stands for a
graph returns zeros and says that it ran.

Of each graph that runs this counts every kernel of Inductor's as one launch, and each buffer that
it reads or writes once; and every call of a library's kernels (convolutions, products) as
_step_count.py counts PyTorch's own, which it also does with all that is not compiled. Not counted:
what a kernel loads a second time, and what one call of a library launches beyond the first. Of the
trace two things are a CPU's: autocast's lists, which name the same of a ResNet's layers as a GPU's,
and that BatchNorm keeps its statistics for the backward in the dtype of its input, a few bytes.

Much of this is private to PyTorch: where it is not as expected there is NotCounted, and no figure.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from _step_count import Account, Traffic, counted
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

_GPU = torch.device("cuda", 0)
# What Inductor asks of a device before it schedules for it: an H200's answers.
_H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
)  # fmt: skip


class NotCounted(Exception):
    """Why a step by torch.compile has no figures, in words."""


@dataclass
class _Graph:
    """A scheduled graph: kernels of Inductor's and calls of others, by name, and its outputs."""

    backward: bool
    kernels: list[tuple[str, Traffic]]
    calls: list[tuple[str, Traffic]]
    conv_outputs: int
    outputs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None]


def compiled_account(model: nn.Module, step: Callable[[], Any]) -> Account:
    """One call of `step`, counted, in which `model`, on the CPU, is compiled: the second call.

    Raises:
        NotCounted: this PyTorch is not as expected, or no graph of the model has run.
    """
    ran: list[_Graph] = []
    try:
        # A cache that is full of other models would leave this one as it is.
        torch.compiler.reset()
        # The forward alone: hooks, as a loss scaler has one, are none of the model's.
        forward = torch.compile(model.forward, backend=_backend(ran), dynamic=False)
        with mock.patch.object(model, "forward", forward):
            step()
            ran.clear()
            with counted() as account:
                step()
    except Exception as error:
        # Dynamo and Inductor wrap what they meet in errors of their own.
        met = getattr(error, "inner_exception", error)
        first = (str(met).strip().splitlines() or [""])[0]
        raise NotCounted(f"{type(met).__name__}: {first}"[:300]) from error
    backward = sum(graph.backward for graph in ran)
    if not backward or len(ran) != 2 * backward:
        raise NotCounted(f"{len(ran) - backward} graphs ran forward, and {backward} backward")
    for graph in ran:
        account.conv_outputs += graph.conv_outputs
        for found, into in ((graph.kernels, account.kernels), (graph.calls, account.calls)):
            for name, traffic in found:
                into.setdefault(name, Traffic()).add(traffic)
    return account


def _backend(ran: list[_Graph]) -> Callable[..., Any]:
    """A backend for torch.compile whose graphs do nothing but say, in `ran`, that they ran."""

    def compile_(gm: torch.fx.GraphModule, inputs: Sequence[Any], **about: Any) -> Any:
        graph = _scheduled(gm, inputs, about)

        def run(args: list[Any]) -> list[Tensor | None]:
            args.clear()
            ran.append(graph)
            # Zeros: what overflows is counted otherwise.
            with _disable_current_modes():
                return [out if out is None else _zeros(*out) for out in graph.outputs]

        run._boxed_call = True  # type: ignore[attr-defined]  # it empties its argument
        return run

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(enable_autograd_cache=False):
            return compile_fx(gm, inputs, inner_compile=compile_)

    return backend


def _zeros(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype).zero_()


def _scheduled(gm: torch.fx.GraphModule, inputs: Sequence[Any], about: dict[str, Any]) -> _Graph:
    """Lower and schedule a graph for the GPU, as Inductor does; nothing of it is built."""
    from torch._guards import TracingContext
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    found: list[_Graph] = []
    backward = bool(about.get("is_backward"))
    with _gpu():
        moved = _moved(gm, inputs)
    values = [_value(node) for node in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    conv_outputs = 0 if backward else _conv_outputs(gm)

    def stop(lowered: Any) -> None:
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        kernels, calls = _launches(lowered.scheduler)
        outputs = [
            None if value is None else (tuple(value.shape), _strides(out), value.dtype)
            for value, out in zip(values, lowered.graph_outputs, strict=True)
        ]
        found.append(_Graph(backward, kernels, calls, conv_outputs, outputs))
        raise NotCounted("scheduled")

    try:
        with _gpu(), config.patch(fx_graph_cache=False):
            with mock.patch.object(GraphLowering, "compile_to_module", stop):
                compile_fx_inner(gm, moved, **about)
    except Exception:
        if not found:
            raise
    if not found:
        raise NotCounted("Inductor did not come to where it writes its kernels")
    (graph,) = found
    # The backward's graph is then made for the strides that the forward's outputs have.
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.extend(None if out is None else out[1] for out in graph.outputs)
    return graph


def _moved(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Let a graph's tensors lie on the GPU; its inputs there."""
    from torch._guards import detect_fake_mode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = detect_fake_mode(inputs)
    if mode is None:
        raise NotCounted("a graph was traced without fake tensors")

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_GPU)
        return _GPU if isinstance(value, torch.device) else value

    with mode:
        moved = [move(value) for value in inputs]
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            raise NotCounted(f"a graph has a constant, {node.target}")
        node.args, node.kwargs = tree_map(move, node.args), tree_map(move, node.kwargs)
    before = {node: _lies(node) for node in gm.graph.nodes if node.op != "output"}
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*moved)
    for node, as_traced in before.items():
        if _lies(node) != as_traced:
            raise NotCounted(f"{node.name} has another layout on a GPU: {_lies(node)}")
    return moved


def _lies(node: Any) -> list[list[tuple[int, int]]]:
    """Sizes and strides of a node's tensors; where there is one element, a stride says nothing."""
    return [
        [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]
        for t in tree_leaves(node.meta.get("val"))
        if isinstance(t, Tensor)
    ]


def _value(node: Any) -> Tensor | None:
    if node is None:
        return None
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise NotCounted(f"a graph returns a {type(value).__name__}")
    return value


def _conv_outputs(gm: torch.fx.GraphModule) -> int:
    """Bytes of what its convolutions write, those of 1x1 aside."""
    convolutions = gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.convolution.default
    )
    return sum(
        node.meta["val"].nbytes
        for node in convolutions
        if max(node.args[1].meta["val"].shape[2:]) > 1
    )


def _strides(out: Any) -> tuple[int, ...]:
    return tuple(int(stride) for stride in out.get_layout().stride)


def _launches(scheduler: Any) -> tuple[list[tuple[str, Traffic]], list[tuple[str, Traffic]]]:
    """Inductor's own kernels and its calls of others' in a schedule, by name."""
    from torch._inductor import ir
    from torch._inductor import scheduler as kinds

    fused = (kinds.SchedulerNode, kinds.FusedSchedulerNode)
    kernels, calls = [], []
    for node in scheduler.nodes:
        if isinstance(node, kinds.NopKernelSchedulerNode):
            continue
        extern = isinstance(node, kinds.ExternKernelSchedulerNode)
        if extern and isinstance(node.node, ir.MultiOutput):
            continue  # one of the results of a call
        if node.get_device().type != "cuda":
            raise NotCounted(f"{node.get_name()} is scheduled for {node.get_device()}")
        moved = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        writes = {dep.name for dep in node.read_writes.writes}
        written = sum(size for name, size in moved.items() if name in writes)
        read = sum(moved.values()) - written
        traffic = Traffic(1, read, read, written)
        if extern:
            calls.append((_name(node.node), traffic))
        elif type(node) in fused and not node.is_template():
            kind = "reduction" if node.is_reduction() else "pointwise"
            kernels.append((f"inductor: {kind}", traffic))
        else:
            raise NotCounted(f"{node.get_name()} is a {type(node).__name__}")
    return kernels, calls


def _name(call: Any) -> str:
    """As PyTorch's dispatcher has it."""
    overload = getattr(call, "op_overload", None)
    if overload is not None:
        return str(overload.overloadpacket.__name__)
    return str(call.get_kernel_name()).removeprefix("extern_kernels.")


@contextmanager
def _gpu() -> Iterator[None]:
    """Answer as an H200 does, whatever GPU is here or is not."""
    from torch._dynamo import device_interface
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties

    def say(answer: Any) -> Callable[..., Any]:
        return lambda *_, **__: answer

    asked: dict[str, Any] = {
        "current_device": say(0), "device_count": say(1), "get_device_properties": say(_H200),
    }  # fmt: skip
    there = {"is_available": say(True), "is_bf16_supported": say(True)}
    interface: dict[str, Any] = {
        name: staticmethod(answer) for name, answer in (asked | there).items()
    }
    known = {"cuda": [_H200]}
    with ExitStack() as stack:
        patched = stack.enter_context
        patched(mock.patch.multiple(torch.cuda, get_device_capability=say((9, 0)), **asked))
        patched(mock.patch.multiple(device_interface.CudaInterface, **interface))
        patched(mock.patch.dict(device_interface.caching_worker_device_properties, known))
        # Without a GPU it would take none but the slowest for bf16.
        patched(mock.patch.object(torch._C, "_select_conv_backend", _cudnn))
        if hasattr(scheduler, "has_triton"):  # PyTorch 2.11
            patched(mock.patch.object(scheduler, "has_triton", say(True)))
        # It keeps what it was told.
        DeviceProperties.create.cache_clear()
        stack.callback(DeviceProperties.create.cache_clear)
        yield


def _cudnn(*_: Any, **given: Any) -> Any:
    """The convolution that a GPU takes."""
    if given["groups"] != 1:
        raise NotCounted("a convolution in groups")
    return torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]  # not in its stub
