"""Launches of kernels as their launchers make them, on meta tensors, by the name of a variant."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastres.kernels._launch import Launch, record

FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


class Variant(NamedTuple):
    name: str
    launches: list[Launch]


@contextmanager
def recorded(into: list[Variant], name: str) -> Iterator[None]:
    with record() as launches:
        yield
    into.append(Variant(name, launches))


@contextmanager
def recorded_one_by_one(into: list[Variant], name: str) -> Iterator[None]:
    """A variant a launch, for functions that launch a kernel more than once, each time another."""
    with record() as launches:
        yield
    for i, launch in enumerate(launches):
        into.append(Variant(f"{name} {i + 1}", [launch]))


def empty(shape: tuple[int, ...], dtype: torch.dtype, fmt: str = "NHWC") -> torch.Tensor:
    if len(shape) != 4:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[fmt])
