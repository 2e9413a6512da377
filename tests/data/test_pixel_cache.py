"""The cache of a folder's pixels: hits, misses, damage, and folders that cannot be written."""

import errno
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastres.data import ImageData, folder

reading = import_module("fastres.data.folder")
caching = import_module("fastres.data.pixel_cache")


def picture(path: Path, colour: tuple[int, int, int] = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), colour).save(path)


@pytest.fixture
def two_parts(tmp_path: Path) -> Path:
    for mark, part in enumerate(("train", "test")):
        for label, name in enumerate(("cat", "dog")):
            for i in range(4):
                picture(tmp_path / "set" / part / name / f"{i:03}.png", (label, i, mark))
    return tmp_path / "set"


@pytest.fixture
def one_part(two_parts: Path) -> Path:
    return two_parts / "train"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files opened as images so far."""
    paths: list[str] = []
    open_image = reading._open

    def spy(path: str, image_size: int | None) -> object:
        paths.append(path)
        return open_image(path, image_size)

    monkeypatch.setattr(reading, "_open", spy)
    return paths


def same(a: ImageData, b: ImageData) -> bool:
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
        for x, y in ((a.train, b.train), (a.test, b.test))
    )


def flip(position: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return damage


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


class TestCache:
    def test_second_call_decodes_nothing(
        self, two_parts: Path, tmp_path: Path, decoded: list[str]
    ) -> None:
        first = folder(two_parts, cache_dir=tmp_path / "made" / "here")
        files = list((tmp_path / "made" / "here").iterdir())
        assert len(files) == 1 and not files[0].name.startswith(".")
        assert decoded
        decoded.clear()
        second = folder(two_parts, cache_dir=tmp_path / "made" / "here")
        assert decoded == []
        assert same(first, second)
        assert second.train.images.is_contiguous(memory_format=torch.channels_last)
        second.train.images[0] = 0  # writable, as decoded images are

    def test_works_without_pillow(
        self, two_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = folder(two_parts, cache_dir=tmp_path / "cache")
        monkeypatch.setitem(sys.modules, "PIL", None)
        assert same(first, folder(two_parts, cache_dir=tmp_path / "cache"))

    def test_none_keeps_nothing(
        self, two_parts: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(caching.tempfile, "mkstemp", None)
        for _ in range(2):
            decoded.clear()
            folder(two_parts, cache_dir=None)
            assert decoded

    @pytest.mark.parametrize("change", ["time", "size", "name", "class", "added", "removed"])
    def test_a_changed_file_is_seen(
        self, two_parts: Path, tmp_path: Path, decoded: list[str], change: str
    ) -> None:
        folder(two_parts, cache_dir=tmp_path / "cache")
        path = two_parts / "train" / "cat" / "002.png"
        stat = path.stat()
        if change == "time":
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
        elif change == "size":
            path.write_bytes(path.read_bytes() + b"\0")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        elif change == "name":
            path.rename(path.with_name("002b.png"))
        elif change == "class":
            for part in ("train", "test"):
                (two_parts / part / "cat").rename(two_parts / part / "cow")
        elif change == "added":
            picture(path.with_name("009.png"))
        else:
            path.unlink()
        decoded.clear()
        again = folder(two_parts, cache_dir=tmp_path / "cache")
        assert decoded
        assert same(again, folder(two_parts, cache_dir=None))

    def test_the_arguments_are_seen(
        self, one_part: Path, tmp_path: Path, decoded: list[str]
    ) -> None:
        for size, fraction in ((None, 0.3), (6, 0.3), (5, 0.3), (None, 0.5)):
            decoded.clear()
            data = folder(one_part, size, fraction, cache_dir=tmp_path / "cache")
            assert decoded
            assert same(data, folder(one_part, size, fraction, cache_dir=None))
        assert len(list((tmp_path / "cache").iterdir())) == 4

    def test_the_root_is_seen(self, two_parts: Path, tmp_path: Path, decoded: list[str]) -> None:
        folder(two_parts, cache_dir=tmp_path / "cache")
        two_parts.rename(tmp_path / "moved")
        decoded.clear()
        folder(tmp_path / "moved", cache_dir=tmp_path / "cache")
        assert decoded

    @pytest.mark.parametrize(
        "damage",
        [
            *(flip(position) for position in (0, 31, 32, 40, 48, 55, 56, 500, -1)),
            *(shorten, lengthen, empty, remove, make_a_folder),
        ],
    )
    def test_a_damaged_file_is_made_again(
        self,
        two_parts: Path,
        tmp_path: Path,
        decoded: list[str],
        damage: Callable[[Path], None],
    ) -> None:
        first = folder(two_parts, cache_dir=tmp_path / "cache")
        (path,) = (tmp_path / "cache").iterdir()
        damage(path)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            decoded.clear()
            assert same(first, folder(two_parts, cache_dir=tmp_path / "cache"))
            assert decoded
            if damage is make_a_folder:  # the one damage that cannot be put right
                assert [w.category for w in warned] == [UserWarning]
                return
            decoded.clear()
            assert same(first, folder(two_parts, cache_dir=tmp_path / "cache"))
        assert decoded == [] and warned == []
        assert list((tmp_path / "cache").iterdir()) == [path]

    def test_a_sound_file_of_another_set_is_not_used(self, tmp_path: Path) -> None:
        caching.write_pixels(tmp_path / "x", np.zeros((3, 2, 2, 3), dtype=np.uint8))
        assert caching.read_pixels(tmp_path / "x", 3) is not None
        assert caching.read_pixels(tmp_path / "x", 4) is None

    @pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace"])
    def test_a_failed_write_is_one_warning(
        self, two_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        place = caching.tempfile if call == "mkstemp" else caching.os
        monkeypatch.setattr(place, call, fail)
        with pytest.warns(UserWarning, match="No space left on device") as warned:
            data = folder(two_parts, cache_dir=tmp_path / "cache")
        assert len(warned) == 1 and warned[0].filename == __file__
        assert "\n" not in str(warned[0].message)
        assert same(data, folder(two_parts, cache_dir=None))
        assert list((tmp_path / "cache").iterdir()) == []

    def test_cache_dir_below_a_file(self, two_parts: Path, tmp_path: Path) -> None:
        picture(tmp_path / "file.png")
        with pytest.warns(UserWarning, match="cannot be written") as warned:
            data = folder(two_parts, cache_dir=tmp_path / "file.png" / "cache")
        assert len(warned) == 1
        assert same(data, folder(two_parts, cache_dir=None))

    def test_default_is_in_xdg_cache_home(
        self, two_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        folder(two_parts)
        assert len(list((tmp_path / "xdg" / "fastres").iterdir())) == 1

    def test_default_is_else_in_the_home_folder(
        self, two_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        folder(two_parts)
        assert len(list((tmp_path / "home" / ".cache" / "fastres").iterdir())) == 1

    def test_no_home_folder(self, two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expand = Path.expanduser

        def homeless(path: Path) -> Path:
            if str(path).startswith("~"):
                raise RuntimeError("Could not determine home directory.")
            return expand(path)

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "expanduser", homeless)
        with pytest.warns(UserWarning, match="home directory") as warned:
            folder(two_parts)
        assert len(warned) == 1
