"""A residual unit that does not compute what stochastic depth drops.

    y = shortcut(x) + b / (1 - p) * branch(x),   b ~ Bernoulli(1 - p)

"batch" leaves the branch out for the whole batch, "subset" runs it on a part of the batch of fixed
size, and "row" computes it all and drops samples as it adds.
Source: Huang et al. 2016, arXiv:1603.09382.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastres.ops._samples import take_samples
from fastres.ops.batch_norm_relu import BatchNormReLU2d
from fastres.ops.step_generator import UnitGenerator
from fastres.ops.stochastic_depth_add import (
    Generator,
    Mode,
    add_subset,
    check_drop,
    draw_subset,
    key_of,
    stochastic_depth_add,
    subset_size,
)


class _Skipped(torch.autograd.Function):
    """The shortcut alone; its backward hands the parameters of the skipped branch zeros.

    DDP then sees a gradient of every parameter, and momentum and weight decay act on them as on the
    others. The zeros are one element, expanded.
    """

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return shortcut.view_as(shortcut)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [
            torch.zeros((), dtype=dtype, device=device).expand(shape) if needed else None
            for (shape, dtype, device), needed in zip(
                ctx.parameters, ctx.needs_input_grad[1:], strict=True
            )
        ]
        return grads[0], *zeros


def skip(shortcut: Tensor, parameters: Sequence[Tensor], clone: bool) -> Tensor:
    """The shortcut alone, with zero gradients for the parameters of a branch that is skipped."""
    y: Tensor = _Skipped.apply(shortcut, *parameters)
    return y.clone() if clone else y


class StochasticDepth(nn.Module):
    """How a unit drops its branch, for a unit that has a forward of its own. No parameters.

    Args:
        p: drop probability, 0 <= p <= 1.
        mode: "batch", "row" or "subset"; see StochasticDepthUnit.
        generator: see StochasticDepthUnit.
    Raises:
        ValueError: p out of range, unknown mode, a generator of another p.
    """

    def __init__(self, p: float, mode: Mode = "batch", generator: Generator = None) -> None:
        super().__init__()
        check_drop(p, mode, generator)
        self.p, self.mode, self.generator = p, mode, generator

    def forward(
        self,
        branch: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        shortcut: Tensor,
        parameters: Callable[[], Sequence[Tensor]],
        clone: bool = False,
    ) -> Tensor:
        """shortcut + b / (1 - p) * branch(x).

        Args:
            branch: called as branch(x, None) for every sample, or as branch(x, index) for x[index].
            x: what the branch reads, [N, C, H, W].
            shortcut: what the branch is added to, [N, C', H', W'].
            parameters: gives those of the branch, which take zero gradients where it is skipped.
            clone: return a copy of the shortcut where the branch is skipped.
        Returns:
            [N, C', H', W']; without clone, where the branch is skipped, a view of shortcut that may
            not be changed in place.
        Raises:
            ValueError: the branch gives another shape than the shortcut's.
        """
        p = self.p
        if not self.training or p == 0:
            return shortcut + _fitting(branch(x, None), shortcut)
        if self.mode == "row":
            return stochastic_depth_add(
                *_of_one_dtype(branch(x, None), shortcut), p, "row", True, self.generator
            )
        if self.mode == "batch":
            if self.drops():
                return skip(shortcut, parameters(), clone)
            return torch.add(shortcut, _fitting(branch(x, None), shortcut), alpha=1.0 / (1.0 - p))
        samples = x.shape[0]
        kept = subset_size(samples, p)
        if kept == 0:
            return skip(shortcut, parameters(), clone)
        key, unit = key_of(self.generator, x.device)
        index, position = draw_subset(key, samples, kept, unit)
        values, shortcut = _of_one_dtype(branch(x, index), shortcut)
        return add_subset(values, shortcut, position, index, samples / kept)

    def drops(self) -> bool:
        """Whether this batch is dropped, drawn on the host, which chooses what to launch."""
        generator = self.generator
        if isinstance(generator, UnitGenerator):
            return generator.dropped
        return self.p == 1 or bool(torch.rand((), generator=generator, device="cpu") < self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"


def _fitting(branch: Tensor, shortcut: Tensor) -> Tensor:
    """branch, unless `+` would broadcast one of the two."""
    if branch.shape != shortcut.shape:
        raise ValueError(
            f"branch: expected the shortcut's shape {list(shortcut.shape)}, "
            f"got {list(branch.shape)}"
        )
    return branch


def _of_one_dtype(branch: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of the two dtypes, as `+` has it: under autocast they may differ."""
    dtype = torch.promote_types(branch.dtype, shortcut.dtype)
    return branch.to(dtype), shortcut.to(dtype)


class StochasticDepthUnit(nn.Module):
    """A residual unit around a branch, which is dropped with probability p in training.

    y = shortcut(x) + b / (1 - p) * branch(x),   b ~ Bernoulli(1 - p);   y = sum in evaluation

    mode "batch": one draw for the batch; a dropped branch is not computed, its BatchNorms see and
    track nothing, and its parameters get zero gradients (so DDP needs no find_unused_parameters,
    and momentum and weight decay act as on the others). Compiled by torch.compile a unit has two
    graphs, with a StepGenerator's unit even under fullgraph=True; many units compiled as one would
    have a graph for each pattern, and meet the recompile limit: compile them one by one.

    However they drop, PyTorch counts the graphs of all units that are compiled one by one together:
    set torch._dynamo.config.recompile_limit, 8 by itself, to twice the number of units.

    mode "row": one draw for each sample; everything is computed, and BatchNorm sees every sample.

    mode "subset": the branch runs on s = max(int(N * (1 - p)), 1) samples drawn afresh, and is
    added back scaled by N / s: shapes never change, and every parameter is used. Its BatchNorms
    normalise by and track those s samples only, so their statistics are noisier than a whole
    batch's, and s = 1 with one position an image is an error. The gather costs no pass of its own
    where branch is an nn.Sequential that begins with BatchNormReLU2d.

    Args:
        branch: from x [N, C, H, W] to the shortcut's shape.
        p: drop probability, 0 <= p <= 1.
        mode: as above.
        shortcut: from x to the sum's other side; None is x itself.
        generator: a StepGenerator's unit, whose draws are a function of seed, step, unit and rank;
            None, PyTorch's own; or a torch.Generator: of the CPU in mode "batch", else x's device.
            With the latter two, processes agree on a dropped batch where their seeds do.
    Raises:
        ValueError: p out of range, unknown mode, a generator of another p.
    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(
        self,
        branch: nn.Module,
        p: float,
        mode: Mode = "batch",
        shortcut: nn.Module | None = None,
        generator: Generator = None,
    ) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut
        self.drop = StochasticDepth(p, mode, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']; see the class."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        # PyTorch forbids changing a view from a custom Function in place, as a ReLU after this
        # unit may, and an error at some steps only would be no kindness: hence the clone.
        return self.drop(self._run, x, shortcut, lambda: list(self.branch.parameters()), clone=True)

    def _run(self, x: Tensor, index: Tensor | None) -> Tensor:
        branch = self.branch
        if index is None:
            return branch(x)
        if _begins_with_batch_norm(branch):
            first, *rest = branch
            y = first(x, index=index)
            for module in rest:
                y = module(y)
            return y
        return branch(take_samples(x, index))


def _begins_with_batch_norm(branch: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether branch(x[index]) is its modules one by one, the first of which takes an index.

    A class with a forward of its own, or hooks, are somebody's wish: then branch itself is called.
    """
    return (
        isinstance(branch, nn.Sequential)
        and type(branch).forward is nn.Sequential.forward
        and len(branch) > 0
        and type(branch[0]).forward is BatchNormReLU2d.forward
        and not (branch._forward_hooks or branch._forward_pre_hooks)
        and not (branch._backward_hooks or branch._backward_pre_hooks)
    )
