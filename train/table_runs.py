"""One run of the table: a row and a seed, trained by its program in a folder of its own."""

import contextlib
import dataclasses
import datetime
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import checkpoint
import records
from boost_config import BoostConfig
from config import Config, to_flags
from errors import TrainError
from recipes import Recipe

_PROGRAMS = Path(__file__).parent
# What a program's settings are made of.
CONFIGS: dict[str, type[Config]] = {"main.py": Config, "boost.py": BoostConfig}
LOG, FAILURE = "log.txt", "failure.txt"
# Seconds that torchrun has to end its processes, which a kill would leave behind.
_PATIENCE = 40
# Of a run's settings, those that say where things lie and what computes, not what is trained.
_WHERE = {
    "config", "data_dir", "out", "resume", "device", "micro_batches",
    "cache_dir", "cache_device_gb", "cache_host_gb",
}  # fmt: skip
_EXCEPTION = re.compile(r"(?:\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error|Exception|Failure)\b.*)")


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
            config = CONFIGS[self.recipe.program](**self.settings)
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
        there = read_json(self.out / records.CONFIG)
        if there is None:
            return
        wanted, usual = self.config.as_dict(), type(self.config)().as_dict()
        for key in sorted(wanted.keys() - _WHERE):
            # A setting that there was not yet had its default.
            held = there.get(key, usual[key])
            if held != wanted[key]:
                flag = "--" + key.replace("_", "-")
                raise TrainError(
                    f"{self.out}: holds a run with {flag} {held}, and row {self.recipe.name} has "
                    f"{flag} {wanted[key]}; choose another --out"
                )

    def summary(self) -> dict[str, Any] | None:
        """What the finished run came to; None before."""
        return read_json(self.out / records.SUMMARY)

    def failure(self) -> str | None:
        """Why the last attempt failed, in one line; None if it did not, or the run is finished."""
        if self.summary() is None:
            with contextlib.suppress(OSError):
                return (self.out / FAILURE).read_text().strip()
        return None

    def command(self) -> list[str]:
        start = [sys.executable]
        if self.processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += ["--nproc_per_node", str(self.processes)]
        return [*start, str(_PROGRAMS / self.recipe.program), *to_flags(self.settings)]

    def train(self, lock: IO[str] | None = None) -> str | None:
        """Train to the end, from the checkpoint if there is one; say what it says, and log it.

        Returns the reason of a failure, which the folder keeps, too. lock: a file that the process
        is to hold open for as long as it runs.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / FAILURE).unlink(missing_ok=True)
            # By lines: what this process cannot see to its end should be there to read.
            with open(self.out / LOG, "a", buffering=1) as log:
                status, lines = self._follow(log, [lock.fileno()] if lock else [])
        except OSError as error:
            return f"{error.filename or self.out}: {error.strerror or error}"
        if self.summary() is not None:
            return None
        why = f"exit status {status}: {reason(lines)}" if status else "it ended without a summary"
        failure = next((line.removeprefix("error: ") for line in lines if _is_error(line)), why)
        with contextlib.suppress(TrainError):  # no room for it: the caller has it
            text = f"{failure}\n".encode()
            checkpoint.write_atomically(self.out / FAILURE, lambda file: file.write(text))
        return failure

    def _follow(self, log: IO[str], held: list[int]) -> tuple[int, list[str]]:
        """The exit status, and the last lines that were printed."""
        now = datetime.datetime.now().isoformat(timespec="seconds")
        log.write(f"--- {now} {shlex.join(self.command())}\n")
        lines: list[str] = []
        with subprocess.Popen(
            self.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", pass_fds=held,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    print(f"  {line}", end="", flush=True)
                    lines = [*lines[-99:], line.rstrip()]
            except BaseException:
                process.terminate()
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        return process.returncode, lines


def _is_error(line: str) -> bool:
    return line.startswith("error: ")


def reason(lines: Iterable[str]) -> str:
    """The line that tells best why a process ended: its exception, or the last that says a word."""
    said = [line.strip() for line in lines if re.search(r"\w", line)]
    raised = [found[1] for line in said if (found := _EXCEPTION.match(line))]
    # torchrun ends with an exception and a report of its own, whatever its processes raised.
    raised = [line for line in raised if "ChildFailedError" not in line] or said
    return raised[-1] if raised else "nothing was printed"


def read_json(path: Path) -> Any:
    """What a file of a run holds; None where there is none.

    Raises:
        TrainError: it is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainError(
            f"{path}: not what a run wrote ({error}); move its folder away or choose another --out"
        ) from error
