"""Time what the host takes for a call of a layer, with every launch of a kernel of ours left out.

python benchmarks/bench_host.py [--json FILE]

Triton's own launch comes on top. Eager's layers stand beside it; on a CPU they compute too, here of
so few values that it hardly counts. Runs without a GPU; in Triton's interpreter it says nothing.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from _program import finish, parser
from _results import Row, measured
from _timing import percentiles
from torch import Tensor, nn

from fastres.kernels import _launch
from fastres.models.resnet import PlainBatchNormReLU2d
from fastres.ops import BatchNormReLU2d, PreActUnit, _register

_SHAPE = (2, 16, 8, 8)


@contextmanager
def without_launches() -> Iterator[None]:
    """Tensors take the kernels wherever they are, and none is run or kept."""
    collecting, recorder = _register.collecting, _launch._recorder
    _register.collecting, _launch._recorder = True, lambda launch: None
    try:
        yield
    finally:
        _register.collecting, _launch._recorder = collecting, recorder


def layers() -> dict[tuple[str, str], Callable[[], nn.Module]]:
    """What is called, by layer and provider."""
    plain: Any = partial(PreActUnit, 16, 16, norm_relu=PlainBatchNormReLU2d, whole=False)
    return {
        ("BatchNormReLU2d", "fastres"): lambda: BatchNormReLU2d(16),
        ("BatchNormReLU2d", "eager"): lambda: PlainBatchNormReLU2d(16),
        ("PreActUnit", "fastres"): lambda: PreActUnit(16, 16),
        ("PreActUnit", "eager"): plain,
    }


def bench(device: torch.device, seconds: float) -> dict[str, Any]:
    """A row for each layer, provider and pass."""
    rows: list[Row] = []
    for (layer, provider), make in layers().items():
        module = make().to(device)
        module.to(memory_format=torch.channels_last)
        for what in ("forward", "forward and backward"):
            about = {"layer": layer, "provider": provider, "pass": what}
            row = measured(about, partial(_measure, module, device, what != "forward", seconds))
            rows.append(row)
            if "median_ms" in row:
                print(f"{layer:16} {provider:8} {what:21} {1000 * row['median_ms']:7.1f} us")
    return {"rows": rows}


def _measure(module: nn.Module, device: torch.device, backward: bool, seconds: float) -> Row:
    x = torch.randn(_SHAPE, device=device).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)

    def call() -> Tensor:
        y: Tensor = module(x)
        if backward:
            y.backward(dy)
        return y

    times: list[float] = []
    end = time.perf_counter() + seconds
    with without_launches():
        for i in itertools.count():
            start = time.perf_counter()
            call()
            now = time.perf_counter()
            # The first calls prepare what later ones find done.
            if i >= 20:
                times.append(1000 * (now - start))
            if len(times) >= 10 and now > end:
                break
            if device.type == "cuda":
                torch.cuda.synchronize()
    return percentiles(times).as_dict()


def main() -> int:
    args = parser(__doc__, seconds=0.5, goes_on=False).parse_args()
    return finish("host", args, bench(args.device, 0.01 if args.small else args.seconds))


if __name__ == "__main__":
    sys.exit(main())
