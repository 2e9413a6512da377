"""A checkpoint on disk: written whole or not at all, and read only if every byte is right."""

import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from errors import TrainError

NAME = "checkpoint.pt"
FORMAT = 1


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at any moment `path` is the old one or the new one, whole.

    Raises:
        TrainError: it cannot be written (no permission, disk full); the old file is untouched.
    """
    try:
        # One name, so that what a killed process left behind is written over. One process writes.
        partial = path.with_name(f".{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise TrainError(
            f"{path}: cannot be written ({error.strerror or error}); free the disk or choose "
            "another --out"
        ) from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Save a dict of tensors and plain values; see write_atomically."""
    # In memory first: torch.save hides a full disk behind an error of its own.
    whole = io.BytesIO()
    torch.save({"format": FORMAT, **state}, whole)
    write_atomically(path, lambda file: file.write(whole.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """What `save` saved, its tensors on the CPU.

    torch.load takes a file with a flipped bit; the archive's own checksums do not.

    Raises:
        TrainError: there is no such file, or it is damaged or no checkpoint of this program.
    """
    advice = "name another checkpoint, or start anew with another --out"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise TrainError(f"{path}: damaged (checksum of {broken!r} is wrong); {advice}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainError(f"{path}: no such checkpoint; {advice}") from None
    # EOFError to zlib.error: what zipfile and torch raise for headers that were cut or changed.
    except (
        OSError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, KeyError, IndexError,
        NotImplementedError, pickle.UnpicklingError, zlib.error,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainError(f"{path}: damaged or cut short ({reason}); {advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainError(f"{path}: not a checkpoint of train/main.py; {advice}")
    return state
