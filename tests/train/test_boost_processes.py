"""train/boost.py under a real torchrun, with gloo: two processes grow one network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint
import pytest
import torch
from tolerances import DDP_ABSOLUTE
from train.tiny_growths import TINY, growth_of, lines
from train.tiny_runs import same

from fastres.boost import outputs

ROOT = Path(__file__).parents[2]
# Forty images in batches of 8 for each of two processes.
FLAGS = [*TINY, "--units", "2"]


def run(fault: str, out: Path, *flags: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(Path(__file__).parent / "boost_with_fault.py"), fault]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "train"), env.get("PYTHONPATH", "")]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(out.parent / "cache")}
    # A rank left hanging in a collective would outlast this.
    done = subprocess.run(
        [*command, *FLAGS, *flags, "--out", str(out)],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_two_processes_grow_one_network(tmp_path: Path, native_path: None) -> None:
    """By features on disk, fetched ahead in both."""
    out = tmp_path / "out"
    disk = ["--cache-host-gb", "0", "--cache-device-gb", "0", "--cache-dir", str(tmp_path / "c")]
    status, said, err = run("none", out, *disk)
    assert status == 0, err
    assert "2 process(es)" in said and not list((tmp_path / "c").iterdir())
    first, second = (torch.load(out / f"rank-{rank}.pt") for rank in (0, 1))
    assert first["units"] == second["units"] == 2
    assert same(first["model"], second["model"])
    a, b = first["boosting"], second["boosting"]
    assert torch.equal(a.pop("state"), b.pop("state"))
    assert torch.equal(a.pop("contribution"), contribution := b.pop("contribution"))
    assert a == b
    assert [unit["cache_place"] for unit in lines(out / "metrics.jsonl")] == ["none", "disk"]

    # One process has the same of it: edges are of all images, each counted once.
    growth = growth_of("--units", "2")
    state = checkpoint.load(out / "checkpoint.pt")
    growth.load_state_dict(state)
    assert same(state["model"], first["model"])
    with torch.no_grad():
        logits = growth.network().eval()(growth.frozen.plain(growth.data.train, 0, 40))
    alone = growth.boosting.alphas[-1] * outputs(logits)
    assert float((alone - contribution).abs().max()) <= DDP_ABSOLUTE
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["units"], summary["workers"]) == (2, 2)
    assert [kind["processes"] for kind in summary["hardware"]] == [2]
    right = logits.argmax(1) == growth.data.train.labels
    assert summary["before_refinement"]["train_accuracy"] == 100 * float(right.double().mean())


@pytest.mark.parametrize(
    ("fault", "words"),
    [("full", "free the disk"), ("torn", "from the disk: the disk is gone")],
)
def test_what_one_process_meets_stops_both_in_words(fault: str, words: str, tmp_path: Path) -> None:
    """Between two units all of them know it, within an epoch the one that has met it says it."""
    out = tmp_path / "out"
    disk = ["--cache-host-gb", "0", "--cache-device-gb", "0", "--cache-dir", str(tmp_path / "c")]
    status, _, err = run(fault, out, *disk)
    assert status != 0 and len(errors(err)) == 1, err
    assert words in errors(err)[0]
    assert len(lines(out / "metrics.jsonl")) == 1
    assert checkpoint.load(out / "checkpoint.pt")["units"] == 1
    assert not (out / "summary.json").exists()
