"""ImageSet, ImageData and Splits, and how split divides and measures."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastres.data import DataError, ImageData, ImageSet, Splits, split


def pixels(n: int, height: int = 4, width: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, height, width, 3), generator=generator, dtype=torch.uint8)
    return images.permute(0, 3, 1, 2)


def image_set(n: int, classes: int = 3, seed: int = 0) -> ImageSet:
    return ImageSet(pixels(n, seed=seed), torch.arange(n) % classes)


def image_data(train: int, test: int, classes: int = 3) -> ImageData:
    names = tuple("abcdefgh"[:classes])
    return ImageData("tiny", names, image_set(train, classes), image_set(test, classes, seed=1))


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_import_brings_in_neither_torchvision_nor_pil() -> None:
    code = (
        "import sys, fastres.data; "
        "print(sorted({'PIL', 'torchvision'} & {name.split('.')[0] for name in sys.modules}))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]" and shown.stderr == ""


def test_data_error_is_a_value_error_of_one_line() -> None:
    error = DataError("a cause\nof two\tlines")
    assert isinstance(error, ValueError) and str(error) == "a cause of two lines"


class TestImageSet:
    def test_length_and_device(self) -> None:
        images = image_set(7)
        moved = images.to("meta")
        assert len(images) == len(moved) == 7
        assert moved.images.device.type == moved.labels.device.type == "meta"
        assert moved.images.is_contiguous(memory_format=torch.channels_last)
        same = images.to(torch.device("cpu"))
        assert same.images.data_ptr() == images.images.data_ptr()

    def test_is_frozen(self) -> None:
        with pytest.raises(FrozenInstanceError):
            image_set(1).labels = torch.zeros(1)  # type: ignore[misc]  # that is what is tested

    @pytest.mark.parametrize(
        ("images", "labels", "said"),
        [
            (pixels(4).float(), torch.arange(4), "float32"),
            (pixels(4)[0], torch.arange(4), r"\[3, 4, 5\]"),
            (pixels(4)[:, :1], torch.arange(4), r"\[4, 1, 4, 5\]"),
            (pixels(4)[:, :, :0], torch.arange(4), r"\[4, 3, 0, 5\]"),
            (pixels(4).contiguous(), torch.arange(4), "channels_last"),
            (pixels(4), torch.arange(4).int(), "int32"),
            (pixels(4), torch.arange(5), r"\[5\]"),
            (pixels(4), torch.arange(4).view(4, 1), r"\[4, 1\]"),
            (pixels(4), torch.arange(4, device="meta"), "cpu and meta"),
        ],
    )
    def test_refuses(self, images: Tensor, labels: Tensor, said: str) -> None:
        with pytest.raises(DataError, match=said) as error:
            ImageSet(images, labels)
        one_line(error)


class TestImageData:
    def test_no_training_image(self) -> None:
        with pytest.raises(DataError, match="no training image") as error:
            image_data(0, 3)
        one_line(error)

    def test_two_image_sizes(self) -> None:
        other = ImageSet(pixels(3, 6, 6), torch.arange(3))
        with pytest.raises(DataError, match=r"\(4, 5\).*\(6, 6\)") as error:
            ImageData("tiny", ("a", "b", "c"), image_set(3), other)
        one_line(error)

    @pytest.mark.parametrize("labels", [[0, 1, 3], [0, -1, 2]])
    def test_label_without_a_class(self, labels: list[int]) -> None:
        odd = ImageSet(pixels(3), torch.tensor(labels))
        for train, test in ((odd, image_set(3)), (image_set(3), odd)):
            with pytest.raises(DataError, match=r"\[0, 3\)") as error:
                ImageData("tiny", ("a", "b", "c"), train, test)
            one_line(error)


class TestSplit:
    @pytest.mark.parametrize(
        ("test", "dev"),
        [(2, 1), (3, 1), (19, 1), (20, 2), (999, 99), (1999, 199), (2000, 1000), (2500, 1000)],
    )
    def test_dev_is_the_first_of_test(self, test: int, dev: int) -> None:
        data = image_data(5, test)
        parts = split(data)
        assert (len(parts.dev), len(parts.test)) == (dev, test - dev)
        assert torch.equal(torch.cat([parts.dev.images, parts.test.images]), data.test.images)
        assert torch.equal(torch.cat([parts.dev.labels, parts.test.labels]), data.test.labels)
        assert (parts.name, parts.classes) == (data.name, data.classes)

    def test_copies_no_image(self) -> None:
        data = image_data(9, 30)
        parts = split(data, 5)
        assert parts.train.images.data_ptr() == data.train.images.data_ptr()
        assert parts.dev.images.data_ptr() == data.test.images.data_ptr()
        assert parts.test.images.data_ptr() == data.test.images[3:].data_ptr()

    @pytest.mark.parametrize("size", [1, 8, 9])
    def test_train_size_keeps_the_first(self, size: int) -> None:
        data = image_data(9, 4)
        parts = split(data, train_size=size)
        assert torch.equal(parts.train.images, data.train.images[:size])
        assert torch.equal(parts.train.labels, data.train.labels[:size])
        # Of the full set, whatever part of it is trained on.
        assert (parts.mean, parts.std) == (split(data).mean, split(data).std)

    @pytest.mark.parametrize("size", [-1, 0, 10])
    def test_train_size_out_of_range(self, size: int) -> None:
        with pytest.raises(DataError, match=f"1 to 9.*got {size}") as error:
            split(image_data(9, 4), train_size=size)
        one_line(error)

    @pytest.mark.parametrize("test", [0, 1])
    def test_too_few_test_images(self, test: int) -> None:
        with pytest.raises(DataError, match=f"{test} test image") as error:
            split(image_data(9, test))
        one_line(error)

    def test_one_class(self) -> None:
        with pytest.raises(DataError, match="at least 2") as error:
            split(image_data(9, 4, classes=1))
        one_line(error)

    def test_to(self) -> None:
        parts = split(image_data(9, 4))
        moved = parts.to("meta")
        assert isinstance(moved, Splits)
        for part in (moved.train, moved.dev, moved.test):
            assert part.images.device.type == "meta"
        assert (moved.name, moved.classes, moved.mean, moved.std) == (
            parts.name,
            parts.classes,
            parts.mean,
            parts.std,
        )


class TestMoments:
    @settings(max_examples=30, deadline=None)  # a loaded machine makes any deadline a lottery
    @given(
        n=st.integers(1, 6),
        height=st.integers(1, 5),
        width=st.integers(1, 5),
        top=st.sampled_from([1, 2, 256]),
        seed=st.integers(0, 10**6),
    )
    def test_are_exact(self, n: int, height: int, width: int, top: int, seed: int) -> None:
        images = (pixels(n, height, width, seed).int() % top + 256 - top).to(torch.uint8)
        test = ImageSet(pixels(2, height, width), torch.zeros(2, dtype=torch.int64))
        train = ImageSet(images, torch.zeros(n, dtype=torch.int64))
        parts = split(ImageData("any", ("a", "b"), train, test))
        for channel in range(3):
            values = [Fraction(v, 255) for v in images[:, channel].flatten().tolist()]
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            # Two roundings to fp64 in the code, one here.
            assert parts.mean[channel] == pytest.approx(float(mean), rel=1e-15, abs=0)
            std = float(variance) ** 0.5 if variance else 1.0
            assert parts.std[channel] == pytest.approx(std, rel=1e-15, abs=0)

    def test_over_several_chunks(self) -> None:
        data = image_data(3000, 4)
        parts = split(data)
        values = data.train.images.double().numpy() / 255
        # fp64 sums of 60,000 values: 60,000 roundings of 1.1e-16 at the very worst.
        np.testing.assert_allclose(parts.mean, values.mean((0, 2, 3)), rtol=1e-11)
        np.testing.assert_allclose(parts.std, values.std((0, 2, 3)), rtol=1e-11)

    def test_constant_channel_has_std_one(self) -> None:
        images = pixels(6).clone(memory_format=torch.preserve_format)
        images[:, 1] = 51
        train = ImageSet(images, torch.arange(6) % 2)
        parts = split(ImageData("flat", ("a", "b"), train, train))
        assert parts.mean[1] == 0.2 and parts.std[1] == 1.0
        assert parts.std[0] < 0.5 and parts.std[2] < 0.5

    def test_of_black_images(self) -> None:
        images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        black = ImageSet(images, torch.arange(2))
        parts = split(ImageData("black", ("a", "b"), black, black))
        assert parts.mean == (0.0, 0.0, 0.0) and parts.std == (1.0, 1.0, 1.0)
