"""FusedSGD against torch.optim.SGD: steps, groups, layouts, half precision, state, errors."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gradient_lists import ReadsOnTheHost
from optim.random_steps import SHAPES, parameters, set_grads, squares
from tolerances import EPS, EPSILONS, store_error, store_floor
from torch import Tensor, nn

from fastres.optim import FusedSGD


def assert_close(got: list[Tensor], want: list[Tensor], steps: int) -> None:
    """Rounding only: a few epsilons a step of the size that parameters and updates have here."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=steps * EPSILONS * EPS, atol=steps * EPSILONS * EPS)


@given(data=st.data())
def test_steps_as_torch_does(path: str, device: str, data: st.DataObject) -> None:
    momentum = data.draw(st.sampled_from([0.0, 0.9]))
    settings: dict[str, Any] = {
        "lr": data.draw(st.sampled_from([0.1, 1.0])),
        "momentum": momentum,
        "weight_decay": data.draw(st.sampled_from([0.0, 0.01])),
        "nesterov": momentum > 0 and data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
    }
    ours, theirs = parameters(device), parameters(device)
    optimizers = [FusedSGD(ours, **settings), torch.optim.SGD(theirs, **settings)]
    for step in range(4):
        missing = data.draw(st.one_of(st.none(), st.integers(0, len(SHAPES) - 1)))
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            set_grads(params, step, missing)
            optimizer.step()
    assert_close(ours, theirs, 4)
    for p, q in zip(ours, theirs, strict=True):
        assert p.stride() == q.stride()
        wanted = optimizers[1].state[q].get("momentum_buffer")
        if wanted is not None:
            assert_close([optimizers[0].state[p]["momentum_buffer"]], [wanted], 4)


def test_groups_of_their_own_settings_and_a_schedule(path: str, device: str) -> None:
    """Groups, one added later, a learning rate that a scheduler changes, one that is a tensor."""
    results: list[list[Any]] = []
    makes: list[Any] = [FusedSGD, torch.optim.SGD]
    for make in makes:
        params = parameters(device)
        optimizer: torch.optim.Optimizer = make(
            [{"params": params[:2]}, {"params": params[2:4], "weight_decay": 0.0, "momentum": 0.5}],
            lr=0.1, momentum=0.9, weight_decay=0.1,
        )  # fmt: skip
        optimizer.add_param_group({"params": params[4:], "lr": torch.tensor(0.3, device=device)})
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            schedule.step()
        results.append(params)
    assert_close(results[0], results[1], 4)


