"""Statistics over two real processes: those of one process that has both shares."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ops import norm_relu_conv2d_equality, preact_unit_equality
from ops.norm_relu_conv2d_equality import Case as Conv
from ops.norm_relu_conv2d_equality import Given, few_programs
from ops.preact_unit_equality import Case
from torch import Tensor

from fastres.ops import Norm, PreActUnit, _register, norm_relu_conv2d, preact_unit
from fastres.ops.stochastic_depth_unit import StochasticDepth

ROOT = Path(__file__).resolve().parents[2]
PROCESSES, SAMPLES = 2, 4
CASES: dict[str, Case | Conv] = {
    "identity": Case(shape=(4, 16, 4, 3)),
    "large mean": Case(shape=(4, 16, 4, 3), values="large_mean"),
    "projection, row": Case(shape=(4, 16, 5, 4), K=32, stride=2, project=True, row_scale=True),
    "subset": Case(shape=(4, 16, 4, 3), picked=0.5),
    "norm1 frozen": Case(shape=(4, 16, 3, 3), training=(False, True)),
    "norm2 frozen, moments": Case(shape=(4, 16, 3, 3), training=(True, False), moments=True),
    "several blocks, moments": Case(shape=(4, 80, 2, 3), K=80, moments=True),
    "no affine, fp16": Case(
        shape=(4, 16, 3, 3), dtype=torch.float16, norm_weight=False, norm_bias=False
    ),
    "conv": Conv(shape=(4, 16, 4, 3), K=16),
    "conv frozen": Conv(shape=(4, 16, 4, 3), training=False),
}
# A sample each, whose gradients are a sample each; those of all else are sums over the samples.
EACH = ("x", "dy", "row_scale", "residual")
# The samples that take a branch, of all and of each process.
INDEX = ([1, 2], [[1], [0]])


def _given(case: Case | Conv, rank: int | None = None) -> Given:
    """The tensors of all samples, or of a process's share."""
    if isinstance(case, Conv):
        return _share(norm_relu_conv2d_equality.tensors(case, "cpu"), rank)
    given = _share(preact_unit_equality.tensors(case, "cpu"), rank)
    if case.picked is not None:
        index = torch.tensor(INDEX[0] if rank is None else INDEX[1][rank])
        position = torch.full((SAMPLES if rank is None else SAMPLES // PROCESSES,), -1)
        position[index] = torch.arange(len(index))
        given |= {"index": index, "position": position}
    return given


def _share(given: Given, rank: int | None) -> Given:
    if rank is None:
        return given
    size = SAMPLES // PROCESSES
    mine = slice(rank * size, (rank + 1) * size)
    return {n: v[mine] if n in EACH and v is not None else v for n, v in given.items()}


def _run(case: Case | Conv, given: Given, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    with few_programs():
        if isinstance(case, Conv):
            conv = partial(norm_relu_conv2d, process_group=group)
            return norm_relu_conv2d_equality.run(conv, case, given)
        unit = partial(preact_unit, process_group=group)
        return preact_unit_equality.run(unit, case, given, fused=True)


def _main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {name: _run(c, _given(c, rank), dist.group.WORLD) for name, c in CASES.items()}
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each process found for each case."""
    if not _register.INTERPRET:
        pytest.skip("gloo's processes take the kernels by the interpreter")
    out = tmp_path_factory.mktemp("group")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(PROCESSES), __file__, str(out)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name: str, by_processes: list[dict[str, dict[str, Tensor]]]) -> None:
    case = CASES[name]
    want = _run(case, _given(case), None)
    found = [rank[name] for rank in by_processes]
    # The order of a sum over all samples and pixels, and what BatchNorm's backward makes of that; a
    # mean a thousand times the spread takes three digits, and would all seven as E[x^2] - E[x]^2.
    bound = 64 * torch.finfo(case.dtype).eps * (100 if case.values == "large_mean" else 1)
    for key, value in want.items():
        parts = [part[key] for part in found]
        if key.startswith("running"):
            assert all(torch.equal(parts[0], part) for part in parts)
            got = parts[0]
        elif key == "y" or key.removeprefix("d") in EACH:
            got = torch.cat(parts)
        else:
            got = torch.stack(parts).sum(0)
        off = (got.double() - value.double()).norm()
        assert bool(off <= bound * value.double().norm()), (key, off / value.double().norm())


def test_alone_a_process_finds_something_else() -> None:
    """So that the test above could fail."""
    case = CASES["identity"]
    want, got = (_run(case, _given(case, rank), None)["y"] for rank in (None, 0))
    assert (got - want[: len(got)]).norm() > 0.01 * got.norm()


class _Two:
    """Stands for a group of two processes, where nothing is sent."""

    group_name = "two"

    def size(self) -> int:
        return 2


def test_a_group_where_no_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_register, "INTERPRET", False)
    group, x, weight = _Two(), torch.randn(2, 16, 4, 4), torch.randn(16, 16, 3, 3)
    trains = Norm(None, None, training=True)
    words = "process_group: its statistics are taken by kernels, got x on cpu"
    with pytest.raises(ValueError, match=words):
        norm_relu_conv2d(x, trains, weight, process_group=group)  # type: ignore[arg-type]  # a stand-in
    with pytest.raises(ValueError, match=words):
        preact_unit(x, trains, weight, trains, weight, process_group=group)  # type: ignore[arg-type]  # as above
    unit = PreActUnit(16, 16, process_group=group)  # type: ignore[arg-type]  # as above
    with pytest.raises(ValueError, match=words):
        unit(x)
    assert unit.eval()(x).shape == x.shape


def test_units_that_a_group_cannot_have() -> None:
    group = _Two()
    with pytest.raises(ValueError, match="process_group: .* layers"):
        PreActUnit(20, 20, process_group=group)  # type: ignore[arg-type]  # as above
    with pytest.raises(ValueError, match="process_group: .* 'batch'"):
        PreActUnit(16, 16, drop=StochasticDepth(0.5, "batch"), process_group=group)  # type: ignore[arg-type]  # as above


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
    os._exit(0)  # gloo's threads may abort a closing Python: end_process in train/workers.py
