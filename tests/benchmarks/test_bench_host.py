"""What the host takes for a call is timed without a launch, and leaves everything as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "bench_host.py"


def test_a_row_for_each_layer_provider_and_pass(tmp_path: Path) -> None:
    # As its users run it: what the interpreter takes would be no figure.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    file = tmp_path / "host.json"
    command = [sys.executable, str(PROGRAM), "--small", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len({(row["layer"], row["provider"], row["pass"]) for row in rows}) == len(rows) == 8
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["n"] >= 10
