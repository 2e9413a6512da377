"""YellowFin: SGD that measures the gradients and tunes its own learning rate and momentum."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastres.ops._dense import is_dense, like, row, send

# Of E|g|^2: less variance than this is rounding, and would be divided by.
_LEAST_VARIANCE = 1e-6
# A gradient may show at most so many times the curvature that was seen so far.
_GROWTH = 100.0
# The learning rate rises over so many windows.
_SLOW_START = 10
# For each parameter, in self.state; and for all of them together, with the first one's, which is
# where torch.optim.LBFGS has its own: what reads states knows parameters alone.
_BUFFERS = ("momentum_buffer", "grad_average")
_SHARED = ("steps", "window", "averages", "distance")


def one_minus_root_momentum(p: Tensor) -> Tensor:
    """1 - x for the x = sqrt(momentum) that minimises x^2 D^2 + (1 - x)^4 C / h_min^2.

    The derivative is zero where y = x - 1 solves y^3 + p y + p = 0, p = D^2 h_min^2 / (2 C), whose
    one real root lies between -1 and 0. In its hyperbolic form nothing cancels at any p > 0, and x
    itself is (1 - x)^3 / p.
    """
    return 2 * (p / 3).sqrt() * torch.sinh(torch.asinh(1.5 * (3 / p).sqrt()) / 3)


class YellowFin(torch.optim.Optimizer):
    """Momentum SGD with one learning rate and one momentum for the model, tuned at every step.

    v = mu * v - factor * alpha * (g + weight_decay * w);   w += v

    where mu and alpha minimise mu * D^2 + alpha^2 * C, the squared distance to the optimum that a
    step of a noisy quadratic leaves, with mu so large that every curvature from h_min to h_max
    contracts at the rate sqrt(mu):

    sqrt(mu) >= (r - 1) / (r + 1), r = sqrt(h_max / h_min);   alpha = (1 - sqrt(mu))^2 / h_min

    h_min and h_max (curvature_range) are the least and the largest |g|^2 of a window, averaged as
    logarithms; C (grad_variance) is E|g|^2 - |E g|^2; D (dist_to_opt) is E(E|g| / E|g|^2). Each E
    is an exponential average, debiased, over the gradients of all groups together. alpha rises over
    the first 10 windows. With clip, a gradient longer than sqrt(h_max) is shortened to that, and
    what it tells the averages is bounded by 10 times that length.

    group["lr"] is the factor, which schedules change; the averages know nothing of it and outlast
    its phases. A gradient that is zero everywhere teaches nothing. A parameter without a gradient
    is left as it is, and counts as one whose gradient is zero.

    LossScaler and torch.amp.GradScaler hand it the loss scale and found_inf as tensors. Nothing
    waits for the device, and a CUDA graph can capture a step (give lr as a tensor there). A skipped
    step leaves parameters and all state bitwise as they were. Under DistributedDataParallel every
    rank reads the same reduced gradients, and so tunes alike.

    Args:
        params: fp32 tensors on one device, or dicts of parameter groups.
        lr: the factor, 0 or more; a tensor is read on the device at each step.
        beta: of the averages, between 0 and 1; the same in all groups.
        curvature_window: gradients in the window, 1 or more; the same in all groups.
        weight_decay: 0 or more; not seen by the averages.
        clip: whether to clip; the same in all groups.
    Raises:
        ValueError: a number out of range, settings that must not differ and do, parameters that are
            not dense fp32 tensors on one device.
        RuntimeError: at a step, a sparse gradient.
    Source: Zhang and Mitliagkas 2017, arXiv:1706.03471.
    """

    # GradScaler then leaves unscaling and skipping to step, by grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        beta: float = 0.999,
        curvature_window: int = 20,
        weight_decay: float = 0.0,
        *,
        clip: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "curvature_window": curvature_window,
            "weight_decay": weight_decay,
            "clip": clip,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups)
            _check_params([p for group in self.param_groups for p in group["params"]])
        except ValueError:
            self.param_groups.pop()
            raise
        self._gather()

    # What is measured, on the device; not a number before the first step

    def curvature_range(self) -> tuple[Tensor, Tensor]:
        """h_min and h_max, fp64 []."""
        low, high, *_ = self._averages().exp().unbind()
        return low, high

    def grad_variance(self) -> Tensor:
        """C, fp64 []: the mean squared distance of gradients from their mean, never quite 0."""
        squared = self._averages()[3]
        mean = torch.linalg.vector_norm(self._flat["grad_average"], dtype=torch.float64)
        variance = squared - (mean / self._debias()).square()
        return variance.maximum(_LEAST_VARIANCE * squared)

    def dist_to_opt(self) -> Tensor:
        """D, fp64 []: how far the optimum is thought to be, in the parameters' units."""
        return self._all["distance"] / self._debias()

    def tuned(self) -> tuple[Tensor, Tensor]:
        """alpha and mu, fp64 []: the learning rate before the groups' factors, and the momentum."""
        low, high = self.curvature_range()
        p = (self.dist_to_opt() * low).square() / (2 * self.grad_variance())
        best = one_minus_root_momentum(p)
        root = (high / low).sqrt()
        robust = (root - 1) / (root + 1)
        momentum = (best**3 / p).maximum(robust).square()
        # 1 - sqrt(mu) of the larger of both, without taking a difference.
        alpha = best.minimum(2 / (root + 1)).square() / low
        steps = self._all["steps"]
        alpha = alpha * (steps / (_SLOW_START * self._settings["curvature_window"])).clamp(max=1)
        return torch.where(steps > 0, alpha, 0.0), torch.where(steps > 0, momentum, 0.0)

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
        _check(self.param_groups)
        if all(p.grad is None for p in self._params):
            return loss
        grad = self._gradient()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if grad_scale is not None:
            grad /= send(grad_scale, grad.device)
        taken = None
        if found_inf is not None:
            taken = send(found_inf, grad.device).reshape(()) == 0
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        bounded = clipped = torch.ones_like(norm)
        if self._settings["clip"]:
            ratio = self.curvature_range()[1].sqrt() / norm
            known = self._all["steps"] > 0
            bounded = torch.where(known, (ratio * math.sqrt(_GROWTH)).clamp(max=1), 1.0)
            clipped = torch.where(known, ratio.clamp(max=1), 1.0)
        self._learn(grad, norm, bounded, taken)
        self._move(grad, clipped, taken)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a YellowFin, into the buffers that there are."""
        states = state_dict["state"]
        # The first one's in the groups that there were then, in whatever order they stand now.
        known = next((s for s in states.values() if s.keys() >= {*_SHARED}), None)
        if known is None:
            raise ValueError("load_state_dict: expected the state of a YellowFin, got another's")
        # First, so that a state that does not fit changes nothing.
        _check(state_dict["param_groups"])
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        # Where there are more of the one than of the other, PyTorch says it.
        for i, p in zip(numbers, self._params, strict=False):
            for name in _BUFFERS:
                held = states.get(i, {}).get(name)
                if held is not None and held.shape != p.shape:
                    raise ValueError(
                        f"load_state_dict: {name} of parameter {i} is {list(held.shape)}, and the "
                        f"parameter {list(p.shape)}: make the optimizer for the same model"
                    )
        held, now = known["window"].numel(), self._settings["curvature_window"]
        for window in (held, state_dict["param_groups"][0]["curvature_window"]):
            if window != now:
                raise ValueError(
                    f"load_state_dict: what was measured is in a window of {now} gradients, got "
                    f"curvature_window = {window}: make the optimizer with that"
                )
        # PyTorch makes them fp32 on the way, as the parameter is, and they may be our own.
        known = {name: known[name].clone() for name in _SHARED}
        super().load_state_dict(state_dict)
        for name, t in self._all.items():
            t.copy_(known[name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Loaded, unpickled, or a deep copy.
        super().__setstate__(state)
        self._gather()

    @torch.no_grad()
    def _gather(self) -> None:
        """Keep the state in flat buffers, of which what self.state shows are views."""
        self._params = [p for group in self.param_groups for p in group["params"]]
        # Settings that all groups share.
        self._settings = self.param_groups[0]
        numel = sum(p.numel() for p in self._params)
        device = self._params[0].device if self._params else torch.device("cpu")
        flat: dict[str, Tensor] = self.__dict__.get("_flat", {})
        if not flat or flat["moves"].numel() != numel or flat["moves"].device != device:
            names = (*_BUFFERS, "moves")
            flat = {name: torch.zeros(numel, dtype=torch.float32, device=device) for name in names}
        self._flat = flat
        self._views = {name: _views(t, self._params) for name, t in flat.items()}
        shared: dict[str, Tensor] = {}
        for i, p in enumerate(self._params):
            state = self.state[p]
            for name in _BUFFERS:
                view = self._views[name][i]
                view.copy_(state[name]) if name in state else view.zero_()
                state[name] = view
            shared |= {name: state.pop(name) for name in _SHARED if name in state}

        window = self._settings["curvature_window"]
        every: dict[str, Tensor] = self.__dict__.get("_all", {})
        if not every or every["window"].numel() != window or every["window"].device != device:
            # averages: of log h_min, log h_max, |g| and |g|^2.
            shapes = {"steps": [], "window": [window], "averages": [4], "distance": []}
            every = {
                name: torch.zeros(shapes[name], dtype=torch.float64, device=device)
                for name in _SHARED
            }
        for name, t in every.items():
            t.copy_(shared[name]) if name in shared else t.zero_()
        self._all = every
        if self._params:
            self.state[self._params[0]].update(every)

    def _gradient(self) -> Tensor:
        """Every gradient in one flat tensor, zeros for a missing one."""
        parts = []
        for p, view in zip(self._params, self._views["moves"], strict=True):
            if p.grad is None:
                parts.append(torch.zeros(p.numel(), dtype=p.dtype, device=p.device))
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"YellowFin does not support sparse gradients, got {p.grad.layout} for a "
                    f"parameter of shape {list(p.shape)}: sparse=False in the embedding, or "
                    "torch.optim.SparseAdam for that parameter"
                )
            parts.append(row(like(p.grad, view)))
        return torch.cat(parts)

    def _debias(self) -> Tensor:
        """1 - beta^steps: the weight that an average has gathered."""
        return -torch.expm1(self._all["steps"] * math.log(self._settings["beta"]))

    def _averages(self) -> Tensor:
        return self._all["averages"] / self._debias()

    def _learn(self, grad: Tensor, norm: Tensor, bounded: Tensor, taken: Tensor | None) -> None:
        """Let the averages take in bounded * grad, where the step is taken."""
        every, weight = self._all, 1 - self._settings["beta"]
        learns = (norm > 0) & norm.isfinite()
        learns = learns if taken is None else learns & taken
        norm = norm * bounded
        latest = 2 * norm.log()
        window = torch.cat([every["window"][1:], latest[None]])
        window = torch.where(every["steps"] > 0, window, latest)
        observed = torch.stack([window.amin(), window.amax(), norm, norm.square()])
        averages = torch.lerp(every["averages"], observed, weight)
        taught = {
            "steps": every["steps"] + 1,
            "window": window,
            "averages": averages,
            "distance": torch.lerp(every["distance"], averages[2] / averages[3], weight),
        }
        for name, t in taught.items():
            every[name].copy_(torch.where(learns, t, every[name]))
        mean = self._flat["grad_average"]
        fresh = mean * (1 - weight) + grad * (weight * bounded)
        mean.copy_(torch.where(learns, fresh, mean))

    def _move(self, grad: Tensor, clipped: Tensor, taken: Tensor | None) -> None:
        """Step by clipped * grad, where the step is taken and a parameter has a gradient."""
        alpha, momentum = self.tuned()
        if any(p.grad is None for p in self._params):
            device = grad.device
            present = torch.cat(
                [torch.full((p.numel(),), p.grad is not None, device=device) for p in self._params]
            )
            taken = present if taken is None else taken & present
        # Without one to choose by, the velocities themselves are added, and nothing is copied.
        name = "momentum_buffer" if taken is None else "moves"
        begin = number = 0
        for group in self.param_groups:
            params, factor = group["params"], group["lr"]
            views = self._views["moves"][number : number + len(params)]
            part = slice(begin, begin + sum(p.numel() for p in params))
            begin, number = part.stop, number + len(params)
            if not params:
                continue
            rate = alpha * (factor.reshape(()) if isinstance(factor, Tensor) else factor)
            v = self._flat["momentum_buffer"][part]
            fresh = v * momentum - grad[part] * (rate * clipped)
            if group["weight_decay"] != 0:
                weights = [row(like(p, view)) for p, view in zip(params, views, strict=True)]
                fresh -= torch.cat(weights) * (rate * group["weight_decay"])
            if taken is not None:
                here = taken[part] if taken.dim() else taken
                # Adding -0.0 changes no bit, where 0.0 would turn -0.0 into 0.0.
                self._flat["moves"][part] = torch.where(here, fresh, -0.0)
                fresh = torch.where(here, fresh, v)
            v.copy_(fresh)
        torch._foreach_add_(self._params, self._views[name])


def _views(flat: Tensor, params: list[Any]) -> list[Tensor]:
    """Each parameter's part of a flat buffer, in its shape and, where it is dense, its strides."""
    views, begin = [], 0
    for p in params:
        part = flat[begin : begin + p.numel()]
        views.append(part.as_strided(p.shape, p.stride()) if is_dense(p) else part.view(p.shape))
        begin += p.numel()
    return views


