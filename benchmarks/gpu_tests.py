"""Run the tests that need a GPU, then every test of ops and models on the GPU, and keep the ends.

python benchmarks/gpu_tests.py [--minutes M] [--json FILE] [--go-on]

Kernels that the tests meet are compiled: each run takes what the one before has left of the time,
and one that is stopped by it says which tests had failed until then. With --small, or where there
is no GPU, the tests are only collected.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _program import finish, parser
from _results import Row, measured
from _sheet import Sheet

_ROOT = Path(__file__).parent.parent
# Those that want most of the memory run alone.
_SELECTIONS = {
    "gpu": ["-m", "gpu and not huge"],
    "ops": ["-m", "not gpu", "tests/ops", "tests/models"],
    "huge": ["-m", "huge"],
}
# Seconds without which a run is not begun; and those in which an interrupted one says how it went.
_LEAST, _LAST_WORDS = 20, 20


def bench(small: bool, sheet: Sheet) -> dict[str, Any]:
    """A row for each selection: what passed, failed and was skipped, and the last lines."""
    collect = small or not torch.cuda.is_available()
    for name, selection in _SELECTIONS.items():
        about = {"tests": name, "only_collected": collect}
        if sheet.known(about) or not sheet.has(_LEAST, about, f"tests: {name}"):
            continue
        workers = [] if name == "huge" else ["-n", str(min(os.cpu_count() or 1, 8))]
        command = [sys.executable, "-m", "pytest", "-v", "-rfEs", *selection]
        command += ["--collect-only", "-q"] if collect else workers
        # Collecting tests, none of which may be selected, ends with 5.
        good = (0, 5) if collect else (0,)
        limit = sheet.clock.left(3600)
        sheet.add([measured(about, partial(run_tests, command, good, limit))])
    return {"rows": sheet.rows}


def run_tests(command: list[str], good: tuple[int, ...], limit: float) -> Row:
    """A row of pytest's run, which is interrupted after `limit` seconds."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=said, stderr=subprocess.STDOUT)
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_LAST_WORDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        said.seek(0)
        lines = said.read().splitlines()
    bad = [line for line in lines[:-40] if re.search(r"\b(FAILED|ERROR)\b", line)]
    lines = [*bad[:100], *lines[-40:]]
    print("\n".join(lines[-12:]), flush=True)
    if late:
        return {"not_measured": "out of time", "output": lines}
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", lines[-1] if lines else "")}
    found: Row = {"seconds": time.monotonic() - start, "output": lines}
    found |= {f"{word}_tests": counts.get(word, 0) for word in ("passed", "failed", "skipped")}
    if process.returncode not in good:
        # pytest's last line is the count of what failed.
        found["failed"] = f"exit status {process.returncode}: {lines[-1] if lines else ''}"
    return found


def main() -> int:
    args = parser(__doc__).parse_args()
    return finish("gpu_tests", args, bench(args.small, Sheet.open("gpu_tests", args)))


if __name__ == "__main__":
    sys.exit(main())
