"""Decoded images in one file: SHA-256 of all that follows, then N, H, W, then the pixels."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

_DIGEST_BYTES = 32
_HEADER_BYTES = _DIGEST_BYTES + 3 * 8


def read_pixels(path: Path, count: int) -> Pixels | None:
    """[count, H, W, 3] pixels from path; None where it is missing, damaged or of another count."""
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError:
        return None
    if len(raw) < _HEADER_BYTES:
        return None
    if hashlib.sha256(raw[_DIGEST_BYTES:].data).digest() != raw[:_DIGEST_BYTES].tobytes():
        return None
    n, height, width = np.frombuffer(raw[_DIGEST_BYTES:_HEADER_BYTES].tobytes(), "<i8").tolist()
    if n != count:
        return None
    return raw[_HEADER_BYTES:].reshape(n, height, width, 3)


def write_pixels(path: Path, pixels: Pixels) -> None:
    """Write contiguous [N, H, W, 3] pixels to path: whole or not at all.

    Raises:
        OSError: the folder cannot be made or written; path is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = np.array(pixels.shape[:3], dtype="<i8").tobytes()
    digest = hashlib.sha256(shape)
    digest.update(pixels.data)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(digest.digest() + shape)
            file.write(pixels.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
