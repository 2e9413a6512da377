"""The built-in data set: ten classes of drawn shapes, made in a second."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastres.data.errors import DataError
from fastres.data.image_set import ImageData, ImageSet

# Images drawn from one random stream; each block holds every class equally often.
_BLOCK = 500


def _box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def _disk(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.85


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs_() - 0.18


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.75, 0.75)


def _frame(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.64, 0.64).abs_() - 0.18


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = math.sqrt(3) / 2 * x.abs() + 0.5 * y
    return torch.maximum(slope, -y) - 0.5


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.95, 0.26), _box(x, y, 0.26, 0.95))


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 1.0, 0.3)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Fold the plane into half a point of the star: its edge is then one straight line.
    turn = math.pi / 5
    angle = torch.remainder(torch.atan2(y, x) + turn, 2 * turn).sub_(turn).abs_()
    radius = torch.hypot(x, y)
    # From the tip at (1.05, 0) to the notch at radius 0.42 and angle turn.
    dx, dy = 0.42 * math.cos(turn) - 1.05, 0.42 * math.sin(turn)
    length = math.hypot(dx, dy)
    return ((radius * angle.cos() - 1.05) * dy - radius * angle.sin() * dx) / length


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.9, 0.68 - torch.hypot(x - 0.5, y))


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x.abs() - 0.55, y) - 0.4


# Signed distance to the outline in units of the shape's radius, below 0 inside; x and y are
# [n, H, W] coordinates from its centre. Each is its own mirror image, so flips change no label.
_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disk": _disk,
    "ring": _ring,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "cross": _cross,
    "bar": _bar,
    "star": _star,
    "crescent": _crescent,
    "dots": _dots,
}


def synthetic(
    train_size: int = 8000, test_size: int = 2000, image_size: int = 32, seed: int = 0
) -> ImageData:
    """Ten classes of shapes: any position, size, turn and colour, on a shaded, noisy ground.

    A pure function of its arguments (on another kind of CPU a pixel may round the other way).
    Image i of train depends on seed, image_size and i alone: a larger train_size appends images
    and changes none; test is drawn from streams of its own. Every 500 images hold 50 of each
    class in random order. The shape is lighter than its ground; colours and shading are drawn
    alike for all classes, and a mirrored image keeps its class.

    Args:
        train_size: training images, at least 1.
        test_size: test images, at least 1.
        image_size: height and width, at least 8 pixels.
        seed: chooses the set, 0 or more.
    Returns:
        ImageData named "synthetic".
    Raises:
        DataError: an argument out of range.
    """
    for what, value, least in (
        ("train size", train_size, 1),
        ("test size", test_size, 1),
        ("image size", image_size, 8),
        ("seed", seed, 0),
    ):
        if value < least:
            raise DataError(f"{what} of the synthetic data must be at least {least}, got {value}")
    # Whatever default device the program has set.
    with torch.device("cpu"):
        train = _draw_set("train", train_size, image_size, seed)
        test = _draw_set("test", test_size, image_size, seed)
    return ImageData("synthetic", tuple(_SHAPES), train, test)


def _draw_set(part: str, count: int, image_size: int, seed: int) -> ImageSet:
    pixels = torch.empty(count, image_size, image_size, 3, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    each = _BLOCK // len(_SHAPES)
    for start in range(0, count, _BLOCK):
        # A hash, so that no two sets, parts or blocks share a stream.
        key = hashlib.sha256(f"{seed} {part} {start}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        block = torch.cat([_draw(shape, each, image_size, stream) for shape in _SHAPES.values()])
        order = torch.randperm(_BLOCK, generator=stream)[: count - start]
        pixels[start : start + _BLOCK] = block[order]
        labels[start : start + _BLOCK] = order // each
    return ImageSet(pixels.permute(0, 3, 1, 2), labels)


def _draw(
    shape: Callable[[Tensor, Tensor], Tensor], n: int, size: int, stream: torch.Generator
) -> Tensor:
    """n images of one shape, [n, size, size, 3] uint8."""

    def uniform(low: float, high: float, *dims: int) -> Tensor:
        unit = torch.rand(n, *dims, generator=stream, dtype=torch.float32)
        return unit * (high - low) + low

    # Pixel centres in [-1, 1].
    axis = torch.arange(1 - size, size, 2, dtype=torch.float32) / size
    x0, y0 = axis.view(1, 1, size), axis.view(1, size, 1)

    # The shape: its coverage of each pixel, from the distance in pixels.
    centre = uniform(-0.25, 0.25, 2, 1, 1)
    radius = uniform(0.55, 0.8, 1, 1)
    angle = uniform(0, 2 * math.pi, 1, 1)
    cos, sin = angle.cos() / radius, angle.sin() / radius
    dx, dy = x0 - centre[:, 0], y0 - centre[:, 1]
    distance = shape(cos * dx + sin * dy, cos * dy - sin * dx)
    cover = (0.5 - distance * (radius * size / 2)).clamp_(0, 1).unsqueeze_(3)

    # Two colours: the shape is the lighter one, in each channel by an amount of its own.
    contrast = uniform(0.1, 0.7, 1, 1, 3)
    ground = uniform(0.3, 0.7, 1, 1, 3) - contrast / 2

    # Shading: a slope across the image and waves, each in a random direction.
    turn = uniform(0, 2 * math.pi, 1, 1)
    slope = (turn.cos() * x0 + turn.sin() * y0).unsqueeze_(3) * uniform(-0.15, 0.15, 1, 1, 3)
    turn, pitch = uniform(0, 2 * math.pi, 1, 1), uniform(3, 9, 1, 1)
    waves = ((turn.cos() * x0 + turn.sin() * y0) * pitch + uniform(0, 2 * math.pi, 1, 1)).sin_()
    slope += waves.unsqueeze_(3) * uniform(-0.08, 0.08, 1, 1, 3)

    noise = uniform(-1, 1, size, size, 3) * uniform(0.05, 0.35, 1, 1, 1)
    image = slope.add_(ground).addcmul_(cover, contrast).add_(noise)
    return image.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
