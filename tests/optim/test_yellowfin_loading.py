"""YellowFin's state: saved and loaded, by PyTorch's ways and in other groups; copies of it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.random_steps import everything, parameters, run, same
from tolerances import EPS, EPSILONS
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fastres.optim import YellowFin


def test_a_saved_state_goes_on_bitwise(device: str, tmp_path: Any) -> None:
    params = parameters(device)
    optimizer = YellowFin(params, lr=0.5, beta=0.9, curvature_window=3, weight_decay=0.1)
    run(optimizer, params, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others: list[Any] = [nn.Parameter(p.detach().clone()) for p in params]
    for dirty in (False, True):
        resumed = YellowFin(others, beta=0.9, curvature_window=3)
        if dirty:
            run(resumed, others, range(7, 9))
        with torch.no_grad():
            for p, q in zip(others, params, strict=True):
                p.copy_(q)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert resumed.param_groups[0]["lr"] == 0.5
        assert same(everything(resumed), everything(optimizer))
    run(optimizer, params, range(5, 9))
    run(resumed, others, range(5, 9))
    assert same(everything(resumed), everything(optimizer))
    # Its own state, which is what it is made of.
    before = everything(resumed)
    resumed.load_state_dict(resumed.state_dict())
    assert same(everything(resumed), before)


def test_a_distributed_checkpoint_goes_on_bitwise(device: str) -> None:
    """States by the parameters' names, as torch.distributed.checkpoint asks for them."""
    nets = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(device) for _ in range(2)]
    optimizer, resumed = (YellowFin(net.parameters()) for net in nets)
    run(optimizer, list(nets[0].parameters()), range(3))
    for options in (StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)):
        state = get_optimizer_state_dict(nets[0], optimizer, options=options)
        set_optimizer_state_dict(nets[1], resumed, copy.deepcopy(state), options=options)
        nets[1].load_state_dict(nets[0].state_dict())
        assert same(everything(resumed), everything(optimizer))


def test_what_is_measured_goes_with_its_groups(device: str) -> None:
    """However the parameters were grouped before; torch.optim numbers them in that order."""
    params = parameters(device)
    optimizer = YellowFin([{"params": []}, {"params": params[3:]}, {"params": params[:3]}])
    run(optimizer, params, range(3))
    state = optimizer.state_dict()
    place = [*range(3, len(params)), 0, 1, 2]
    renumbered = {
        "state": {place[i]: s for i, s in state["state"].items()},
        "param_groups": [state["param_groups"][1] | {"params": list(range(len(params)))}],
    }
    others: list[Any] = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = YellowFin(others)
    resumed.load_state_dict(renumbered)
    assert [float(t) for t in resumed.tuned()] == [float(t) for t in optimizer.tuned()]
    run(optimizer, params, range(3, 5))
    run(resumed, others, range(3, 5))
    for p, q in zip(params, others, strict=True):
        # Sums over all gradients, taken in another order.
        torch.testing.assert_close(p, q, rtol=4 * EPSILONS * EPS, atol=4 * EPSILONS * EPS)


def test_an_empty_group_does_nothing(device: str) -> None:
    params, others = parameters(device), parameters(device)
    optimizer = YellowFin([{"params": [], "weight_decay": 0.1}, {"params": params}])
    optimizer.add_param_group({"params": []})
    other = YellowFin(others)
    run(optimizer, params, range(3))
    run(other, others, range(3))
    assert same(everything(optimizer), everything(other))
    YellowFin([{"params": []}]).step()


def test_loading_fills_the_buffers_in_place(device: str) -> None:
    """A captured graph goes on with what was loaded."""
    params = parameters(device)
    optimizer = YellowFin(params)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    run(optimizer, params, range(2, 4))
    optimizer.load_state_dict(saved)
    now = [t for state in optimizer.state.values() for t in state.values()]
    wanted = [t for state in saved["state"].values() for t in state.values()]
    assert {id(t) for t in now if t.dtype == torch.float64} <= {id(t) for t in tensors}
    assert {t.data_ptr() for t in now if t.numel()} == {t.data_ptr() for t in tensors if t.numel()}
    assert all(any(torch.equal(t, w) for w in wanted) for t in now)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_their_own_way(device: str, duplicate: Callable[[Any], Any]) -> None:
    params = parameters(device)
    optimizer = YellowFin(params, curvature_window=3, clip=False)
    run(optimizer, params, range(2))
    twin = duplicate(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    kept = everything(twin)
    run(optimizer, params, range(2, 4))
    assert same(everything(twin), kept)
    run(twin, twins, range(2, 4))
    assert same([p.detach() for p in twins], [p.detach() for p in params])
    assert [float(t) for t in twin.tuned()] == [float(t) for t in optimizer.tuned()]
