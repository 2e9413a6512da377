"""--profile: the phases, what records them, and that training stays what it is without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import profiling
import pytest
import torch
from config import Config
from errors import TrainError
from main import main
from nvtx_log import NvtxLog
from profiling import Profile
from train.tiny_runs import same, trainer_of, weights_of
from trainer import Trainer, unmarked

ROOT = Path(__file__).parents[2]
# 40 images in batches of 16: two steps an epoch, ten in all.
TINY = [
    "--dataset", "synthetic", "--train-size", "40", "--image-size", "8", "--device", "cpu",
    "--depth", "8", "--width", "4", "--batch-size", "16", "--epochs", "5", "--deterministic",
    "--eval-every", "9",
]  # fmt: skip
METHODS = {
    "plain": [],
    "postact": ["--block", "postact", "--shortcut", "A"],
    "fp16, every op": [
        "--fused", "--precision", "fp16", "--drop-prob", "0.5", "--drop-mode", "subset",
        "--meprop-ratio", "0.5",
    ],
    "fused, batch": ["--fused", "--drop-prob", "0.5"],
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("native_path")


@pytest.fixture(autouse=True)
def _nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in profiling._LISTENERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> NvtxLog:
    log = NvtxLog()
    monkeypatch.setitem(sys.modules, "nvtx", log)
    return log


def annotations(path: Path) -> list[dict[str, Any]]:
    """The marked ranges of a trace in Chrome's form."""
    events = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e["ph"] == "X" and e.get("cat") == "user_annotation"]


def steps(trainer: Trainer, count: int) -> None:
    trainer.network.train()
    index = torch.arange(16, device=trainer.workers.device)
    for number in range(count):
        trainer.train_step(index, number)


