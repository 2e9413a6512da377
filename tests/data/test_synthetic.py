"""The drawn data set: pure, balanced, beyond a linear classifier."""

import math
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from fastres.data import DataError, ImageData, split, synthetic

drawing = import_module("fastres.data.synthetic")


@pytest.fixture(scope="module")
def data() -> ImageData:
    return synthetic(train_size=3000, test_size=1000)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # On a busy machine two threads spend ten times as long waiting for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def equal(a: ImageData, b: ImageData) -> bool:
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
        for x, y in ((a.train, b.train), (a.test, b.test))
    )


def test_what_it_is(data: ImageData) -> None:
    assert data.name == "synthetic"
    assert data.classes == (
        *("disk", "ring", "square", "frame", "triangle"),
        *("cross", "bar", "star", "crescent", "dots"),
    )
    assert data.train.images.shape == (3000, 3, 32, 32)
    assert data.test.images.shape == (1000, 3, 32, 32)
    parts = split(data)
    assert (len(parts.train), len(parts.dev), len(parts.test)) == (3000, 100, 900)


def test_defaults() -> None:
    whole = synthetic()
    assert (len(whole.train), len(whole.test)) == (8000, 2000)
    assert whole.train.images.shape[2:] == (32, 32)


def test_is_a_pure_function(data: ImageData) -> None:
    state = torch.random.get_rng_state()
    again = synthetic(train_size=3000, test_size=1000)
    assert equal(data, again)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_does_not_depend_on_the_number_of_threads(data: ImageData) -> None:
    torch.set_num_threads(2)
    try:
        two = synthetic(500, 1)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(two.train.images, data.train.images[:500])


def test_does_not_depend_on_default_dtype_or_device() -> None:
    plain = synthetic(20, 20, image_size=8)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        other = synthetic(20, 20, image_size=8)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert equal(plain, other)


@pytest.mark.parametrize("size", [1, 500, 501])
def test_a_larger_set_begins_with_the_smaller(data: ImageData, size: int) -> None:
    small = synthetic(train_size=size, test_size=size)
    assert torch.equal(small.train.images, data.train.images[:size])
    assert torch.equal(small.train.labels, data.train.labels[:size])
    assert torch.equal(small.test.images, data.test.images[:size])
    assert torch.equal(small.test.labels, data.test.labels[:size])


def test_no_two_images_are_the_same(data: ImageData) -> None:
    other = synthetic(500, 500, seed=1)
    images = [x.images for x in (data.train, data.test, other.train, other.test)]
    rows = {row.numpy().tobytes() for row in torch.cat(images).flatten(1)}
    assert len(rows) == 3000 + 1000 + 500 + 500


def test_classes_are_balanced_and_mixed(data: ImageData) -> None:
    for part in (data.train, data.test):
        for block in part.labels.split(500):
            assert torch.bincount(block, minlength=10).tolist() == [50] * 10
    # 100 labels at random: the rarest class is missing with a chance of 3e-4, for this seed not.
    assert len(data.train.labels[:100].unique()) == 10


@pytest.mark.parametrize("size", [8, 9, 33, 64])
def test_any_image_size(size: int) -> None:
    drawn = synthetic(20, 20, image_size=size)
    assert drawn.train.images.shape == (20, 3, size, size)
    assert drawn.train.images.float().std(dim=(2, 3)).min() > 2  # no image is one flat colour


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train_size": 0}, "train size.*1, got 0"),
        ({"test_size": -3}, "test size.*1, got -3"),
        ({"image_size": 7}, "image size.*8, got 7"),
        ({"seed": -1}, "seed.*0, got -1"),
    ],
)
def test_refuses(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        synthetic(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("disk", math.pi * 0.85**2),
        ("ring", math.pi * (0.9**2 - 0.54**2)),
        ("square", 1.5**2),
        ("frame", 1.64**2 - 0.92**2),
        ("triangle", 3 * math.sqrt(3) * 0.5**2),
        ("cross", 2 * 1.9 * 0.52 - 0.52**2),
        ("bar", 2 * 0.6),
        ("star", 5 * 1.05 * 0.42 * math.sin(math.pi / 5)),
        ("dots", 2 * math.pi * 0.4**2),
    ],
)
def test_shapes_cover_their_area(name: str, area: float) -> None:
    n = 500
    axis = (torch.arange(n) * 2 + 1) / n * 1.25 - 1.25
    inside = drawing._SHAPES[name](axis.view(1, 1, n), axis.view(1, n, 1)) < 0
    # An outline of up to 12 units crosses 12/0.005 cells, each half wrong at worst, and the
    # errors fall on both sides: 1 % is far more than is left.
    assert inside.sum().item() * (2.5 / n) ** 2 == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize("name", list(drawing._SHAPES))
def test_a_mirrored_shape_is_the_same_shape_turned(name: str) -> None:
    x, y = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shape = drawing._SHAPES[name]
    there = shape(x, y)
    mirrored = [(shape(-x, y) - there).abs().max(), (shape(x, -y) - there).abs().max()]
    assert min(mirrored) < 1e-5  # fp32 rounding of coordinates of order 1


def test_the_ground_tells_nothing(data: ImageData) -> None:
    # Corners lie outside every shape most of the time. 300 images of a class, standard deviation
    # about 60 of 255: the mean of a class strays by 3.5, four times that is allowed.
    corners = data.train.images[:, :, ::31, ::31].float().mean(dim=(2, 3))
    means = torch.stack([corners[data.train.labels == k].mean(dim=0) for k in range(10)])
    assert (means - means.mean(dim=0)).abs().max() < 14


@pytest.mark.parametrize("size", [16, 32])
def test_a_linear_classifier_stays_under_60_percent(data: ImageData, size: int) -> None:
    parts = split(data if size == 32 else synthetic(3000, 1000, image_size=size))
    mean, std = torch.tensor(parts.mean).view(3, 1, 1), torch.tensor(parts.std).view(3, 1, 1)
    x, held_out = [
        ((part.images / 255 - mean) / std).flatten(1) for part in (parts.train, parts.test)
    ]
    y, truth = parts.train.labels, parts.test.labels
    for decay in (0.01, 1.0):
        weight = torch.zeros(x.shape[1], 10, requires_grad=True)
        bias = torch.zeros(10, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=20, line_search_fn="strong_wolfe")

        def loss(
            weight: torch.Tensor = weight,
            bias: torch.Tensor = bias,
            decay: float = decay,
            optimizer: torch.optim.LBFGS = optimizer,
        ) -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight + bias, y) + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            train = ((x @ weight + bias).argmax(1) == y).float().mean().item()
            test = ((held_out @ weight + bias).argmax(1) == truth).float().mean().item()
        # It has learned what it can, above the 10 % of chance, and that is not enough.
        assert train > 0.3
        assert 0.15 < test < 0.6
