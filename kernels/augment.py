"""Gather by index, random crop from zero padding, random flip, normalise and cast, in one pass.

    y = (pixel / 255 - mean) / std

A program writes one tile of one image in y's own layout order and finds each pixel where the crop
and the flip put it; the image's draw (Philox 4x32-10) costs less than storing it would.

Least bytes moved, with e bytes an output element: 1 + e (the pixel once, y once). Every step
of the arithmetic is correctly rounded, so that y is bitwise what PyTorch computes on a CPU.
"""

import torch
import triton
import triton.language as tl

from ._integers import cdiv
from ._launch import launch
from ._tiles import empty_images

__all__ = ["augment_fwd", "empty_output"]

# CROP_STREAM of fastres.ops._philox: the CPU's path draws from the same one.
STREAM = tl.constexpr(1)
# 1/255 in two parts. A pixel times the first is exact, so the sum is pixel / 255 correctly rounded,
# contracted to an FMA or not, at a sixth of a division's instructions.
HIGH = tl.constexpr(257 / 65536)
LOW = tl.constexpr(1 / (255 * 65536))
# Eight elements a thread; an image of 3x32x32 is three tiles without a remainder. Not tuned yet.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _bounded(word, span: tl.constexpr):
    """A 32-bit word as an integer in [0, span): the high half of word * span."""
    return ((word.to(tl.uint64) * span) >> 32).to(tl.int32)


# These change from set to set, run to run, epoch to epoch and batch to batch (index may be a slice
# that begins anywhere): none of them may compile the kernel again.
@triton.jit(
    do_not_specialize=["N", "seed", "epoch"],
    do_not_specialize_on_alignment=["index_ptr", "epoch_ptr"],
)
def _augment_fwd_kernel(
    images_ptr, index_ptr, epoch_ptr, mean_ptr, std_ptr, y_ptr,
    N, seed, epoch, index_stride,
    images_stride_n, images_stride_c, images_stride_h, images_stride_w,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    PADDING: tl.constexpr, FLIP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[b] = the crop of images[index[b]], normalised; NaN where index[b] is out of range.

    images: uint8, any strides; index: int64; mean, std: [C] fp32; y: dense, NHWC or NCHW. With
    epoch_ptr the epoch is read there.
    """
    b = tl.program_id(0).to(tl.int64)
    image = tl.load(index_ptr + b * index_stride)
    found = (image >= 0) & (image < N)
    tile, lanes = tl.program_id(1), tl.arange(0, BLOCK)
    if WIDE:
        tile, lanes = tile.to(tl.int64), lanes.to(tl.int64)
    element = tile * BLOCK + lanes
    ok = element < C * H * W
    if CHANNELS_LAST:
        h, w, c = element // (W * C), element // C % W, element % C
    else:
        c, h, w = element // (H * W), element // W % H, element % W
    mean = tl.load(mean_ptr + c, mask=ok, other=0.0)
    std = tl.load(std_ptr + c, mask=ok, other=1.0)

    if PADDING > 0 or FLIP:
        if epoch_ptr is not None:
            counter = tl.load(epoch_ptr).to(tl.uint32)
        else:
            # Compiled graphs hand over an epoch of 1 as a constant.
            counter = (tl.zeros([], tl.int64) + epoch).to(tl.uint32)
        top, left, mirror, _ = tl.philox(seed, image.to(tl.uint32), counter, STREAM, 0)
        if FLIP:
            w = tl.where((mirror >> 31) != 0, W - 1 - w, w)
        if PADDING > 0:
            h += _bounded(top, 2 * PADDING + 1) - PADDING
            w += _bounded(left, 2 * PADDING + 1) - PADDING
    # Of an image that is not there no row is read.
    rows = tl.where(found, H, 0)
    inside = ok & (h >= 0) & (h < rows) & (w >= 0) & (w < W)
    offsets = h * images_stride_h + w * images_stride_w + c * images_stride_c
    pixel = tl.load(images_ptr + image * images_stride_n + offsets, mask=inside, other=0)
    pixel = pixel.to(tl.float32)
    y = tl.div_rn(pixel * HIGH + pixel * LOW - mean, std)
    y = tl.where(found, y, float("nan"))
    tl.store(y_ptr + b * (C * H * W) + element, y.to(y_ptr.dtype.element_ty), mask=ok)


def empty_output(
    images: torch.Tensor, index: torch.Tensor, dtype: torch.dtype, channels_last: bool
) -> torch.Tensor:
    """An uninitialised y [B, C, H, W] for augment_fwd."""
    return empty_images((index.shape[0], *images.shape[1:]), dtype, images.device, channels_last)


def augment_fwd(
    images: torch.Tensor,
    index: torch.Tensor,
    mean_std: tuple[torch.Tensor, torch.Tensor],
    seed: int,
    epoch: int | torch.Tensor,
    padding: int,
    flip: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """y [B, C, H, W] of dtype, dense, NHWC in memory with channels_last, else NCHW.

    Args:
        images: uint8 [N, C, H, W], any strides; index: int64 [B], any stride.
        mean_std: the mean and the std, each fp32 [C] contiguous, of pixels scaled to [0, 1].
        seed: the generator's key, 64 bits; epoch: 32 bits of its counter, or int64, one element.
        padding: the crop's offset from the centre is drawn from [-padding, padding], pixels.
        flip: whether every other image on average is mirrored, left to right.
    """
    y = empty_output(images, index, dtype, channels_last)
    if y.numel() == 0:
        return y
    N, C, H, W = images.shape
    stride_n, stride_c, stride_h, stride_w = images.stride()
    as_tensor = isinstance(epoch, torch.Tensor)
    reach = (C - 1) * stride_c + (H - 1) * stride_h + (W - 1) * stride_w
    launch(
        _augment_fwd_kernel, (y.shape[0], cdiv(C * H * W, BLOCK)),
        images, index, epoch if as_tensor else None, *mean_std, y,
        N, seed, 0 if as_tensor else epoch, index.stride(0), stride_n, stride_c, stride_h, stride_w,
        C=C, H=H, W=W, PADDING=padding, FLIP=flip, CHANNELS_LAST=channels_last,
        # 64-bit offsets inside an image only where it needs them: they cost registers.
        WIDE=max(reach, C * H * W) >= 2**31, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y
