"""One run of the table: a row and a seed, trained by train/main.py in a folder of its own."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint
import records
from config import Config, to_flags
from errors import TrainError
from recipes import Recipe

_MAIN = Path(__file__).with_name("main.py")
LOG, FAILURE = "log.txt", "failure.txt"
# Of a run's settings, those that say where things lie and not what is trained.
_WHERE = ("config", "data_dir", "out", "resume")


@dataclasses.dataclass(frozen=True)
class Run:
    """A row, a seed, the processes it is spread over, and all its settings but the defaults.

    Raises:
        TrainError: settings that do not fit together, or that its processes cannot share.
    """

    recipe: Recipe
    seed: int
    processes: int
    settings: dict[str, Any]
    config: Config = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        try:
            config = Config(**self.settings)
            shares = self.processes * config.micro_batches
            if config.batch_size % shares:
                raise TrainError(f"--batch-size {config.batch_size}: not a multiple of {shares}")
        except TrainError as error:
            raise TrainError(f"row {self.recipe.name}: {error}") from None
        object.__setattr__(self, "config", config)

    @property
    def out(self) -> Path:
        return self.config.out_dir

    def check_folder(self) -> None:
        """See that the run in the folder, if there is one, is this one.

        Raises:
            TrainError: it has other settings; it stays as it is.
        """
        there = _read_json(self.out / records.CONFIG)
        if there is None:
            return
        wanted = self.config.as_dict()
        for key in sorted(wanted.keys() - set(_WHERE)):
            if there.get(key) != wanted[key]:
                flag = "--" + key.replace("_", "-")
                raise TrainError(
                    f"{self.out}: holds a run with {flag} {there.get(key)}, and row "
                    f"{self.recipe.name} has {flag} {wanted[key]}; choose another --out"
                )

    def summary(self) -> dict[str, Any] | None:
        """What the finished run came to; None before."""
        return _read_json(self.out / records.SUMMARY)

    def failure(self) -> str | None:
        """Why the last attempt failed, in one line; None if it did not."""
        with contextlib.suppress(OSError):
            return (self.out / FAILURE).read_text().strip()
        return None

    def command(self) -> list[str]:
        start = [sys.executable]
        if self.processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += ["--nproc_per_node", str(self.processes)]
        return [*start, str(_MAIN), *to_flags(self.settings)]

    def train(self) -> None:
        """Train to the end, from the checkpoint if there is one; say what it says, and log it.

        A failure is kept in the folder, and raises nothing.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / FAILURE).unlink(missing_ok=True)
        last, error = "nothing was printed", None
        with (
            open(self.out / LOG, "a") as log,
            subprocess.Popen(
                self.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace",
            ) as process,
        ):  # fmt: skip
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    print(f"  {line}", end="", flush=True)
                    last = line.strip() or last
                    if line.startswith("error: "):
                        error = line.removeprefix("error: ").strip()
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            why = error or f"exit status {process.returncode}: {last}"
            text = f"{why}\n".encode()
            checkpoint.write_atomically(self.out / FAILURE, lambda file: file.write(text))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainError(
            f"{path}: not what a run wrote ({error}); move its folder away or choose another --out"
        ) from error
