"""A folder of class folders: layouts, order, every refusal."""

import errno
import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastres.data import DataError, ImageData, folder, split

reading = import_module("fastres.data.folder")

Colour = tuple[int, int, int]


def picture(path: Path, colour: Colour = (10, 20, 30), size: tuple[int, int] = (6, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def fill(root: Path, counts: dict[str, int], mark: int = 0) -> None:
    """PNG files whose colour tells them apart: (class, number in the class, mark)."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        for i in range(count):
            picture(root / name / f"{i:03}.png", (label, i, mark))


@pytest.fixture
def two_parts(tmp_path: Path) -> Path:
    fill(tmp_path / "set" / "train", {"cat": 5, "dog": 4, "eel": 3}, mark=100)
    fill(tmp_path / "set" / "test", {"cat": 2, "dog": 2, "eel": 2}, mark=200)
    return tmp_path / "set"


@pytest.fixture
def one_part(tmp_path: Path) -> Path:
    fill(tmp_path / "set", {"cat": 6, "dog": 4})
    return tmp_path / "set"


def colours(images: Tensor) -> list[Colour]:
    """The colour of each image, each of one colour only."""
    assert (images == images[:, :, :1, :1]).all()
    return [(r, g, b) for r, g, b in images[:, :, 0, 0].tolist()]


def permuted(items: list[Colour]) -> list[Colour]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    return [items[i] for i in order.tolist()]


def same(a: ImageData, b: ImageData) -> bool:
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
        for x, y in ((a.train, b.train), (a.test, b.test))
    )


def refusal(*said: str, **arguments: object) -> str:
    with pytest.raises(DataError) as error:
        folder(cache_dir=None, **arguments)  # type: ignore[arg-type]  # named by each test
    message = str(error.value)
    assert "\n" not in message
    for words in said:
        assert words in message
    return message


class TestLayouts:
    def test_train_and_test(self, two_parts: Path) -> None:
        data = folder(two_parts, cache_dir=None)
        assert (data.name, data.classes) == ("set", ("cat", "dog", "eel"))
        assert data.train.images.shape == (12, 3, 6, 6)
        train = [(k, i, 100) for k, n in enumerate((5, 4, 3)) for i in range(n)]
        test = [(k, i, 200) for k in range(3) for i in range(2)]
        assert colours(data.train.images) == permuted(train)
        assert colours(data.test.images) == permuted(test)
        assert data.train.labels.tolist() == [colour[0] for colour in permuted(train)]
        assert data.test.labels.tolist() == [colour[0] for colour in permuted(test)]
        assert len(split(data).dev) == 1

    @pytest.mark.parametrize(("fraction", "size"), [(0.1, 1), (0.3, 3), (0.5, 5), (0.94, 9)])
    def test_a_fraction_to_test_on(self, one_part: Path, fraction: float, size: int) -> None:
        data = folder(one_part, test_fraction=fraction, cache_dir=None)
        files = permuted([(k, i, 0) for k, n in enumerate((6, 4)) for i in range(n)])
        assert data.classes == ("cat", "dog")
        assert colours(data.test.images) == files[:size]
        assert colours(data.train.images) == files[size:]
        assert data.test.labels.tolist() == [colour[0] for colour in files[:size]]
        assert data.train.labels.tolist() == [colour[0] for colour in files[size:]]

    def test_order_comes_from_names_not_from_the_disk(self, tmp_path: Path) -> None:
        for name in ("b/2", "a/1", "b/0", "a/3"):
            picture(tmp_path / "set" / f"{name}.png", (ord(name[0]), int(name[2]), 0))
        data = folder(tmp_path / "set", test_fraction=0.25, cache_dir=None)
        files = permuted([(97, 1, 0), (97, 3, 0), (98, 0, 0), (98, 2, 0)])
        assert colours(torch.cat([data.test.images, data.train.images])) == files

    def test_relative_root(self, two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(two_parts)
        assert folder(Path("."), cache_dir=None).name == "set"

    def test_other_folders_beside_train_and_test(self, two_parts: Path) -> None:
        fill(two_parts / "val", {"cow": 1})
        assert folder(two_parts, cache_dir=None).classes == ("cat", "dog", "eel")

    def test_default_device_is_left_alone(self, two_parts: Path) -> None:
        torch.set_default_device("meta")
        try:
            data = folder(two_parts, cache_dir=None)
        finally:
            torch.set_default_device(None)
        assert data.train.images.device == data.train.labels.device == torch.device("cpu")


class TestImages:
    def test_common_formats(self, tmp_path: Path) -> None:
        for suffix in ("jpg", "JPEG", "png", "bmp", "webp", "ppm", "gif", "tif", "TIFF"):
            picture(tmp_path / "set" / "a" / f"x.{suffix}", (200, 100, 40))
        picture(tmp_path / "set" / "b" / "x.png", (200, 100, 40))
        data = folder(tmp_path / "set", test_fraction=0.1, cache_dir=None)
        assert len(data.train) + len(data.test) == 10
        images = torch.cat([data.train.images, data.test.images]).int()
        expected = torch.tensor([200, 100, 40]).view(1, 3, 1, 1)
        # JPEG and WebP are lossy: a flat colour survives to within a few steps of 255.
        assert (images - expected).abs().max() <= 4

    def test_other_pixels_become_rgb(self, tmp_path: Path) -> None:
        # 102 is in the web palette that PIL converts to, and below the threshold to black.
        rgb = Image.new("RGB", (4, 4), (102, 102, 102))
        for mode in ("1", "L", "LA", "P", "RGBA"):
            (tmp_path / mode).mkdir()
            rgb.convert(mode, dither=Image.Dither.NONE).save(tmp_path / mode / "x.png")
        (tmp_path / "CMYK").mkdir()
        rgb.convert("CMYK").save(tmp_path / "CMYK" / "x.tif")
        data = folder(tmp_path, test_fraction=0.2, cache_dir=None)
        for part in (data.train, data.test):
            for image, label in zip(part.images, part.labels.tolist(), strict=True):
                mode = data.classes[label]
                assert image.unique().tolist() == [0 if mode == "1" else 102], mode

    def test_hidden_and_other_files_are_passed_over(self, two_parts: Path) -> None:
        plain = folder(two_parts, cache_dir=None)
        (two_parts / "train" / "cat" / "notes.txt").write_text("not an image")
        (two_parts / "train" / "cat" / ".hidden.png").write_text("not an image")
        (two_parts / "train" / "cat" / "more.png").mkdir()
        (two_parts / "train" / ".cache").mkdir()
        (two_parts / "readme.png").write_text("not an image")
        assert same(folder(two_parts, cache_dir=None), plain)

    def test_image_size(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        for i, name in enumerate(("a", "b")):
            (tmp_path / name).mkdir()
            noise = generator.integers(0, 256, (9 + i, 14, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / "x.png")
        data = folder(tmp_path, image_size=5, test_fraction=0.5, cache_dir=None)
        for part in (data.train, data.test):
            with Image.open(tmp_path / data.classes[part.labels.item()] / "x.png") as image:  # type: ignore[index]  # int64 labels
                expected = np.asarray(ImageOps.fit(image, (5, 5)))
            assert np.array_equal(part.images[0].permute(1, 2, 0).numpy(), expected)

    @pytest.mark.parametrize("threaded_bytes", [0, 1 << 60])
    def test_threads_change_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threaded_bytes: int
    ) -> None:
        fill(tmp_path, {"a": 150, "b": 150})
        monkeypatch.setattr(reading, "_THREADED_BYTES", threaded_bytes)
        data = folder(tmp_path, test_fraction=0.5, cache_dir=None)
        files = permuted([(k, i, 0) for k in range(2) for i in range(150)])
        assert colours(torch.cat([data.test.images, data.train.images])) == files


class TestRefusals:
    def test_missing_root(self, tmp_path: Path) -> None:
        refusal(str(tmp_path / "none"), "No such file", root=tmp_path / "none")

    def test_root_is_a_file(self, tmp_path: Path) -> None:
        path = picture(tmp_path / "x.png")
        refusal(str(path), "Not a directory", root=path)

    def test_empty_root(self, tmp_path: Path) -> None:
        refusal(str(tmp_path), "at least 2, found none", root=tmp_path)

    def test_images_without_class_folders(self, tmp_path: Path) -> None:
        picture(tmp_path / "x.png")
        refusal("folder of images for each class", root=tmp_path)

    def test_one_class(self, tmp_path: Path) -> None:
        fill(tmp_path, {"cat": 3})
        refusal("at least 2, found cat", root=tmp_path, test_fraction=0.5)

    def test_one_class_in_train(self, tmp_path: Path) -> None:
        fill(tmp_path / "train", {"cat": 3})
        fill(tmp_path / "test", {"cat": 3})
        refusal(str(tmp_path / "train"), "at least 2", root=tmp_path)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_class_without_an_image(self, two_parts: Path, part: str) -> None:
        empty = two_parts / part / "dog"
        for path in empty.iterdir():
            path.rename(path.with_suffix(".txt"))
        refusal(str(empty), "no image", ".jpg", root=two_parts)

    def test_other_classes_in_test(self, two_parts: Path) -> None:
        (two_parts / "test" / "cat").rename(two_parts / "test" / "cow")
        refusal("same class folders", "cat, cow", root=two_parts)

    def test_many_other_classes_in_test(self, two_parts: Path) -> None:
        fill(two_parts / "test", {f"x{i}": 1 for i in range(5)})
        refusal("x0, x1, x2 and 2 more", root=two_parts)

    def test_test_folder_missing(self, two_parts: Path) -> None:
        (two_parts / "test").rename(two_parts / "val")
        refusal(str(two_parts / "train"), "holds folders", "test/<class>", root=two_parts)

    def test_fraction_beside_a_test_folder(self, two_parts: Path) -> None:
        refusal("its own test folder", "0.2", root=two_parts, test_fraction=0.2)

    def test_no_fraction(self, one_part: Path) -> None:
        refusal("no train and test folder", "--test-fraction", root=one_part)

    @pytest.mark.parametrize("fraction", [-0.5, 0.0, 1.0, 2.0, float("nan")])
    def test_fraction_out_of_range(self, one_part: Path, fraction: float) -> None:
        refusal("between 0 and 1", str(fraction), root=one_part, test_fraction=fraction)

    @pytest.mark.parametrize("fraction", [0.01, 0.99])
    def test_fraction_leaves_nothing(self, one_part: Path, fraction: float) -> None:
        refusal(str(fraction), "10 images", "both need one", root=one_part, test_fraction=fraction)

    @pytest.mark.parametrize("size", [0, -8])
    def test_image_size_out_of_range(self, two_parts: Path, size: int) -> None:
        refusal("at least 1 pixel", str(size), root=two_parts, image_size=size)

    def test_two_image_sizes(self, two_parts: Path) -> None:
        odd = picture(two_parts / "test" / "dog" / "odd.png", size=(7, 5))
        message = refusal(str(odd), "7x5", "6x6", "--image-size", root=two_parts)
        assert message.count(str(two_parts)) == 2
        assert folder(two_parts, image_size=6, cache_dir=None).test.images.shape == (7, 3, 6, 6)

    def test_truncated_jpeg(self, two_parts: Path) -> None:
        path = picture(two_parts / "train" / "eel" / "half.jpg", size=(64, 64))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refusal(str(path), "cannot be read as an image", root=two_parts, image_size=6)

    @pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
    def test_not_an_image(self, two_parts: Path, content: bytes, suffix: str) -> None:
        path = two_parts / "train" / "eel" / f"bad{suffix}"
        path.write_bytes(content)
        refusal(str(path), "cannot be read as an image", root=two_parts)

    def test_any_error_of_a_reader(self, two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(image: Image.Image, mode: str) -> None:
            raise SyntaxError("broken chunk\nin the file")

        monkeypatch.setattr(Image.Image, "convert", fail)
        refusal(".png cannot be read as an image", "broken chunk in the file", root=two_parts)

    def test_memory_error_is_no_damaged_image(
        self, two_parts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(image: Image.Image, mode: str) -> None:
            raise MemoryError

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(MemoryError):
            folder(two_parts, cache_dir=None)

    def test_of_several_bad_images_always_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(tmp_path, {"a": 150, "b": 150})
        for path in sorted((tmp_path / "b").iterdir())[::7]:
            path.write_bytes(b"")
        monkeypatch.setattr(reading, "_THREADED_BYTES", 0)
        assert len({refusal(root=tmp_path, test_fraction=0.5) for _ in range(3)}) == 1

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_more_than_8_bits(self, two_parts: Path, mode: str) -> None:
        path = two_parts / "train" / "cat" / "deep.tif"
        Image.new(mode, (6, 6), 3000).save(path)
        refusal(str(path), f"{mode} pixels", "8 bits", root=two_parts)

    def test_no_pillow(self, two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        refusal("Pillow", "fastres[train]", root=two_parts)

    def test_unreadable_class(self, two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # By a stand-in: the superuser, as whom tests often run, may read every folder.
        closed = two_parts / "train" / "cat"
        scan = os.scandir

        def scandir(path: Path) -> object:
            if path == closed:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", scandir)
        refusal(str(closed), "Permission denied", root=two_parts)
