"""What "right" means for unscale: its results against fp64."""

import torch
from ops.gradient_lists import Gradient, make
from tolerances import EPS, EPSILONS, store_error, store_floor, sum_epsilons
from torch import Tensor

from fastres.ops import unscale
from fastres.ops.unscale import unscale_reference


def check(
    gradients: list[Gradient], device: str, scale: float = 1024.0, mode: str = "in place"
) -> None:
    """Raise AssertionError unless unscale is right on these in a mode: in place, out or check."""
    given = make(gradients, device)
    before = [None if t is None else t.clone() for t in given]
    s = torch.tensor(scale, device=device)
    out: list[Tensor | None] | None = None
    if mode == "out":
        # Those of odd number in place.
        out = [
            t if t is None or (i % 2 and gradients[i].layout != "expanded")
            else torch.full(t.shape, torch.nan, device=device)
            for i, t in enumerate(given)
        ]  # fmt: skip
    found_inf, norm = unscale(given, s, out=out, write=mode != "check", norm=True)
    exact = [t.double() for t in before if t is not None]
    want, broken, total = unscale_reference(exact, s.double()) if exact else ([], s * 0, s * 0)
    assert norm is not None
    assert (found_inf.shape, found_inf.dtype, norm.shape, norm.dtype) == (
        (), torch.float32, (), torch.float32,
    )  # fmt: skip
    if float(found_inf) != float(broken):
        raise AssertionError(f"found_inf is off: {float(found_inf)} for {gradients}")
    elements = sum(t.numel() for t in want)
    allowed = (EPSILONS + sum_epsilons(elements)) * EPS * float(total) + 1e-20
    if not float(broken) and not abs(float(norm) - float(total)) <= allowed:
        raise AssertionError(f"the norm is off by {float(norm) - float(total)} for {gradients}")
    if float(broken) and float(norm) < torch.inf:
        raise AssertionError(f"the norm is off: {float(norm)} of what is not finite")
    results = given if mode == "in place" else out
    if mode == "check" or results is None:
        results, want = given, exact
    for got, wanted, old in zip(
        (t for t in results if t is not None), want, (t for t in before if t is not None),
        strict=True,
    ):  # fmt: skip
        store = store_error(got.dtype) if mode != "check" else 0.0
        off = (got.double() - wanted).abs()
        # One rounding of 1 / scale, one of the product, and the storing.
        allowed_each = (2 * EPS + store) * wanted.abs() + store_floor(got.dtype)
        right = (off <= allowed_each) | (got.double() == wanted) | (got.isnan() & wanted.isnan())
        if not bool(right.all()):
            raise AssertionError(f"a gradient is off by {off.max()}, from {old.dtype}")
    if mode != "in place":
        for now, kept, target in zip(given, before, out or given, strict=True):
            if now is not None and (mode == "check" or target is not now):
                torch.testing.assert_close(now, kept, rtol=0, atol=0, equal_nan=True)
