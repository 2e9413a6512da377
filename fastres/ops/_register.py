"""How an op is registered with PyTorch, and which tensors take the Triton kernels."""

import functools
import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

# Triton reads the variable when a kernel is defined, so it is read once here too.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Kept, since what it has registered ends with it.
_LIBRARY = torch.library.Library("fastres", "FRAGMENT")

# Set by dry_run: launches are collected, so that it does not matter where the tensors are.
collecting = False


def register_op(
    name: str, *, mutates_args: tuple[str, ...] = (), traceable: bool = True
) -> Callable[..., Any]:
    """Decorator: register fastres::<name>, visible to torch.compile down to its Triton kernels.

    In Triton's interpreter the kernels cannot be traced, and the op is opaque. So is an op with
    traceable=False, whose kernels take addresses: a traced tensor has none.
    """
    opaque = INTERPRET or not traceable
    factory = torch.library.custom_op if opaque else torch.library.triton_op
    return factory(f"fastres::{name}", mutates_args=mutates_args)


def register_autograd(
    op: Any,
    backward: Callable[..., tuple[Any, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """op.register_autograd, and on CPUs and GPUs the same at a fraction of its cost to the host.

    Before setup_context PyTorch completes the arguments by the schema's defaults, in a time that
    grows with the square of their number: 0.2 ms for a whole unit. Our ops have no defaults.
    """
    op.register_autograd(backward, setup_context=setup_context)
    overload = op._opoverload
    for argument in overload._schema.arguments:
        # Of a list of tensors a Function sees no tensor, and so finds no gradient for it.
        assert not argument.has_default_value() and str(argument.type) != "List[Tensor]"

    def compute(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = compute(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{op._name}_autograd", (torch.autograd.Function,), members)

    def kernel(*args: Any) -> Any:
        # PyTorch would let it pass, and call the tangent zero.
        if forward_ad._current_level >= 0:
            _refuse_tangents(op._name, args)
        if torch.is_grad_enabled() and any(
            arg.requires_grad for arg in args if isinstance(arg, torch.Tensor)
        ):
            return function.apply(*args)
        return compute(*args)

    for key in ("AutogradCPU", "AutogradCUDA"):
        _LIBRARY.impl(op._name, kernel, key)


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"fastres::{name} has no forward-mode derivative: take reverse mode, or PyTorch's own "
            "layers"
        )


def takes_kernels(x: torch.Tensor) -> bool:
    """Whether x takes the Triton kernels: on a GPU, anywhere in the interpreter or a dry run."""
    return x.is_cuda or INTERPRET or collecting


def kernels(stem: str, x: torch.Tensor) -> ModuleType:
    """fastres.kernels.<stem>, imported when a tensor first needs it; x is what they will run on."""
    if not takes_kernels(x):
        raise ValueError(
            f"torch.ops.fastres.{stem} runs Triton kernels and got a tensor on {x.device}: call "
            f"fastres.ops.{stem}, which takes PyTorch's own path there"
        )
    return _import_kernels(stem)


@functools.cache
def _import_kernels(stem: str) -> ModuleType:
    try:
        module = importlib.import_module(f"fastres.kernels.{stem}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise RuntimeError(
            "a GPU tensor takes fastres's Triton kernels and Triton is not installed: "
            "pip install triton, or move the tensor to the CPU"
        ) from error
    compilers = [os.environ.get("CC"), "cc", "gcc", "clang"]
    if not INTERPRET and not any(shutil.which(name) for name in compilers if name):
        raise RuntimeError(
            "Triton builds its launchers with a C compiler and finds none: install gcc or clang, "
            "or set CC to one"
        )
    return module
