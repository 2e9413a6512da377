"""Any folder of class folders, decoded once and cached as one file."""

from __future__ import annotations

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from fastres.data.errors import DataError
from fastres.data.image_set import ImageData, ImageSet
from fastres.data.pixel_cache import Pixels, read_pixels, write_pixels

_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
_FORMAT = "fastres folder cache 1"
# Images a thread decodes at a time: few enough that an error early in the set is met early.
_CHUNK = 64
# Decoding smaller files is mostly Python, which threads only slow down: 127 µs for an image of
# 32x32 on one thread, 180 µs on two.
_THREADED_BYTES = 4096


class _File(NamedTuple):
    path: str
    label: int
    size: int
    mtime_ns: int


def folder(
    root: Path,
    image_size: int | None = None,
    test_fraction: float | None = None,
    cache_dir: Path | None | Literal["default"] = "default",
) -> ImageData:
    """Read a folder of class folders, root/train/<class>/* and root/test/<class>/*.

    Where root has no train and test folder it is read as root/<class>/*, and test_fraction says
    how much of it becomes the test set. Hidden files and names without an image's extension are
    passed over. Images become RGB; an alpha channel is dropped.

    The order is a fixed permutation (torch.randperm, seed 0) of the files sorted by class and
    name: of each part where there are two, else of all, whose first part is then the test set.

    The decoded pixels are kept in one file in cache_dir, named by a hash of root, the arguments,
    and the path, size and time of every image. A damaged cache file is made again.

    Args:
        root: the folder.
        image_size: crop to the centre square and resize each image to image_size x image_size
            pixels; None where all have one size already.
        test_fraction: share of the images to test on, in (0, 1); only for root/<class>/*.
        cache_dir: None for no cache; "default" is $XDG_CACHE_HOME/fastres or ~/.cache/fastres.
    Returns:
        ImageData named as root is.
    Raises:
        DataError: no such layout, an empty class, one class only, other classes in test than in
            train, two image sizes, an unreadable image, an argument out of range.
    Warns:
        UserWarning: cache_dir cannot be written; the data is right all the same.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image size must be at least 1 pixel, got {image_size}")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise DataError(f"test fraction must lie between 0 and 1, got {test_fraction}")
    root = Path(os.path.abspath(Path(root).expanduser()))
    top = _subfolders(root)
    if {"train", "test"} <= set(top):
        if test_fraction is not None:
            raise DataError(
                f"{root} has its own test folder, got test fraction {test_fraction}: leave it out"
            )
        classes, train = _scan(root / "train")
        test_classes, test = _scan(root / "test")
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise DataError(
                f"train and test in {root} must have the same class folders, only one of them "
                f"has {_some(odd)}"
            )
        train, test = _permuted(train), _permuted(test)
    else:
        classes, files = _scan(root)
        if test_fraction is None:
            raise DataError(
                f"{root} has no train and test folder: give --test-fraction, such as 0.1, to test "
                "on a part of it"
            )
        files = _permuted(files)
        test_size = round(len(files) * test_fraction)
        if not 0 < test_size < len(files):
            raise DataError(
                f"test fraction {test_fraction} of the {len(files)} images in {root} leaves "
                f"{test_size} to test on and {len(files) - test_size} to train on: both need one"
            )
        test, train = files[:test_size], files[test_size:]
    pixels = _pixels(root, train + test, image_size, test_fraction, cache_dir)
    return ImageData(
        root.name or str(root),
        tuple(classes),
        _image_set(pixels[: len(train)], train),
        _image_set(pixels[len(train) :], test),
    )


def _subfolders(path: Path) -> list[str]:
    """Names of the visible folders in path, sorted."""
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read as a folder of images ({error.strerror}): give the folder "
            "that holds train/<class>/ and test/<class>/, or <class>/"
        ) from error


def _scan(path: Path) -> tuple[list[str], list[_File]]:
    """The classes in path and their images, sorted by class and name."""
    classes = _subfolders(path)
    if len(classes) < 2:
        raise DataError(
            f"{path} must hold a folder of images for each class, at least 2, found "
            f"{_some(classes) if classes else 'none'}"
        )
    files = []
    for label, name in enumerate(classes):
        found, nested = [], False
        try:
            with os.scandir(path / name) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        nested = True
                    elif os.path.splitext(entry.name)[1].lower() in _SUFFIXES and entry.is_file():
                        stat = entry.stat()
                        found.append(_File(entry.path, label, stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            raise DataError(f"{path / name} cannot be read ({error.strerror})") from error
        if nested and not found:
            raise DataError(
                f"{path / name} must be a class and hold images, but holds folders: give the "
                "folder that holds train/<class>/ and test/<class>/, or <class>/"
            )
        if not found:
            raise DataError(
                f"class folder {path / name} has no image in it "
                f"({' '.join(sorted(_SUFFIXES))}): add some, or take the folder away"
            )
        files += sorted(found, key=lambda file: file.path)
    return classes, files


def _permuted(files: list[_File]) -> list[_File]:
    # Sorted by class, "the first 1,000" would all be of one class.
    seed = torch.Generator("cpu").manual_seed(0)
    order = torch.randperm(len(files), generator=seed, device="cpu")
    return [files[i] for i in order.tolist()]


def _image_set(pixels: Pixels, files: list[_File]) -> ImageSet:
    labels = torch.tensor([file.label for file in files], dtype=torch.int64, device="cpu")
    return ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _pixels(
    root: Path,
    files: list[_File],
    image_size: int | None,
    test_fraction: float | None,
    cache_dir: Path | None | Literal["default"],
) -> Pixels:
    """[N, H, W, 3] pixels of files, from the cache or into it."""
    if cache_dir is None:
        return _decode(files, image_size)
    prefix = len(os.path.join(root, ""))
    words = [_FORMAT, os.fspath(root), repr(image_size), repr(test_fraction)]
    words += [f"{path[prefix:]}\0{size}\0{mtime_ns}" for path, _, size, mtime_ns in files]
    key = hashlib.sha256("\0".join(words).encode(errors="surrogateescape"))
    try:
        if cache_dir == "default":
            base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
            cache_dir = Path(base) / "fastres"
        cache = Path(cache_dir).expanduser() / f"{key.hexdigest()[:32]}.pixels"
    except RuntimeError as error:
        warnings.warn(f"{root} is not cached: {error}", stacklevel=3)
        return _decode(files, image_size)
    pixels = read_pixels(cache, len(files))
    if pixels is None:
        pixels = _decode(files, image_size)
        try:
            write_pixels(cache, pixels)
        except OSError as error:
            warnings.warn(
                f"{root} is decoded anew at each start: its cache cannot be written ({error})",
                stacklevel=3,
            )
    return pixels


def _decode(files: list[_File], image_size: int | None) -> Pixels:
    """[N, H, W, 3] pixels of files."""
    first = _open(files[0].path, image_size)
    pixels = np.empty((len(files), *first.shape), dtype=np.uint8)

    def decode(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(files))):
            image = _open(files[i].path, image_size)
            if image.shape != first.shape:
                raise DataError(
                    f"images must have one size, {files[0].path} is {_size(first)} and "
                    f"{files[i].path} is {_size(image)} pixels: give --image-size"
                )
            pixels[i] = image

    threaded = sum(file.size for file in files) >= _THREADED_BYTES * len(files)
    pool = ThreadPoolExecutor(os.cpu_count() if threaded else 1)
    try:
        # In order, so that of several bad files the same one is named each time.
        for _ in pool.map(decode, range(0, len(files), _CHUNK)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels


def _size(image: Pixels) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _open(path: str, image_size: int | None) -> Pixels:
    """One image as [H, W, 3]."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(
            f"images need Pillow ({error}): pip install 'fastres[train]', or use "
            "--dataset synthetic"
        ) from error
    try:
        with Image.open(path) as image:
            # PIL turns 16-bit and float grey values past 255 into 255: a white image.
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has {image.mode} pixels: save it with 8 bits a channel")
            rgb = image.convert("RGB")
            if image_size is not None:
                rgb = ImageOps.fit(rgb, (image_size, image_size))
            return np.asarray(rgb)
    except (DataError, MemoryError):
        raise
    # PIL's readers raise whatever the damage leads them to: OSError, SyntaxError, struct.error…
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({error}): replace or delete it") from (
            error
        )
