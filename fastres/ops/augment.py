"""A training batch from a data set that lives on the device, as one op; and the epoch's order.

    y = (pixel / 255 - mean) / std   of a random crop from zero padding, mirrored or not

Read from the top: the reference, the registered op, the functions. What is drawn is a pure function
of (seed, epoch, image index): it does not depend on the device, the batch or the number of ranks.
Source: He et al. 2016, arXiv:1512.03385, section 4.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.ops._philox import CROP_STREAM, SHUFFLE_STREAM, philox
from fastres.ops._register import kernels, register_op, takes_kernels


def augment_reference(
    images: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    tops: Tensor,
    lefts: Tensor,
    mirrored: Tensor,
    padding: int,
) -> Tensor:
    """The definition of augment, image by image, given what was drawn for each.

    Args:
        tops, lefts: integers [B], the crop's corner in the padded image, each in [0, 2*padding].
        mirrored: bool [B].
    """
    H, W = images.shape[2:]
    batch = []
    draws = zip(index.tolist(), tops.tolist(), lefts.tolist(), mirrored.tolist(), strict=True)
    for i, top, left, mirror in draws:
        padded = F.pad(images[i], (padding,) * 4)
        crop = padded[:, top : top + H, left : left + W]
        if mirror:
            crop = torch.flip(crop, dims=[2])
        batch.append((crop.float() / 255 - mean[:, None, None]) / std[:, None, None])
    return torch.stack(batch)


@register_op("augment")
def _augment(
    images: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: int,
    epoch: int,
    epoch_tensor: Tensor | None,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """y [B, C, H, W] of dtype, dense, NHWC in memory with channels_last, else NCHW; no gradient.

    epoch counts where there is no epoch_tensor.
    """
    return kernels("augment", images).augment_fwd(
        images, index, (mean, std), seed, epoch if epoch_tensor is None else epoch_tensor, padding,
        flip, dtype, channels_last,
    )  # fmt: skip


@_augment.register_fake
def _(
    images: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: int,
    epoch: int,
    epoch_tensor: Tensor | None,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return kernels("augment", images).empty_output(images, index, dtype, channels_last)


def augment(
    images: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int = 0,
    epoch: int | Tensor = 0,
    padding: int = 4,
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Gather images, crop each at random from zero padding, flip at random, normalise and cast.

    y[b] = (crop(images[index[b]]) / 255 - mean) / std

    One Triton kernel on a GPU, a few PyTorch ops on a CPU, and bitwise the same y. The crop and the
    flip of an image depend on (seed, epoch, index) alone. With padding=0 and flip=False nothing is
    drawn, and y is the normalised image: evaluation's path.

    Args:
        images: uint8 [N, C, H, W], the whole data set, any strides; fastest in channels_last.
        index: int64 [B], the images of this batch, each in [0, N). One outside raises IndexError on
            a CPU; on a GPU, where asking would wait for the device, its y is NaN.
        mean, std: fp32 [C], of pixels scaled to [0, 1].
        seed: of the run, 64 bits.
        epoch: 0 <= epoch < 2^32; a tensor, int64 of one element, is read on the device, of whose
            value the lower 32 bits count.
        padding: black pixels added on each side before the crop, 0 <= padding < min(H, W).
        flip: whether every other image on average is mirrored, left to right.
        dtype: of y, fp32, fp16 or bf16.
        memory_format: of y, torch.channels_last or torch.contiguous_format.
    Returns:
        [B, C, H, W] in dtype and memory_format; arithmetic in fp32. No gradient.
    Raises:
        ValueError: a shape, dtype, device, memory format or number that does not fit.
    Source: He et al. 2016, arXiv:1512.03385, section 4.2; drawn by Philox 4x32-10 (Salmon et al.
    2011).
    """
    _check(images, index, mean, std, seed, epoch, padding, dtype, memory_format)
    channels_last = memory_format == torch.channels_last
    if not takes_kernels(images):
        return _native(images, index, mean, std, seed, epoch, padding, flip, dtype, channels_last)
    number, tensor = (0, epoch) if isinstance(epoch, Tensor) else (epoch, None)
    return torch.ops.fastres.augment.default(
        images, index, mean.contiguous(), std.contiguous(), seed, number, tensor, padding, flip,
        dtype, channels_last,
    )  # fmt: skip


