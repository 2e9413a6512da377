"""The one form of every file of results: written whole, read with care.

A file is a JSON object: the form's number, the benchmark's name, the command, what it ran on (see
_environment), and `rows`. A row is flat: what was measured (provider, sizes, dtype, ...), then
either a timing (see _timing) or the word that stands in its place: `not_measured` where a limit of
the machine or of the time met it, `failed` where something is wrong.
"""

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from _environment import environment

FORMAT = 2

Row = dict[str, Any]


class ResultsError(Exception):
    """A file of results that cannot be used, in words."""


# An absolute path, also one among flags that are quoted together: all of it but its last part.
_PATH = re.compile(r"(^|[\s=])/(?:[^\s/]+/)*([^\s/]+)")


class WrongResult(Exception):
    """A provider's result is not the reference's: it gets no speed."""


def results(benchmark: str, device: str = "cpu", **content: Any) -> dict[str, Any]:
    """The head of a file of results, and its content.

    device: "cpu" or "cuda"; a GPU beside a CPU that works is not in the head.
    """
    # Where folders lie on the machine that measured is nobody else's business.
    flags = [_PATH.sub(r"\1\2", flag) for flag in sys.argv[1:]]
    command = shlex.join(["python", "/".join(Path(sys.argv[0]).parts[-2:]), *flags])
    head = {"format": FORMAT, "benchmark": benchmark, "command": command, "device": device}
    return head | environment() | ({"gpu": None} if device == "cpu" else {}) | content


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file of results; see write_whole."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: what lay there before survives whatever stops this."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    # A temporary file is its owner's alone; results are for everybody.
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def load(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ResultsError: it cannot be read, is no file of results, or is of another form.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"{path.name}: not readable as JSON ({error})") from error
    form = content.get("format") if isinstance(content, dict) else None
    if form != FORMAT:
        raise ResultsError(
            f"{path.name}: has results of form {form}, and form {FORMAT} is read here; "
            "measure it again with this version's benchmarks"
        )
    missing = {"benchmark", "date", "torch", "cpu"} - content.keys()
    if missing:
        raise ResultsError(f"{path.name}: lacks {', '.join(sorted(missing))}; measure it again")
    return content


def measured(about: Row, measure: Callable[[], Row]) -> Row:
    """`about` and what measure() finds, or `about` and why it found nothing.

    One row that cannot be had must not cost the others: memory that runs out, a wrong result and a
    provider that raises each become the row's own words.
    """
    try:
        return about | measure()
    except WrongResult:
        return without_speed(about, failed="wrong result")
    except Exception as error:
        if is_out_of_memory(error):
            return without_speed(about, not_measured="out of memory")
        words = str(error).strip().splitlines() or [""]
        return without_speed(about, failed=f"{type(error).__name__}: {words[0]}"[:300])


def is_out_of_memory(error: Exception) -> bool:
    """Whether a limit of the machine was met: libraries say so in words of their own."""
    said = str(error).lower()
    words = ("out of memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in said for w in words)


def without_speed(about: Row, **why: str) -> Row:
    """The row, with `not_measured` or `failed` in place of figures, said aloud."""
    words = " ".join(f"{key}={value}" for key, value in about.items())
    print(f"{words}: {' '.join(why.values())}, no speed", flush=True)
    return about | why


def failures(rows: Iterable[Row], provider: str | None = None) -> list[str]:
    """What is wrong, a line each: of one provider or of all."""
    return [
        " ".join(f"{key}={value}" for key, value in row.items())
        for row in rows
        if "failed" in row and provider in (None, row.get("provider"))
    ]
