"""Time data-parallel training at 1, 2, 4, ... processes, and model what more would do.

    python benchmarks/bench_scaling.py                         on all GPUs of this machine, by NCCL
    python benchmarks/bench_scaling.py --device cpu --processes 1 2 4          on its cores, by gloo
    python benchmarks/bench_scaling.py --model-from FILE.json  only the model, of saved figures

Starts the processes itself. Each runs the training step of train/main.py --fused, by fp16 with loss
scaling on a GPU and by fp32 on a CPU: strong scaling (the global batch stays) and weak scaling (the
batch of a process stays).

What communication costs is measured: the same step with and without its all-reduces, in turn, by a
hook that does all else; and the same all-reduces alone. Exposed is what they add to a step, which
is less than they take alone where the backward pass hides them. All of that is timed in turn, but
one number of processes after another.

A sweep of all-reduces over message sizes is what the model of 8 to 1024 processes is fitted to: it
needs two process counts of 2 or more. It assumes one kind of link, unless --inter-node-latency and
--inter-node-bandwidth tell another for the network between nodes.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _program import finish, parser
from _results import ResultsError, Row, load, without_speed
from _scaling_group import measure
from _scaling_model import PROCESSES, Network, NoModel, lines, predict
from _scaling_worker import Part, Run, usable_cpus
from _timing import Clock

# MiB; None is DDP's own default: 1 for the first bucket, 25 for the others.
_BUCKET_CAPS = (None, 0.25, 1, 5, 25)


def bench(
    device: torch.device,
    small: bool,
    seconds: float,
    clock: Clock,
    processes: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
    backend: str | None = None,
    timeout: float = 300.0,
    network: Network | None = None,
    **model: Any,
) -> dict[str, Any]:
    """Every number of processes, strong and weak, buckets, all-reduces, and the model.

    processes: powers of two up to the number of GPUs or cores where none are given.
    """
    gpu = device.type == "cuda"
    here = torch.cuda.device_count() if gpu else usable_cpus()
    counts = sorted(set(processes or default_processes(device)))
    batches = sorted(set(batch_sizes or ([16] if small else [128, 1024] if gpu else [128])))
    model = ({"depth": 8, "width": 4} if small else {"depth": 20, "width": 16}) | model
    ends = time.time() + clock.left(1e9)
    backend = backend or ("nccl" if gpu else "gloo")
    run = Run(device.type, backend, model, seconds, timeout, ends)
    about = {"provider": "fastres", "device": device.type, "backend": backend, **model}
    if not gpu:
        print(
            f"on a CPU the processes share its {here} core(s): what is gained here, or lost, says "
            "nothing about GPUs",
            flush=True,
        )
    rows: list[Row] = []
    for count in counts:
        if gpu and count > here:
            for batch in batches:
                for row in _steps(about, count, batch):
                    rows.append(
                        without_speed(
                            row, not_measured=f"needs {count} GPUs, {here} is or are here"
                        )
                    )
            continue
        if not gpu and count > here:
            about |= {"oversubscribed": True}
            print(f"{count} processes take turns on {here} core(s)", flush=True)
        parts = _parts(about, count, batches, small, gpu, buckets=count == max(counts))
        for part in [p for p in parts if "not_measured" in p.rows[0]]:
            rows += [without_speed(row, not_measured=row.pop("not_measured")) for row in part.rows]
        found = measure(run, count, [p for p in parts if "not_measured" not in p.rows[0]])
        rows += found
        if count == 1:
            # Of one process the two are one thing, timed once.
            rows += [row | {"scaling": "weak"} for row in found if row["scaling"] == "strong"]
    _efficiency(rows)
    of = f"{torch.cuda.get_device_name()} GPUs" if gpu else "gloo on one CPU host"
    return {"rows": rows, "of": of} | modelled(rows, of, network)


def default_processes(device: torch.device) -> list[int]:
    """Powers of two up to the number of GPUs, or of cores; and 2, to say what it needs."""
    here = torch.cuda.device_count() if device.type == "cuda" else usable_cpus()
    return sorted({2} | {2**i for i in range(max(here, 1).bit_length())})


def _steps(about: Row, count: int, batch: int) -> list[Row]:
    """The steps of one batch size, strong and weak."""
    found = []
    for scaling, share in (("strong", batch / count), ("weak", batch)):
        row: Row = {"kind": "step", **about, "scaling": scaling, "processes": count}
        row["global_batch"] = batch if scaling == "strong" else batch * count
        if share == int(share):
            row |= {"batch_per_process": int(share), **_settings({})}
        else:
            row["not_measured"] = f"{batch} images do not share out evenly"
        found.append(row)
    return found


def _settings(ddp: dict[str, Any]) -> Row:
    return {
        "bucket_cap_mb": None, "static_graph": False, "gradient_as_bucket_view": True
    } | ddp  # fmt: skip


def _parts(
    about: Row, count: int, batches: list[int], small: bool, gpu: bool, buckets: bool
) -> list[Part]:
    """What so many processes are to measure, the steps first."""
    parts = [
        Part((row,))
        for batch in batches
        for row in _steps(about, count, batch)
        if count > 1 or row["scaling"] == "strong"
    ]
    if count == 1:
        # What the model's strong scaling computes by: the shares of 8 to 1024 processes.
        shares = {b // p for b in batches for p in PROCESSES if b % p == 0} - set(batches)
        for share in sorted(shares, reverse=True):
            row = {"kind": "step", **about, "scaling": "one process", "processes": 1}
            row |= {"global_batch": share, "batch_per_process": share, **_settings({})}
            parts.append(Part((row,)))
        return parts
    largest = 2**18 if small else 2**28 if gpu else 2**24
    for size in (4**i for i in range(1, int(math.log(largest, 4)) + 1)):
        row = {"kind": "all_reduce"}
        row |= {k: v for k, v in about.items() if k in ("device", "backend", "oversubscribed")}
        parts.append(Part((row | {"processes": count, "bytes": size},)))
    if buckets:
        settings: list[dict[str, Any]] = [
            {"bucket_cap_mb": cap} for cap in (_BUCKET_CAPS[:2] if small else _BUCKET_CAPS)
        ]
        settings += [{"static_graph": True}]
        settings += [] if small else [{"gradient_as_bucket_view": False}]
        row = {"kind": "buckets", **about, "scaling": "weak", "processes": count}
        row |= {"global_batch": count * batches[0], "batch_per_process": batches[0]}
        parts.append(Part(tuple(row | _settings(s) for s in settings), tuple(settings)))
    return parts


def _efficiency(rows: list[Row]) -> None:
    """Beside each step, its speed over that of one process times their number."""
    steps = [row for row in rows if row["kind"] == "step" and "median_ms" in row]
    for row in steps:
        strong = row["scaling"] == "strong"
        batch = row["global_batch"] if strong else row["batch_per_process"]
        alone = [
            other["images_per_second"]
            for other in steps
            if other["processes"] == 1
            and other["scaling"] != "one process"
            and other["batch_per_process"] == batch
        ]
        if row["scaling"] in ("strong", "weak") and alone:
            row["efficiency"] = row["images_per_second"] / (row["processes"] * alone[0])
            print(
                f"{row['scaling']:6} {row['processes']} process(es), batch "
                f"{row['batch_per_process']} each: efficiency {row['efficiency']:.0%}"
            )


def modelled(rows: list[Row], of: str, network: Network | None) -> dict[str, Any]:
    """The rows with the model's behind them, and what it was fitted to; or why it says nothing."""
    try:
        model = predict(rows, of, network)
    except NoModel as error:
        print(f"no model: {error}")
        return {"model": {"refused": str(error)}}
    print(*lines(model), sep="\n")
    said = model.pop("rows")
    return {"rows": rows + said, "model": model}


