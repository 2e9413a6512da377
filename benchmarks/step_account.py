"""Count the bytes and launches of one training step, without a GPU, fused beside its peers.

    python benchmarks/step_account.py                       depth 20, fp16, NHWC
    python benchmarks/step_account.py --depth 110 --precision bf16 --batch-size 8
    python benchmarks/step_account.py --provider fused --json step.json

Nothing is computed from shapes: the step runs, from augmentation to optimizer, its Triton kernels
in Triton's interpreter, where every load and store is counted as it is executed, and PyTorch's own
calls are counted as they are dispatched (_step_count.py says how). It is the second step that
counts: the first makes the optimizer's buffers.

"fused units" is "fused" with each residual unit as one op; "fused units graph" what a CUDA graph of
that step holds, which is one launch itself. One pass is the bytes of all
convolutions' outputs but the projections', in the dtype that the step runs in. Reads count each
address once a launch; "again" is what a kernel loads beyond that, and leaves to the caches. At a
small batch the partial sums and the slabs of the weights' gradients, which hardly grow with it,
weigh more. What differs on a GPU: autocast's lists for the loss, and what cuDNN does inside one
call.

"compile" is "eager" with its model by torch.compile: the model does not run then, its kernels are
those that Inductor schedules for an H200 (_inductor_schedule.py says how). They are counted one by
one, where a call of PyTorch's counts its inputs once: BatchNorm's calls read theirs twice, and
beside them eager's passes are 3 too few. With a PyTorch whose Inductor is not as expected, a line
says so in the column's place.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Triton reads it when a kernel is defined: before anything imports one.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

import torch
from _inductor_schedule import NotCounted, compiled_account
from _program import aligned, finish
from _results import Row
from _step_count import Account, Traffic, counted
from config import Config
from device_step import DeviceStep
from errors import TrainError
from trainer import Trainer
from workers import Workers

from fastres.data import split, synthetic

PROVIDERS: dict[str, dict[str, Any]] = {
    "fused units": {"fused": True, "fused_units": True},
    "fused units graph": {"fused": True, "fused_units": True, "cuda_graph": True},
    "fused": {"fused": True},
    "compile": {"fused": False, "compiled": True},
    "eager": {"fused": False},
}


def account_of(provider: str, batch_size: int, side: int = 32, **settings: Any) -> Account:
    """One training step of a provider, counted, on images of `side` pixels a side.

    Raises:
        TrainError: there is no such step.
        NotCounted: torch.compile's cannot be had of this PyTorch.
    """
    settings = PROVIDERS[provider] | settings
    graphed = settings.pop("cuda_graph", False)
    compiled = settings.pop("compiled", False)
    config = Config(dataset="synthetic", batch_size=batch_size, **settings)
    data = split(synthetic(batch_size, 20, side))
    trainer = Trainer(config, Workers(0, 1, 0, torch.device("cpu")), data)
    trainer.network.train()
    index = torch.arange(batch_size)
    take: Callable[[], Any] = partial(trainer.train_step, index, 1)
    if compiled:
        return compiled_account(trainer.model, take)
    # One image is enough to make the optimizer's buffers, and the interpreter is slow.
    trainer.train_step(index[:1], 0)
    if graphed:
        step = DeviceStep(trainer)
        step.begin_epoch(0)
        take = step.run
    with counted() as account:
        take()
    return account


def rows_of(account: Account, about: Row) -> list[Row]:
    """A row for each kernel and call, the largest first, and one for all of them."""

    def row(by: str, name: str, traffic: Traffic) -> Row:
        moved = traffic.read + traffic.written
        return about | {
            "by": by, "name": name, "launches": traffic.launches, "bytes_read": traffic.read,
            "bytes_loaded_again": traffic.loaded - traffic.read, "bytes_written": traffic.written,
            "bytes_per_image": moved / about["batch_size"], "passes": moved / account.conv_outputs,
        }  # fmt: skip

    rows = [row("triton", name, traffic) for name, traffic in account.kernels.items()]
    rows += [row("torch", name, traffic) for name, traffic in account.calls.items()]
    rows.sort(key=lambda row: -row["bytes_per_image"])
    return [*rows, row("all", "total", account.total)]


def table(rows: Sequence[Row]) -> str:
    """Providers side by side: launches, KB an image, and passes."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    found = {(row["provider"], row["name"]): row for row in rows}
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "total"))
    head = ["KB an image"]
    for provider in providers:
        head += [f"{provider}: launches", "read", "again", "written", "passes"]
    lines = [head]
    for name in [*names, "total"]:
        line = [name]
        for provider in providers:
            row = found.get((provider, name))
            if row is None:
                line += ["-"] * 5
                continue
            sizes = [row[f"bytes_{what}"] for what in ("read", "loaded_again", "written")]
            line += [str(row["launches"])]
            line += [f"{size / row['batch_size'] / 1e3:,.1f}" for size in sizes]
            line += [f"{row['passes']:.2f}"]
        lines.append(line)
    return aligned(lines, names=1)


def main() -> int:
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16")
    parser.add_argument("--layout", choices=("NHWC", "NCHW"), default="NHWC")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8, help="the interpreter is slow")
    parser.add_argument("--small", action="store_true", help="toy size, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    args = parser.parse_args()
    if args.small:
        args.depth, args.width, args.batch_size = 8, 16, 2
    side = 16 if args.small else 32
    about = {
        "depth": args.depth, "width": args.width, "batch_size": args.batch_size,
        "dtype": args.precision, "layout": args.layout,
    }  # fmt: skip
    rows: list[Row] = []
    for provider in args.provider:
        try:
            account = account_of(
                provider, args.batch_size, side, depth=args.depth, width=args.width,
                precision=args.precision, channels_last=args.layout == "NHWC",
            )  # fmt: skip
        except TrainError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except NotCounted as error:
            words = f"not counted with torch {torch.__version__}: {error}"
            none = {"by": "all", "name": "not counted", "not_measured": words}
            rows.append({"provider": provider} | about | none)
            continue
        rows += rows_of(account, {"provider": provider} | about)
        one_pass = account.conv_outputs / args.batch_size
        print(f"{provider}: one pass is {one_pass / 1e3:,.1f} KB an image", file=sys.stderr)
    measured = [row for row in rows if "not_measured" not in row]
    if measured:
        print(table(measured))
    for row in rows:
        if "not_measured" in row:
            print(f"torch.compile: {row['not_measured']}")
    return finish("step_account", args, {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
