"""What the command line of every benchmark has in common."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _results import failures, results, save


def parser(
    doc: str | None, seconds: float | None = None, goes_on: bool = True
) -> argparse.ArgumentParser:
    """--device, --small, --minutes, --json; --seconds of timing a figure where they are given.

    goes_on: whether the program keeps what it has measured; gpu_suite.py hands --go-on to all.
    """
    head, _, rest = (doc or "").partition("\n")
    made = argparse.ArgumentParser(
        description=head, epilog=rest.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    made.add_argument("--small", action="store_true", help="toy size, to see that it works")
    if seconds is not None:
        made.add_argument("--seconds", type=float, default=seconds, help="of timing, a figure")
    made.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no other measurement after these"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    kept = "keep what --json FILE has, and measure the rest"
    made.add_argument(
        "--go-on", action="store_true", help=kept if goes_on else "no effect: all is measured anew"
    )
    return made


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name}: no GPU here; --device cpu measures on the CPU")
    if device.index is not None:
        raise argparse.ArgumentTypeError(
            f"expected cpu or cuda, got {name}: CUDA_VISIBLE_DEVICES={device.index} chooses a GPU"
        )
    return device


def aligned(lines: Sequence[Sequence[str]], names: int) -> str:
    """A table of these lines: the first `names` columns begin alike, the others end alike."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i < names else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def finish(benchmark: str, args: argparse.Namespace, content: dict[str, Any]) -> int:
    """Save what was found where --json names a file; the exit status, 1 where a row failed."""
    if args.json:
        # Programs that take no device compute on the CPU.
        device = args.device.type if hasattr(args, "device") else "cpu"
        save(args.json, results(benchmark, device, small=args.small, finished=True, **content))
    failed = failures(content.get("rows", ()))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))
