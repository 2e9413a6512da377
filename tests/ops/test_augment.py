"""augment against its reference, in Triton and in PyTorch alike, and what it refuses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.augment_equality import DTYPES, EPOCHS, FORMATS, SEEDS, check, data, native, restride
from torch._dynamo.testing import CompileCounterWithBackend

import fastres.kernels.augment as augment_kernels
from fastres.kernels._launch import launch, record
from fastres.ops import _register, augment


@pytest.fixture(params=["kernel", "native"])
def place(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The device of a test that runs twice: on the Triton kernel and on PyTorch's CPU path."""
    if request.param == "kernel":
        yield device
    else:
        with native():
            yield "cpu"


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (5, 4, 7, 7))),
    B=st.integers(1, 4),
    kind=st.sampled_from(["nhwc", "nchw", "transposed", "slice", "images last"]),
    step=st.integers(1, 2),
    seed=SEEDS,
    epoch=EPOCHS,
    padding=st.integers(0, 4),
    flip=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(FORMATS),
)
def test_is_the_reference(
    place: str, shape: tuple[int, ...], B: int, kind: str, step: int, padding: int, **options: Any
) -> None:
    images, mean, std = data(*shape, seed=B, device=place)
    images = restride(images, kind)
    g = torch.Generator().manual_seed(B)
    index = torch.randint(0, shape[0], (B * step,), generator=g).to(place)[::step]
    options["padding"] = min(padding, min(shape[2:]) - 1)
    y = augment(images, index, mean, std, **options)
    check(y, images, index, mean, std, **options)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_several_tiles(
    place: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """More elements than a program writes, and a last tile that is not full."""
    images, mean, std = data(3, 3, 21, 23, device=place)
    index = torch.tensor([2, 0, 2], device=place)
    options: dict[str, Any] = dict(seed=5, epoch=2, dtype=dtype, memory_format=memory_format)
    y = augment(images, index, mean, std, **options)
    check(y, images, index, mean, std, **options)


def test_every_pixel_value_is_divided_exactly(place: str) -> None:
    images = torch.arange(256, dtype=torch.uint8, device=place).view(1, 1, 16, 16)
    index, ones = torch.zeros(1, dtype=torch.int64, device=place), torch.ones(1, device=place)
    y = augment(images, index, 0 * ones, ones, padding=0, flip=False)
    assert torch.equal(y.cpu().flatten(), torch.arange(256.0) / 255)


def test_evaluation_draws_nothing(place: str) -> None:
    images, mean, std = data(6, device=place)
    index = torch.tensor([5, 1, 3], device=place)
    y = augment(images, index, mean, std, padding=0, flip=False)
    want = images[index].cpu().float() / 255
    want = (want - mean.cpu()[:, None, None]) / std.cpu()[:, None, None]
    assert torch.equal(y.cpu(), want)
    again = augment(images, index, mean, std, padding=0, flip=False, seed=7, epoch=3)
    assert torch.equal(y, again)


def test_an_image_does_not_know_its_batch(place: str) -> None:
    images, mean, std = data(12, device=place)
    everything = augment(images, torch.arange(12, device=place), mean, std, seed=3, epoch=4)
    # Any order, any repetition, any split over ranks.
    for index in ([7], [3, 3], [11, 0, 5], list(range(1, 12, 4)), list(range(11, -1, -1))):
        y = augment(images, torch.tensor(index, device=place), mean, std, seed=3, epoch=4)
        assert torch.equal(y, everything[index])


def test_an_index_out_of_range_reads_nothing(place: str) -> None:
    images, mean, std = data(4, device=place)
    index = torch.tensor([-1, 2, 4, 2**40], device=place)
    if not _register.takes_kernels(images):
        with pytest.raises(IndexError):
            augment(images, index, mean, std)
        return
    y = augment(images, index, mean, std)
    assert y[[0, 2, 3]].isnan().all() and not y[1].isnan().any()


def test_empty(place: str) -> None:
    images, mean, std = data(4, device=place)
    nothing = torch.zeros(0, dtype=torch.int64, device=place)
    for memory_format in FORMATS:
        y = augment(images, nothing, mean, std, memory_format=memory_format)
        assert y.shape == (0, 3, 8, 8) and y.is_contiguous(memory_format=memory_format)
    assert augment(images[:0], nothing, mean, std).shape == (0, 3, 8, 8)


def test_expanded_mean_and_std(place: str) -> None:
    images, mean, std = data(2, device=place)
    index = torch.tensor([1, 0], device=place)
    mean, std = mean[:1].expand(3), std[:1].expand(3)
    check(augment(images, index, mean, std), images, index, mean, std)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(device: str, memory_format: torch.memory_format) -> None:
    images, mean, std = data(4, device=device)
    index = torch.tensor([3, 0], device=device)
    channels_last = memory_format == torch.channels_last
    for epoch in (None, torch.tensor([2], device=device)):
        args = (images, index, mean, std, 1, 2, epoch, 2, True, torch.float16, channels_last)
        torch.library.opcheck(torch.ops.fastres.augment.default, args)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_an_epoch_on_the_device(place: str, shape: tuple[int, ...]) -> None:
    """Read where the images are; of one out of range the lower 32 bits count."""
    images, mean, std = data(8, device=place)
    index = torch.tensor([3, 0, 5], device=place)
    for epoch, same in ((0, 0), (7, 7), (2**32 + 7, 7), (-1, 2**32 - 1)):
        there = torch.full(shape, epoch, dtype=torch.int64, device=place)
        y = augment(images, index, mean, std, seed=1, epoch=there)
        assert torch.equal(y, augment(images, index, mean, std, seed=1, epoch=same))


def test_compiles_once_for_all_epochs(place: str) -> None:
    images, mean, std = data(8, device=place)
    index = torch.tensor([3, 0, 5], device=place)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if images.is_cuda else "aot_eager")
    compiled = torch.compile(augment, fullgraph=True, backend=counter)
    # The third graph takes the epoch as a symbol; 0 and 1 are PyTorch's to specialise on.
    for epoch in range(6):
        y = compiled(images, index, mean, std, seed=1, epoch=epoch)
        assert torch.equal(y, augment(images, index, mean, std, seed=1, epoch=epoch))
    assert counter.frame_count <= 3


