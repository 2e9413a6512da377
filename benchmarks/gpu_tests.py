"""Run the tests that need a GPU, then every test of ops and models on the GPU, and keep the ends.

python benchmarks/gpu_tests.py [--minutes M] [--json FILE]

Kernels that the tests meet are compiled: the second run may take what the first has left of the
time. With --small, or where there is no GPU, the tests are only collected.
"""

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _program import finish, parser
from _results import Row, measured
from _timing import Clock

_ROOT = Path(__file__).parent.parent
_SELECTIONS = {"gpu": ["-m", "gpu"], "ops": ["-m", "not gpu", "tests/ops", "tests/models"]}


def bench(small: bool, clock: Clock) -> dict[str, Any]:
    """A row for each selection: what passed, failed and was skipped, and the last lines."""
    collect = small or not torch.cuda.is_available()
    rows: list[Row] = []
    for name, selection in _SELECTIONS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-rfEs", *selection]
        command += ["--collect-only"] if collect else ["-n", str(min(os.cpu_count() or 1, 8))]
        # Collecting tests, none of which may be selected, ends with 5.
        good = (0, 5) if collect else (0,)
        about = {"tests": name, "only_collected": collect}
        rows.append(measured(about, partial(_run, command, good, clock.left(3600))))
    return {"rows": rows}


def _run(command: list[str], good: tuple[int, ...], limit: float) -> Row:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=_ROOT, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        return {"not_measured": "out of time", "output": text.splitlines()[-40:]}
    lines = done.stdout.splitlines()[-40:]
    print("\n".join(lines[-12:]), flush=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", lines[-1] if lines else "")}
    found: Row = {"seconds": time.monotonic() - start, "output": lines}
    found |= {f"{word}_tests": counts.get(word, 0) for word in ("passed", "failed", "skipped")}
    if done.returncode not in good:
        # pytest's last line is the count of what failed.
        found["failed"] = f"exit status {done.returncode}: {lines[-1] if lines else ''}"
    return found


def main() -> int:
    args = parser(__doc__, goes_on=False).parse_args()
    return finish("gpu_tests", args, bench(args.small, Clock(args.minutes)))


if __name__ == "__main__":
    sys.exit(main())