def test_trains_a_channels_last_model_as_torch_does(path: str, device: str) -> None:
    def trained(make: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        model = model.to(device).to(memory_format=torch.channels_last)
        optimizer = make(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        x = torch.randn(4, 3, 6, 6, device=device)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        weight = model.get_parameter("0.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last)
        return [p.detach() for p in model.parameters()]

    for got, want in zip(trained(FusedSGD), trained(torch.optim.SGD), strict=True):
        # Three steps through BatchNorm carry the last bits on.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_have_fp32_masters(path: str, device: str, dtype: torch.dtype) -> None:
    """Updates too small for the half parameter add up in its master; parameters are its copy."""
    params = [nn.Parameter(torch.ones(20, device=device, dtype=dtype)), *parameters(device)]
    optimizer = FusedSGD(params, lr=1.0)
    (master, *rest) = optimizer.masters()
    assert master.dtype == torch.float32 and all(
        a is b for a, b in zip(rest, params[1:], strict=True)
    )
    for _ in range(8):
        params[0].grad = torch.full((20,), 2.0**-12, device=device, dtype=dtype)
        optimizer.step()
    assert torch.equal(master, torch.full_like(master, 1 - 2.0**-9))
    allowed = store_error(dtype) + store_floor(dtype)
    assert float((params[0].detach().float() - master).abs().max()) <= allowed
    assert params[0].detach().dtype == dtype


def test_what_is_written_into_a_half_parameter_counts(path: str, device: str) -> None:
    p = nn.Parameter(torch.zeros(5, device=device, dtype=torch.float16))
    optimizer = FusedSGD([p], lr=1.0)
    with torch.no_grad():
        p.fill_(3.0)  # as model.load_state_dict does
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full_like(p, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_overflow_skips_bitwise(path: str, device: str, dtype: torch.dtype) -> None:
    params = parameters(device, dtype)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    set_grads(params, 0)
    optimizer.step()

    def everything() -> list[Tensor]:
        buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
        return [t.detach().clone() for t in (*params, *buffers, *optimizer.masters())]

    before = everything()
    optimizer.grad_scale = torch.tensor(4.0, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    set_grads(params, 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
    optimizer.found_inf.zero_()  # type: ignore[attr-defined]
    set_grads(params, 1, scale=4.0)
    with ReadsOnTheHost():
        optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_states_go_from_one_to_the_other(path: str, device: str, tmp_path: Any) -> None:
    """Two steps by either, then two by the other from its state_dict, saved and loaded."""
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    makes: list[Any] = [FusedSGD, torch.optim.SGD]
    ends = []
    for first in makes:
        for second in makes:
            params = parameters(device)
            optimizer = first(params, **settings)
            for step in range(2):
                set_grads(params, step)
                optimizer.step()
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            optimizer = second(params, lr=9.0)
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            for step in range(2, 4):
                set_grads(params, step)
                optimizer.step()
            ends.append(params)
    for end in ends[1:]:
        assert_close(end, ends[0], 4)


def test_loading_fills_the_buffers_in_place(path: str, device: str) -> None:
    """A captured graph, or a view that somebody holds, goes on with what was loaded."""
    params = parameters(device, torch.float16)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
    masters = optimizer.masters()
    set_grads(params, 1)
    optimizer.step()
    with torch.no_grad():
        for p, v in zip(params, values, strict=True):
            p.copy_(v)
    optimizer.load_state_dict(saved)
    for i, (p, buffer, master) in enumerate(zip(params, buffers, masters, strict=True)):
        assert optimizer.state[p]["momentum_buffer"] is buffer
        assert torch.equal(buffer, saved["state"][i]["momentum_buffer"])
        assert buffer.dtype == torch.float32
        # The master's bits below fp16 are back too.
        assert torch.equal(master, saved["state"][i]["master"])


@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_a_resumed_half_model_goes_on_bitwise(path: str, device: str, first: str) -> None:
    """Its weights are the masters' roundings, whichever of the two is loaded first."""
    params = parameters(device, torch.float16)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    others = [nn.Parameter(torch.zeros_like(p)) for p in params]
    resumed = FusedSGD(others, lr=0.1, momentum=0.9)
    for what in (first, "optimizer" if first == "model" else "model"):
        if what == "optimizer":
            resumed.load_state_dict(saved)
        else:
            with torch.no_grad():
                for p, v in zip(others, values, strict=True):
                    p.copy_(v)
    for ps, o in ((params, optimizer), (others, resumed)):
        set_grads(ps, 1)
        o.step()
    for a, b in zip(optimizer.masters(), resumed.masters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_their_own_way(
    path: str, device: str, dtype: torch.dtype, duplicate: Callable[[Any], Any]
) -> None:
    params = parameters(device, dtype)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    optimizer.step()
    twin = duplicate(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in twins]
    for step in (1, 2):
        set_grads(params, step)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(twins, kept, strict=True))
    for step in (1, 2):
        set_grads(twins, step)
        twin.step()
    for a, b in zip(twin.masters(), optimizer.masters(), strict=True):
        assert torch.equal(a, b)


def test_zero_grad_and_closures(path: str, device: str) -> None:
    params = parameters(device)
    optimizer = FusedSGD(params, lr=0.1)
    set_grads(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(bool((p.grad == 0).all()) for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    before = float(params[0].detach().square().sum())
    assert float(optimizer.step(squares(params[0])).detach()) == pytest.approx(before)
    assert float(params[0].detach().square().sum()) < before


def test_autograd_notices_a_step(path: str, device: str) -> None:
    """As after any in-place op: a backward through the old value is an error."""
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = FusedSGD([p], lr=0.1)
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_moved_parameters_are_noticed(path: str, device: str) -> None:
    model = nn.Linear(3, 2, device=device)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    model.weight.data = model.weight.data.clone()
    with pytest.raises(
        RuntimeError, match=r"shape \[2, 3\] is no longer in the optimizer's buffer"
    ):
        optimizer.step()


def test_sparse_gradients_are_refused_in_words(path: str, device: str) -> None:
    model = nn.Embedding(10, 3, sparse=True, device=device)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    model(torch.tensor([1, 2], device=device)).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def _wrong() -> list[tuple[dict[str, Any], str]]:
    base = torch.ones(6)
    return [
        ({"lr": -1.0}, "lr: expected lr >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr: expected lr >= 0, got nan"),
        ({"lr": torch.ones(2)}, r"lr: expected a tensor of one element, got \[2\]"),
        ({"momentum": -0.1}, "momentum: expected momentum >= 0, got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay: expected weight_decay >= 0, got -0.1"),
        ({"dampening": 0.5}, "dampening: FusedSGD has none, got 0.5: use torch.optim.SGD"),
        ({"nesterov": True}, "nesterov: needs a momentum, got momentum=0"),
        (
            {"params": [torch.ones(2).double()]},
            "expected parameters of one of .*, got torch.float64",
        ),
        ({"params": [torch.ones(2, dtype=torch.int32)]}, "expected parameters .*, got torch.int32"),
        ({"params": [torch.ones(2) + 0j]}, "expected parameters of one of .*, got torch.complex64"),
        ({"params": [base[:3], base[:2]]}, "shares its memory with another"),
        ({"params": [base[2:], base[:3]]}, "shares its memory with another"),
        ({"params": []}, "empty parameter list"),
    ]


@pytest.mark.parametrize(("change", "words"), _wrong())
def test_wrong_input_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {"params": [torch.ones(2)], "lr": 0.1}
    with pytest.raises(ValueError, match=words):
        FusedSGD(**(right | change))


def test_a_state_that_is_refused_changes_nothing(device: str) -> None:
    optimizer = FusedSGD(parameters(device), lr=0.1)
    other = torch.optim.SGD(parameters(device), lr=0.5, momentum=0.9, dampening=0.5)
    with pytest.raises(ValueError, match="dampening: FusedSGD has none, got 0.5"):
        optimizer.load_state_dict(other.state_dict())
    adam = torch.optim.Adam(parameters(device))
    with pytest.raises(ValueError, match="a FusedSGD or a torch.optim.SGD, got another's"):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[0]["dampening"] == 0


def test_a_group_that_is_refused_changes_nothing(device: str) -> None:
    params = parameters(device)
    optimizer = FusedSGD(params, lr=0.1)
    with pytest.raises(ValueError, match="dampening"):
        optimizer.add_param_group({"params": [torch.ones(3, device=device)], "dampening": 0.5})
    set_grads(params, 0)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
