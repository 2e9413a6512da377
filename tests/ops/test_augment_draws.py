"""What augment and shuffle draw: from which words, how evenly, and the same everywhere."""

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.augment_equality import DTYPES, EPOCHS, FORMATS, SEEDS, data, native, python_philox

import fastres.kernels.augment as augment_kernels
from fastres.ops import augment, shuffle
from fastres.ops._philox import CROP_STREAM, SHUFFLE_STREAM
from fastres.ops.augment import _draw


@given(
    seed=SEEDS,
    epoch=EPOCHS,
    padding=st.integers(0, 5),
    flip=st.booleans(),
    images=st.lists(st.integers(0, 2**32 - 1), max_size=4),
)
def test_the_draw_is_the_documented_one(
    seed: int, epoch: int, padding: int, flip: bool, images: list[int]
) -> None:
    index = torch.tensor(images, dtype=torch.int64)
    tops, lefts, mirrored = _draw(index, seed, epoch, padding, flip)
    for i, top, left, mirror in zip(images, tops, lefts, mirrored, strict=True):
        words = python_philox(seed, (i, epoch, CROP_STREAM, 0))
        assert top == words[0] * (2 * padding + 1) // 2**32
        assert left == words[1] * (2 * padding + 1) // 2**32
        assert mirror == (flip and words[2] >= 2**31)


def test_the_streams_are_apart() -> None:
    assert augment_kernels.STREAM.value == CROP_STREAM != SHUFFLE_STREAM


def test_draws_are_uniform() -> None:
    """Pearson's chi-squared of 81 crops x 2 flips: 161 degrees of freedom, mean 161, std 18."""
    n = 81 * 2 * 200
    tops, lefts, mirrored = _draw(torch.arange(n), 0, 0, 4, True)
    counts = torch.bincount((tops * 9 + lefts) * 2 + mirrored, minlength=162).double()
    assert ((counts - 200) ** 2 / 200).sum() < 161 + 4 * 18
    # Nor does an epoch say anything about the next: the same for pairs of crops.
    following = _draw(torch.arange(n), 0, 1, 4, True)
    counts = torch.bincount(tops * 9 + following[0], minlength=81).double()
    assert ((counts - 400) ** 2 / 400).sum() < 80 + 4 * 13


def test_both_paths_draw_alike(device: str) -> None:
    images, mean, std = data(9)
    index = torch.arange(9)
    inputs = [t.to(device) for t in (images, index, mean, std)]
    pairs = list(itertools.product((0, 1, -5, 2**40 + 16), (0, 1, 16, 2**31)))
    kernel = [augment(*inputs, seed=seed, epoch=epoch).cpu() for seed, epoch in pairs]
    with native():
        cpu = [augment(images, index, mean, std, seed=seed, epoch=epoch) for seed, epoch in pairs]
    assert all(torch.equal(a, b) for a, b in zip(kernel, cpu, strict=True))
    # And no two of the sixteen drew the same.
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(cpu, 2))


@given(n=st.integers(0, 300), seed=SEEDS, epoch=EPOCHS)
def test_shuffle_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = shuffle(n, seed, epoch, "cpu")
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    words = [python_philox(seed, (i, epoch, SHUFFLE_STREAM, 0)) for i in range(n)]
    assert order.tolist() == sorted(range(n), key=lambda i: words[i][:2])


def test_shuffle_depends_on_seed_and_epoch_alone(device: str) -> None:
    orders = [shuffle(1000, seed, epoch, device).cpu() for seed in range(3) for epoch in range(3)]
    with native():
        assert torch.equal(orders[0], shuffle(1000, 0, 0, torch.device("cpu")))
    for a, b in itertools.combinations(orders, 2):
        # Two random permutations agree in one place on average.
        assert (a == b).sum() < 10


def test_shuffle_is_uniform() -> None:
    """Where images 0 and 9 go, over 1,000 epochs: chi-squared of 10 places, mean 9, std 4.2."""
    places = torch.stack([torch.argsort(shuffle(10, 0, e, "cpu")) for e in range(1000)])
    for image in (0, 9):
        counts = torch.bincount(places[:, image], minlength=10).double()
        assert ((counts - 100) ** 2 / 100).sum() < 9 + 4 * 4.2


# Inductor, because of what it does to integers: see fastres/ops/_philox.py.
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_shuffle_compiles(backend: str) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(shuffle, fullgraph=True, backend=backend)
    for n, seed, epoch in ((50, 0, 0), (50, 1, 1), (50, -7, 2**31)):
        assert torch.equal(compiled(n, seed, epoch, "cpu"), shuffle(n, seed, epoch, "cpu"))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("n: expected", (-1, 0, 0)),
        ("n: expected", (2**32 + 1, 0, 0)),
        ("seed: expected", (3, 2**63, 0)),
        ("epoch: expected", (3, 0, -1)),
    ],
)
def test_shuffle_invalid_arguments(message: str, arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=message):
        shuffle(*arguments, "cpu")


@pytest.mark.gpu
def test_the_gpu_draws_as_the_cpu() -> None:
    images, mean, std = data(2000, 3, 32, 32)
    inputs = [t.cuda() for t in (images, mean, std)]
    rng = random.Random(0)
    for epoch in (0, 1, 16, 2**31):
        seed = rng.randrange(-(2**63), 2**63)
        index = shuffle(2000, seed, epoch, "cpu")
        assert torch.equal(index, shuffle(2000, seed, epoch, "cuda").cpu())
        for dtype, memory_format in itertools.product(DTYPES, FORMATS):
            options: dict[str, Any] = dict(
                seed=seed, epoch=epoch, dtype=dtype, memory_format=memory_format
            )
            y = augment(inputs[0], index.cuda(), *inputs[1:], **options)
            assert torch.equal(y.cpu(), augment(images, index, mean, std, **options))
