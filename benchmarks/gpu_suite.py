"""Everything there is to know of one GPU, by one command in under 8 minutes, as one JSON.

    python benchmarks/gpu_suite.py [--folder DIR] [--part NAME ...] [--out FILE]

Runs the gpu tests, times each op forward and backward, times the whole training step, and trains a
few epochs on a folder data set (a small one is drawn where --folder names none). The file is
written anew after every part, so that an interrupted run keeps what it has.
With --small the same parts run on a CPU, at toy size, to show that the suite itself works.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_augment
import bench_batch_norm_relu
import bench_cast
import bench_meprop_conv2d
import bench_meprop_linear
import bench_sgd_step
import bench_step
import bench_stochastic_depth_add
import bench_stochastic_depth_unit
import bench_unscale
import torch
from _environment import environment
from _timing import Clock

_ROOT = Path(__file__).parent.parent
_TRAININGS = {
    "fused": ["--fused"],
    "plain": ["--no-fused"],
    # "row" and "subset" alone launch stochastic depth's kernels; "batch" leaves them out.
    "every op": ["--fused", "--drop-prob", "0.5", "--drop-mode", "subset", "--meprop-ratio", "0.5"],
}


def gpu_tests(small: bool, clock: Clock) -> dict[str, Any]:
    """The tests marked gpu, then every test of ops and models on the GPU; else only collected."""
    results: dict[str, Any] = {}
    # The second compiles hundreds of variants: it may take what the rest leaves, and no more.
    selections = {"gpu": ["-m", "gpu"], "ops": ["-m", "not gpu", "tests/ops", "tests/models"]}
    for name, selection in selections.items():
        command = [sys.executable, "-m", "pytest", "-q", "-rfEs", *selection]
        command += ["--collect-only"] if small else ["-n", str(min(os.cpu_count() or 1, 8))]
        results[name] = run_part(command, clock, most=150 if name == "gpu" else 90)
        print("\n".join(results[name]["output"][-12:]), flush=True)
    return results


def run_part(command: list[str], clock: Clock, most: float) -> dict[str, Any]:
    """A command's exit status and the end of its output; None where its time ran out."""
    limit = clock.left(most)
    try:
        # Decoded images of the suite's own folder are of no use to anybody later.
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                command, cwd=_ROOT, env=os.environ | {"XDG_CACHE_HOME": cache},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit,
            )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        text = said.decode() if isinstance(said, bytes) else said
        return {"exit_status": None, "seconds": limit, "output": text.splitlines()[-40:]}
    return {"exit_status": done.returncode, "output": done.stdout.splitlines()[-40:]}


def training(small: bool, device: torch.device, folder: Path | None, clock: Clock) -> Any:
    """A few epochs of train/main.py with one seed on a folder data set: plain, fused, every op."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if folder is None:
            folder = scratch / "images"
            draw_folder(folder, *((64, 32) if small else (4000, 1000)))
        flags = ["--dataset", "folder", "--data-dir", str(folder), "--device", device.type]
        if small:
            flags += ["--epochs", "1", "--depth", "8", "--width", "4", "--batch-size", "16"]
        else:
            flags += ["--epochs", "5", "--schedule", "cosine", "--precision", "fp16"]
        for name, chosen in _TRAININGS.items():
            out = scratch / name
            command = [sys.executable, str(_ROOT / "train" / "main.py"), *flags, *chosen]
            results[name] = run_part([*command, "--out", str(out)], clock, most=80)
            if results[name]["exit_status"] == 0:
                results[name]["epochs"] = [
                    json.loads(line) for line in (out / "metrics.jsonl").open()
                ]
                results[name]["summary"] = json.loads((out / "summary.json").read_text())
            print(f"training {name}:", *results[name]["output"][-5:], sep="\n  ", flush=True)
    return results


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--folder", type=Path, help="class folders with train/ and test/")
    parser.add_argument("--part", nargs="+", help="only these: tests, step, training, an op's name")
    parser.add_argument("--minutes", type=float, default=7.5, help="measure no more after these")
    parser.add_argument("--out", type=Path, help="JSON file (benchmarks/results/DATE-GPU.json)")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        print("error: no GPU here; --small shows the suite on a CPU", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = environment() | {"small": args.small, "seconds": {}}
    name = (results["gpu"] or {"name": "cpu"})["name"].lower().replace(" ", "-")
    stamp = results["date"][:16].replace(":", "").replace("T", "-")
    size = "-small" if args.small else ""
    out = args.out or Path(__file__).parent / "results" / f"{stamp}-{name}{size}.json"
    clock = Clock(args.minutes)
    seconds = 0.01 if args.small else 0.05
    batch_sizes, step_seconds = ([16], 0.01) if args.small else ([128, 1024], 1.0)
    model = {"depth": 8, "width": 4} if args.small else {"depth": 20, "width": 16}
    # The long sweeps come last.
    ops: dict[str, Callable[[torch.device, bool, float, str, Clock], Any]] = {
        "augment": bench_augment.bench,
        "unscale": bench_unscale.bench,
        "cast": bench_cast.bench,
        "sgd_step": bench_sgd_step.bench,
        "meprop_linear": bench_meprop_linear.bench,
        "meprop_conv2d": bench_meprop_conv2d.bench,
        "stochastic_depth_add": bench_stochastic_depth_add.bench,
        "batch_norm_relu": bench_batch_norm_relu.bench,
    }
    parts: dict[str, Callable[[], Any]] = {
        "tests": lambda: gpu_tests(args.small, clock),
        "step": lambda: bench_step.bench(device, batch_sizes, step_seconds, clock, **model),
        "training": lambda: training(args.small, device, args.folder, clock),
        "stochastic_depth_unit": lambda: bench_stochastic_depth_unit.bench(
            device, args.small, step_seconds, "stages", clock
        ),
        **{
            name: partial(op, device, args.small, seconds, "stages", clock)
            for name, op in ops.items()
        },
    }
    failures: list[str] = []
    unknown = set(args.part or ()) - set(parts)
    if unknown:
        parser.error(f"--part {' '.join(sorted(unknown))}: expected some of {' '.join(parts)}")
    for part, run in parts.items():
        if args.part and part not in args.part:
            continue
        # A part that has not begun in time is named; the long ones look at the clock themselves.
        if part in ops and not clock.has(15, part):
            results[part] = {"skipped": "out of time"}
            continue
        print(f"--- {part}", flush=True)
        started = time.perf_counter()
        try:
            results[part] = run()
        except Exception as error:  # one part's failure must not cost the others' figures
            results[part] = {"error": f"{type(error).__name__}: {error}"}
            failures.append(f"{part}: {results[part]['error']}")
        results["seconds"][part] = time.perf_counter() - started
        if part in ("tests", "training"):
            failures += [
                f"{part} {name}: exit status {run['exit_status']}"
                for name, run in results[part].items()
                # Collecting tests, none of which may be selected, ends with 5.
                if isinstance(run, dict)
                and run["exit_status"] not in ((0, 5) if args.small else (0,))
            ]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    print(f"wrote {out} after {sum(results['seconds'].values()):.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