def _check(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"lr: expected a tensor of one element, got {list(lr.shape)}")
        elif not 0.0 <= lr < float("inf"):
            raise ValueError(f"lr: expected a factor of 0 or more, got {lr}")
        if not 0.0 < group["beta"] < 1.0:
            raise ValueError(f"beta: expected a number between 0 and 1, got {group['beta']}")
        window = group["curvature_window"]
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"curvature_window: expected a whole number above 0, got {window}")
        if not 0.0 <= group["weight_decay"] < float("inf"):
            raise ValueError(f"weight_decay: expected 0 or more, got {group['weight_decay']}")
        for name in ("beta", "curvature_window", "clip"):
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"{name}: expected the same in all groups, which are tuned together, got "
                    f"{groups[0][name]} and {group[name]}"
                )


def _check_params(params: list[Tensor]) -> None:
    for p in params:
        if p.dtype != torch.float32:
            raise ValueError(
                f"YellowFin: expected fp32 parameters, got {p.dtype} for shape {list(p.shape)}: "
                "keep them in fp32 under autocast, or use FusedSGD, which has fp32 masters"
            )
        if p.layout != torch.strided:
            raise ValueError(f"YellowFin: expected dense parameters, got {p.layout}")
        if p.device != params[0].device:
            raise ValueError(
                f"YellowFin: expected parameters on one device, got {params[0].device} and "
                f"{p.device}: its averages are over all of them"
            )
