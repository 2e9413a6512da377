"""What each process of bench_scaling measures: steps and all-reduces, beside the other processes.

A part is timed in repeats of a few calls each, all its variants in turn. Before each repeat the
processes meet; its time is that of the slowest process.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from _results import Row
from _timing import percentiles
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from config import Config  # noqa: E402  # found by the line above
from trainer import Trainer, set_precision_and_determinism  # noqa: E402  # as above
from workers import Workers, end_process, usable_cpus  # noqa: E402  # as above

from fastres.data import ImageSet, Splits, split, synthetic  # noqa: E402  # as above

# Images that are drawn; a larger batch takes them more than once.
_DRAWN = 1024
_FEWEST_REPEATS, _MOST_REPEATS = 5, 200


@dataclass(frozen=True)
class Run:
    """What all processes of a run are told."""

    device: str
    backend: str
    model: dict[str, Any]
    seconds: float
    timeout: float
    ends: float = math.inf
    """time.time() after which no part is begun."""


@dataclass(frozen=True)
class Part:
    """Rows that are measured together, and that fail together."""

    rows: tuple[Row, ...]
    settings: tuple[dict[str, Any], ...] = ({},)
    """DistributedDataParallel's, a row each."""


@dataclass
class _Switch:
    """Whether _hook reduces the gradients, and the bytes of the buckets that it has seen."""

    reduces: bool = True
    buckets: dict[int, int] = field(default_factory=dict)


