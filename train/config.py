"""The settings of a training run: one frozen value, from flags and a TOML file."""

import contextlib
import dataclasses
import difflib
import io
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from errors import TrainError

T = TypeVar("T")

# --lr where none is given.
_LR = {"sgd": 0.1, "adam": 1e-3, "yellowfin": 1.0}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a ResNet on small images, on one process or under torchrun.

    torchrun --standalone --nproc_per_node gpu train/main.py --fused
    """

    config: Path | None = None
    """TOML file of values for the flags below (train_size = 5000); a flag overrides it."""
    fused: bool = False
    """Use every fused op that the other flags call for."""
    fused_units: bool = False
    """With --fused, run stem, each pre-activation unit, and classifier and loss as one op each on a
    GPU. It has not run on one yet."""
    cuda_graph: bool = False
    """Replay each training step as one launch on a GPU, a CUDA graph. It has not run on one yet."""
    gradient_buckets: int = 1
    """With --cuda-graph and several processes: collectives of a step, each begun as soon as its
    gradients are there, beside the rest of the backward. One follows the whole backward."""
    prebuild: bool = False
    """On a GPU: build the kernels of --fused's step with all cores before the first step, and not
    one after the other as they come. It has not run on a GPU yet."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs where there are any, else the CPU."""
    precision: Literal["fp32", "fp16", "bf16", "pure-fp16"] = "fp32"
    """fp16, bf16: autocast. pure-fp16: fp16 weights beside fp32 masters. fp32: no TF32 either."""
    max_skipped_steps: int = 50
    """Of fp16: stop after so many steps in a row whose gradients overflowed."""
    channels_last: bool = True
    """NHWC activations and weights."""

    dataset: Literal["cifar10", "folder", "synthetic"] = "cifar10"
    """cifar10: downloaded if need be. folder: any folder of class folders. synthetic: built in."""
    data_dir: Path | None = None
    """Where cifar10 lies or goes (./data), or the folder that --dataset folder reads."""
    image_size: int | None = None
    """Pixels a side: crops and resizes a folder's images; draws synthetic ones (32)."""
    test_fraction: float | None = None
    """Share of the images to test on, for a folder without train/ and test/."""
    train_size: int | None = None
    """Train on this many images only (for synthetic: draw this many)."""

    depth: int = 20
    """Weighted layers, 6n + 2."""
    units: int | None = None
    """Residual units to have, of the (depth - 2) / 2, from the first one on; the rest is cut."""
    width: int = 16
    """Channels of the first stage."""
    block: Literal["preact", "postact"] = "preact"
    """BatchNorm and ReLU before or after each convolution."""
    shortcut: Literal["A", "B"] = "B"
    """Where the shape changes: A slices and pads with zeros, B projects."""
    zero_init: bool = False
    """Each unit begins as its shortcut: 0 in the last weights of its branch."""

    drop_prob: float = 0.0
    """Stochastic depth: drop a unit's branch with this probability."""
    drop_mode: Literal["batch", "row", "subset"] = "batch"
    """Drop for a whole batch, for each image, or compute on a share of the images of fixed size."""
    drop_schedule: Literal["uniform", "linear"] = "linear"
    """The same probability for every unit, or rising linearly to --drop-prob at the last."""
    meprop_ratio: float | None = None
    """meProp: the share kept of each convolution's output gradient; the last layer stays dense."""
    meprop_mode: Literal["row", "unified"] = "unified"
    """Keep the largest of each image, or the same channels for all."""
    meprop_warmup_epochs: int = 0
    """Dense epochs before the first one of meProp."""
    meprop_dense_every: int | None = None
    """After them every so many-th epoch is dense again: 2 is sparse, dense, sparse, dense, ..."""

    batch_size: int = 128
    """Images a step over all processes."""
    micro_batches: int = 1
    """Micro-batches that each process takes in turn, each as a process of its own would: BatchNorm
    and its statistics, stochastic depth, images. Gradients are averaged, one step is taken."""
    epochs: int = 200
    """Passes over the training set."""
    optimizer: Literal["sgd", "adam", "yellowfin"] = "sgd"
    """yellowfin: SGD that tunes its learning rate and momentum itself."""
    lr: float | None = None
    """sgd: learning rate for a batch of 128, scaled linearly with the batch size (0.1). adam:
    learning rate (0.001). yellowfin: factor on the learning rate that it tunes (1). The schedule
    multiplies each."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from 0, a little at each step."""
    schedule: Literal["step", "cosine"] = "step"
    """step: a tenth after 40 % of the epochs, and again after 80 %. cosine: down to 0."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 1e-4
    """On every parameter, as a part of its gradient."""
    decay_norm_bias: bool = True
    """Weight decay on BatchNorm's parameters and on biases too."""

    seed: int = 0
    """Of the initial weights, the order of the images, and their augmentation."""
    deterministic: bool = False
    """Bitwise the same run twice: deterministic algorithms only."""
    out: Path | None = None
    """Folder for metrics, checkpoint, curve (runs/DATASET-BLOCKDEPTH)."""
    resume: str = "auto"
    """auto: go on from the checkpoint in --out, if any. none: refuse such a folder. Or a path."""
    profile: bool = False
    """Mark the phases of some steps for nsys and ncu; where neither listens, write --out/trace.json
    and print the top kernels. The run goes on to its end, with the same weights."""
    profile_steps: int = 10
    """Of --profile: steps that it records, after the first 5."""
    eval_every: int = 1
    """Epochs between evaluations on train, dev and test; the last epoch always has one."""

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", _LR[self.optimizer])

        need = self.need
        need(self.depth >= 8 and (self.depth - 2) % 6 == 0, "depth", "6n + 2: 8, 14, 20, 26, ...")
        most = (self.depth - 2) // 2
        fine = self.units is None or 1 <= self.units <= most
        need(fine, "units", f"1 to {most}, those of --depth {self.depth}")
        need(self.width >= 1, "width", "1 or more")
        need(self.batch_size >= 1, "batch_size", "1 or more")
        need(self.micro_batches >= 1, "micro_batches", "1 or more")
        shared = self.batch_size % self.micro_batches == 0
        need(shared, "micro_batches", f"a divisor of --batch-size {self.batch_size}")
        need(self.epochs >= 1, "epochs", "1 or more")
        need(0 < (self.lr or 0) < float("inf"), "lr", "a positive number")
        need(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", "0 to --epochs")
        need(0 <= self.momentum < 1, "momentum", "0 or more, under 1")
        sgd = self.optimizer == "sgd"
        need(sgd or self.momentum == 0.9, "momentum", "--optimizer sgd beside it: others have none")
        need(0 <= self.weight_decay < float("inf"), "weight_decay", "0 or more")
        need(self.max_skipped_steps >= 1, "max_skipped_steps", "1 or more")
        need(0 <= self.drop_prob <= 1, "drop_prob", "0 to 1")
        ratio = self.meprop_ratio
        need(ratio is None or 0 < ratio <= 1, "meprop_ratio", "more than 0, at most 1")
        need(ratio or self.meprop_mode == "unified", "meprop_mode", "--meprop-ratio beside it")
        warm, every = self.meprop_warmup_epochs, self.meprop_dense_every
        sparse = ratio is not None and ratio < 1
        need(warm == 0 or sparse, "meprop_warmup_epochs", "--meprop-ratio under 1 beside it")
        need(every is None or sparse, "meprop_dense_every", "--meprop-ratio under 1 beside it")
        need(0 <= warm < self.epochs, "meprop_warmup_epochs", "0 or more, under --epochs")
        most = self.epochs - warm
        fine = every is None or 2 <= every <= most
        need(fine, "meprop_dense_every", f"2 or more, and the {most} epochs after the dense ones")
        pure = self.precision == "pure-fp16"
        units = self.fused and self.block == "preact"
        need(not self.fused_units or units, "fused_units", "--fused and --block preact beside it")
        need(not pure or self.fused, "precision", "--fused beside it, for its fp32 master weights")
        need(not pure or sgd, "precision", "--optimizer sgd beside it, which has fp32 masters")
        need(0 <= self.seed < 2**63, "seed", "0 or more, under 2^63")
        need(self.profile_steps >= 1, "profile_steps", "1 or more")
        need(self.eval_every >= 1, "eval_every", "1 or more")
        graph = self.cuda_graph
        need(not (graph and self.device == "cpu"), "cuda_graph", "a GPU, and no --device cpu")
        need(not (graph and self.profile), "cuda_graph", "no --profile, whose marks a graph drops")
        buckets = self.gradient_buckets
        need(buckets >= 1, "gradient_buckets", "1 or more")
        need(buckets == 1 or graph, "gradient_buckets", "--cuda-graph beside it")
        built = self.prebuild
        need(not built or self.fused, "prebuild", "--fused beside it, whose kernels it builds")
        need(not (built and self.device == "cpu"), "prebuild", "a GPU, and no --device cpu")
        need(self.train_size is None or self.train_size >= 1, "train_size", "1 or more")
        fine = self.train_size is None or self.batch_size <= self.train_size
        need(fine, "batch_size", f"at most the {self.train_size} images of --train-size")
        need(self.image_size is None or self.image_size >= 8, "image_size", "8 or more")
        fraction = self.test_fraction
        need(fraction is None or 0 < fraction < 1, "test_fraction", "more than 0, under 1")
        folder, size = self.dataset == "folder", self.dataset != "cifar10"
        need(not folder or self.data_dir is not None, "data_dir", "the folder of class folders")
        drawn = self.dataset == "synthetic"
        need(not drawn or self.data_dir is None, "data_dir", "no --dataset synthetic, it has none")
        need(fraction is None or folder, "test_fraction", "--dataset folder beside it")
        need(self.image_size is None or size, "image_size", "--dataset folder or synthetic with it")

    def need(self, fine: object, name: str, wants: str) -> None:
        """Raise TrainError, in words of the flag of a setting, unless it is fine."""
        if not fine:
            flag = "--" + name.replace("_", "-")
            raise TrainError(f"{flag} {getattr(self, name)}: expected {wants}")

    @property
    def peak_lr(self) -> float:
        """What the schedule multiplies."""
        assert self.lr is not None
        return self.lr * self.batch_size / 128 if self.optimizer == "sgd" else self.lr

    @property
    def out_dir(self) -> Path:
        return self.out or Path("runs") / f"{self.dataset}-{self.block}{self.depth}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and a checkpoint hold them."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


C = TypeVar("C", bound=Config)


def parse(argv: Sequence[str], *, quiet: bool = False) -> Config:
    """parse_over_file for train/main.py."""
    return parse_over_file(Config, "main.py", argv, quiet=quiet)


def parse_over_file(kind: type[C], program: str, argv: Sequence[str], *, quiet: bool = False) -> C:
    """The flags in argv over the TOML file that --config names, over the defaults.

    Raises:
        TrainError: a flag, key or value that does not fit, in one line.
        SystemExit: after --help.
    """
    return parse_as(kind, program, [*_toml_flags(kind, argv), *argv], quiet=quiet)


def parse_as(kind: type[T], program: str, argv: Sequence[str], *, quiet: bool = False) -> T:
    """A dataclass of settings from flags.

    Raises:
        TrainError: a flag or value that does not fit, in one line.
        SystemExit: after --help.
    """
    # The benchmarks make a Config without a command line, and need no tyro.
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=argv, console_outputs=not quiet)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        # tyro draws a box with a title; a terminal shared by several ranks wants a line.
        lines = [line.strip(" │") for line in said.getvalue().splitlines()]
        text = " ".join(line for line in lines if line and not re.match("[╭╰─]|-----", line))
        raise TrainError(text or "a flag does not fit: see --help") from None


def to_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings by their names in Config as flags of the command line; None is left out."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def _toml_flags(kind: type[Config], argv: Sequence[str]) -> list[str]:
    """The file that --config names as flags, to stand before those of the command line."""
    path = None
    for i, arg in enumerate(argv):
        if arg == "--config" and i + 1 < len(argv):
            path = Path(argv[i + 1])
        elif arg.startswith("--config="):
            path = Path(arg.removeprefix("--config="))
    if path is None:
        return []
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"--config {path}: cannot be read ({error}); name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise TrainError(f"--config {path}: not TOML: {error}") from error
    names = {field.name for field in dataclasses.fields(kind)} - {"config"}
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help for the names"
            raise TrainError(f"--config {path}: unknown key {key!r}; {hint}")
        if not isinstance(value, bool | int | float | str):
            raise TrainError(f"--config {path}: {key} = {value!r}: expected one plain value")
    return to_flags(values)
