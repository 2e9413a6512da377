"""How the convolutions' kernels are tried, broken and whole, in tiles small enough for many.

A mutant is a file, the text to replace in it, what takes its place, and the case that tells.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from ops import kernel_mutants
from ops.norm_relu_conv2d_equality import small_tiles

# Where one kernel leaves both gradients; the others' mutants take the two that leave one each.
BOTH = "_conv_backward"
Mutant = tuple[str, str, str, Any]


def see_that_a_copy_passes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutants: Iterable[Mutant],
    check: Callable[[Any], None],
) -> None:
    """Of the kernels as they are, every case."""
    kernel_mutants.take(tmp_path, monkeypatch, "preact_unit")
    for case, both in dict.fromkeys((case, file == BOTH) for file, *_, case in mutants):
        with small_tiles(fuses=both):
            check(case)


def see_that_it_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Mutant,
    check: Callable[[Any], None],
) -> None:
    file, old, changed, case = mutant
    kernel_mutants.take(tmp_path, monkeypatch, file, old, changed)
    with small_tiles(fuses=file == BOTH), pytest.raises(AssertionError, match="is off"):
        check(case)