# DDP compares the annotation of what it returns, which a string would not be.
def _hook(switch: _Switch, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of DDP that reduces the gradients, or does all else but that."""
    switch.buckets[bucket.index()] = bucket.buffer().nbytes
    if switch.reduces:
        return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is the default group
    bucket.buffer().div_(dist.get_world_size())
    return debugging_hooks.noop_hook(None, bucket)


class _AllReduces:
    """The all-reduces of a step and nothing else, or a single one."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """sizes: bytes of each message."""
        self.messages = [torch.empty(size // 4, device=device) for size in sizes]
        self.refill()

    def refill(self) -> None:
        """Each call sums what the last one left: begin where there is room to grow."""
        for message in self.messages:
            message.normal_().mul_(1e-30)

    @staticmethod
    def most_calls(processes: int) -> int:
        """Sums that grow from 1e-30 to 1e30 at the most."""
        return int(60 / math.log10(processes))

    def __call__(self) -> None:
        for work in [dist.all_reduce(message, async_op=True) for message in self.messages]:
            work.wait()


class _Bench:
    """One process's side of the measurements."""

    def __init__(self, run: Run, workers: Workers) -> None:
        self.run, self.workers = run, workers
        self.gpu = workers.device.type == "cuda"
        self._data: Splits | None = None

    def data(self, images: int) -> Splits:
        """At least so many training images, on the device."""
        if self._data is None:
            self._data = split(synthetic(_DRAWN, 20)).to(self.workers.device)
        drawn = self._data.train
        again = -(-images // len(drawn))
        if again == 1:
            return self._data
        many = drawn.images.repeat(again, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        train = ImageSet(many, drawn.labels.repeat(again))
        d = self._data
        return Splits(d.name, d.classes, train, d.dev, d.test, d.mean, d.std)

    def meet(self) -> None:
        if self.workers.world_size > 1:
            dist.all_reduce(torch.zeros(1, device=self.workers.device))
        self._settle()

    def _settle(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def slowest(self, seconds: Any) -> np.ndarray:
        """Of every process's times, the longest."""
        times = torch.as_tensor(seconds, dtype=torch.float64, device=self.workers.device)
        if self.workers.world_size > 1:
            dist.all_reduce(times, dist.ReduceOp.MAX)
        return times.cpu().numpy()

    def _repeat(self, fn: Callable[[], Any], calls: int) -> float:
        if isinstance(fn, _AllReduces):
            fn.refill()
        self.meet()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        self._settle()
        return (time.perf_counter() - start) / calls

    def interleaved(
        self, variants: Sequence[Callable[[], Any]], shortest: float
    ) -> tuple[np.ndarray, int]:
        """Seconds of each call, [repeats, variants], and the calls in a repeat.

        shortest: seconds that a repeat of the fastest variant is to take at the least.
        """
        for fn in variants:
            for _ in range(10 if self.gpu else 2):
                fn()
        once = self.slowest([self._repeat(fn, 1) for fn in variants])
        most = min(100, _AllReduces.most_calls(max(self.workers.world_size, 2)))
        calls = min(max(math.ceil(shortest / float(once.min())), 1), most)
        wanted = math.ceil(self.run.seconds / (calls * float(once.max())))
        repeats = min(max(wanted, _FEWEST_REPEATS), _MOST_REPEATS)
        times = np.empty((repeats, len(variants)))
        for i in range(repeats):
            # The order turns, so that what slows the machine slows all alike.
            for j in (k % len(variants) for k in range(i, i + len(variants))):
                times[i, j] = self._repeat(variants[j], calls)
        return self.slowest(times), calls

    def all_reduce(self, part: Part) -> list[Row]:
        """An all-reduce of one message."""
        numel = part.rows[0]["bytes"] // 4
        rank, processes = self.workers.rank, self.workers.world_size
        message = torch.full((numel,), rank + 1.0, device=self.workers.device)
        dist.all_reduce(message)
        if not self._everywhere(bool((message == processes * (processes + 1) / 2).all())):
            return [{"failed": "wrong result"}]

        del message
        times, calls = self.interleaved([_AllReduces([4 * numel], self.workers.device)], 0.005)
        timing = percentiles(list(1000 * times[:, 0]))
        # What nccl-tests calls the bus bandwidth: comparable over process counts.
        moved = 2 * (processes - 1) / processes * 4 * numel
        return [
            timing.as_dict()
            | {"calls_a_repeat": calls, "bus_gb_per_s": moved / timing.median_ms / 1e6}
        ]

    def steps(self, part: Part) -> list[Row]:
        """The training step under each of the part's settings, in turn."""
        shared = self.workers.world_size > 1
        variants: list[Callable[[], Any]] = []
        switches: list[_Switch] = []
        for row, settings in zip(part.rows, part.settings, strict=True):
            step, trainer = self._trainer(row["batch_per_process"], settings)
            variants.append(step)
            if not shared:
                continue
            right = self._same_weights(trainer)
            switch = _Switch()
            hooked, trainer = self._trainer(row["batch_per_process"], settings)
            trainer.network.register_comm_hook(switch, _hook)  # type: ignore[operator]  # DDP's
            hooked()
            switches.append(switch)

            def by(
                reduces: bool, step: Callable[[], Any] = hooked, switch: _Switch = switch
            ) -> None:
                switch.reduces = reduces
                step()

            alone = _AllReduces(
                [size for _, size in sorted(switch.buckets.items())], self.workers.device
            )
            variants += [partial(by, True), partial(by, False), alone]
            if not right:
                return [{"failed": "wrong result"}] * len(part.rows)
        # Host work of several steps overlaps on a GPU as it does in training.
        times, calls = self.interleaved(variants, 0.05 if self.gpu else 0.0)
        each = len(variants) // len(part.rows)
        found = []
        for i, row in enumerate(part.rows):
            mine = 1000 * times[:, i * each : (i + 1) * each]
            figures = percentiles(list(mine[:, 0])).as_dict() | {"calls_a_repeat": calls}
            images = row["batch_per_process"] * self.workers.world_size
            figures["images_per_second"] = 1000 * images / figures["median_ms"]
            figures |= _communication(mine[:, 1:], switches[i]) if shared else {}
            found.append(figures)
        return found

    def _trainer(self, batch: int, settings: dict[str, Any]) -> tuple[Callable[[], None], Trainer]:
        precision: Literal["fp16", "fp32"] = (
            "fp16" if self.gpu else "fp32"
        )  # halves are 10 times slower on a CPU
        workers = self.workers
        images = batch * workers.world_size
        config = Config(
            dataset="synthetic", fused=True, precision=precision, batch_size=images,
            # The peak is 0.1 at any batch, which no step of thousands on a few images outgrows.
            lr=12.8 / images, **self.run.model,
        )  # fmt: skip
        set_precision_and_determinism(config)
        trainer = Trainer(config, workers, self.data(images), **settings)
        trainer.network.train()
        index = torch.arange(batch, device=workers.device) + batch * workers.rank
        done = 0

        def step() -> None:
            nonlocal done
            trainer.train_step(index, done)
            done += 1

        for _ in range(2):
            step()
        return step, trainer

    def _same_weights(self, trainer: Trainer) -> bool:
        """Whether all processes hold one model after their first steps: they shared gradients."""
        mine = torch.cat([p.detach().float().reshape(-1) for p in trainer.model.parameters()])
        lead = mine.clone()
        dist.broadcast(lead, 0)
        return self._everywhere(bool(torch.equal(mine, lead) and mine.isfinite().all()))

    def _everywhere(self, right: bool) -> bool:
        return float(self.slowest([0.0 if right else 1.0])[0]) == 0.0


def _communication(times_ms: np.ndarray, switch: _Switch) -> Row:
    """What the all-reduces add to a step, repeat by repeat, beside what they take alone."""
    reduced, unreduced, alone = times_ms.T
    exposed = percentiles(list(reduced - unreduced))
    share = percentiles(list(1 - unreduced / reduced))
    total = percentiles(list(alone))
    row: Row = {
        "communication_share": share.median_ms,
        "communication_share_low": share.low_ms,
        "communication_share_high": share.high_ms,
        "exposed_ms": exposed.median_ms,
        "exposed_low_ms": exposed.low_ms,
        "exposed_high_ms": exposed.high_ms,
        "communication_ms": total.median_ms,
        "communication_low_ms": total.low_ms,
        "communication_high_ms": total.high_ms,
        "step_unreduced_ms": percentiles(list(unreduced)).median_ms,
        "bucket_bytes": [size for _, size in sorted(switch.buckets.items())],
    }
    if exposed.low_ms <= 0:
        row["note"] = "what communication adds is not told from the spread of the steps"
    elif exposed.low_ms > total.high_ms:
        row["note"] = "more than the all-reduces take alone: the processes wait for the slower one"
    return row


def row_text(row: Row) -> str:
    """A row as a line."""
    head = f"{row['kind']:10} {row['processes']} process(es)"
    if row["kind"] == "all_reduce":
        head += f" {row['bytes']:>11,} bytes"
    else:
        head += f" {row['scaling']:11} batch {row['batch_per_process']:<5} each"
        cap = row.get("bucket_cap_mb")
        if row["kind"] == "buckets":
            head += f", buckets of {cap if cap is not None else 'default'} MiB"
            head += ", static graph" if row["static_graph"] else ""
            head += "" if row["gradient_as_bucket_view"] else ", gradients copied"
    reason = row.get("not_measured") or row.get("failed")
    if reason:
        return f"{head}: {reason}, no speed"
    line = f"{head}: {row['median_ms']:9.3f} ms [{row['low_ms']:.3f}, {row['high_ms']:.3f}]"
    if "bus_gb_per_s" in row:
        line += f" {row['bus_gb_per_s']:8.3f} GB/s (bus)"
    if "images_per_second" in row:
        line += f" {row['images_per_second']:10,.0f} images/s"
    if "exposed_ms" in row:
        line += (
            f", communication {row['communication_share']:.1%}: adds {row['exposed_ms']:.3f} ms, "
            f"alone {row['communication_ms']:.3f} ms, {len(row['bucket_bytes'])} bucket(s)"
            f"{' (' + row['note'] + ')' if 'note' in row else ''}"
        )
    return line


def work(rank: int, processes: int, run: Run, port: int, parts: list[Part], out: Path) -> None:
    """One process: meet the others, measure the parts."""
    device = torch.device(run.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(usable_cpus() // processes, 1))
    if processes > 1:
        patience = timedelta(seconds=run.timeout)
        dist.init_process_group(
            run.backend,
            # The parent chose a free port by listening on it: nobody can take it in between.
            store=dist.TCPStore("127.0.0.1", port, is_master=False, timeout=patience),
            rank=rank, world_size=processes, timeout=patience,
            device_id=device if run.backend == "nccl" else None,
        )  # fmt: skip
    workers = Workers(rank, processes, rank, device)
    bench = _Bench(run, workers)

    def write(line: dict[str, Any]) -> None:
        if workers.leads:
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    for i, part in enumerate(parts):
        # The leading process's clock is everybody's.
        late = bool(bench.slowest([float(workers.leads and time.time() > run.ends)])[0])
        write({"begun": i})
        if late:
            figures: list[Row] = [{"not_measured": "out of time"}] * len(part.rows)
        elif part.rows[0]["kind"] == "all_reduce":
            figures = bench.all_reduce(part)
        else:
            figures = bench.steps(part)
        rows = [about | found for about, found in zip(part.rows, figures, strict=True)]
        for row in rows if workers.leads else ():
            print(row_text(row), flush=True)
        write({"done": i, "rows": rows})
        if bench.gpu:
            torch.cuda.empty_cache()
    workers.leave()
    end_process(0, processes)
