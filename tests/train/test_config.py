"""Flags, the TOML file, and what does not fit."""

from pathlib import Path

import pytest
from config import Config, parse
from errors import TrainError

BEST = Path(__file__).parents[2] / "train" / "best.toml"


def test_no_flag_but_fused_is_the_reports_job() -> None:
    config = parse(["--fused"])
    assert config == Config(fused=True)
    assert (config.dataset, config.depth, config.block) == ("cifar10", 20, "preact")
    assert (config.epochs, config.batch_size, config.lr) == (200, 128, 0.1)
    assert (config.warmup_epochs, config.schedule, config.precision) == (0, "step", "fp32")
    assert (config.momentum, config.weight_decay, config.channels_last) == (0.9, 1e-4, True)
    assert config.optimizer == "sgd"


def test_each_optimizer_has_its_own_learning_rate() -> None:
    """Only SGD's goes with the batch size."""
    for optimizer, lr, peak in (("sgd", 0.1, 0.8), ("adam", 1e-3, 1e-3), ("yellowfin", 1.0, 1.0)):
        flags = ["--optimizer", optimizer, "--batch-size", "1024"]
        config = parse(flags)
        assert config.lr == lr and config.peak_lr == pytest.approx(peak)
        given = parse([*flags, "--lr", "0.5"])
        assert given.lr == 0.5 and given.peak_lr == (4.0 if optimizer == "sgd" else 0.5)


def test_flags_override_the_file_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("depth = 26\nfused = true\nchannels_last = false\nlr = 0.2\n")
    for argv in (["--config", str(path), "--depth", "14"], ["--depth", "14", f"--config={path}"]):
        config = parse(argv)
        assert (config.depth, config.lr) == (14, 0.2)
        assert config.fused and not config.channels_last
    assert not parse(["--config", str(path), "--no-fused"]).fused


def test_best_is_readable_and_fused() -> None:
    config = parse(["--config", str(BEST)])
    assert config.fused and config.batch_size == 1024 and config.block == "preact"
    assert (config.drop_prob, config.drop_schedule, config.precision) == (0.5, "uniform", "fp16")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--fusde"], ["--fusde", "--fused"]),
        (["--depth", "abc"], ["--depth", "abc"]),
        (["--depth", "21"], ["--depth 21", "6n + 2"]),
        (["--dataset", "imagenet"], ["imagenet", "cifar10"]),
        (["--batch-size", "0"], ["--batch-size 0", "1 or more"]),
        (["--fused-units"], ["--fused-units True", "--fused and --block preact"]),
        (["--fused", "--fused-units", "--block", "postact"], ["--fused-units", "--block preact"]),
        (["--lr", "nan"], ["--lr nan", "positive"]),
        (["--lr", "inf"], ["--lr inf", "positive"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--warmup-epochs", "300"], ["--warmup-epochs 300.0", "0 to --epochs"]),
        (["--momentum", "1"], ["--momentum 1.0"]),
        (["--weight-decay", "-1"], ["--weight-decay -1.0"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--train-size", "0"], ["--train-size 0"]),
        (["--eval-every", "0"], ["--eval-every 0"]),
        (["--dataset", "folder"], ["--data-dir", "folder of class folders"]),
        (["--test-fraction", "0.1"], ["--test-fraction 0.1", "--dataset folder"]),
        (["--image-size", "16"], ["--image-size 16", "folder or synthetic"]),
        (["--image-size", "4", "--dataset", "synthetic"], ["--image-size 4", "8 or more"]),
        (["--drop-prob", "1.5"], ["--drop-prob 1.5", "0 to 1"]),
        (["--drop-prob", "nan"], ["--drop-prob nan", "0 to 1"]),
        (["--drop-mode", "each"], ["each", "subset"]),
        (["--meprop-ratio", "0"], ["--meprop-ratio 0.0", "more than 0"]),
        (["--meprop-mode", "column"], ["column", "unified"]),
        (["--meprop-mode", "row"], ["--meprop-mode row", "--meprop-ratio"]),
        (["--dataset", "synthetic", "--data-dir", "x"], ["--data-dir x", "no --dataset synthetic"]),
        (["--train-size", "100"], ["--batch-size 128", "at most the 100 images of --train-size"]),
        (["--precision", "pure-fp16"], ["--precision pure-fp16", "--fused"]),
        (["--optimizer", "lion"], ["lion", "yellowfin"]),
        (["--optimizer", "adam", "--lr", "0"], ["--lr 0.0", "positive"]),
        (["--optimizer", "adam", "--momentum", "0.5"], ["--momentum 0.5", "--optimizer sgd"]),
        (
            ["--precision", "pure-fp16", "--fused", "--optimizer", "yellowfin"],
            ["--precision pure-fp16", "--optimizer sgd", "fp32 masters"],
        ),
        (["--max-skipped-steps", "0"], ["--max-skipped-steps 0", "1 or more"]),
        (["--config", "no-such.toml"], ["no-such.toml", "cannot be read"]),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_it(argv: list[str], words: list[str]) -> None:
    with pytest.raises(TrainError) as error:
        parse(argv)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize = 3\n", ["'batchsize'", "batch_size"]),
        ("depth = [20]\n", ["depth = [20]", "one plain value"]),
        ("depth = \n", ["not TOML"]),
        ('depth = "deep"\n', ["--depth", "deep"]),
        ('config = "x.toml"\n', ["'config'"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(TrainError) as error:
        parse(["--config", str(path)])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
