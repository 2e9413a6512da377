"""How an op is registered with PyTorch, and which tensors take the Triton kernels."""

import functools
import importlib
import os
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

# Triton reads the variable when a kernel is defined, so it is read once here too.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

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
