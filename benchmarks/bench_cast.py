"""Time cast, fp32 masters to half weights, beside PyTorch's copy_ and torch.compile.

    python benchmarks/bench_cast.py [--sweep full] [--device cpu] [--small] [--json FILE]

Bytes: every element read once and written once. --sweep stages takes about as many as the networks
of depth 20 and 122 have parameters, and more than a cache holds; --sweep full every other power of
two.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _comparison import Case, Op, Work, compare, compiled, run_program
from _sheet import Sheet
from torch import Tensor

from fastres.ops import cast

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def eager(source: Tensor, out: Tensor) -> Tensor:
    return out.copy_(source)


def _make(numel: int, dtype: torch.dtype, device: torch.device) -> Work:
    source = torch.randn(numel, device=device)
    out = torch.empty(numel, dtype=dtype, device=device)

    def check(op: Op) -> bool:
        out.fill_(torch.nan)
        return torch.equal(op(source, out), source.to(dtype))

    def passes(op: Op) -> dict[str, Callable[[], Any]]:
        return {"forward": partial(op, source, out)}

    providers: dict[str, Op] = {"fastres": cast, "eager": eager, **compiled(eager)}
    return Work(providers, check, passes, {"forward": source.nbytes + out.nbytes})


def _cases(device: torch.device, small: bool, sweep: str) -> Iterator[Case]:
    sizes: tuple[int, ...] = (272_480, 1_930_000, 2**26)
    if small:
        sizes = (1000,)
    elif sweep == "full":
        sizes = tuple(2**i for i in range(12, 31, 2))
    for numel in sizes:
        for dtype_name, dtype in _DTYPES.items():
            about = {"dtype": dtype_name, "numel": numel}
            yield Case(about, (4 + dtype.itemsize) * numel, partial(_make, numel, dtype, device))


def bench(
    device: torch.device, small: bool, seconds: float, sweep: str, sheet: Sheet
) -> dict[str, Any]:
    """Every size and dtype by every provider; a wrong result gets no speed."""
    return compare(device, _cases(device, small, sweep), seconds, sheet)


def main() -> int:
    return run_program(__doc__, "cast", bench)


if __name__ == "__main__":
    sys.exit(main())
