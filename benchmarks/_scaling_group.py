"""How bench_scaling starts its processes, watches them and goes on where one dies or hangs.

A group of processes works through parts. The leading process writes a line to a file when it begins
a part and when it has its rows, so that a process that dies or hangs costs the part in hand alone:
the rest is given to a new group.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp
from _results import Row
from _scaling_worker import Part, Run, row_text, work


def measure(run: Run, processes: int, parts: Sequence[Part]) -> list[Row]:
    """The rows of the parts by so many processes; a part whose processes die or hang says so."""
    rows: list[Row] = []
    left, idle = list(parts), 0
    while left:
        lines, why = _group(run, processes, left)
        done = [line for line in lines if "done" in line]
        rows += [row for line in done for row in line["rows"]]
        left = left[len(done) :]
        # Processes that never came so far as to begin, and twice, will not do so for other parts.
        idle = 0 if lines else idle + 1
        lost, left = (left, []) if idle == 2 else (left[:1], left[1:])
        for row in [about | why for part in lost for about in part.rows]:
            print(row_text(row), flush=True)
            rows.append(row)
    return rows


def _group(run: Run, processes: int, parts: list[Part]) -> tuple[list[dict[str, Any]], Row]:
    """One group of processes: the lines that it wrote, and why it went no further."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.jsonl"
        out.touch()
        patience = timedelta(seconds=run.timeout)
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience
        )
        context = mp.start_processes(
            work, (processes, run, store.port, parts, out), nprocs=processes, join=False,
            daemon=True, start_method="spawn",
        )  # fmt: skip
        assert context is not None  # join=False
        why: Row = {}
        seen, heard = -1, time.monotonic()
        try:
            while not context.join(timeout=0.2):
                if (size := out.stat().st_size) != seen:
                    seen, heard = size, time.monotonic()
                if time.monotonic() - heard > run.timeout:
                    why = {"failed": f"no answer in {run.timeout:g} s; see --timeout"}
                    break
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            why = _reason(str(error))
        finally:
            for process in context.processes:
                with suppress(ValueError):
                    process.kill()
                    process.join()
        # What was cut off in the middle of a line was not finished.
        whole = [line for line in out.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        return [json.loads(line) for line in whole], why


def _reason(said: str) -> Row:
    """What a process died of, in a row's words."""
    if any(word in said for word in ("OutOfMemoryError", "MemoryError", "can't allocate memory")):
        return {"not_measured": "out of memory"}
    last = [line.strip() for line in said.splitlines() if line.strip()][-1:]
    return {"failed": (last or ["a process died"])[0][:300]}
