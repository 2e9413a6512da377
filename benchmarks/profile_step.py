"""Profile some training steps: the phases, and the top kernels with share, bytes and GB/s.

    python benchmarks/profile_step.py                      a trace and a table (on a CPU: --small)
    python benchmarks/profile_step.py --provider compile --batch-size 1024 --out DIR --json FILE

Under nsys and ncu the same program marks its phases for them, in the NVTX domain "fastres", and
writes no trace of its own. What the steps do in the steady state, and nothing else:

    nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop \\
        -o step python benchmarks/profile_step.py
    nsys stats --report nvtx_gpu_proj_sum,cuda_gpu_kern_sum step.nsys-rep

Everything about the kernels of one phase, or of an operator in it ("A/*/B": B anywhere inside A):

    ncu --profile-from-start off --nvtx --nvtx-push-pop-scope process \\
        --nvtx-include "fastres@forward/*/batch_norm_relu" \\
        --set full --clock-control none -o step python benchmarks/profile_step.py --steps 1

The phases: data, forward (in it stem, stage1, stage2, stage3, head; in these conv, conv1, conv2,
shortcut, batch_norm_relu, meprop_conv2d, stochastic_depth_add, linear), loss, backward, update (in
it unscale, optimizer), and all-reduce under torchrun train/main.py --profile. A phase by itself is
"fastres@backward/"; the scope is the process, since autograd launches from a thread of its own.
all-reduce ends on another thread than it begins on, and so is "fastres@all-reduce" without a slash.
--clock-control none leaves the GPU's clocks alone. A compiled model is marked from outside only.
"""

import argparse
import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _program import finish, parser
from _results import Row, measured
from _timing import percentiles

# isort: split
# Which makes the modules of train/ importable.
from _training_step import Step, make_step, providers

# isort: split
import records
from config import Config
from errors import TrainError
from kernel_table import Table
from profiling import Profile, listener, load_nvtx

from fastres.data import split, synthetic

# Compiling, choosing algorithms, filling the allocator's cache; the last one counts the bytes.
_WARMUP = {"cuda": 10, "cpu": 3}


def profile(step: Step, steps: int, out: Path, nvtx: Any) -> Table | None:
    """The table of the recorded steps, all on the same images; None where nsys or ncu recorded.

    Raises:
        TrainError: the trace cannot be written.
    """
    device = step.trainer.workers.device
    warmup = _WARMUP.get(device.type, _WARMUP["cuda"])
    say = partial(print, flush=True)
    recorded = Profile(step.trainer, steps, out, nvtx, say, warmup)
    for _ in range(warmup + steps):
        step()
    if recorded.table is None and listener() is None:
        raise TrainError(f"{recorded.path}: no trace was written")
    return recorded.table


def rows(about: Row, table: Table, top: int) -> list[Row]:
    """A row a kernel, with its time in a step; bytes and GB/s where its operator's are known."""
    found: list[Row] = []
    for line in table.lines[:top]:
        known = dataclasses.asdict(line)
        ms = known.pop("ms")
        known = {key: value for key, value in known.items() if value is not None}
        found.append(about | known | percentiles(ms).as_dict())
    return found


def main() -> int:
    options = parser(__doc__, goes_on=False)
    options.add_argument("--provider", choices=("fused", "eager", "compile"), default="fused")
    options.add_argument("--batch-size", type=int, help="images a step (128; with --small 16)")
    options.add_argument("--depth", type=int, help="layers, 6n + 2 (20; with --small 8)")
    options.add_argument("--width", type=int, help="of the first stage (16; with --small 4)")
    options.add_argument("--steps", type=int, help="to record (10; with --small 2)")
    options.add_argument("--top", type=int, default=40, help="kernels in the JSON (40)")
    options.add_argument(
        "--out",
        type=Path,
        default=Path("runs/profile"),
        metavar="DIR",
        help="for trace.json (runs/profile)",
    )
    args = options.parse_args()
    try:
        return run(args)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """Raises TrainError where something does not fit, before any step is taken."""
    nvtx = load_nvtx("profile_step.py")
    device: torch.device = args.device
    sizes = (16, 8, 4, 2) if args.small else (128, 20, 16, 10)
    given = (args.batch_size, args.depth, args.width, args.steps)
    pairs = zip(given, sizes, strict=True)
    batch_size, depth, width, steps = (usual if value is None else value for value, usual in pairs)
    if steps < 1:
        raise TrainError(f"--steps {steps}: expected 1 or more")
    records.make_out(args.out)
    name, (settings, mode) = next(
        (name, how)
        for name, how in providers(device).items()
        if name.startswith(args.provider) and "channels_last" in name
    )
    settings = settings | {"batch_size": batch_size}
    # Raises, in words, where a size does not fit.
    Config(dataset="synthetic", depth=depth, width=width, **settings)
    about: Row = {"provider": name, "batch_size": batch_size, "depth": depth, "width": width}
    print(f"{name}, batch {batch_size}, depth {depth}, width {width}, on {device}", flush=True)
    found: list[Table | None] = []

    def take() -> Row:
        data = split(synthetic(batch_size, 20)).to(device)
        step = make_step(device, data, settings, mode, depth=depth, width=width)
        found.append(profile(step, steps, args.out, nvtx))
        return {}

    row = measured(about, take)
    table = found[0] if found else None
    content: dict[str, Any] = {"recorded_by": listener() or "torch.profiler", "rows": []}
    if not found:
        content["rows"] = [row]
    elif table is not None:
        content["rows"] = rows(about, table, args.top)
        content["step"] = percentiles(table.step_ms).as_dict()
        content["busy"] = table.busy
        content["phases_ms"] = {name: statistics.median(ms) for name, ms in table.phases.items()}
        content["trace"] = f"{args.out.name}/trace.json"
    return finish("profile_step", args, content)


if __name__ == "__main__":
    sys.exit(main())
