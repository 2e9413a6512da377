"""update_scale against its reference and torch's GradScaler, errors, and kernels broken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gradient_lists import ReadsOnTheHost
from ops.kernel_mutants import take
from torch import Tensor

from fastres.ops import update_scale
from fastres.ops.update_scale import update_scale_reference


def make(scale: float, clean: int, skipped: tuple[int, int], device: str) -> list[Tensor]:
    return [
        torch.tensor(scale, device=device),
        torch.tensor(clean, dtype=torch.int32, device=device),
        torch.tensor(skipped, dtype=torch.int32, device=device),
    ]


def check(
    device: str, pattern: list[bool], scale: float = 65536.0, clean: int = 0, **settings: Any
) -> None:
    """Raise AssertionError unless update_scale is right after every step of a pattern."""
    settings = {
        "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "min_scale": 1.0,
    } | settings  # fmt: skip
    tensors = make(scale, clean, (3, 5), device)
    wanted = float(tensors[0]), clean, (3, 5)
    for found in pattern:
        found_inf = torch.tensor(float(found), device=device)
        update_scale(tensors[0], tensors[1], tensors[2], found_inf, **settings)
        wanted = update_scale_reference(*wanted, found, **settings)
        # What the device keeps is rounded, and it is that which goes on.
        wanted = float(torch.tensor(wanted[0])), *wanted[1:]
        got = float(tensors[0]), int(tensors[1]), tuple(tensors[2].tolist())
        if got != wanted:
            raise AssertionError(f"the scale is off: {got}, wanted {wanted}")


@given(
    pattern=st.lists(st.booleans(), max_size=8),
    scale=st.sampled_from([65536.0, 1.0, 3e38, 1e-3, 0.7]),
    clean=st.integers(0, 3),
    growth_factor=st.sampled_from([2.0, 1.1, 1.0000001, 1e30]),
    backoff_factor=st.sampled_from([0.5, 0.1, 0.999]),
    growth_interval=st.integers(1, 4),
    min_scale=st.sampled_from([1.0, 1e-3, 0.1]),
)
def test_equals_the_reference(path: str, device: str, **case: Any) -> None:
    check(device, **case)


@given(
    pattern=st.lists(st.booleans(), min_size=4, max_size=12),
    growth_factor=st.sampled_from([2.0, 1.1, 1.3]),
    backoff_factor=st.sampled_from([0.5, 0.1, 0.7]),
)
def test_bitwise_as_gradscaler(
    path: str, device: str, pattern: list[bool], growth_factor: float, backoff_factor: float
) -> None:
    scale, clean, skipped = make(1000.1, 0, (0, 0), device)
    theirs = scale.clone(), clean.clone()
    for found in pattern:
        found_inf = torch.tensor(float(found), device=device)
        update_scale(
            scale, clean, skipped, found_inf, growth_factor=growth_factor,
            backoff_factor=backoff_factor, growth_interval=2, min_scale=1e-30,
        )  # fmt: skip
        torch._amp_update_scale_(*theirs, found_inf, growth_factor, backoff_factor, 2)
        assert (float(scale), int(clean)) == (float(theirs[0]), int(theirs[1]))


def test_any_number_but_zero_is_an_overflow(path: str, device: str) -> None:
    for value in (1.0, 2.0, torch.inf, torch.nan):
        scale, clean, skipped = make(8.0, 1, (0, 0), device)
        update_scale(scale, clean, skipped, torch.tensor(value, device=device))
        assert (float(scale), int(clean), skipped.tolist()) == (4.0, 0, [1, 1]), value


def test_the_host_never_waits(path: str, device: str) -> None:
    scale, clean, skipped = make(8.0, 1, (0, 0), device)
    found_inf = torch.ones((), device=device)
    with ReadsOnTheHost():
        update_scale(scale, clean, skipped, found_inf)


def test_found_inf_may_have_a_dimension(path: str, device: str) -> None:
    for found in (0.0, 1.0):
        kept = []
        for found_inf in (torch.tensor(found), torch.tensor([found])):
            scale, clean, skipped = make(8.0, 1, (0, 0), device)
            update_scale(scale, clean, skipped, found_inf.to(device))
            kept.append([float(scale), int(clean), *skipped.tolist()])
        assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("at", "wrong", "words"),
    [
        (0, torch.ones(2), r"scale: expected 1 of torch.float32 on cpu, got \[2\]"),
        (
            1,
            torch.ones(1),
            "growth_tracker: expected 1 of torch.int32 on cpu, got .* torch.float32",
        ),
        (2, torch.zeros((), dtype=torch.int32), "skipped: expected 2 of torch.int32"),
        (3, torch.ones(1, device="meta"), "found_inf: expected 1 .* on cpu, got .* on meta"),
    ],
)
def test_wrong_input_is_refused_in_words(at: int, wrong: Tensor, words: str) -> None:
    tensors = [*make(8.0, 1, (0, 0), "cpu"), torch.zeros(())]
    tensors[at] = wrong
    with pytest.raises(ValueError, match=words):
        update_scale(*tensors)


def test_opcheck(device: str) -> None:
    tensors = (*make(8.0, 1, (0, 0), device), torch.ones((), device=device))
    torch.library.opcheck(torch.ops.fastres.update_scale.default, (*tensors, 2.0, 0.5, 2, 1.0))


LONG = [False, False, True, False, True, True, False, False, False]
# The text to replace (once in the file), and what takes its place.
MUTANTS = {
    "never backs off": ("* backoff).to", "* 1.0).to"),
    "grows every step": ("clean == interval", "clean > 0"),
    "grows without end": ('grown < float("inf")', "grown == grown"),
    "has no floor": ("tl.maximum(after, least)", "after"),
    "keeps counting clean steps": ("tl.where(found | grows, 0, clean)", "clean"),
    "counts no skipped step": ("tl.load(skipped_ptr) + 1, 0", "tl.load(skipped_ptr), 0"),
    "forgets what was skipped in all": (" + found.to(tl.int32)", ""),
    "rounds the factor": ("scale.to(tl.float64) * growth)", "scale * growth.to(tl.float32))"),
}


def _check_all(device: str) -> None:
    check(device, LONG)
    check(device, LONG, scale=1000.1, growth_factor=1.3)
    check(device, LONG, scale=3.3e38)
    check(device, LONG, scale=2.0)


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "update_scale")
    _check_all(device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    take(tmp_path, monkeypatch, "update_scale", *MUTANTS[name])
    with pytest.raises(AssertionError, match="is off"):
        _check_all(device)
