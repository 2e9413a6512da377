"""train/main.py in one process: a run from start to end, and every way to get it wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import torch
from config import Config
from errors import TrainError
from main import main
from PIL import Image
from train.tiny_runs import on_native_path, same, weights_of
from trainer import check_fits

from fastres.data import split, synthetic

ROOT = Path(__file__).parents[2]
TINY = [
    "--dataset", "synthetic", "--train-size", "40", "--image-size", "8", "--device", "cpu",
    "--depth", "8", "--width", "4", "--batch-size", "16", "--epochs", "3", "--deterministic",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("native_path")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of three epochs."""
    out = tmp_path_factory.mktemp("run") / "out"
    with on_native_path():
        assert main([*TINY, "--fused", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    names = {"checkpoint.pt", "config.json", "curve.png", "metrics.jsonl", "summary.json"}
    assert {path.name for path in finished.iterdir()} == names
    records = lines(finished / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert record.keys() == {
            "epoch", "loss", "lr", "seconds", "images_per_second", "memory_bytes",
            "train_accuracy", "dev_accuracy", "test_accuracy", "hardware",
        }  # fmt: skip
        assert record["images_per_second"] > 0 and record["memory_bytes"] > 1e6
    # A tenth after 40 % and again after 80 %, of a rate scaled from a batch of 128 to one of 16.
    assert [record["lr"] for record in records] == pytest.approx([0.0125, 0.00125, 0.000125])
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    assert summary["config"]["depth"] == 8 and summary["epochs"] == 3
    (kind,) = summary["hardware"]
    assert kind == records[0]["hardware"] and (kind["processes"], kind["device"]) == (1, "cpu")
    config = json.loads((finished / "config.json").read_text())
    assert config["fused"] is True and config["dataset"] == "synthetic"
    with Image.open(finished / "curve.png") as curve:
        assert curve.size[0] > 500 and curve.convert("L").getextrema() == (0, 255)


def test_the_end_says_where_things_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--fused", "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "batch_norm_relu (7 layers), augment" in said
    assert "test accuracy " in said.splitlines()[-5]
    for name in ("metrics.jsonl", "checkpoint.pt", "curve.png", "summary.json"):
        assert str(tmp_path / "out" / name) in said


def test_fused_and_plain_runs_of_one_seed_lie_on_each_other(finished: Path, tmp_path: Path) -> None:
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    fused, plain = (lines(out / "metrics.jsonl") for out in (finished, tmp_path))
    for a, b in zip(fused, plain, strict=True):
        # The same sums in the same order on a CPU, but for the add of the residual.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_resume_goes_on_bitwise(finished: Path, tmp_path: Path) -> None:
    """A run that ended after each epoch, with records that ran ahead of its checkpoint."""
    out = tmp_path / "out"
    uninterrupted = weights_of(finished)
    flags = [*TINY, "--fused", "--out", str(out)]
    save = checkpoint.save

    def stops(path: Path, state: dict[str, Any]) -> None:
        if state["epoch"] == 2:
            raise KeyboardInterrupt
        save(path, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", stops)
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    assert len(lines(out / "metrics.jsonl")) == 2  # the second epoch's has no checkpoint
    assert main(flags) == 0
    assert same(weights_of(out), uninterrupted)
    strip = {"seconds", "images_per_second", "memory_bytes"}
    for a, b in zip(lines(out / "metrics.jsonl"), lines(finished / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if k not in strip} == {
            k: v for k, v in b.items() if k not in strip
        }


def test_resuming_a_finished_run_trains_nothing_more(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights_of(finished), (finished / "metrics.jsonl").read_text()
    assert main([*TINY, "--fused", "--out", str(finished)]) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert same(weights_of(finished), before[0])
    assert (finished / "metrics.jsonl").read_text() == before[1]


def test_a_changed_number_of_epochs_is_honoured(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(finished / "checkpoint.pt")
    flags = [*TINY, "--epochs", "4", "--lr", "0.05", "--resume", path, "--out", str(tmp_path)]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "resume   after epoch 3 of 4" in said and "changed  lr: 0.1 -> 0.05" in said
    assert [record["epoch"] for record in lines(tmp_path / "metrics.jsonl")] == [4]
    assert lines(tmp_path / "metrics.jsonl")[0]["lr"] == pytest.approx(0.05 / 8 / 100)


def test_a_resume_on_other_hardware_is_told(tmp_path: Path) -> None:
    flags, threads = [*TINY, "--out", str(tmp_path)], torch.get_num_threads()
    try:
        for epochs, more in ((1, 0), (2, 1), (3, 1)):
            torch.set_num_threads(threads + more)
            assert main([*flags, "--epochs", str(epochs)]) == 0
    finally:
        torch.set_num_threads(threads)
    kinds = json.loads((tmp_path / "summary.json").read_text())["hardware"]
    assert [kind["threads"] for kind in kinds] == [threads, threads + 1]


@pytest.mark.parametrize(
    ("precision", "fused"),
    [
        ("fp16", "--fused"),
        ("fp16", "--no-fused"),
        ("bf16", "--fused"),
        ("bf16", "--no-fused"),
        ("pure-fp16", "--fused"),
    ],
)
def test_half_precision_trains(precision: str, fused: str, tmp_path: Path) -> None:
    assert main([*TINY, "--precision", precision, fused, "--out", str(tmp_path)]) == 0
    record = lines(tmp_path / "metrics.jsonl")[-1]
    assert record["loss"] < 3
    assert ("loss_scale" in record) == (precision != "bf16")
    dtypes = {name: t.dtype for name, t in weights_of(tmp_path).items()}
    pure = torch.float16 if precision == "pure-fp16" else torch.float32
    assert dtypes["stem.weight"] == dtypes["fc.bias"] == pure
    assert dtypes["units.0.bn1.weight"] == dtypes["bn.running_var"] == torch.float32


def test_evaluation_may_wait_but_the_last_epoch_has_one(tmp_path: Path) -> None:
    assert main([*TINY, "--eval-every", "2", "--out", str(tmp_path)]) == 0
    evaluated = ["test_accuracy" in record for record in lines(tmp_path / "metrics.jsonl")]
    assert evaluated == [False, True, True]


def fails(
    argv: list[str], capsys: pytest.CaptureFixture[str], *words: str, status: int = 1
) -> None:
    """The run ends with this status and one line that holds these words."""
    capsys.readouterr()
    assert main(argv) == status
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: "), said
    for word in words:
        assert word in said[0]


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(TrainError, match="--batch-size 41: more than the 40 training images"):
        check_fits(Config(batch_size=41), split(synthetic(40, 20, 8)))


def test_bad_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", str(tmp_path / "out")]
    fails([*TINY, *out, "--fusde"], capsys, "--fusde", "--fused", status=2)
    fails([*TINY, *out, "--batch-size", "41"], capsys, "--batch-size 41", "40 images", status=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    fails([*TINY, *out, "--device", "cuda"], capsys, "--device cuda", "no GPU", status=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    words = ("2 processes", "1 GPU", "--nproc_per_node 1", "--device cpu")
    fails([*TINY, *out, "--device", "cuda"], capsys, *words, status=2)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    fails([*TINY, "--out", str(tmp_path / "file" / "out")], capsys, "cannot be written", "--out")
    fails([*TINY, "--out", str(tmp_path / "file")], capsys, "cannot be written", "--out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "checkpoint.pt").read_bytes()
    fails(
        [*TINY, "--out", str(finished), "--resume", "none"], capsys, "holds a run already", "--out"
    )
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_checkpoints_that_do_not_fit(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = finished / "checkpoint.pt"
    before = source.read_bytes()
    here = ["--out", str(tmp_path / "out"), "--resume", str(source)]
    fails([*TINY, *here, "--depth", "14"], capsys, "--depth 8", "--depth 14")
    fails([*TINY, *here, "--block", "postact"], capsys, "--block preact", "--block postact")
    fails([*TINY, *here[:3], str(tmp_path / "no.pt")], capsys, "no.pt", "no such checkpoint")
    (tmp_path / "out" / "checkpoint.pt").write_bytes(before[: len(before) // 2])
    fails([*TINY, *here[:2]], capsys, "checkpoint.pt: damaged or cut short", "--out")
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before[: len(before) // 2]
    assert source.read_bytes() == before


def draw_folder(root: Path, train: int, test: int, side: int = 8) -> None:
    """Images of one colour in two classes, half of them each."""
    for part, count in (("train", train), ("test", test)):
        for name, colour in (("a", 10), ("b", 200)):
            (root / part / name).mkdir(parents=True)
            for i in range(count // 2):
                image = Image.new("RGB", (side, side), (colour, i, 0))
                image.save(root / part / name / f"{i}.png")


def test_another_run_is_not_overwritten_by_a_resume(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--epochs", "1", "--out", str(tmp_path)]) == 0
    before = weights_of(tmp_path)
    resume = ["--resume", str(finished / "checkpoint.pt"), "--out", str(tmp_path)]
    fails([*TINY, *resume], capsys, "holds a run already", "--out")
    assert same(weights_of(tmp_path), before)


def test_images_that_are_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_folder(tmp_path / "images", 20, 20, side=4)
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--device", "cpu"]
    flags += ["--batch-size", "16", "--out", str(tmp_path / "out")]
    fails(flags, capsys, "4 pixels", "--image-size 8")


def test_a_checkpoint_of_other_data(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_folder(tmp_path / "images", 20, 20)
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--device", "cpu"]
    flags += ["--depth", "8", "--width", "4", "--batch-size", "16"]
    flags += ["--resume", str(finished / "checkpoint.pt")]
    fails([*flags, "--out", str(tmp_path / "out")], capsys, "other data", "classes", "mean")


def test_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--device", "cpu", "--out", str(tmp_path / "out")]
    where = ["--dataset", "folder", "--data-dir", str(tmp_path / "nowhere")]
    fails([*out, *where], capsys, str(tmp_path / "nowhere"))


def test_divergence_stops_the_run_and_keeps_the_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--epochs", "5", "--out", str(tmp_path)]
    resume = ["--resume", str(finished / "checkpoint.pt"), "--lr", "1e30"]
    fails([*flags, *resume], capsys, "diverged", "--lr 1e+30", "epoch 4", "checkpoint is whole")
    assert same(weights_of(tmp_path), weights_of(finished))
    # A run that diverges at once keeps what it began with.
    fails([*TINY, "--out", str(tmp_path / "out"), "--lr", "1e30"], capsys, "diverged", "epoch 1")
    assert checkpoint.load(tmp_path / "out" / "checkpoint.pt")["epoch"] == 0
    assert main([*TINY, "--out", str(tmp_path / "out"), "--epochs", "1"]) == 0


def test_a_fused_step_launches_every_kernel(tmp_path: Path) -> None:
    """In Triton's interpreter, and counted where the interpreter itself starts a kernel."""
    program = (
        "import sys, collections, triton.runtime.interpreter as interpreter\n"
        "started = collections.Counter()\n"
        "call = interpreter.GridExecutor.__call__\n"
        "def counted(self, *args, **kwargs):\n"
        "    started[self.fn.__name__] += 1\n"
        "    return call(self, *args, **kwargs)\n"
        "interpreter.GridExecutor.__call__ = counted\n"
        f"sys.path.insert(0, {str(ROOT / 'train')!r})\n"
        "from main import main\n"
        "status = main(sys.argv[1:])\n"
        "print('KERNELS', *(f'{name}={count}' for name, count in sorted(started.items())))\n"
        "sys.exit(status)\n"
    )
    draw_folder(tmp_path / "images", 16, 10)
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--device", "cpu"]
    flags += ["--depth", "8", "--width", "4", "--batch-size", "16", "--epochs", "1", "--fused"]
    flags += ["--drop-prob", "0.5", "--drop-mode", "subset", "--meprop-ratio", "0.5"]
    flags += ["--precision", "pure-fp16", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = next(line for line in done.stdout.splitlines() if line.startswith("KERNELS")).split()
    started = dict(word.split("=") for word in words[1:])
    # One step of seven layers; the evaluations add forwards, none of them with moments.
    for name in ("_moments_kernel", "_update_running_kernel", "_batch_norm_relu_sums_bwd_kernel"):
        assert started[name] == "7", started
    assert started["_batch_norm_relu_bwd_kernel"] == "7"
    assert int(started["_batch_norm_relu_fwd_kernel"]) > 7
    assert int(started["_augment_fwd_kernel"]) >= 4
    # Three units drop; the stem, six convolutions and two projections choose channels; and the
    # optimizer has a flat buffer of fp16 and one of fp32, the former with masters to begin with.
    for name in ("_stochastic_depth_add_fwd_kernel", "_stochastic_depth_add_bwd_kernel"):
        assert started[name] == "3", started
    assert started["_draw_subset_kernel"] == "3"
    assert started["_meprop_sums_kernel"] == started["_meprop_channels_kernel"] == "9"
    assert started["_unscale_fwd_kernel"] == "1" and started["_sgd_step_fwd_kernel"] == "2"
    assert started["_cast_fwd_kernel"] == "1"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gpu_trains_as_the_cpu_does(precision: str, tmp_path: Path) -> None:
    flags = [*TINY, "--fused", "--precision", precision, "--epochs", "2"]
    for device in ("cpu", "cuda"):
        assert main([*flags, "--device", device, "--out", str(tmp_path / device)]) == 0
    cpu, cuda = (lines(tmp_path / device / "metrics.jsonl") for device in ("cpu", "cuda"))
    for a, b in zip(cpu, cuda, strict=True):
        # A few small steps: fp32 differs by rounding, halves by theirs.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3 if precision == "fp32" else 0.05)


def test_a_resnet_20_learns_the_synthetic_set(tmp_path: Path) -> None:
    """Over 90 %, where tests/data/test_synthetic.py keeps a linear classifier under 60 %.

    At 16 pixels, where it takes half the time that it takes at 32.
    """
    flags = ["--dataset", "synthetic", "--device", "cpu", "--fused", "--epochs", "4"]
    flags += ["--image-size", "16", "--batch-size", "64", "--schedule", "cosine"]
    flags += ["--eval-every", "4", "--out", str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["OMP_NUM_THREADS"] = "1"  # two threads would wait for a core that another test has
    command = [sys.executable, str(ROOT / "train" / "main.py"), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] > 90
