"""Parameters in one flat buffer, with momentum, fp32 masters or half copies beside it."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastres.ops import cast, flat_offsets, takes_kernels
from fastres.ops._dense import DTYPES, is_dense, like
from fastres.ops.sgd_step import Overflow, overflow_of, step_each, step_flat

# Elements up to which a step finds an overflow itself: a launch less, and 4 bytes an element more
# that move. Not tuned on a GPU yet.
FINDS_OVERFLOW = 1 << 21
# And parameters, each of which has a program or more: a launch counts less than 2^15 of them.
_MOST_PARAMETERS = 1 << 14


class FlatParameters:
    """Parameters that became views of one buffer, each in the strides that it had.

    Attributes:
        params: the parameters, all of one dtype and on one device.
        sizes, offsets: elements of each, and where in the buffer it begins.
        flat: fp32, flat: the parameters, or the fp32 masters of half-precision ones.
        half: the half-precision parameters, flat, or None where the parameters are fp32.
        masters: for each parameter, what is stepped: the parameter itself, or its fp32 master.
        halves: the half-precision parameters, or None where the parameters are fp32.
        momentum: fp32, flat, zeros at first, or None before it is needed.
        momentum_views: each parameter's part of it.
    """

    def __init__(self, params: Sequence[Parameter]) -> None:
        self.params = list(params)
        first = self.params[0]
        self.sizes = [p.numel() for p in self.params]
        self.offsets, total = flat_offsets(self.sizes)
        # PyTorch keeps a parameter that is not dense (an expanded one) in a gradient that is.
        self._strides = [
            p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
            for p in self.params
        ]
        self.flat = torch.zeros(total, dtype=torch.float32, device=first.device)
        self.half = None if first.dtype == torch.float32 else self.flat.to(first.dtype)
        self.momentum: Tensor | None = None
        self.momentum_views: list[Tensor] = []
        self._overflow: Overflow | None = None
        stored = self.views(self.flat if self.half is None else self.half)
        with torch.no_grad():
            for p, view in zip(self.params, stored, strict=True):
                view.copy_(p)
                p.data = view
        self.halves: list[Tensor] | None = None
        self.masters: list[Tensor] = list(self.params)
        if self.half is not None:
            self.halves = stored
            cast(self.half, self.flat)
            self.masters = self.views(self.flat)
        self._addresses = [p.data_ptr() for p in self.params]
        self._versions = [p._version for p in self.params]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of a flat buffer, in the parameter's shape and strides."""
        places = zip(self.params, self._strides, self.offsets, strict=True)
        return [flat.as_strided(p.shape, stride, offset) for p, stride, offset in places]

    def need_momentum(self) -> None:
        """Make the momentum buffer, zeros, where there is none."""
        if self.momentum is None:
            self.momentum = torch.zeros_like(self.flat)
            self.momentum_views = self.views(self.momentum)

    @property
    def finds_overflow(self) -> bool:
        """Whether one launch may step and see for itself if a gradient is Inf or NaN."""
        small = self.flat.numel() <= FINDS_OVERFLOW and len(self.params) <= _MOST_PARAMETERS
        return takes_kernels(self.flat) and small

    def need_overflow(self) -> Overflow:
        """What `step` then takes: one for all steps, made where it has no room for momentum."""
        made = self._overflow
        if made is None or (len(made.before) == 1 and self.momentum is not None):
            made = self._overflow = overflow_of(self.flat, self.momentum)
        return made

    def check(self) -> None:
        """Raise RuntimeError unless every parameter still is where it was put."""
        for p, address in zip(self.params, self._addresses, strict=True):
            if p.data_ptr() != address:
                raise RuntimeError(
                    f"FusedSGD: a parameter of shape {list(p.shape)} is no longer in the "
                    "optimizer's buffer: model.to(...), .half() or p.data = ... moved it. Make the "
                    "optimizer after the model is where it trains, or a new one now"
                )

    def refresh(self) -> None:
        """Take from half-precision parameters what somebody wrote into them since the last step.

        A loaded or initialised parameter would otherwise come back as its old master has it. Where
        it is what its master rounds to, as when a model and then its optimizer are loaded, or the
        other way round, the master keeps its precision.
        """
        if self.half is not None:
            versions = zip(self.params, self.masters, self._versions, strict=True)
            for p, master, version in versions:
                if p._version != version:
                    master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
        self._versions = [p._version for p in self.params]

    def _stepped(self) -> None:
        """Tell autograd that the parameters changed, as an in-place op of PyTorch's own would."""
        torch.autograd.graph.increment_version(self.params)
        self._versions = [p._version for p in self.params]

    def gradients(self) -> tuple[list[Tensor | None], bool]:
        """Each parameter's gradient in the parameter's strides, and whether they are unscaled.

        Unscaled are the fp32 gradients of half-precision parameters that LossScaler.unscale_ made.
        """
        masters = self.masters if self.half is not None else []
        unscaled = any(master.grad is not None for master in masters)
        owners = masters if unscaled else self.params
        found: list[Tensor | None] = []
        for p, owner, view in zip(self.params, owners, self.masters, strict=True):
            grad = owner.grad if p.grad is not None else None
            if grad is not None and grad.layout != torch.strided:
                raise RuntimeError(
                    f"FusedSGD does not support sparse gradients, got {grad.layout} for a "
                    f"parameter of shape {list(p.shape)}: sparse=False in the embedding, or "
                    "torch.optim.SGD for that parameter"
                )
            found.append(None if grad is None else like(grad, view))
        return found, unscaled

    def step(
        self,
        group: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        overflow: Overflow | None = None,
    ) -> None:
        """Take FusedSGD's step with a group's settings, unless found_inf is set or an overflow
        found."""
        self.check()
        self.refresh()
        grads, unscaled = self.gradients()
        settings = (
            group["lr"], group["momentum"], group["weight_decay"], group["nesterov"],
            group["maximize"], None if unscaled else grad_scale, found_inf,
        )  # fmt: skip
        moves = group["momentum"] != 0
        if takes_kernels(self.flat):
            buffer = self.momentum if moves else None
            step_flat(
                grads, self.sizes, self.offsets, self.flat, buffer, self.half, *settings, overflow
            )
        else:
            buffers = self.momentum_views if moves else None
            step_each(grads, self.masters, buffers, self.halves, *settings)
        self._stepped()
        self.drop_master_grads()

    def drop_master_grads(self) -> None:
        if self.half is not None:
            for master in self.masters:
                master.grad = None


def checked(params: Sequence[Tensor]) -> None:
    """Raise ValueError unless FusedSGD can own all of these."""
    for p in params:
        if p.dtype not in DTYPES:
            raise ValueError(
                f"FusedSGD: expected parameters of one of {list(DTYPES)}, got {p.dtype} for shape "
                f"{list(p.shape)}"
            )
        if p.layout != torch.strided:
            raise ValueError(f"FusedSGD: expected dense parameters, got {p.layout}")
    placed = [p for p in params if p.numel() > 0 and p.device.type != "meta"]
    placed.sort(key=lambda p: (str(p.device), p.data_ptr()))
    for p, q in itertools.pairwise(placed):
        # Of a parameter with gaps, in which others may lie, the first byte alone is known.
        end = p.data_ptr() + (p.nbytes if is_dense(p) else 1)
        if p.device == q.device and q.data_ptr() < end:
            raise ValueError(
                f"FusedSGD: a parameter of shape {list(q.shape)} shares its memory with another, "
                "and would be parted from it: give one of them"
            )
