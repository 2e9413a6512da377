"""CIFAR-10 by torchvision, with every failure told in one line."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import pickle
import socket
import ssl
import tarfile
import tempfile
import urllib.error
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastres.data.errors import DataError
from fastres.data.image_set import ImageData, ImageSet

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

_ELSE = "or use --dataset folder or --dataset synthetic"

# A firewall that drops packets would otherwise hold the run for minutes at each attempt.
_TIMEOUT_S = 30.0

# What urlopen and torchvision raise where the network or the far end is at fault.
_DOWNLOAD_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    RuntimeError,
    EOFError,
    tarfile.TarError,
    zlib.error,
)


def cifar10(root: Path) -> ImageData:
    """CIFAR-10 in its original order, which is random already: 50,000 and 10,000 images, 32x32.

    Files under root that pass torchvision's checksums are used and no network is touched. Else
    the archive (170 MB) is downloaded to a folder beside them, and only what has passed its
    checksum takes their place: a failed download leaves every file as it was, and several
    processes may start at once.

    Args:
        root: holds cifar-10-batches-py/ or cifar-10-python.tar.gz, or is to hold them.
    Returns:
        ImageData named "CIFAR-10".
    Raises:
        DataError: no torchvision, no network, a corrupt archive, or root cannot be read or written.
    """
    root = Path(root).expanduser()
    with _quiet():
        data = _load(root)
        if data is None:
            _install(root)
            data = _load(root)
    if data is None:
        raise DataError(
            f"CIFAR-10 in {root} changed while it was read: is another program writing there? "
            "Start again"
        )
    return data


def _load(root: Path) -> ImageData | None:
    """The data under root; None where a file is missing or fails its checksum."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise DataError(
            f"CIFAR-10 needs torchvision ({error}): pip install 'fastres[train]', {_ELSE}"
        ) from error
    try:
        train, test = CIFAR10(str(root), train=True), CIFAR10(str(root), train=False)
    except OSError as error:
        raise DataError(
            f"CIFAR-10 in {root} cannot be read ({error}): check the permissions, {_ELSE}"
        ) from error
    except RuntimeError:
        return None
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        # The checksums passed a moment ago, so this is a file that changed in between.
        raise DataError(f"CIFAR-10 in {root} changed while it was read ({error!r})") from error
    return ImageData("CIFAR-10", tuple(train.classes), _image_set(train), _image_set(test))


def _image_set(part: CIFAR10) -> ImageSet:
    images = torch.from_numpy(np.ascontiguousarray(part.data)).permute(0, 3, 1, 2)
    return ImageSet(images, torch.tensor(part.targets, dtype=torch.int64, device="cpu"))


def _install(root: Path) -> None:
    """Put a verified copy of the data under root, from the archive there or from the network."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive = root / CIFAR10.filename
    try:
        root.mkdir(parents=True, exist_ok=True)
        verified = check_integrity(archive, CIFAR10.tgz_md5)
        with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=root) as folder:
            staging = Path(folder)
            if verified:
                # Never a link to a corrupt archive: torchvision would write through it.
                (staging / archive.name).symlink_to(archive.resolve())
            CIFAR10(str(staging), download=True)
            (root / CIFAR10.base_folder).mkdir(exist_ok=True)
            for path in sorted((staging / CIFAR10.base_folder).iterdir()):
                os.replace(path, root / CIFAR10.base_folder / path.name)
            if not verified:
                os.replace(staging / archive.name, archive)
    except _DOWNLOAD_ERRORS as error:
        advice = f"place {archive.name} in {root}"
        if archive.exists():
            advice = (
                f"{archive} is corrupt or half downloaded ({archive.stat().st_size:,} bytes), "
                "delete it or put a whole one in its place"
            )
        raise DataError(
            f"CIFAR-10 could not be downloaded to {root} ({_cause(error)}): {advice}, {_ELSE}"
        ) from error
    except OSError as error:
        raise DataError(
            f"CIFAR-10 could not be written to {root} ({_cause(error)}): choose a folder that can "
            f"be written, with 400 MB free, {_ELSE}"
        ) from error


def _cause(error: BaseException) -> str:
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torchvision's progress bars, and give its downloads, which have none, a timeout."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S if timeout is None else timeout)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            # The batches are Python 2 pickles; NumPy 2.4.0 to 2.4.4 warn of their dtype's flags.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            yield
    finally:
        socket.setdefaulttimeout(timeout)
