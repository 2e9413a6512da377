"""SGD on the single-pass kernel: unscale, decay, momentum, update and half copy in one launch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastres.ops.sgd_step import Overflow
from fastres.optim._flat import FlatParameters, checked


class FusedSGD(torch.optim.Optimizer):
    """torch.optim.SGD with its parameters in flat buffers, stepped in one launch a group and dtype.

    g = grad / grad_scale + weight_decay * p;   m = momentum * m + g
    p -= lr * (g + momentum * m if nesterov else m)

    Every parameter becomes a view of a flat fp32 buffer, in the strides that it had. A
    half-precision parameter becomes a view of a flat half-precision buffer, and the step is taken
    on its fp32 master: a model of pure fp16 trains as one under autocast does (keep BatchNorm in
    fp32). Make the optimizer when the model is on its device and in its dtype. What is written into
    a parameter later (model.load_state_dict) counts; through p.data it goes unseen. torch.save
    writes a view's whole buffer: save the model, or clones of a part of it.

    LossScaler and torch.amp.GradScaler hand it the loss scale and found_inf as tensors, and nothing
    waits for the device; a skipped step leaves parameters and momentum bitwise as they were. A
    parameter without a gradient is left as it is. Whether .grad is scaled after a scaled step is
    left open: it is on a GPU, and not on a CPU.

    state_dict is torch.optim.SGD's and each loads the other's; a half-precision parameter has its
    "master" there too.

    Args:
        params: tensors, or dicts of parameter groups; fp32, fp16 or bf16.
        lr: learning rate; a tensor is read on the device at each step, which captured graphs need.
        momentum, weight_decay, nesterov, maximize: as torch.optim.SGD's.
        dampening: 0, there for the signature's sake.
    Raises:
        ValueError: a number out of range, a dampening, parameters of another dtype, or two that
            share memory.
        RuntimeError: at a step, a sparse gradient, or a parameter that was moved elsewhere.
    Source: Sutskever et al. 2013; fp32 masters: Micikevicius et al. 2018, arXiv:1710.03740.
    """

    # GradScaler then leaves unscaling and skipping to step, by grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        # A list for each parameter group; add_param_group, which the base class calls, fills it.
        self._flat: list[list[FlatParameters]] = []
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            # For torch.optim.SGD, when it loads this state.
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            checked([p for g in self.param_groups for p in g["params"]])
        except ValueError:
            self.param_groups.pop()
            raise
        self._flat.append(_flatten(group))
        self._show_masters(self._flat[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; with found_inf set (see LossScaler), none.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        overflow: Overflow | None = getattr(self, "overflow", None)
        for group, parts in zip(self.param_groups, self._flat, strict=True):
            _check_group(group)
            for part in parts:
                if group["momentum"] != 0:
                    self._show_momentum(part)
                part.step(group, grad_scale, found_inf, overflow)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros; the masters' are dropped."""
        super().zero_grad(set_to_none)
        self.drop_master_grads()

    def masters(self) -> list[Tensor]:
        """The fp32 tensors that are stepped, in the order of the parameters.

        A half-precision parameter's master, an fp32 parameter itself. After LossScaler.unscale_
        every one has its fp32 gradient as .grad, for clip_grad_norm_(optimizer.masters(), 1.0).
        """
        found = {
            p: master
            for parts in self._flat
            for part in parts
            for p, master in zip(part.params, part.masters, strict=True)
        }
        return [found[p] for group in self.param_groups for p in group["params"]]

    @property
    def finds_overflow(self) -> bool:
        """Whether a step can see for itself if a gradient is Inf or NaN, given need_overflow().

        Not where parameters lie in several buffers, none of whose steps sees the others' gradients,
        in a large one, or on a CPU: found_inf is found before such a step.
        """
        parts = [part for parts in self._flat for part in parts]
        return len(parts) == 1 and parts[0].finds_overflow

    def need_overflow(self) -> Overflow:
        """What a step takes as the attribute `overflow`, beside grad_scale, in found_inf's place.

        Its found_inf says afterwards whether the step was skipped, until the next one writes it.
        """
        ((part,),) = self._flat
        if self.param_groups[0]["momentum"] != 0:
            self._show_momentum(part)
        return part.need_overflow()

    def drop_master_grads(self) -> None:
        """Forget the fp32 gradients that LossScaler.unscale_ made of half-precision ones."""
        for parts in self._flat:
            for part in parts:
                part.drop_master_grads()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a FusedSGD or of a torch.optim.SGD, into the buffers that there are."""
        for group in state_dict["param_groups"]:
            if not {"momentum", "dampening", "nesterov"} <= group.keys():
                raise ValueError(
                    "load_state_dict: expected the state of a FusedSGD or a torch.optim.SGD, got "
                    f"another's, whose groups have {', '.join(sorted(group.keys() - {'params'}))}"
                )
            _check_group(group)  # first, so that a state that does not fit changes nothing
        super().load_state_dict(state_dict)
        # The base class casts what it loads to the parameter's dtype: fp32 state of half-precision
        # parameters is taken from the source.
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        source = state_dict["state"]
        self._adopt({p: source[i] for p, i in zip(params, numbers, strict=True) if i in source})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in (("nesterov", False), ("maximize", False), ("dampening", 0.0)):
                group.setdefault(name, value)
            _check_group(group)
        if "_flat" not in self.__dict__:  # unpickled, or a deep copy
            self._flat = [_flatten(group) for group in self.param_groups]
            self._adopt(dict(self.state))

    @torch.no_grad()
    def _adopt(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Copy momentum buffers and masters into the flat buffers, and show these as the state."""
        for part in (part for parts in self._flat for part in parts):
            loaded = [state.get(p, {}) for p in part.params]
            if any(s.get("momentum_buffer") is not None for s in loaded):
                part.need_momentum()
            for p, s, momentum in zip(part.params, loaded, part.momentum_views, strict=False):
                buffer = s.get("momentum_buffer")
                momentum.zero_() if buffer is None else momentum.copy_(buffer)
                self.state[p]["momentum_buffer"] = momentum
            if part.half is not None:
                for p, s, master in zip(part.params, loaded, part.masters, strict=True):
                    known = s.get("master")
                    master.copy_(p if known is None else known)
            self._show_masters([part])

    def _show_masters(self, parts: list[FlatParameters]) -> None:
        for part in parts:
            if part.half is not None:
                for p, master in zip(part.params, part.masters, strict=True):
                    self.state[p]["master"] = master

    def _show_momentum(self, part: FlatParameters) -> None:
        if part.momentum is None:
            part.need_momentum()
            for p, view in zip(part.params, part.momentum_views, strict=True):
                self.state[p]["momentum_buffer"] = view


def _flatten(group: dict[str, Any]) -> list[FlatParameters]:
    parts: dict[tuple[torch.dtype, torch.device], list[Any]] = {}
    for p in group["params"]:
        parts.setdefault((p.dtype, p.device), []).append(p)
    return [FlatParameters(params) for params in parts.values()]


def _check_group(group: dict[str, Any]) -> None:
    lr, momentum = group["lr"], group["momentum"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr: expected a tensor of one element, got {list(lr.shape)}")
    elif not 0.0 <= lr < float("inf"):
        raise ValueError(f"lr: expected lr >= 0, got {lr}")
    for name in ("momentum", "weight_decay"):
        if not 0.0 <= group[name] < float("inf"):
            raise ValueError(f"{name}: expected {name} >= 0, got {group[name]}")
    if group["dampening"] != 0:
        raise ValueError(
            f"dampening: FusedSGD has none, got {group['dampening']}: use torch.optim.SGD"
        )
    if group["nesterov"] and momentum == 0:
        raise ValueError("nesterov: needs a momentum, got momentum=0")
