"""LossScaler in GradScaler's place: what it takes, gives and saves, and what it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
from scaled_steps import backward, parameters, train
from torch import nn

from fastres.amp import LossScaler
from fastres.optim import FusedSGD


def test_scale_takes_what_grad_scaler_takes(device: str) -> None:
    scaler, one = LossScaler(init_scale=4.0), torch.ones((), device=device)
    assert float(scaler.scale(one)) == 4.0
    nested = scaler.scale([one, (one, [one])])
    assert isinstance(nested, list) and isinstance(nested[1], tuple)
    assert float(nested[1][1][0]) == 4.0
    assert [float(v) for v in scaler.scale(v for v in (one, one))] == [4.0, 4.0]
    assert scaler.scale(one.half().expand(2)).dtype == torch.float16
    with pytest.raises(ValueError, match="a Tensor or an iterable of Tensors, got float"):
        scaler.scale(1.0)


def test_disabled_passes_through(device: str) -> None:
    scaler, params = LossScaler(enabled=False), parameters(device)
    optimizer = torch.optim.SGD(params, lr=0.1)
    loss = params[0].sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    before = params[0].detach().clone()
    assert scaler.unscale_(optimizer) is None
    assert scaler.step(optimizer) is None
    scaler.update()
    scaler.watch(nn.BatchNorm1d(3))
    assert torch.equal(params[0], before - 0.1)
    assert (scaler.is_enabled(), scaler.get_scale(), scaler.state_dict()) == (False, 1.0, {})
    scaler.load_state_dict({})


def test_states_go_from_one_to_the_other(device: str) -> None:
    params = parameters(device)
    optimizer, scaler = FusedSGD(params, lr=0.1), LossScaler(growth_interval=7, growth_factor=3.0)
    train(scaler, optimizer, params, [True, False, False, True, True])
    state = scaler.state_dict()
    peer = torch.amp.GradScaler(device)
    peer.load_state_dict(state)
    names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    assert peer.state_dict() == {name: state[name] for name in names}
    for late in (False, True):
        loaded = LossScaler()
        if late:
            loaded.scale(torch.zeros((), device=device))
        loaded.load_state_dict(state)
        assert loaded.state_dict() == state
        loaded.load_state_dict(peer.state_dict())
        assert loaded.state_dict() == state | {"skipped_in_a_row": 0}
    for duplicate in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert duplicate.state_dict() == state
        assert train(duplicate, optimizer, params, [False]) == [state["scale"]]
    with pytest.raises(RuntimeError, match="The source state dict is empty"):
        scaler.load_state_dict({})


def test_getters_and_setters() -> None:
    scaler = LossScaler(8.0, 3.0, 0.25, 5)
    got = scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor()
    assert (*got, scaler.get_growth_interval()) == (8.0, 3.0, 0.25, 5)
    scaler.set_growth_factor(4.0)
    scaler.set_backoff_factor(0.5)
    scaler.set_growth_interval(6)
    state = scaler.state_dict()
    assert [state[f"growth_{n}"] for n in ("factor", "interval")] == [4.0, 6]
    assert state["backoff_factor"] == 0.5


def test_a_new_scale(device: str) -> None:
    scaler, params = LossScaler(), parameters(device)
    backward(scaler, params, 0)
    for new in (32.0, 16, torch.tensor([8.0], device=device)):
        scaler.update(new)
        assert scaler.get_scale() == float(new)
    with pytest.raises(AssertionError, match="new_scale should be a float or a 1-element"):
        scaler.update(torch.ones(2))


@pytest.mark.parametrize("fused", [True, False])
def test_called_in_the_wrong_order(device: str, fused: bool) -> None:
    """GradScaler's exceptions and words, and what to do."""
    params = parameters(device)
    optimizer: Any = (FusedSGD if fused else torch.optim.SGD)(params, lr=0.1)
    scaler, peer = LossScaler(), torch.amp.GradScaler(device)
    for s in (scaler, peer):
        for call in (lambda s=s: s.step(optimizer), lambda s=s: s.unscale_(optimizer), s.update):
            with pytest.raises(AssertionError, match="but _scale is None"):
                call()
        backward(s, params, 0)
        with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
            s.update()
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            s.step(optimizer, closure=lambda: None)
        s.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called on this opt"):
            s.unscale_(optimizer)
        s.step(optimizer)
        with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last"):
            s.step(optimizer)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
            s.unscale_(optimizer)
        s.update()
        optimizer.zero_grad()
        if s is scaler or not fused:
            with pytest.raises(AssertionError, match="No inf checks were recorded for this opti"):
                s.step(optimizer)
    with pytest.raises(AssertionError, match="may only be pickled at the beginning"):
        backward(scaler, params, 1)
        scaler.step(optimizer)
        pickle.dumps(scaler)


def test_wrong_input_is_refused_in_words(device: str) -> None:
    for settings, error, words in (
        ({"growth_factor": 1.0}, AssertionError, "The growth factor must be > 1.0"),
        ({"backoff_factor": 1.0}, AssertionError, "The backoff factor must be < 1.0"),
        ({"backoff_factor": 0.0}, ValueError, "backoff_factor: expected a number above 0, got 0"),
        ({"init_scale": 0.0}, ValueError, "init_scale: expected a number above 0, got 0.0"),
        ({"init_scale": float("inf")}, ValueError, "init_scale: expected .* above 0, got inf"),
        ({"min_scale": -1.0}, ValueError, "min_scale: expected a number above 0, got -1.0"),
        ({"growth_interval": 0}, ValueError, "growth_interval: expected 1 or more, got 0"),
        ({"init_scale": "cuda"}, ValueError, "takes no device"),
    ):
        with pytest.raises(error, match=words):
            LossScaler(**settings)
    scaler = LossScaler()
    scaler.scale(torch.zeros((), device=device))
    half = nn.Parameter(torch.ones(3, device=device, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(torch.optim.SGD([half], lr=0.1))
    embedding = nn.Embedding(5, 2, sparse=True, device=device)
    scaler.scale(embedding(torch.tensor([1], device=device)).sum()).backward()
    for make in (FusedSGD, torch.optim.SGD, torch.optim.SparseAdam):
        optimizer = make(embedding.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="expected a dense gradient, got torch.sparse_coo"):
            scaler.step(optimizer)
    halves = [nn.Parameter(torch.ones(2, device=device).half()) for _ in range(2)]
    optimizer = FusedSGD(halves, lr=0.1)
    halves[0].grad = torch.ones_like(halves[0])
    halves[1].grad = torch.ones_like(halves[1]).to_sparse()
    with pytest.raises(ValueError, match="expected a dense gradient"):
        scaler.unscale_(optimizer)
    assert all(master.grad is None for master in optimizer.masters())
    elsewhere = [nn.Parameter(torch.ones(2, device=d)) for d in (device, "meta")]
    for p in elsewhere:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=f"on one device, got {device}.*, meta: give the param"):
        scaler.step(torch.optim.SGD(elsewhere, lr=0.1))
