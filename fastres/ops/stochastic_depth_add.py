"""Stochastic depth: add a residual branch that is dropped at random, without reading it then.

    y = shortcut + b / (1 - p) * branch,   b ~ Bernoulli(1 - p)

Read from the top: the reference, the registered ops, the function, the Module. A unit that does not
even compute what it drops is StochasticDepthUnit, in stochastic_depth_unit.py.
Source: Huang et al. 2016, arXiv:1603.09382; inverted scaling in training, none at test time.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastres.ops._philox import is_plain
from fastres.ops._register import kernels, register_autograd, register_op, takes_kernels
from fastres.ops._samples import add_samples, take_samples
from fastres.ops.step_generator import UnitGenerator, draws, threshold

Mode = Literal["batch", "row", "subset"]
Generator = torch.Generator | UnitGenerator | None


def stochastic_depth_add_reference(
    branch: Tensor, shortcut: Tensor, kept: Tensor, scale: float
) -> Tensor:
    """The definition of stochastic_depth_add, for kept: bool [N] or [1]."""
    return torch.where(kept[:, None, None, None], shortcut + scale * branch, shortcut)


@register_op("stochastic_depth_add")
def _forward(
    branch: Tensor,
    shortcut: Tensor,
    key: Tensor,
    position: Tensor | None,
    source: Tensor | None,
    threshold: int,
    scale: float,
    row: bool,
    unit: int,
) -> Tensor:
    """y, dense. Samples are drawn by key, or, with the two of them, those of position and source.

    position: int64 [N], each sample's place in branch or -1; source: int64 [s], for each sample of
    branch the sample that it goes to, or -1. key: int64 [3], of seed, step and rank.
    """
    return kernels("stochastic_depth_add", branch).stochastic_depth_add_fwd(
        branch, shortcut, key, position, threshold, scale, row, unit
    )


@_forward.register_fake
def _(
    branch: Tensor,
    shortcut: Tensor,
    key: Tensor,
    position: Tensor | None,
    source: Tensor | None,
    threshold: int,
    scale: float,
    row: bool,
    unit: int,
) -> Tensor:
    return kernels("stochastic_depth_add", branch).empty_y(shortcut)


@register_op("stochastic_depth_add_backward")
def _backward(
    dy: Tensor,
    key: Tensor,
    source: Tensor | None,
    threshold: int,
    scale: float,
    row: bool,
    unit: int,
    channels_last: bool,
) -> Tensor:
    """dbranch, dense, NHWC in memory with channels_last, else NCHW."""
    return kernels("stochastic_depth_add", dy).stochastic_depth_add_bwd(
        dy, key, source, threshold, scale, row, unit, channels_last
    )


@_backward.register_fake
def _(
    dy: Tensor,
    key: Tensor,
    source: Tensor | None,
    threshold: int,
    scale: float,
    row: bool,
    unit: int,
    channels_last: bool,
) -> Tensor:
    samples = dy.shape[0] if source is None else source.shape[0]
    return kernels("stochastic_depth_add", dy).empty_dbranch(dy, samples, channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    branch, _, key, _, source, *ctx.draw = inputs
    ctx.channels_last = branch.is_contiguous(memory_format=torch.channels_last)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(key, source)


def _autograd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    dbranch = None
    if dy is not None and ctx.needs_input_grad[0]:
        key, source = ctx.saved_tensors
        dbranch = torch.ops.fastres.stochastic_depth_add_backward.default(
            dy, key, source, *ctx.draw, ctx.channels_last
        )
    return (dbranch, dy, *(None,) * 7)


register_autograd(_forward, _autograd_backward, _setup_context)


@register_op("draw_subset")
def _draw_subset(key: Tensor, samples: int, kept: int, unit: int) -> tuple[Tensor, Tensor]:
    """index int64 [kept], random samples of [0, samples), and position int64 [samples] in it."""
    return kernels("stochastic_depth_add", key).draw_subset(key, samples, kept, unit)


@_draw_subset.register_fake
def _(key: Tensor, samples: int, kept: int, unit: int) -> tuple[Tensor, Tensor]:
    return kernels("stochastic_depth_add", key).empty_subset(key, samples, kept)


def stochastic_depth_add(
    branch: Tensor,
    shortcut: Tensor,
    p: float,
    mode: Mode = "row",
    training: bool = True,
    generator: Generator = None,
) -> Tensor:
    """Add a residual branch that survives with probability 1 - p.

    y = shortcut + b / (1 - p) * branch,   b ~ Bernoulli(1 - p)

    One kernel on a GPU, which draws, and does not read the branch of a dropped sample; so nothing
    of it, a NaN neither, reaches y. Its gradient there is zero.

    Args:
        branch: [N, C, H, W], fp32, fp16 or bf16, any strides. On a CPU fp64 too.
        shortcut: same shape, dtype and device as branch, any strides.
        p: drop probability, 0 <= p <= 1; p = 1 returns shortcut's values.
        mode: "batch" draws one b for the batch, "row" one for each sample, and "subset" keeps
            max(int(N * (1 - p)), 1) samples, and scales them by N over their number.
        training: without it y = shortcut + branch.
        generator: a torch.Generator of branch's device (which torch.compile does not take), None
            for PyTorch's own, or a StepGenerator's unit, whose draws are a function of seed, step,
            unit and rank.
    Returns:
        [N, C, H, W] in shortcut's dtype and memory format. Arithmetic in fp32; on a CPU PyTorch's
        own add, which rounds the factor to a half-precision dtype first.
    Raises:
        ValueError: shapes, dtypes or devices differ, p out of range, unknown mode, a generator of
            another p.
    Source: Huang et al. 2016, arXiv:1603.09382; inverted scaling in training, none at test time.
    """
    check_drop(p, mode, generator)
    _check(branch, shortcut)
    if not training or p == 0:
        return shortcut + branch
    key, unit = key_of(generator, branch.device)
    if mode == "subset":
        samples = branch.shape[0]
        kept = subset_size(samples, p)
        _, position = draw_subset(key, samples, kept, unit)
        # Where sample n goes to n, one list says both where from and where to.
        n = torch.arange(samples, device=branch.device)
        position = torch.where(position >= 0, n, -1)
        return add_subset(branch, shortcut, position, position, samples / max(kept, 1))
    row, scale = mode == "row", 1.0 / (1.0 - p) if p < 1 else 0.0
    if takes_kernels(branch):
        return torch.ops.fastres.stochastic_depth_add.default(
            branch, shortcut, key, None, None, threshold(p), scale, row, unit
        )
    draw = draws(key, branch.shape[0] if row else 1, unit, with_rank=row)
    return _add_kept(branch, shortcut, draw >= threshold(p), scale)


def _add_kept(branch: Tensor, shortcut: Tensor, kept: Tensor, scale: float) -> Tensor:
    """The CPU's path, which does not read what is dropped either. kept: bool [N] or [1]."""
    if not is_plain(branch, shortcut, kept):
        # A graph has no room for a number of samples that only the draw tells.
        branch = torch.where(kept[:, None, None, None], branch, 0.0)
        return torch.add(shortcut, branch, alpha=scale)
    if bool(kept.all()):
        return torch.add(shortcut, branch, alpha=scale)
    index = kept.expand(branch.shape[0]).nonzero()[:, 0]
    return add_samples(shortcut, index, take_samples(branch, index), scale)