def test_no_epoch_and_no_seed_has_a_kernel_of_its_own() -> None:
    kernel = augment_kernels._augment_fwd_kernel
    options = getattr(kernel, "kwargs", None) or vars(kernel)
    assert {"N", "seed", "epoch"} <= set(options["do_not_specialize"])


def test_launches_on_meta_tensors() -> None:
    """What a build without a GPU takes; 64-bit offsets inside an image where it is that large."""
    images = torch.empty(7, 3, 8, 8, dtype=torch.uint8, device="meta")
    far = images.as_strided(images.shape, (1, 2**30, 8, 1))
    index, mean = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(3, device="meta")
    with record() as launches:
        for t in (images, far):
            augment_kernels.augment_fwd(t, index, (mean, mean), 0, 0, 4, True, mean.dtype, True)
    assert [entry.constexprs["WIDE"] for entry in launches] == [False, True]


def test_64_bit_offsets(device: str) -> None:
    images, mean, std = data(4, device=device)
    index = torch.tensor([3, 1], device=device)
    with record() as launches:
        y = augment_kernels.augment_fwd(
            images, index, (mean, std), 9, 2, 3, True, torch.float32, True
        )
    (entry,) = launches
    constexprs = entry.constexprs | {"WIDE": True}
    launch(entry.kernel, entry.grid, *entry.args, num_warps=entry.num_warps, **constexprs)
    check(y, images, index, mean, std, seed=9, epoch=2, padding=3)


def _invalid() -> list[tuple[str, dict[str, Any]]]:
    images, mean, std = data(4)
    index = torch.tensor([1, 0])
    return [
        ("images: expected", dict(images=images[0])),
        ("images: expected", dict(images=images.float())),
        ("index: expected", dict(index=index[None])),
        ("index: expected", dict(index=index.int())),
        ("index: expected", dict(index=index.to("meta"))),
        ("mean: expected", dict(mean=mean[:2])),
        ("mean: expected", dict(mean=mean.double())),
        ("std: expected", dict(std=std[:, None])),
        ("std: expected", dict(std=std.to("meta"))),
        ("seed: expected", dict(seed=2**63)),
        ("seed: expected", dict(seed=-(2**63) - 1)),
        ("epoch: expected", dict(epoch=-1)),
        ("epoch: expected", dict(epoch=2**32)),
        ("epoch: expected", dict(epoch=torch.zeros(2, dtype=torch.int64))),
        ("epoch: expected", dict(epoch=torch.zeros(1))),
        ("epoch: expected", dict(epoch=torch.zeros((), dtype=torch.int64, device="meta"))),
        ("padding: expected", dict(padding=-1)),
        ("padding: expected", dict(padding=8)),
        ("dtype: expected", dict(dtype=torch.float64)),
        ("memory_format: expected", dict(memory_format=torch.preserve_format)),
    ]


@pytest.mark.parametrize(("message", "change"), _invalid())
def test_invalid_arguments(message: str, change: dict[str, Any]) -> None:
    images, mean, std = data(4)
    valid: dict[str, Any] = dict(images=images, index=torch.tensor([1, 0]), mean=mean, std=std)
    with pytest.raises(ValueError, match=message):
        augment(**(valid | change))


@pytest.mark.gpu
@pytest.mark.huge(3)  # 2^31 bytes of images, and room
def test_a_data_set_beyond_2_to_the_31() -> None:
    N = 2**31 // 3072 + 100
    images = torch.zeros(N, 32, 32, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    last, mean, std = data(1, 3, 32, 32)
    images[N - 1] = last[0].cuda()
    index = torch.tensor([0, N - 1], device="cuda")
    y = augment(images, index, mean.cuda(), std.cuda(), padding=0, flip=False)
    want = (last[0].float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(y[1].cpu(), want)
