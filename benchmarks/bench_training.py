"""Train by train/main.py, plain, fused and by every method, and keep the accuracies and the rates.

python benchmarks/bench_training.py --folder DIR             5 epochs of a folder of class folders
python benchmarks/bench_training.py --folder DIR --flags "--train-size 10000 --epochs 3"
python benchmarks/bench_training.py                          a small set is drawn

Each run is a process of its own, with one seed and its metrics read from what it wrote. A rate is
the median over the epochs after the first, which warms up.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _program import finish, parser
from _results import Row, measured
from _sheet import Sheet

_ROOT = Path(__file__).parent.parent
# Seconds of one training.
_LONGEST = 10.0**6
TRAININGS = {
    "plain": ["--no-fused"],
    "fused": ["--fused"],
    "stochastic depth, batch": ["--fused", "--drop-prob", "0.5"],
    "stochastic depth, row": ["--fused", "--drop-prob", "0.5", "--drop-mode", "row"],
    "stochastic depth, subset": ["--fused", "--drop-prob", "0.5", "--drop-mode", "subset"],
    "meProp 0.5": ["--fused", "--meprop-ratio", "0.5"],
    "meProp 0.1": ["--fused", "--meprop-ratio", "0.1"],
    # "row" and "subset" alone launch stochastic depth's kernels; "batch" leaves them out.
    "every op": ["--fused", "--drop-prob", "0.5", "--drop-mode", "subset", "--meprop-ratio", "0.5"],
}


def bench(
    device: torch.device,
    small: bool,
    sheet: Sheet,
    folder: Path | None = None,
    flags: list[str] | None = None,
    only: list[str] | None = None,
) -> dict[str, Any]:
    """A row for each training; flags are those of train/main.py, for all of them."""
    if flags is None:
        flags = ["--epochs", "5", "--schedule", "cosine"]
        flags += ["--precision", "fp16"] if device.type == "cuda" else []
    if small:
        flags = ["--epochs", "1", "--depth", "8", "--width", "4", "--batch-size", "16"]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if folder is None:
            folder = scratch / "images"
            draw_folder(folder, *((64, 32) if small else (4000, 1000)))
        data = ["--dataset", "folder", "--data-dir", str(folder), "--device", device.type]
        for name in only or TRAININGS:
            method = TRAININGS[name]
            about = {"provider": name, "flags": shlex.join([*method, *flags])}
            if sheet.known(about) or not sheet.has(20, about, f"training {name}"):
                continue
            command = [*data, *flags, *method, "--out", str(scratch / name)]
            limit = sheet.clock.left(_LONGEST)
            sheet.add([measured(about, partial(_run, command, limit))])
            if "test_accuracy" in sheet.rows[-1]:
                print(_text(sheet.rows[-1]), flush=True)
    return {"rows": sheet.rows}


def _run(flags: list[str], limit: float) -> Row:
    out = Path(flags[-1])
    # Decoded images of a drawn folder are of no use to anybody later.
    with tempfile.TemporaryDirectory() as cache:
        try:
            done = subprocess.run(
                [sys.executable, str(_ROOT / "train" / "main.py"), *flags],
                env=os.environ | {"XDG_CACHE_HOME": cache}, cwd=out.parent, timeout=limit,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"not_measured": "out of time"}
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
        raise RuntimeError(f"exit status {done.returncode}: {last}")
    summary = json.loads((out / "summary.json").read_text())
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    rates = [epoch["images_per_second"] for epoch in epochs[1:] or epochs]
    kept = ("data", "epochs", "train_accuracy", "dev_accuracy", "test_accuracy", "processes")
    return {
        **{key: summary[key] for key in (*kept, "training_seconds", "wall_seconds")},
        "seed": summary["config"]["seed"],
        "depth": summary["config"]["depth"],
        "batch_size": summary["config"]["batch_size"],
        "precision": summary["config"]["precision"],
        "images_per_second": statistics.median(rates),
        "losses": [epoch["loss"] for epoch in epochs],
        "skipped_steps": sum(epoch.get("skipped_steps", 0) for epoch in epochs),
    }


def _text(row: Row) -> str:
    losses = " ".join(f"{loss:.3f}" for loss in row["losses"])
    return (
        f"{row['provider']:26} test {row['test_accuracy']:5.2f} %  dev {row['dev_accuracy']:5.2f} %"
        f"  train {row['train_accuracy']:5.2f} %  {row['images_per_second']:11,.0f} images/s"
        f"  loss {losses}"
    )


def draw_folder(root: Path, train: int, test: int) -> None:
    """The synthetic set as PNG files in class folders."""
    from PIL import Image

    from fastres.data import synthetic

    data = synthetic(train, test)
    for part, images in (("train", data.train), ("test", data.test)):
        for i, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            path = root / part / data.classes[int(label)] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--folder", type=Path, help="class folders with train/ and test/")
    p.add_argument("--run", nargs="+", choices=TRAININGS, help="only these")
    p.add_argument("--flags", type=shlex.split, help="of train/main.py, for every run")
    args = p.parse_args()
    if args.folder is not None and not args.folder.is_dir():
        p.error(f"--folder {args.folder}: no such folder")
    folder = args.folder.resolve() if args.folder else None
    sheet = Sheet.open("training", args)
    found = bench(args.device, args.small, sheet, folder, args.flags, args.run)
    return finish("training", args, found)


if __name__ == "__main__":
    sys.exit(main())