def subset_size(samples: int, p: float) -> int:
    """How many of a batch's samples "subset" keeps: max(int(N * (1 - p)), 1), and none at p = 1."""
    if p == 1:
        return 0
    # 10 * (1 - 0.8) is a little under 2 in floating point, and means 2.
    return min(max(int(samples * (1.0 - p) + 1e-6), 1), samples)


def draw_subset(key: Tensor, samples: int, kept: int, unit: int) -> tuple[Tensor, Tensor]:
    """The `kept` samples of least draw, in that order.

    Args:
        key: int64 [3]: seed, step, rank; unit: whose draw it is.
        samples: N, of the batch; kept: 0 <= kept <= N.
    Returns:
        index int64 [kept], samples of [0, N), and position int64 [N], each one's place in index,
        or -1.
    """
    if takes_kernels(key):
        return torch.ops.fastres.draw_subset.default(key, samples, kept, unit)
    order = torch.argsort(draws(key, samples, unit, with_rank=True), stable=True)
    place = torch.arange(samples, device=key.device)
    position = torch.empty_like(place).scatter_(0, order, torch.where(place < kept, place, -1))
    return order[:kept], position


def add_subset(
    branch: Tensor, shortcut: Tensor, position: Tensor, source: Tensor, scale: float
) -> Tensor:
    """shortcut + scale * branch where a sample has a place in branch: scatter and add in one pass.

    Args:
        branch: [s, C, H, W]; shortcut: [N, C, H, W], of one dtype and device, any strides.
        position: int64 [N], each sample's place in branch, or -1.
        source: int64 [s], the sample that each one of branch goes to, or -1.
        scale: of branch.
    Returns:
        [N, C, H, W] as shortcut.
    Raises:
        ValueError: branch or shortcut is not of these sizes, or they differ in dtype or device.
    """
    _check(branch, shortcut, position.shape[0])
    if branch.shape[0] != source.shape[0]:
        raise ValueError(
            f"branch: expected {source.shape[0]} samples, as it was given, got {branch.shape[0]}"
        )
    if takes_kernels(branch):
        return torch.ops.fastres.stochastic_depth_add.default(
            branch, shortcut, position, position, source, 0, scale, True, 0
        )
    if source is position:
        return _add_kept(branch, shortcut, position >= 0, scale)
    return add_samples(shortcut, source, branch, scale)


