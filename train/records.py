"""What a run leaves behind and shows: metrics, curve, summary, and progress on the terminal."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from checkpoint import write_atomically
from errors import TrainError
from tqdm import tqdm

METRICS, SUMMARY, CURVE, CONFIG = "metrics.jsonl", "summary.json", "curve.png", "config.json"

Record = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


class Metrics:
    """An epoch a record, as JSON lines; or whatever `counted` names, from 1 on."""

    def __init__(self, path: Path, counted: str = "epoch") -> None:
        self.path, self._counted = path, counted
        self.records: list[Record] = []

    def keep_until(self, number: int) -> None:
        """Read the file, and take back the records that ran ahead of a checkpoint's number.

        Raises:
            TrainError: the file is not one that this program wrote; it stays as it is.
        """
        try:
            text = self.path.read_text() if self.path.exists() else ""
            records = [json.loads(line) for line in text.splitlines()]
            self.records = [record for record in records if record[self._counted] <= number]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainError(
                f"{self.path}: not the metrics of a run ({error}); move it away or choose another "
                "--out"
            ) from error
        self._write()

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._write()

    def _write(self) -> None:
        # Whole each time: a few hundred bytes an epoch, and never half a line.
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self.path, lambda file: file.write(lines.encode()))


def hardware_of(records: list[Record]) -> list[Record]:
    """What computed them, each kind once: a run may be resumed on another machine."""
    kinds: list[Record] = []
    for record in records:
        kind = record.get("hardware")  # which no record had at first
        if kind is not None and kind not in kinds:
            kinds.append(kind)
    return kinds


def draw_curve(path: Path, records: list[Record], title: str) -> None:
    """Accuracies and training loss by epoch, as a PNG."""
    # Only the leading process draws, once: the rest need not load it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, style in (("train", "-"), ("dev", "--"), ("test", "-")):
        points = [(r["epoch"], r[f"{name}_accuracy"]) for r in records if f"{name}_accuracy" in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker=".", label=f"{name} accuracy")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    losses = axes.twinx()
    losses.plot(
        [r["epoch"] for r in records], [r["loss"] for r in records], color="0.5", label="loss"
    )
    losses.set_ylabel("training loss")
    losses.set_ylim(bottom=0)
    handles = [*axes.get_legend_handles_labels()[0], *losses.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


class Progress:
    """A bar with rate and time left on the leading process's terminal; elsewhere nothing."""

    def __init__(self, steps: int, batch_size: int, epochs: int, done: int, shown: bool) -> None:
        self._epochs, self._batch_size = epochs, batch_size
        self._bar = tqdm(
            total=steps * batch_size * epochs,
            initial=steps * batch_size * done,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
        )

    def epoch(self, number: int) -> None:
        self._bar.set_description(f"epoch {number}/{self._epochs}")

    def step(self) -> None:
        self._bar.update(self._batch_size)

    def line(self, text: str) -> None:
        """A line above the bar, or a plain one."""
        self._bar.clear()
        print(text, flush=True)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def epoch_line(record: Record, epochs: int, seconds_left: float) -> str:
    parts = [f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {record['loss']:.4f}"]
    for name in ("train", "dev", "test"):
        if f"{name}_accuracy" in record:
            parts.append(f"{name} {record[f'{name}_accuracy']:.2f} %")
    parts += [f"lr {record['lr']:.4g}", f"{record['images_per_second']:,.0f} images/s"]
    minutes, seconds = divmod(math.ceil(seconds_left), 60)
    return "  ".join([*parts, f"{minutes}:{seconds:02d} left"])


def make_out(path: Path) -> None:
    """Make the folder of a run and see that it can be written.

    Raises:
        TrainError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TrainError(
            f"--out {path}: cannot be written ({error.strerror}); choose another"
        ) from error