def _draw(
    index: Tensor, seed: int, epoch: int | Tensor, padding: int, flip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's crop, tops and lefts int64 [B] in [0, 2*padding], and whether it is mirrored."""
    if isinstance(epoch, Tensor):
        epoch = epoch & 0xFFFFFFFF
    words = philox(seed, index, epoch, CROP_STREAM)
    # The high half of word * span is uniform in [0, span) to 2^-32, without a division.
    tops, lefts = ((word * (2 * padding + 1)) >> 32 for word in words[:2])
    return tops, lefts, (words[2] >= 1 << 31) & flip


def _native(
    images: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: int,
    epoch: int | Tensor,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The CPU's path: the batch's pixels, C bytes each, are picked by their number."""
    B, (C, H, W) = index.shape[0], images.shape[1:]
    pixels = images.permute(0, 2, 3, 1).index_select(0, index)
    if padding > 0 or flip:
        tops, lefts, mirrored = _draw(index, seed, epoch, padding, flip)
        pixels = F.pad(pixels, (0, 0, padding, padding, padding, padding))
        Hp, Wp = H + 2 * padding, W + 2 * padding
        h = torch.arange(H, device=images.device) + tops[:, None]
        w = torch.arange(W, device=images.device)
        w = torch.where(mirrored[:, None], w.flip(0), w) + lefts[:, None]
        rows = torch.arange(B, device=images.device)[:, None] * Hp + h
        numbers = (rows * Wp)[:, :, None] + w[:, None, :]
        pixels = pixels.view(B * Hp * Wp, C).index_select(0, numbers.view(-1))
    # The layout is chosen while elements are bytes. Then mean and std are laid out for runs of W*C
    # or H*W values: over three channels PyTorch's inner loop would have three elements to do.
    if channels_last:
        pixels = pixels.view(B, H, W * C)
        mean, std = mean.repeat(W), std.repeat(W)
    else:
        pixels = pixels.view(B, H, W, C).permute(0, 3, 1, 2).contiguous()
        mean, std = mean[:, None, None], std[:, None, None]
    y = pixels.float().div_(255).sub_(mean).div_(std).to(dtype)
    return y.view(B, H, W, C).permute(0, 3, 1, 2) if channels_last else y


def shuffle(n: int, seed: int, epoch: int, device: torch.device | str) -> Tensor:
    """The epoch's order of n images: a permutation that depends on (seed, epoch) alone.

    Images are sorted by 64 random bits each, which every device draws and sorts alike; two equal
    keys, one chance in 10^10 for 50,000 images, keep their order.

    Args:
        n: number of images, 0 <= n <= 2^32.
        seed: of the run, 64 bits; epoch: 0 <= epoch < 2^32.
        device: where the permutation is made.
    Returns:
        int64 [n], a permutation of 0 .. n - 1.
    Raises:
        ValueError: n, seed or epoch out of range.
    """
    if not 0 <= n <= 1 << 32:
        raise ValueError(f"n: expected 0 <= n <= 2**32, got {n}")
    _check_seed(seed)
    _check_epoch(epoch)
    number = torch.arange(n, device=device)
    high, low, _, _ = philox(seed, number, epoch, SHUFFLE_STREAM)
    # Shifted to be signed first, so that nothing overflows.
    keys = (high - (1 << 31)) * (1 << 32) + low
    return torch.argsort(keys, stable=True)


def _check_seed(seed: int) -> None:
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed: expected -2**63 <= seed < 2**63, got {seed}")


def _check_epoch(epoch: int) -> None:
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch: expected 0 <= epoch < 2**32, got {epoch}")


def _check(
    images: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: int,
    epoch: int | Tensor,
    padding: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(
            f"images: expected [N, C, H, W] in torch.uint8, got {list(images.shape)} in "
            f"{images.dtype}"
        )
    if index.dim() != 1 or index.dtype != torch.int64 or index.device != images.device:
        raise ValueError(
            f"index: expected [B] in torch.int64 on {images.device}, got {list(index.shape)} in "
            f"{index.dtype} on {index.device}"
        )
    for name, v in (("mean", mean), ("std", std)):
        fits = v.shape == images.shape[1:2] and v.device == images.device
        if not fits or v.dtype != torch.float32:
            raise ValueError(
                f"{name}: expected [{images.shape[1]}] in torch.float32 on {images.device}, got "
                f"{list(v.shape)} in {v.dtype} on {v.device}"
            )
    _check_seed(seed)
    if not isinstance(epoch, Tensor):
        _check_epoch(epoch)
    elif epoch.numel() != 1 or epoch.dtype != torch.int64 or epoch.device != images.device:
        raise ValueError(
            f"epoch: expected one element in torch.int64 on {images.device}, got "
            f"{list(epoch.shape)} in {epoch.dtype} on {epoch.device}"
        )
    side = min(images.shape[2:])
    if not 0 <= padding < side:
        raise ValueError(f"padding: expected 0 <= padding < min(H, W) = {side}, got {padding}")
    allowed = [torch.float32, torch.float16, torch.bfloat16]
    if dtype not in allowed:
        raise ValueError(f"dtype: expected one of {allowed}, got {dtype}")
    formats = [torch.channels_last, torch.contiguous_format]
    if memory_format not in formats:
        raise ValueError(f"memory_format: expected one of {formats}, got {memory_format}")
