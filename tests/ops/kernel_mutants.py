"""A copy of the kernels with one place of them broken, taken in place of the kernels."""

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from fastres.ops import _register

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str = "", changed: str = ""
) -> None:
    """Let ops find a copy of the kernels, in one file of which `changed` stands for `old`."""
    if old and os.environ.get("TRITON_INTERPRET") != "1":
        # And a race that is one on a GPU alone would be won there often enough.
        pytest.skip("a broken kernel may read past its tensors, which ends a GPU's process")
    package = tmp_path / "copied" / "kernels"
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / f"{file}.py"
    source = path.read_text()
    if old:
        assert source.count(old) == 1, "the kernel was rewritten: rewrite its mutant"
        path.write_text(source.replace(old, changed))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "copied"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()

    def from_copy(stem: str) -> object:
        return importlib.import_module(f"copied.kernels.{stem}")

    monkeypatch.setattr(_register, "_import_kernels", from_copy)
