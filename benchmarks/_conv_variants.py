"""Which launches of the convolutions' kernels are built: a unit's, the stem's, the classifier's."""

import itertools

import torch
from _recorded_launches import FORMATS, Variant, empty, recorded, recorded_one_by_one

from fastres.kernels import classifier_cross_entropy, preact_unit, stem_conv2d
from fastres.kernels._launch import record
from fastres.kernels.norm_relu_conv2d import batch_moments, norm_relu_conv2d_bwd


def preact_unit_variants(dtype: torch.dtype) -> list[Variant]:
    """Of fp16 all, of the others, which differ in the products' instruction, a few: a build of
    these kernels takes seconds."""
    found: list[Variant] = []
    # ResNet-20's units, and one whose channels are several blocks on both sides of a product.
    shapes = [(16, 32, 1), (32, 16, 2), (64, 8, 1), (16, 32, 2), (32, 16, 1), (128, 8, 2)]
    half = dtype == torch.float16
    for C, side, stride in shapes if half else shapes[:3]:
        name = f"C={C} {side}x{side} stride {stride}"
        _preact_unit_step(found, name, (128, C, side, side), dtype, stride)
    for kind in ("eval", "row", "subset", "meprop", "subset meprop") if half else ():
        _preact_unit_step(found, f"C=32 stride 2 {kind}", (128, 32, 16, 16), dtype, 2, kind)
    # A 1x1 convolution by itself, which no unit has.
    x, dy = empty((128, 32, 16, 16), dtype), empty((128, 64, 8, 8), dtype)
    c, weight = empty((32,), torch.float32), empty((64, 32, 1, 1), torch.float32)
    with recorded_one_by_one(found, "1x1 C=32 16x16 stride 2 bwd"):
        norm_relu_conv2d_bwd(dy, x, c, c, c, c, weight, None, 1.0, 2, 1e-5, True, ("", 1))
    return found


def _preact_unit_step(
    into: list[Variant], name: str, shape: tuple[int, int, int, int], dtype: torch.dtype,
    stride: int, kind: str = "",
) -> None:  # fmt: skip
    """kind: "eval", "row", "subset" (of half the samples), "meprop" (a quarter of the channels), or
    both of these."""
    N, C, H, W = shape
    K, kept, trains = C * stride, N // 2, kind != "eval"
    x, c, k = empty(shape, dtype), empty((C,), torch.float32), empty((K,), torch.float32)
    weight1, weight2 = (empty((K, i, 3, 3), torch.float32) for i in (C, K))
    projection = empty((K, C, 1, 1), torch.float32) if stride > 1 else None
    index = position = row_scale = None
    kept_channels = K // 4 if "meprop" in kind else K
    if "subset" in kind:
        index, position = empty((kept,), torch.int64), empty((N,), torch.int64)
    if kind == "row":
        row_scale = empty((N,), torch.float32)
    given1, given2 = ((None, None), (None, None)) if trains else ((c, c), (k, k))
    partial, chunk = None, 0
    if trains:
        # As the unit before would leave them.
        with record():
            moments = batch_moments(x)
        partial, chunk = moments.partial, moments.chunk
    with recorded_one_by_one(into, f"{name} fwd"):
        y, _, h, *_ = preact_unit.preact_unit_fwd(
            x, partial, chunk, index, position, given1, (c, c), weight1, given2, (k, k), weight2,
            projection, row_scale, 2.0, stride, (1e-5, 1e-5), trains, ("", 1),
        )  # fmt: skip
    with recorded_one_by_one(into, f"{name} bwd"):
        preact_unit.preact_unit_bwd(
            y, x, h, index, position, (c, c), (c, c), weight1, (k, k), (k, k), weight2,
            projection, row_scale, 2.0, stride, (1e-5, 1e-5), (trains, trains),
            (kept_channels,) * 3, ("", 1),
        )  # fmt: skip


def stem_conv2d_variants(dtype: torch.dtype) -> list[Variant]:
    """Of fp16 all, of the others a few, as of preact_unit."""
    found: list[Variant] = []
    # What ResNets on small images begin with; then the widest, and one with a part of a block.
    shapes = [(3, 16, 32), (3, 64, 32), (1, 16, 28), (4, 128, 32), (3, 48, 7)]
    for C, K, side in shapes if dtype == torch.float16 else shapes[:2]:
        for fmt in FORMATS:
            x, y = empty((128, C, side, side), dtype, fmt), empty((128, K, side, side), dtype)
            weight = empty((K, C, 3, 3), torch.float32)
            name = f"C={C} K={K} {side}x{side} {fmt}"
            with recorded(found, f"{name} fwd"):
                stem_conv2d.stem_conv2d_fwd(x, weight, True)
            with recorded(found, f"{name} bwd"):
                stem_conv2d.stem_conv2d_bwd(y, x, weight)
    x, weight = empty((128, 3, 32, 32), dtype), empty((16, 3, 3, 3), torch.float32)
    with recorded(found, "C=3 K=16 32x32 NHWC fwd without moments"):
        stem_conv2d.stem_conv2d_fwd(x, weight, False)
    return found


def classifier_cross_entropy_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    # ResNet-20's, and what no ResNet on 32x32 images meets: moments that a launch of their own
    # merges, a weight that is several blocks; one class, one pixel.
    shapes = [(64, 8, 10), (16, 32, 10), (128, 7, 100), (512, 7, 128), (48, 1, 1)]
    kinds = {"train": (True, True), "eval": (False, True), "eval alone": (False, False)}
    for (C, side, classes), (kind, (trains, kept)) in itertools.product(shapes, kinds.items()):
        name = f"C={C} {side}x{side} {classes} classes {kind}"
        x, c = empty((128, C, side, side), dtype), empty((C,), torch.float32)
        weight, bias = empty((classes, C), torch.float32), empty((classes,), torch.float32)
        with record():
            moments = batch_moments(x)
        partial, chunk = (moments.partial, moments.chunk) if trains else (None, 0)
        running, target = None if trains else c, empty((128,), torch.int64)
        with recorded_one_by_one(found, f"{name} fwd"):
            loss, _, _, _, dlogits, pooled, da, sums = (
                classifier_cross_entropy.classifier_cross_entropy_fwd(
                    x, partial, chunk, running, running, c, c, weight, bias, target, 0.1, 1e-5, kept
                )
            )
        if kept:
            with recorded(found, f"{name} bwd"):
                classifier_cross_entropy.classifier_cross_entropy_bwd(
                    loss, x, c, c, c, c, weight, bias, dlogits, pooled, da, sums, 1e-5, trains
                )
    return found
