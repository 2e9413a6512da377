"""Two real processes: one rank's loss overflows, and both skip, after the reduction."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastres.amp import LossScaler
from fastres.optim import FusedSGD, YellowFin

ROOT = Path(__file__).resolve().parents[1]
# At step 1 rank 1 alone overflows, at step 2 rank 0.
OVERFLOWS = [None, 1, 0, None]
OPTIMIZERS: dict[str, Any] = {
    "FusedSGD": lambda params: FusedSGD(params, lr=0.1, momentum=0.9),
    "YellowFin": YellowFin,
}


def _train(optimizer_name: str) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    scaler = LossScaler()
    scaler.watch(model)
    generator = torch.Generator().manual_seed(rank)
    stepped, counted = [], []
    for overflows in OVERFLOWS:
        optimizer.zero_grad()
        loss = parallel(torch.randn(6, 3, generator=generator)).square().mean()
        scaler.scale(loss * (torch.inf if overflows == rank else 1.0)).backward()
        stepped.append(bool(scaler.step(optimizer)))
        scaler.update()
        counted.append(int(model.get_buffer("1.num_batches_tracked")))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    state = [t.flatten() for state in optimizer.state.values() for t in state.values()]
    torch.distributed.destroy_process_group()
    return {
        "state": torch.cat(state).tolist(), "stepped": stepped, "counted": counted,
        "scale": scaler.get_scale(), "weights": weights.tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ranks_agree_on_skipping(optimizer: str, tmp_path: Path) -> None:
    """And on all that an optimizer keeps: YellowFin tunes by the reduced gradients."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        __file__, str(tmp_path), optimizer,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)  # the native path: the interpreter's is tested elsewhere
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["stepped"] == [True, False, False, True]
    assert first["counted"] == [1, 1, 1, 2]
    assert first["scale"] == 65536.0 / 4
    assert all(abs(w) < 10 for w in first["weights"])


if __name__ == "__main__":
    results = _train(sys.argv[2])
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    os._exit(0)  # as end_process in train/workers.py: gloo's threads may abort a closing Python
