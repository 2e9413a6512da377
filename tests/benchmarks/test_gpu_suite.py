"""The suite at toy size: every part runs, and the figures are all there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("suite") / "results.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--small", "--out", str(out)],
        env=env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_hardware_versions_and_date(results: dict) -> None:
    for key in ("date", "cpu", "python", "torch", "triton", "fastres", "gpu", "cuda", "seconds"):
        assert key in results
    assert results["small"] is True


def test_ops_are_right_and_timed_beside_their_peers(results: dict) -> None:
    for op, passes in (("batch_norm_relu", 2), ("augment", 1)):
        rows = results[op]["rows"]
        assert not [row for row in rows if "failed" in row or "not_measured" in row], rows
        assert {row["provider"] for row in rows} >= {"fastres", "eager", "compile"}
        assert len({row.get("pass") for row in rows}) == passes
        for row in rows:
            assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
            assert row["gb_per_s"] > 0 and 0 < row["share_of_copy"] < 10


def test_steps_and_training(results: dict) -> None:
    providers = [row["provider"] for row in results["step"]]
    for word in ("eager fp32 NCHW", "channels_last", "compile", "fused"):
        assert any(word in provider for provider in providers)
    assert all(row["images_per_second"] > 0 for row in results["step"])
    assert len({round(row["loss"], 3) for row in results["step"]}) == 1  # one model, one batch
    for run in results["training"].values():
        assert run["exit_status"] == 0 and run["summary"]["data"] == "images"


def test_without_a_gpu_the_full_suite_refuses() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py")],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and "no GPU here" in done.stderr
