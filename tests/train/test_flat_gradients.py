"""One flat buffer of gradients in DistributedDataParallel's place, under a real torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from config import parse
from errors import TrainError
from train.tiny_runs import same, tensors_of

ROOT = Path(__file__).parents[2]
TINY = [
    "--dataset", "synthetic", "--train-size", "48", "--image-size", "8", "--fused",
    "--depth", "8", "--width", "4", "--batch-size", "12", "--epochs", "2", "--deterministic",
]  # fmt: skip
DROP = ["--drop-prob", "0.5", "--drop-schedule", "uniform", "--drop-mode"]
METHODS = {
    "plain": [],
    # A unit that is left out has no gradients, on no process.
    "batch": [*DROP, "batch"],
    "pure-fp16, row": ["--precision", "pure-fp16", *DROP, "row"],
    "micro-batches": ["--micro-batches", "2", "--optimizer", "yellowfin"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flat")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(ROOT / "tests" / "train" / "flat_runs.py"), str(out)]
    flags = {name: [*TINY, *more] for name, more in METHODS.items()}
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "train")])
    # Kernels cannot be captured with a CPU's tensors: --cuda-graph is given to a run without a GPU.
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*command, json.dumps(flags)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_bitwise_distributed_data_parallels(method: str, finished: Path) -> None:
    """Of two processes, whose sums have one order."""
    assert same(tensors_of(finished / f"{method}-ddp"), tensors_of(finished / f"{method}-flat"))


def test_processes_begin_and_go_on_with_the_same(finished: Path) -> None:
    one, other = (json.loads((finished / f"said{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    # The first layer's weight, of inputs of 1 and of 2, has 1.5 times the first process's gradient.
    mean = json.loads(one["mean"])
    assert len(mean) == 4 and mean[1] != [0.0, 0.0]
    assert mean[0][0] == pytest.approx([1.5 * mean[1][0]] * 3)


def test_what_differs_is_an_error_in_words(finished: Path) -> None:
    said = json.loads((finished / "said0.json").read_text())
    assert said["other models"].startswith("the processes have different models")
    assert "gradients of different parameters" in said["other gradients"]
    assert "gradients of different parameters" in said["other layers"]


def test_buckets_are_reduced_beside_the_backward(finished: Path) -> None:
    """The last layer's when the first layer's gradient is only being made."""
    said = json.loads((finished / "said0.json").read_text())
    assert said["before the last backward"] == "([0], [])"
    assert said["in the last backward"] == "([0, 1], 2)"
    assert said["after it"] == "2"


def test_kernels_are_collected_and_nothing_is_trained(finished: Path) -> None:
    """--prebuild in two processes, whose collectives meet in the dry run too."""
    for rank in (0, 1):
        for same_steps, launches in json.loads((finished / f"ahead{rank}.json").read_text()):
            assert same_steps and launches > 15


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gradient-buckets", "0"], "--gradient-buckets 0: expected 1 or more"),
        (["--gradient-buckets", "2"], "--gradient-buckets 2: expected --cuda-graph beside it"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], words: str) -> None:
    with pytest.raises(TrainError, match=words):
        parse([*TINY, *flags], quiet=True)
