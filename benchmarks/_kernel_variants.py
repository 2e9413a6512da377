"""Every launch that the library makes: each op's launchers, at every shape that is shipped.

The launchers run on meta tensors with their launches recorded, so that what is built is what would
be launched. Of launches that run the same binary the first is named.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fastres.kernels import (
    _aot,
    augment,
    batch_norm_relu,
    cast,
    classifier_cross_entropy,
    meprop,
    preact_unit,
    sgd_step,
    stem_conv2d,
    stochastic_depth_add,
    unscale,
    update_scale,
)
from fastres.kernels._launch import Launch, configure_for, family_of, record
from fastres.kernels.norm_relu_conv2d import batch_moments, norm_relu_conv2d_bwd

# In the order in which a binary that several dtypes share finds its name.
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


class Variant(NamedTuple):
    name: str
    launches: list[Launch]


@contextmanager
def _recorded(into: list[Variant], name: str) -> Iterator[None]:
    with record() as launches:
        yield
    into.append(Variant(name, launches))


@contextmanager
def _recorded_one_by_one(into: list[Variant], name: str) -> Iterator[None]:
    """A variant a launch, for functions that launch a kernel more than once, each time another."""
    with record() as launches:
        yield
    for i, launch in enumerate(launches):
        into.append(Variant(f"{name} {i + 1}", [launch]))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, fmt: str = "NHWC") -> torch.Tensor:
    if len(shape) != 4:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[fmt])


def _batch_norm_relu_step(
    into: list[Variant], name: str, shape: tuple[int, int, int, int], dtype: torch.dtype,
    fmt: str = "NHWC", dy_fmt: str | None = None, residual: bool = False, training: bool = True,
    affine: bool = True, relu: bool = True, picked: int = 0,
) -> None:  # fmt: skip
    x = _empty(shape, dtype, fmt)
    dy = _empty((picked or shape[0], *shape[1:]), dtype, dy_fmt or fmt)
    index = _empty((picked,), torch.int64) if picked else None
    vector = _empty(shape[1:2], torch.float32)
    weight = bias = vector if affine else None
    shortcut = _empty(shape, dtype, fmt) if residual else None
    running = None if training else (vector, vector)
    with _recorded(into, f"{name} fwd"):
        _, mean, var, mask = batch_norm_relu.batch_norm_relu_fwd(
            x, index, weight, bias, shortcut, running, 1e-5, relu
        )
    mean, var = running or (mean, var)
    with _recorded(into, f"{name} bwd"):
        batch_norm_relu.batch_norm_relu_bwd(
            dy, x, index, weight, bias, mean, var, mask, 1e-5, relu, training,
            (True, affine, affine, residual),
        )  # fmt: skip


def batch_norm_relu_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    for C, fmt, residual, training in itertools.product(
        (16, 32, 64), FORMATS, (False, True), (True, False)
    ):
        name = f"C={C} {fmt} {'train' if training else 'eval'}{' +residual' if residual else ''}"
        shape = (128, C, 512 // C, 512 // C)
        _batch_norm_relu_step(found, name, shape, dtype, fmt, residual=residual, training=training)
    # What no ResNet on 32x32 images meets: other divisibility, blocks of 64 channels, sizes of 1.
    odd: dict[str, Any] = {"dtype": dtype, "residual": True}
    _batch_norm_relu_step(found, "C=20 7x7 NCHW", (3, 20, 7, 7), fmt="NCHW", **odd)
    _batch_norm_relu_step(found, "C=512 7x7", (32, 512, 7, 7), **odd)
    _batch_norm_relu_step(found, "C=16 dy NCHW", (128, 16, 32, 32), dy_fmt="NCHW", **odd)
    _batch_norm_relu_step(found, "C=1 M=2", (2, 1, 1, 1), **odd)
    _batch_norm_relu_step(found, "C=1 M=1 eval", (1, 1, 1, 1), training=False, **odd)
    _batch_norm_relu_step(found, "C=16 no affine", (128, 16, 32, 32), dtype, affine=False)
    _batch_norm_relu_step(found, "C=16 no relu", (128, 16, 32, 32), dtype, relu=False)
    for fmt in FORMATS:
        name = f"C=16 {fmt} 64 of 128 samples"
        _batch_norm_relu_step(found, name, (128, 16, 32, 32), dtype, fmt, picked=64)
    for fmt in FORMATS:
        wide = (2**17, 16, 32, 32)
        _batch_norm_relu_step(found, f"C=16 {fmt} wide", wide, fmt=fmt, **odd)
    vector, batches = _empty((16,), torch.float32), _empty((), torch.int64)
    half = _empty((16,), dtype)
    for running, (momentum, counter) in itertools.product(
        (vector, half), ((0.1, batches), (None, batches), (0.1, None))
    ):
        name = f"C=16 {'fp32' if running is vector else 'half'} running, momentum={momentum}"
        with _recorded(found, f"{name}{'' if counter is None else ', counted'}"):
            batch_norm_relu.update_running(running, running, counter, vector, vector, momentum, 99)
    for momentum, counter in ((0.1, batches), (None, batches), (0.1, None)):
        name = f"two of C=16, momentum={momentum}{'' if counter is None else ', counted'}"
        two, batch = (vector, vector, counter), (vector, vector)
        with _recorded(found, name):
            batch_norm_relu.update_two_running(two, two, batch, batch, (momentum,) * 2, (99, 99))
    for applies in (None, _empty((), torch.bool)):
        with _recorded(found, f"a network's{'' if applies is None else ', where a step is taken'}"):
            batch_norm_relu.update_every_running(
                [vector, vector, batches, vector, vector], [0.1], [99], applies
            )
    return found


def augment_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    index, vector = _empty((128,), torch.int64), _empty((3,), torch.float32)
    for source, fmt, (padding, flip) in itertools.product(
        FORMATS, FORMATS, ((4, True), (0, False))
    ):
        images = _empty((50_000, 3, 32, 32), torch.uint8, source)
        name = f"32x32 {source} to {fmt}{f' padding={padding} flip' if flip else ''}"
        with _recorded(found, name):
            augment.augment_fwd(
                images, index, (vector, vector), 2**40, 1, padding, flip, dtype, fmt == "NHWC"
            )
    with _recorded(found, "32x32 NHWC to NHWC padding=4 flip, epoch on the device"):
        images, epoch = _empty((50_000, 3, 32, 32), torch.uint8), _empty((), torch.int64)
        augment.augment_fwd(images, index, (vector, vector), 2**40, epoch, 4, True, dtype, True)
    large = _empty((2, 3, 2**15, 2**15), torch.uint8, "NCHW")
    with _recorded(found, "wide"):
        augment.augment_fwd(large, index, (vector, vector), 1, 1, 4, True, dtype, True)
    return found


def _stochastic_depth_add_step(
    into: list[Variant], name: str, shape: tuple[int, int, int, int], dtype: torch.dtype,
    fmts: str = "NHWC NHWC NHWC", row: bool = True, kept: int | None = None,
) -> None:  # fmt: skip
    """fmts: of branch, shortcut and dy. With kept, a subset of so many of the samples."""
    N, (branch_fmt, shortcut_fmt, dy_fmt) = shape[0], fmts.split()
    branch = _empty((N if kept is None else kept, *shape[1:]), dtype, branch_fmt)
    shortcut, dy = _empty(shape, dtype, shortcut_fmt), _empty(shape, dtype, dy_fmt)
    key, position, source, threshold = _empty((3,), torch.int64), None, None, 2**30
    if kept is not None:
        threshold, position, source = 0, *(_empty((n,), torch.int64) for n in (N, kept))
    with _recorded(into, f"{name} fwd"):
        stochastic_depth_add.stochastic_depth_add_fwd(
            branch, shortcut, key, position, threshold, 2.0, row, 2
        )
    with _recorded(into, f"{name} bwd"):
        stochastic_depth_add.stochastic_depth_add_bwd(
            dy, key, source, threshold, 2.0, row, 2, branch_fmt == "NHWC"
        )


def stochastic_depth_add_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    for C, fmt, row in itertools.product((16, 32, 64), FORMATS, (True, False)):
        name = f"C={C} {fmt} {'row' if row else 'batch'}"
        shape, fmts = (128, C, 512 // C, 512 // C), f"{fmt} {fmt} {fmt}"
        _stochastic_depth_add_step(found, name, shape, dtype, fmts, row)
    for C, fmt in itertools.product((16, 64), FORMATS):
        shape, fmts = (128, C, 512 // C, 512 // C), f"{fmt} {fmt} {fmt}"
        name = f"C={C} {fmt} 64 of 128 samples"
        _stochastic_depth_add_step(found, name, shape, dtype, fmts, kept=64)
    # What no ResNet on 32x32 images meets: mixed layouts, other divisibility, sizes of 1.
    for fmts in ("NHWC NCHW NHWC", "NCHW NHWC NCHW", "NCHW NCHW NHWC"):
        for kept in (None, 64):
            name = f"C=16 {fmts.replace(' ', '+')}{' subset' if kept else ''}"
            _stochastic_depth_add_step(found, name, (128, 16, 32, 32), dtype, fmts, kept=kept)
    _stochastic_depth_add_step(found, "C=20 7x7", (3, 20, 7, 7), dtype, "NHWC NCHW NCHW")
    _stochastic_depth_add_step(found, "C=1 M=1", (1, 1, 1, 1), dtype, kept=1)
    large, mixed = (2, 4, 2**15, 2**15), "NHWC NCHW NHWC"
    for fmts, kept in itertools.product((mixed, "NCHW NCHW NCHW"), (None, 1)):
        name = f"wide {fmts.replace(' ', '+')}{' subset' if kept else ''}"
        _stochastic_depth_add_step(found, name, large, dtype, fmts, kept=kept)
    key = _empty((3,), torch.int64)
    for N, kept in ((128, 64), (100, 1), (1, 1), (2**17, 3)):
        with _recorded(found, f"subset of {kept} of {N}"):
            stochastic_depth_add.draw_subset(key, N, kept, 2)
    return found


def unscale_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    # The kernel reads dtypes from its table: one binary for all of them.
    grads = [_empty((64, 64, 3, 3), dtype), _empty((64,), torch.float32), _empty((10,), dtype)]
    masters = [_empty(tuple(grad.shape), torch.float32) for grad in grads]
    scale = _empty((), torch.float32)
    targets: dict[str, list[torch.Tensor]] = {"in place": grads, "to fp32": masters, "check": []}
    for (name, out), norm in itertools.product(targets.items(), (False, True)):
        with _recorded(found, f"{name}{', norm' if norm else ''}"):
            unscale.unscale_fwd(grads, out, scale, norm)
    with _recorded(found, "16 blocks"):
        unscale.unscale_fwd([_empty((16 * 2048,), dtype)], [], scale, True)
    return found


def update_scale_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    one, count = _empty((), torch.float32), _empty((), torch.int32)
    with _recorded(found, "a scale"):
        update_scale.update_scale_fwd(one, count, _empty((2,), torch.int32), one, 2.0, 0.5, 9, 1.0)
    return found


def cast_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    names = {dtype: name for name, dtype in DTYPES.items()}
    for source, target, M in itertools.product(
        dict.fromkeys((torch.float32, dtype)), DTYPES.values(), (272_480, 272_474, 1)
    ):
        with _recorded(found, f"{names[source]} to {names[target]}, M={M}"):
            cast.cast_fwd(_empty((M,), source), _empty((M,), target))
    return found


def sgd_step_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    grads = [_empty((64, 64, 3, 3), dtype), None, _empty((64,), torch.float32)]
    sizes, offsets, flat = [36_864, 64, 64], [0, 36_864, 36_928], _empty((36_992,), torch.float32)
    one = _empty((), torch.float32)
    half = _empty((36_992,), torch.float16 if dtype == torch.float32 else dtype)
    finds = (one, one, _empty((2, 36_992), torch.float32), _empty((), torch.int32))
    rates: tuple[float | torch.Tensor, ...] = (0.1, one)
    for buffer, copy, nesterov, guards, lr in itertools.product(
        (flat, None), (half, None), (True, False), ((one, one), finds, (None, None)), rates
    ):
        if nesterov and buffer is None:
            continue
        words = f"{'momentum' if buffer is not None else 'plain'}{' nesterov' if nesterov else ''}"
        words += "" if copy is None else " +half"
        words += "" if guards[0] is None else " guarded" if guards is not finds else " finds"
        with _recorded(found, f"{words}, lr {'on the device' if lr is one else 'given'}"):
            sgd_step.sgd_step_fwd(
                grads, sizes, offsets, flat, buffer, copy, lr, 0.9, 1e-4, nesterov, False, *guards
            )
    return found


def meprop_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    shapes = [(128, C, 512 // C, 512 // C) for C in (16, 32, 64)]
    # A linear layer's, what no ResNet on 32x32 images meets, and one example past 2^30 elements.
    shapes += [(512, 4096, 1, 1), (3, 20, 7, 7), (2, 1, 1, 1), (2, 2**12, 2**9, 2**9)]
    for shape, fmt in itertools.product(shapes, FORMATS):
        name = "x".join(map(str, shape)) + f" {fmt}"
        dy = _empty(shape, dtype, fmt)
        with _recorded(found, f"{name} row"):
            meprop.select_row(dy, 3)
        with _recorded(found, f"{name} channels"):
            meprop.select_channels(dy, 1)
    # Rows that do not lie dense: a division for every element.
    for fmt in FORMATS:
        dy = _empty((128, 32, 16, 16), dtype, fmt)
        with _recorded(found, f"sliced {fmt} row"):
            meprop.select_row(dy[:, 4:20] if fmt == "NHWC" else dy[:, ::2], 3)
    return found


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
    x, dy = _empty((128, 32, 16, 16), dtype), _empty((128, 64, 8, 8), dtype)
    c, weight = _empty((32,), torch.float32), _empty((64, 32, 1, 1), torch.float32)
    with _recorded_one_by_one(found, "1x1 C=32 16x16 stride 2 bwd"):
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
    x, c, k = _empty(shape, dtype), _empty((C,), torch.float32), _empty((K,), torch.float32)
    weight1, weight2 = (_empty((K, i, 3, 3), torch.float32) for i in (C, K))
    projection = _empty((K, C, 1, 1), torch.float32) if stride > 1 else None
    index = position = row_scale = None
    kept_channels = K // 4 if "meprop" in kind else K
    if "subset" in kind:
        index, position = _empty((kept,), torch.int64), _empty((N,), torch.int64)
    if kind == "row":
        row_scale = _empty((N,), torch.float32)
    given1, given2 = ((None, None), (None, None)) if trains else ((c, c), (k, k))
    partial, chunk = None, 0
    if trains:
        # As the unit before would leave them.
        with record():
            moments = batch_moments(x)
        partial, chunk = moments.partial, moments.chunk
    with _recorded_one_by_one(into, f"{name} fwd"):
        y, _, h, *_ = preact_unit.preact_unit_fwd(
            x, partial, chunk, index, position, given1, (c, c), weight1, given2, (k, k), weight2,
            projection, row_scale, 2.0, stride, (1e-5, 1e-5), trains, ("", 1),
        )  # fmt: skip
    with _recorded_one_by_one(into, f"{name} bwd"):
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
            x, y = _empty((128, C, side, side), dtype, fmt), _empty((128, K, side, side), dtype)
            weight = _empty((K, C, 3, 3), torch.float32)
            name = f"C={C} K={K} {side}x{side} {fmt}"
            with _recorded(found, f"{name} fwd"):
                stem_conv2d.stem_conv2d_fwd(x, weight, True)
            with _recorded(found, f"{name} bwd"):
                stem_conv2d.stem_conv2d_bwd(y, x, weight)
    x, weight = _empty((128, 3, 32, 32), dtype), _empty((16, 3, 3, 3), torch.float32)
    with _recorded(found, "C=3 K=16 32x32 NHWC fwd without moments"):
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
        x, c = _empty((128, C, side, side), dtype), _empty((C,), torch.float32)
        weight, bias = _empty((classes, C), torch.float32), _empty((classes,), torch.float32)
        with record():
            moments = batch_moments(x)
        partial, chunk = (moments.partial, moments.chunk) if trains else (None, 0)
        running, target = None if trains else c, _empty((128,), torch.int64)
        with _recorded_one_by_one(found, f"{name} fwd"):
            loss, _, _, _, dlogits, pooled, da, sums = (
                classifier_cross_entropy.classifier_cross_entropy_fwd(
                    x, partial, chunk, running, running, c, c, weight, bias, target, 0.1, 1e-5, kept
                )
            )
        if kept:
            with _recorded(found, f"{name} bwd"):
                classifier_cross_entropy.classifier_cross_entropy_bwd(
                    loss, x, c, c, c, c, weight, bias, dlogits, pooled, da, sums, 1e-5, trains
                )
    return found


# Another op's launches: a function from a dtype to its variants, here.
OPS: dict[str, Callable[[torch.dtype], list[Variant]]] = {
    "batch_norm_relu": batch_norm_relu_variants,
    "augment": augment_variants,
    "stochastic_depth_add": stochastic_depth_add_variants,
    "unscale": unscale_variants,
    "update_scale": update_scale_variants,
    "cast": cast_variants,
    "sgd_step": sgd_step_variants,
    "meprop": meprop_variants,
    "preact_unit": preact_unit_variants,
    "stem_conv2d": stem_conv2d_variants,
    "classifier_cross_entropy": classifier_cross_entropy_variants,
}


class Task(NamedTuple):
    """Which launch to build, by where `configurations` has it: launches do not pickle."""

    op: str
    kernel: str
    dtype: str
    target: str
    variant: str
    launch: int


@functools.cache
def configurations(op: str, dtype: str, family: str) -> dict[str, Variant]:
    """By name, as on a device of a family. A process of a pool meets each many times."""
    with configure_for(family):
        return {variant.name: variant for variant in OPS[op](DTYPES[dtype])}


def _family(target: str) -> str:
    about = _aot.TARGETS[target]
    return about.backend if about.backend == "hip" else family_of(about.arch // 10)


def launch_of(task: Task) -> Launch:
    variants = configurations(task.op, task.dtype, _family(task.target))
    return variants[task.variant].launches[task.launch]


def tasks(
    ops: Sequence[str], dtypes: Sequence[str], targets: Sequence[str], small: bool = False
) -> list[Task]:
    """One for every binary that these ops launch for these dtypes on these targets.

    A binary has one name, whatever else is asked for: that of the first launch, over all dtypes,
    that runs it. small: one configuration for each kernel and target.
    """
    named: dict[tuple[str, ...], Task] = {}
    wanted: dict[tuple[str, ...], Task] = {}
    for op, dtype, target in itertools.product(ops, DTYPES, targets):
        for variant in configurations(op, dtype, _family(target)).values():
            for i, launch in enumerate(variant.launches):
                what = _aot.specialized(launch, target)
                key = (target, *what.key)
                task = Task(op, what.source.name, dtype, target, variant.name, i)
                named.setdefault(key, task)
                if dtype in dtypes:
                    wanted.setdefault(key, named[key])
    if small:
        first: dict[tuple[str, str], Task] = {}
        for task in wanted.values():
            first.setdefault((task.kernel, task.target), task)
        return list(first.values())
    return list(wanted.values())