def main() -> int:
    made = parser(__doc__, seconds=2.0, goes_on=False)
    made.add_argument("--processes", type=int, nargs="+", metavar="N", help="1 2 4 ... up to all")
    made.add_argument("--backend", choices=("nccl", "gloo"), help="nccl on GPUs, gloo on a CPU")
    made.add_argument("--batch-size", type=int, nargs="+", metavar="B",
                      help="global (strong) and of a process (weak)")  # fmt: skip
    made.add_argument("--depth", type=int, help="6n + 2 (20)")
    made.add_argument("--width", type=int, help="channels of the first stage (16)")
    made.add_argument("--timeout", type=float, default=300.0, metavar="S",
                      help="give processes up after so long without an answer")  # fmt: skip
    made.add_argument("--model-from", type=Path, metavar="FILE",
                      help="measure nothing: the model of the figures in this file")  # fmt: skip
    made.add_argument("--inter-node-latency", type=float, metavar="US", help="of a hop, given")
    made.add_argument("--inter-node-bandwidth", type=float, metavar="GB/S", help="of a node, given")
    made.add_argument("--processes-per-node", type=int, default=8, metavar="N",
                      help="for the network between nodes (8)")  # fmt: skip
    args = made.parse_args()
    try:
        network = _network(args)
        if args.model_from:
            return finish("scaling", args, _from_file(args.model_from, network))
        _check(args)
    except (ResultsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model = {k: v for k, v in (("depth", args.depth), ("width", args.width)) if v is not None}
    return finish(
        "scaling", args,
        bench(
            args.device, args.small, args.seconds, Clock(args.minutes), args.processes,
            args.batch_size, args.backend, args.timeout, network, **model,
        ),
    )  # fmt: skip


def _network(args: Any) -> Network | None:
    given = (args.inter_node_latency, args.inter_node_bandwidth)
    if given == (None, None):
        return None
    if None in given or not all(0 < x < math.inf for x in given) or args.processes_per_node < 1:
        raise ValueError(
            f"--inter-node-latency {given[0]} and --inter-node-bandwidth {given[1]}: expected "
            "both, in us and GB/s, and 1 or more --processes-per-node"
        )
    return Network(args.processes_per_node, 1e-6 * given[0], 1e9 * given[1])


def _check(args: Any) -> None:
    """Raise ValueError where the flags ask for what cannot be."""
    gpu = args.device.type == "cuda"
    gpus = torch.cuda.device_count()
    if gpu and not gpus:
        raise ValueError("--device cuda: PyTorch finds no GPU here; pass --device cpu")
    if args.backend == "nccl" and not gpu:
        raise ValueError("--backend nccl: works on GPUs; pass --backend gloo, or --device cuda")
    for name in ("processes", "batch_size"):
        values = getattr(args, name) or ()
        if any(value < 1 for value in values):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {' '.join(map(str, values))}: expected 1 or more")
    most = max(args.processes or [1])
    if gpu and most > gpus:
        raise ValueError(
            f"--processes {most}: more than the {gpus} GPU(s) here, one a process; lower it, or "
            "pass --device cpu"
        )
    if args.depth is not None and (args.depth < 8 or (args.depth - 2) % 6):
        raise ValueError(f"--depth {args.depth}: expected 6n + 2: 8, 14, 20, 26, ...")
    if args.width is not None and args.width < 1:
        raise ValueError(f"--width {args.width}: expected 1 or more")
    if not (args.timeout > 0 and args.seconds > 0):
        raise ValueError(
            f"--timeout {args.timeout:g} --seconds {args.seconds:g}: expected more than 0"
        )


def _from_file(path: Path, network: Network | None) -> dict[str, Any]:
    """The model alone, of what a file holds, and where and when that was measured.

    Raises:
        ResultsError: the file is of another form or of another benchmark.
    """
    content = load(path)
    if content["benchmark"] != "scaling" or not isinstance(content.get("rows"), list):
        raise ResultsError(
            f"{path.name}: holds results of {content['benchmark']}, and those of scaling are "
            "read here"
        )
    source = {key: content.get(key) for key in ("command", "date", "gpu", "cpu", "torch")}
    print(f"measured {source['date']} by {source['command']}")
    measured = [row for row in content["rows"] if isinstance(row, dict) and not row.get("model")]
    found = modelled(measured, str(content.get("of", "processes unnamed")), network)
    said = [row for row in found.pop("rows", []) if row.get("model")]
    return {"rows": said, "measured_on": source, **found}


if __name__ == "__main__":
    sys.exit(main())
