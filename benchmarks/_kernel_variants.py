"""Every launch that the library makes: each op's launchers, at every shape that is shipped.

The launchers run on meta tensors with their launches recorded, so that what is built is what would
be launched. Of launches that run the same binary the first is named.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from _conv_variants import (
    classifier_cross_entropy_variants,
    preact_unit_variants,
    stem_conv2d_variants,
)
from _recorded_launches import FORMATS, Variant, empty, recorded

from fastres.kernels import (
    _aot,
    augment,
    batch_norm_relu,
    cast,
    meprop,
    sgd_step,
    stochastic_depth_add,
    unscale,
    update_scale,
)
from fastres.kernels._launch import Launch, configure_for, family_of

# In the order in which a binary that several dtypes share finds its name.
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}


def _batch_norm_relu_step(
    into: list[Variant], name: str, shape: tuple[int, int, int, int], dtype: torch.dtype,
    fmt: str = "NHWC", dy_fmt: str | None = None, residual: bool = False, training: bool = True,
    affine: bool = True, relu: bool = True, picked: int = 0,
) -> None:  # fmt: skip
    x = empty(shape, dtype, fmt)
    dy = empty((picked or shape[0], *shape[1:]), dtype, dy_fmt or fmt)
    index = empty((picked,), torch.int64) if picked else None
    vector = empty(shape[1:2], torch.float32)
    weight = bias = vector if affine else None
    shortcut = empty(shape, dtype, fmt) if residual else None
    running = None if training else (vector, vector)
    with recorded(into, f"{name} fwd"):
        _, mean, var, mask = batch_norm_relu.batch_norm_relu_fwd(
            x, index, weight, bias, shortcut, running, 1e-5, relu
        )
    mean, var = running or (mean, var)
    with recorded(into, f"{name} bwd"):
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
    vector, batches = empty((16,), torch.float32), empty((), torch.int64)
    half = empty((16,), dtype)
    for running, (momentum, counter) in itertools.product(
        (vector, half), ((0.1, batches), (None, batches), (0.1, None))
    ):
        name = f"C=16 {'fp32' if running is vector else 'half'} running, momentum={momentum}"
        with recorded(found, f"{name}{'' if counter is None else ', counted'}"):
            batch_norm_relu.update_running(running, running, counter, vector, vector, momentum, 99)
    for momentum, counter in ((0.1, batches), (None, batches), (0.1, None)):
        name = f"two of C=16, momentum={momentum}{'' if counter is None else ', counted'}"
        two, batch = (vector, vector, counter), (vector, vector)
        with recorded(found, name):
            batch_norm_relu.update_two_running(two, two, batch, batch, (momentum,) * 2, (99, 99))
    for applies in (None, empty((), torch.bool)):
        with recorded(found, f"a network's{'' if applies is None else ', where a step is taken'}"):
            batch_norm_relu.update_every_running(
                [vector, vector, batches, vector, vector], [0.1], [99], applies
            )
    return found


def augment_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    index, vector = empty((128,), torch.int64), empty((3,), torch.float32)
    for source, fmt, (padding, flip) in itertools.product(
        FORMATS, FORMATS, ((4, True), (0, False))
    ):
        images = empty((50_000, 3, 32, 32), torch.uint8, source)
        name = f"32x32 {source} to {fmt}{f' padding={padding} flip' if flip else ''}"
        with recorded(found, name):
            augment.augment_fwd(
                images, index, (vector, vector), 2**40, 1, padding, flip, dtype, fmt == "NHWC"
            )
    with recorded(found, "32x32 NHWC to NHWC padding=4 flip, epoch on the device"):
        images, epoch = empty((50_000, 3, 32, 32), torch.uint8), empty((), torch.int64)
        augment.augment_fwd(images, index, (vector, vector), 2**40, epoch, 4, True, dtype, True)
    large = empty((2, 3, 2**15, 2**15), torch.uint8, "NCHW")
    with recorded(found, "wide"):
        augment.augment_fwd(large, index, (vector, vector), 1, 1, 4, True, dtype, True)
    return found


def _stochastic_depth_add_step(
    into: list[Variant], name: str, shape: tuple[int, int, int, int], dtype: torch.dtype,
    fmts: str = "NHWC NHWC NHWC", row: bool = True, kept: int | None = None,
) -> None:  # fmt: skip
    """fmts: of branch, shortcut and dy. With kept, a subset of so many of the samples."""
    N, (branch_fmt, shortcut_fmt, dy_fmt) = shape[0], fmts.split()
    branch = empty((N if kept is None else kept, *shape[1:]), dtype, branch_fmt)
    shortcut, dy = empty(shape, dtype, shortcut_fmt), empty(shape, dtype, dy_fmt)
    key, position, source, threshold = empty((3,), torch.int64), None, None, 2**30
    if kept is not None:
        threshold, position, source = 0, *(empty((n,), torch.int64) for n in (N, kept))
    with recorded(into, f"{name} fwd"):
        stochastic_depth_add.stochastic_depth_add_fwd(
            branch, shortcut, key, position, threshold, 2.0, row, 2
        )
    with recorded(into, f"{name} bwd"):
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
    key = empty((3,), torch.int64)
    for N, kept in ((128, 64), (100, 1), (1, 1), (2**17, 3)):
        with recorded(found, f"subset of {kept} of {N}"):
            stochastic_depth_add.draw_subset(key, N, kept, 2)
    return found


def unscale_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    # The kernel reads dtypes from its table: one binary for all of them.
    grads = [empty((64, 64, 3, 3), dtype), empty((64,), torch.float32), empty((10,), dtype)]
    masters = [empty(tuple(grad.shape), torch.float32) for grad in grads]
    scale = empty((), torch.float32)
    targets: dict[str, list[torch.Tensor]] = {"in place": grads, "to fp32": masters, "check": []}
    for (name, out), norm in itertools.product(targets.items(), (False, True)):
        with recorded(found, f"{name}{', norm' if norm else ''}"):
            unscale.unscale_fwd(grads, out, scale, norm)
    with recorded(found, "16 blocks"):
        unscale.unscale_fwd([empty((16 * 2048,), dtype)], [], scale, True)
    return found


def update_scale_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    one, count = empty((), torch.float32), empty((), torch.int32)
    with recorded(found, "a scale"):
        update_scale.update_scale_fwd(one, count, empty((2,), torch.int32), one, 2.0, 0.5, 9, 1.0)
    return found


def cast_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    names = {dtype: name for name, dtype in DTYPES.items()}
    for source, target, M in itertools.product(
        dict.fromkeys((torch.float32, dtype)), DTYPES.values(), (272_480, 272_474, 1)
    ):
        with recorded(found, f"{names[source]} to {names[target]}, M={M}"):
            cast.cast_fwd(empty((M,), source), empty((M,), target))
    return found


def sgd_step_variants(dtype: torch.dtype) -> list[Variant]:
    found: list[Variant] = []
    grads = [empty((64, 64, 3, 3), dtype), None, empty((64,), torch.float32)]
    sizes, offsets, flat = [36_864, 64, 64], [0, 36_864, 36_928], empty((36_992,), torch.float32)
    one = empty((), torch.float32)
    half = empty((36_992,), torch.float16 if dtype == torch.float32 else dtype)
    finds = (one, one, empty((2, 36_992), torch.float32), empty((), torch.int32))
    rates: tuple[float | torch.Tensor, ...] = (0.1, one)
    for buffer, copy, nesterov, guards, lr in itertools.product(
        (flat, None), (half, None), (True, False), ((one, one), finds, (None, None)), rates
    ):
        if nesterov and buffer is None:
            continue
        words = f"{'momentum' if buffer is not None else 'plain'}{' nesterov' if nesterov else ''}"
        words += "" if copy is None else " +half"
        words += "" if guards[0] is None else " guarded" if guards is not finds else " finds"
        with recorded(found, f"{words}, lr {'on the device' if lr is one else 'given'}"):
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
        dy = empty(shape, dtype, fmt)
        with recorded(found, f"{name} row"):
            meprop.select_row(dy, 3)
        with recorded(found, f"{name} channels"):
            meprop.select_channels(dy, 1)
    # Rows that do not lie dense: a division for every element.
    for fmt in FORMATS:
        dy = empty((128, 32, 16, 16), dtype, fmt)
        with recorded(found, f"sliced {fmt} row"):
            meprop.select_row(dy[:, 4:20] if fmt == "NHWC" else dy[:, ::2], 3)
    return found


# Another op's launches: a function from a dtype to its variants, here or in _conv_variants.py.
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