def test_a_profiled_run_goes_on_to_the_same_weights(
    tmp_path: Path, nvtx: NvtxLog, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--epochs", "4", "--out"]  # eight steps, so that three can be recorded
    assert main([*flags, str(tmp_path / "plain")]) == 0
    assert not nvtx.calls
    capsys.readouterr()
    assert main([*flags, str(tmp_path / "profiled"), "--profile"]) == 0
    assert same(weights_of(tmp_path / "plain"), weights_of(tmp_path / "profiled"))
    ranges = annotations(tmp_path / "profiled" / "trace.json")
    marked = {name for what, name in nvtx.calls if what == "push"}
    assert marked <= {e["name"] for e in ranges}
    assert [e["name"] for e in ranges].count("step") == 3
    said = capsys.readouterr().out
    assert "3 steps of" in said and "aten::convolution_backward" in said
    assert "perfetto" in said and not (tmp_path / "profiled" / ".trace.json.part").exists()


@pytest.mark.parametrize("method", METHODS)
def test_phases_nest_and_change_nothing(method: str, tmp_path: Path, nvtx: NvtxLog) -> None:
    states = []
    for profiled in (False, True):
        trainer = trainer_of([*TINY, *METHODS[method]])
        if profiled:
            Profile(trainer, 2, tmp_path, nvtx, lambda line: None, warmup=2)
        steps(trainer, 6)
        states.append(trainer.model.state_dict())
    assert same(*states)
    assert (tmp_path / "trace.json").exists()

    assert nvtx.domains == {"fastres"} and not nvtx.still_open()
    parents = nvtx.parents()
    for name in ("data", "forward", "loss", "backward", "update"):
        assert parents[name] == {"step"}
        assert nvtx.calls.count(("push", name)) == 2  # the warm-up's steps are not marked
    for name in ("stem", "stage1", "stage2", "stage3", "head"):
        assert parents[name] == {"forward"}
    scaled = "fp16" in method
    assert parents["optimizer"] == {"update"} and ("unscale" in parents) == scaled
    stages = {"stage1", "stage2", "stage3"}
    if method == "plain":
        assert parents["conv1"] == parents["conv2"] == stages and parents["conv"] == {"stem"}
        assert parents["shortcut"] == {"stage2", "stage3"}
        assert parents["batch_norm_relu"] == {*stages, "head"}
    elif method == "fp16, every op":
        assert parents["unscale"] == {"update"}
        order = [call for call in nvtx.calls if call[1] in ("unscale", "optimizer")]
        assert order[:4] == [(w, n) for n in ("unscale", "optimizer") for w in ("push", "pop")]
        assert parents["stochastic_depth_add"] == stages
        # Inside the branch that may be dropped, and beside it the stem and the shortcuts.
        assert parents["meprop_conv2d"] == {"stochastic_depth_add", "stem", "stage2", "stage3"}


def test_ranges_end_where_a_step_raises(tmp_path: Path, nvtx: NvtxLog) -> None:
    trainer = trainer_of(TINY)
    profile = Profile(trainer, 2, tmp_path, nvtx, print, warmup=1)
    steps(trainer, 2)

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    hook = trainer.model.units[1].conv1.register_forward_hook(stop)  # type: ignore[union-attr]  # a unit's
    with pytest.raises(Stop):
        steps(trainer, 1)
    hook.remove()
    assert not nvtx.still_open() and nvtx.calls[-1] == ("pop", "step")
    assert nvtx.calls.count(("push", "stage2")) == 2 and nvtx.calls.count(("push", "head")) == 1
    assert trainer.phase is unmarked and profile.table is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
    before = len(nvtx.calls)
    steps(trainer, 3)
    assert len(nvtx.calls) == before and not list(tmp_path.iterdir())


def test_the_steady_steps_lie_between_start_and_stop(
    tmp_path: Path, nvtx: NvtxLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(TINY)
    profile = Profile(trainer, 2, tmp_path, nvtx, print, warmup=2)

    class Gate:
        @staticmethod
        def start() -> None:
            nvtx.calls.append(("start", "capture"))

        @staticmethod
        def stop() -> None:
            nvtx.calls.append(("end", "capture"))

    monkeypatch.setattr(profile, "_cuda", Gate)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: nvtx.calls.append(("wait", "")))
    steps(trainer, 2)
    assert not nvtx.calls
    steps(trainer, 3)
    assert nvtx.calls[:3] == [("wait", ""), ("start", "capture"), ("push", "step")]
    assert nvtx.calls[-3:] == [("pop", "step"), ("wait", ""), ("end", "capture")]
    assert nvtx.calls.count(("push", "step")) == 2


@pytest.mark.gpu
def test_on_a_gpu_the_profiler_is_started_and_stopped_around_kernels(
    tmp_path: Path, nvtx: NvtxLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what in ("start", "stop"):
        real = getattr(torch.cuda.profiler, what)

        def logged(what: str = what, real: Any = real) -> None:
            nvtx.calls.append((what, "capture"))
            real()

        monkeypatch.setattr(torch.cuda.profiler, what, logged)
    trainer = trainer_of([*TINY, "--fused", "--precision", "fp16"], "cuda")
    profile = Profile(trainer, 2, tmp_path, nvtx, print, warmup=3)
    steps(trainer, 6)
    captures = [call for call in nvtx.calls if call[1] == "capture"]
    assert captures == [("start", "capture"), ("stop", "capture")]
    assert nvtx.calls[0] == captures[0] and nvtx.calls[-1] == captures[1]
    assert profile.table is not None and profile.table.on_device
    # Beside its own kernels an op shows those that fill what it allocates, in tests alone.
    lines = [line for line in profile.table.lines if line.op == "fastres::batch_norm_relu"]
    own = [line for line in lines if "batch_norm_relu" in line.kernel or "moments" in line.kernel]
    assert own and all(line.gb_per_s and line.gb_per_s > 0 for line in own)


@pytest.mark.parametrize("variable", list(profiling._LISTENERS))
def test_a_listener_from_outside_is_left_to_record(
    variable: str, tmp_path: Path, nvtx: NvtxLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(profiling, "profile", None)  # torch.profiler's, not to be made
    said: list[str] = []
    trainer = trainer_of(TINY)
    Profile(trainer, 1, tmp_path, nvtx, said.append, warmup=1)
    steps(trainer, 3)
    assert ("push", "forward") in nvtx.calls and not nvtx.still_open()
    assert len(said) == 1 and "no trace here" in said[0] and not list(tmp_path.iterdir())


def test_a_compiled_model_is_marked_from_outside(tmp_path: Path, nvtx: NvtxLog) -> None:
    trainer = trainer_of(TINY)
    trainer.model.compile(backend="eager")
    Profile(trainer, 1, tmp_path, nvtx, lambda line: None, warmup=2)
    steps(trainer, 4)
    names = {name for _, name in nvtx.calls}
    assert names == {"step", "data", "forward", "loss", "backward", "update", "optimizer"}


def test_a_trace_that_cannot_be_written_does_not_cost_the_run(
    tmp_path: Path, nvtx: NvtxLog
) -> None:
    (tmp_path / "trace.json").mkdir()
    said: list[str] = []
    trainer = trainer_of(TINY)
    Profile(trainer, 1, tmp_path, nvtx, said.append, warmup=1)
    steps(trainer, 3)
    assert len(said) == 1 and "trace.json: cannot be written" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_steps_that_the_run_does_not_have(
    tmp_path: Path, nvtx: NvtxLog, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--epochs", "2", "--profile", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --profile: ") and "has 4;" in said and said.count("\n") == 1
    with pytest.raises(TrainError, match="--profile-steps 0: expected 1 or more"):
        Config(profile_steps=0)


def environment(*paths: Path) -> dict[str, str]:
    """This one, without the interpreter, and with these first on Python's path."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [*map(str, paths), env.get("PYTHONPATH", "")]
    return env | {"PYTHONPATH": os.pathsep.join(part for part in path if part)}


def test_off_loads_nothing_and_a_missing_nvtx_is_one_line(tmp_path: Path) -> None:
    assert unmarked("forward") is unmarked("loss")  # one object for all
    (tmp_path / "nvtx.py").write_text("raise ImportError('not here')")
    program = (
        "import sys\n"
        "from main import main\n"
        "assert main([*sys.argv[1:], '--epochs', '1', '--out', 'plain']) == 0\n"
        "assert 'nvtx' not in sys.modules\n"
        "sys.exit(main([*sys.argv[1:], '--profile', '--out', 'profiled']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *TINY],
        cwd=tmp_path, env=environment(tmp_path, ROOT, ROOT / "train"),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime" not in line]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert said[0].startswith("error: --profile: ")
    assert 'pip install "fastres[profile]"' in said[0]
    assert (tmp_path / "plain").exists() and not (tmp_path / "profiled").exists()


# What each process runs: the same training twice, the second time with a profile.
_TWICE = """
import json, sys
from pathlib import Path
import torch
from config import parse
from main import load_data
from nvtx_log import NvtxLog
from profiling import Profile
from trainer import Trainer
from workers import Workers, end_process

config, out = parse(sys.argv[2:]), Path(sys.argv[1])
workers, nvtx, states = Workers.join("cpu"), NvtxLog(), []
data = load_data(config)
for profiled in (False, True):
    trainer = Trainer(config, workers, data)
    if profiled:
        Profile(trainer, 2, out, nvtx, lambda line: None, warmup=2)
    trainer.network.train()
    share = config.batch_size // workers.world_size
    index = torch.arange(share) + share * workers.rank
    for step in range(6):
        trainer.train_step(index, step)
    states.append(trainer.model.state_dict())
same = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
(out / f"{workers.rank}.json").write_text(json.dumps({"same": same, "calls": nvtx.calls}))
workers.leave()
end_process(0)
"""


def test_processes_mark_all_reduce_and_train_the_same(tmp_path: Path) -> None:
    """Three: a third of a gradient is not what a division by three gives."""
    (tmp_path / "twice.py").write_text(_TWICE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "3", str(tmp_path / "twice.py"), str(tmp_path)]
    done = subprocess.run(
        [*command, *TINY, "--batch-size", "12", "--fused"],
        env=environment(ROOT, ROOT / "train", ROOT / "tests"),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank, trace in enumerate(("trace.json", "trace-rank1.json", "trace-rank2.json")):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["same"]
        calls = [tuple(call) for call in found["calls"]]
        begun = [i for i, call in enumerate(calls) if call == ("start", "all-reduce")]
        ended = [i for i, call in enumerate(calls) if call == ("end", "all-reduce")]
        # A bucket a step, begun and ended within its backward.
        assert len(begun) == len(ended) == 2
        assert calls.index(("push", "backward")) < begun[0] < ended[0] < begun[1]
        assert ended[0] < calls.index(("pop", "backward"))
        names = {e["name"] for e in annotations(tmp_path / trace)}
        assert {"step", "backward", "all-reduce", "gloo:all_reduce"} <= names
