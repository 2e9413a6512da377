"""What importing fastres does, and what it says where something is missing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastres.ops import _register

ROOT = Path(__file__).resolve().parents[2]


def _python(program: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
    )


def test_kernels_as_a_top_level_package_is_refused_in_words() -> None:
    done = _python("import kernels")
    assert done.returncode != 0
    assert "this package is fastres.kernels and was imported as 'kernels'" in done.stderr
    assert "pip install -e ." in done.stderr


def test_import_is_pure() -> None:
    """No Triton, no CUDA context, no output, no patch of torch's settings."""
    done = _python(
        "import sys, torch\n"
        "before = torch.get_num_threads(), torch.backends.cudnn.benchmark\n"
        "import fastres, fastres.ops\n"
        "assert before == (torch.get_num_threads(), torch.backends.cudnn.benchmark)\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'triton']\n"
        "assert not [name for name in sys.modules if name.startswith('fastres.kernels')]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_cpu_tensor_needs_no_triton() -> None:
    done = _python(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, fastres.ops\n"
        "print(fastres.ops.BatchNormReLU2d(3)(torch.randn(2, 3, 4, 4)).shape)\n",
        {"TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fresh_import(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The next tensor imports the kernels again; afterwards everything is as before."""
    for name in [name for name in sys.modules if name.startswith("fastres.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    _register._import_kernels.cache_clear()
    yield monkeypatch
    _register._import_kernels.cache_clear()


def test_missing_triton_is_said_in_words(fresh_import: pytest.MonkeyPatch) -> None:
    fresh_import.setattr(_register, "INTERPRET", True)
    fresh_import.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed: pip install triton, or move"):
        _register.kernels("batch_norm_relu", torch.zeros(1))


def test_a_missing_module_that_is_not_triton_is_not_blamed_on_it(
    fresh_import: pytest.MonkeyPatch,
) -> None:
    fresh_import.setattr(_register, "INTERPRET", True)
    with pytest.raises(ModuleNotFoundError, match="no_such_op"):
        _register.kernels("no_such_op", torch.zeros(1))


@pytest.mark.parametrize("cc", [None, "no-such-compiler"])
def test_missing_c_compiler_is_said_in_words(
    fresh_import: pytest.MonkeyPatch, cc: str | None, tmp_path: Path
) -> None:
    import fastres.kernels.batch_norm_relu  # noqa: F401  # the kernels are there, the compiler not

    fresh_import.setattr(_register, "INTERPRET", False)
    fresh_import.setenv("PATH", str(tmp_path))
    if cc is None:
        fresh_import.delenv("CC", raising=False)
    else:
        fresh_import.setenv("CC", cc)
    with pytest.raises(RuntimeError, match="C compiler and finds none: install gcc or clang"):
        _register._import_kernels("batch_norm_relu")
    # What CC names is enough.
    fresh_import.setenv("CC", sys.executable)
    assert shutil.which("gcc") is None
    assert _register._import_kernels("batch_norm_relu") is not None