def key_of(generator: Generator, device: torch.device) -> tuple[Tensor, int]:
    """What to draw by: int64 [3] of seed, step and rank, and the unit's number."""
    if isinstance(generator, UnitGenerator):
        return generator.steps.key(device), generator.number
    # randint and not random_, and no word of a generator that is None: torch.compile takes neither.
    options: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.randint(1 << 62, (3,), device=device, **options), 0


def check_drop(p: float, mode: str, generator: Generator = None) -> None:
    """Raise ValueError unless 0 <= p <= 1, there is such a mode, and generator draws by p."""
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a drop probability, 0 <= p <= 1, got {p}")
    if mode not in ("batch", "row", "subset"):
        raise ValueError(f"mode: expected 'batch', 'row' or 'subset', got {mode!r}")
    # Dropped by one probability and scaled by another, the sum would be biased.
    if isinstance(generator, UnitGenerator) and generator.p != p:
        raise ValueError(f"generator: expected a unit of p = {p}, got one of p = {generator.p}")


def _check(branch: Tensor, shortcut: Tensor, samples: int | None = None) -> None:
    """samples: of shortcut, where they are not as many as branch's."""
    shape, dtype, device = branch.shape, branch.dtype, branch.device
    if len(shape) != 4:
        raise ValueError(f"branch: expected [N, C, H, W], got shape {list(shape)}")
    allowed = [torch.float32, torch.float16, torch.bfloat16]
    if dtype not in allowed and (dtype != torch.float64 or takes_kernels(branch)):
        raise ValueError(f"branch: expected one of {allowed} on {device}, got {dtype}")
    if samples is not None:
        shape = torch.Size((samples, *shape[1:]))
    if shortcut.shape != shape or shortcut.dtype != dtype or shortcut.device != device:
        raise ValueError(
            f"shortcut: expected branch's {list(shape)}, {dtype} on {device}, "
            f"got {list(shortcut.shape)}, {shortcut.dtype} on {shortcut.device}"
        )


class StochasticDepthAdd(nn.Module):
    """stochastic_depth_add as a Module: in training draws, in evaluation adds.

    Args:
        p: drop probability, 0 <= p <= 1.
        mode: "batch", "row" or "subset".
        generator: see stochastic_depth_add.
    Raises:
        ValueError: p out of range, unknown mode, a generator of another p.
    """

    def __init__(self, p: float, mode: Mode = "row", generator: Generator = None) -> None:
        super().__init__()
        check_drop(p, mode, generator)
        self.p, self.mode, self.generator = p, mode, generator

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """See stochastic_depth_add."""
        return stochastic_depth_add(
            branch, shortcut, self.p, self.mode, self.training, self.generator
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"
