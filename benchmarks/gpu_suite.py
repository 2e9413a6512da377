"""Everything there is to know of one GPU, by one command in under 8 minutes, as one JSON.

    python benchmarks/gpu_suite.py [--folder DIR] [--out FILE]

Runs the gpu tests, times each op forward and backward, times the whole training step, and trains a
few epochs on a folder data set (a small one is drawn where --folder names none). The file is
written anew after every part, so that an interrupted run keeps what it has.
With --small the same parts run on a CPU, at toy size, to show that the suite itself works.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_augment
import bench_batch_norm_relu
import bench_step
import torch
from _environment import environment
from _timing import Clock

_ROOT = Path(__file__).parent.parent


def gpu_tests(small: bool) -> dict[str, Any]:
    """pytest -m gpu; at toy size only their collection."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x" if small else "-rfEs"]
    if small:
        command.append("--collect-only")
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=150)
    print(done.stdout[-3000:])
    return {"exit_status": done.returncode, "output": done.stdout.splitlines()[-40:]}


def training(small: bool, device: torch.device, folder: Path | None) -> dict[str, Any]:
    """A few epochs of train/main.py, fused and plain with one seed, on a folder data set."""
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if folder is None:
            folder = scratch / "images"
            draw_folder(folder, *((64, 32) if small else (4000, 1000)))
        flags = ["--dataset", "folder", "--data-dir", str(folder), "--device", device.type]
        if small:
            flags += ["--epochs", "1", "--depth", "8", "--width", "4", "--batch-size", "16"]
        else:
            flags += ["--epochs", "5", "--schedule", "cosine", "--precision", "fp16"]
        for fused in ("--fused", "--no-fused"):
            out = scratch / fused.strip("-")
            command = [sys.executable, str(_ROOT / "train" / "main.py"), *flags, fused]
            done = subprocess.run(
                [*command, "--out", str(out)], capture_output=True, text=True, timeout=100
            )
            if done.returncode:
                results[fused] = {"exit_status": done.returncode, "error": done.stderr[-2000:]}
                print(f"training {fused} failed:\n{done.stderr[-2000:]}")
                continue
            epochs = [json.loads(line) for line in (out / "metrics.jsonl").open()]
            summary = json.loads((out / "summary.json").read_text())
            results[fused] = {"exit_status": 0, "summary": summary, "epochs": epochs}
            print(f"training {fused}: " + done.stdout.split("\ntest accuracy")[-1].splitlines()[0])
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
    parser.add_argument("--minutes", type=float, default=7.5, help="measure no more after these")
    parser.add_argument("--out", type=Path, help="JSON file (benchmarks/results/DATE-GPU.json)")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        print("error: no GPU here; --small shows the suite on a CPU", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = environment() | {"small": args.small, "seconds": {}}
    name = (results["gpu"] or {"name": "cpu"})["name"].lower().replace(" ", "-")
    out = args.out or Path(__file__).parent / "results" / f"{results['date'][:10]}-{name}.json"
    clock = Clock(args.minutes)
    seconds = 0.01 if args.small else 0.05
    batch_sizes, step_seconds = ([16], 0.01) if args.small else ([128, 1024], 1.0)
    model = {"depth": 8, "width": 4} if args.small else {"depth": 20, "width": 16}
    # The op's long sweep comes last, and takes what time is left.
    parts: dict[str, Callable[[], Any]] = {
        "tests": lambda: gpu_tests(args.small),
        "step": lambda: bench_step.bench(device, batch_sizes, step_seconds, clock, **model),
        "training": lambda: training(args.small, device, args.folder),
        "augment": lambda: bench_augment.bench(device, args.small, seconds),
        "batch_norm_relu": lambda: bench_batch_norm_relu.bench(device, args.small, seconds, clock),
    }
    failed = False
    for part, run in parts.items():
        print(f"--- {part}", flush=True)
        started = time.perf_counter()
        try:
            results[part] = run()
        except Exception as error:  # one part's failure must not cost the others' figures
            results[part] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{part} failed: {results[part]['error']}", file=sys.stderr)
            failed = True
        results["seconds"][part] = time.perf_counter() - started
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    # Collecting tests, none of which may be selected, ends with status 5 at toy size.
    failed |= results["tests"].get("exit_status", 1) not in ((0, 5) if args.small else (0,))
    failed |= any(r.get("exit_status", 1) for r in results["training"].values())
    print(f"wrote {out} after {sum(results['seconds'].values()):.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
