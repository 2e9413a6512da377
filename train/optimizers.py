"""A run's optimizer: its parameter groups, and its state in an order without them."""

from typing import Any

import torch
from config import Config
from torch import nn

from fastres.optim import FusedSGD, YellowFin


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a config, for a model that is where it trains."""
    params = parameter_groups(model, config.decay_norm_bias)
    settings: dict[str, Any] = {"lr": config.peak_lr, "weight_decay": config.weight_decay}
    if config.optimizer == "yellowfin":
        return YellowFin(params, **settings)
    if config.optimizer == "adam":
        return torch.optim.Adam(params, **settings, fused=True, capturable=config.cuda_graph)
    settings["momentum"] = config.momentum
    return (
        FusedSGD(params, **settings)
        if config.fused
        else torch.optim.SGD(params, **settings, fused=True)
    )


def parameter_groups(model: nn.Module, decay_norm_bias: bool) -> list[dict[str, Any]]:
    """All parameters, or those of weights and, without decay, those of BatchNorm and biases.

    Source: Goyal et al. 2017, arXiv:1706.02677, section 5.3.
    """
    params = list(model.parameters())
    if decay_norm_bias:
        return [{"params": params}]
    # BatchNorm's parameters and biases are vectors; what multiplies activations is not.
    return [
        {"params": [p for p in params if p.dim() > 1]},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def in_model_order(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    """An optimizer's state_dict whose numbers are places in model.parameters().

    PyTorch numbers parameters by group after group: a state could else be given to other ones when
    the groups change between a checkpoint and its resume.
    """
    place = {p: i for i, p in enumerate(model.parameters())}
    number = [place[p] for group in optimizer.param_groups for p in group["params"]]
    return state | {
        "state": {number[k]: v for k, v in state["state"].items()},
        "param_groups": [
            group | {"params": [number[k] for k in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def load_in_strides(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """optimizer.load_state_dict, with each tensor laid out in memory as its parameter is.

    PyTorch keeps the strides of what it loads, and its fused steps pair the elements of a parameter
    and its state by memory: after a change of memory format they would be each other's.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    loaded = dict(state["state"])
    for p, i in zip(params, numbers, strict=True):
        if i in loaded:
            loaded[i] = {
                name: torch.empty_like(p, dtype=value.dtype, device=value.device).copy_(value)
                if isinstance(value, torch.Tensor) and value.shape == p.shape and p.dim() == 4
                else value
                for name, value in loaded[i].items()
            }
    optimizer.load_state_dict(state | {"state": loaded})
