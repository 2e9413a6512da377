"""What every test runs under: Triton's interpreter where there is no GPU, and no stray numbers."""

import os

import torch

# Triton reads the variable when a kernel is defined, so it is set before anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from fastres.ops import _register

# Derandomised, so that a red run is red again. A deadline would fail whoever shares the machine.
settings.register_profile(
    "default",
    max_examples=12,
    deadline=None,
    derandomize=True,
    # Fixtures here (seed, NaN-filled memory, monkeypatched tiles) hold for every example alike.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# pytest --hypothesis-profile thorough
settings.register_profile(
    "thorough", settings.get_profile("default"), max_examples=300, derandomize=False
)
settings.load_profile("default")

# Workers of xdist share the cores; more threads than cores slow each other down.
torch.set_num_threads(
    max((os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 1)
)


def _remember_builtins() -> None:
    """Let Triton's interpreter look only once for what it patches, a fifth of its time.

    It searches triton.language for builtins at every launch, and at every call of a jitted function
    in a kernel. Their names do not change.
    """
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}
    is_builtin = interpreter.tl.core.is_builtin

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if not is_builtin(member):
                return  # patched already, all of them
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def _skip_overflow_checks() -> None:
    """Save the interpreter half of its time: it works out every overflow of an integer, and then,
    without its debug option, tells nobody.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    _remember_builtins()
    _skip_overflow_checks()


def pytest_configure(config: pytest.Config) -> None:
    # Triton's interpreter computes in NumPy, which warns wherever NaN or Inf pass.
    config.addinivalue_line("filterwarnings", r"ignore::RuntimeWarning:triton\.runtime.*")
    # Triton 3.6's interpreter makes integers of arrays of one element: NumPy warns, and from 2.4 on
    # refuses, which would fail a hundred tests (triton-lang/triton#9171).
    config.addinivalue_line("filterwarnings", r"ignore::DeprecationWarning:triton\.runtime.*")
    if os.environ.get("TRITON_INTERPRET") == "1" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        with suppress(PackageNotFoundError):
            if version("triton").startswith("3.6."):
                raise pytest.UsageError("Triton 3.6's interpreter needs NumPy 2.3: numpy<2.4")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    huge = item.get_closest_marker("huge")
    if huge and torch.cuda.is_available():
        torch.cuda.empty_cache()
        (needed,), free = huge.args, torch.cuda.mem_get_info()[0] / 2**30
        if free < needed:
            pytest.skip(f"needs {needed} GiB of the device's memory, of which {free:.1f} are free")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's tensors take the path that they take without the interpreter."""
    monkeypatch.setattr(_register, "INTERPRET", False)


@pytest.fixture(params=["kernels", "native"])
def path(request: pytest.FixtureRequest, device: str) -> str:
    """Each path that the tensors may take."""
    if request.param == "native":
        if device != "cpu":
            pytest.skip("on a GPU there is one path")
        request.getfixturevalue("native")
    return str(request.param)


@pytest.fixture(autouse=True)
def _every_number_accounted_for() -> Iterator[None]:
    """Seed, and fill what torch.empty returns with NaN: an element nobody wrote then shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Filling comes only with deterministic algorithms. Only warn: on a GPU some of PyTorch's own
    # ops that stand beside ours in a test have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # made a property at import
    # A convolution of PyTorch's own that stands beside ours is not cut down to TF32 on a GPU.
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
