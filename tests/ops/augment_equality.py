"""What the tests of augment share: images, the paper's Philox, and the comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from hypothesis import strategies as st
from tolerances import store_error, store_floor
from torch import Tensor

from fastres.ops import _register
from fastres.ops.augment import _draw, augment_reference

SEEDS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, -1, 2**31, 2**32 - 1, 2**32])
EPOCHS = st.integers(0, 2**32 - 1) | st.integers(0, 3) | st.just(2**31)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.channels_last, torch.contiguous_format]


@contextmanager
def native() -> Iterator[None]:
    """CPU tensors take PyTorch's path, where they would take the kernels in the interpreter."""
    with mock.patch.object(_register, "INTERPRET", False):
        yield


def data(
    N: int, C: int = 3, H: int = 8, W: int = 8, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, mean and std."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (N, C, H, W), dtype=torch.uint8, generator=g)
    images = images.contiguous(memory_format=torch.channels_last)
    mean, std = torch.rand(C, generator=g), torch.rand(C, generator=g) + 0.1
    return images.to(device), mean.to(device), std.to(device)


def restride(images: Tensor, kind: str) -> Tensor:
    """The same images in another layout."""
    N, C, H, W = images.shape
    if kind == "nchw":
        return images.contiguous()
    if kind == "transposed":
        return images.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "slice":
        larger = images.new_full((2 * N, C + 1, H + 3, 2 * W), 77)
        view = larger[::2, 1:, 2:-1, 1::2]
        view.copy_(images)
        return view
    if kind == "images last":
        return images.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return images


def python_philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox 4x32-10 in integers of any size, as the paper writes it."""
    mask = 2**32 - 1
    k0, k1 = seed % 2**32, (seed >> 32) % 2**32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p2 >> 32) ^ c1 ^ k0, p2 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def check(
    y: Tensor,
    images: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int = 0,
    epoch: int = 0,
    padding: int = 4,
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> None:
    """y against the reference, bit for bit: each operation on a pixel is correctly rounded.

    The reference is given _draw's crops, which test_augment_draws compares with the paper's Philox.
    """
    images, index, mean, std = (t.cpu() for t in (images, index, mean, std))
    draw = _draw(index, seed, epoch, padding, flip)
    want = augment_reference(images, index, mean, std, *draw, padding)
    assert y.dtype == dtype
    assert y.shape == want.shape
    assert y.is_contiguous(memory_format=memory_format), y.stride()
    y = y.cpu()
    if dtype == torch.bfloat16 and _register.INTERPRET:
        # Triton's interpreter truncates to bf16.
        bound = store_error(dtype) * want.abs() + store_floor(dtype)
        assert ((y.float() - want).abs() <= bound).all(), "y is off by more than its rounding"
    else:
        assert torch.equal(y, want.to(dtype)), "y is not the reference"
