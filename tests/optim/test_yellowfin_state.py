"""YellowFin as an optimizer: groups, layouts, loss scaling, skipped steps, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gradient_lists import ReadsOnTheHost
from optim.random_steps import SHAPES, everything, parameters, run, same, set_grads, squares
from tolerances import EPS, EPSILONS
from torch import nn

from fastres.amp import LossScaler
from fastres.optim import YellowFin

# LossScaler's own kernels are tested elsewhere.
pytestmark = pytest.mark.usefixtures("native")


def test_groups_have_their_own_factors_and_decay(device: str) -> None:
    """The groups' factors scale one rate; momentum and what is measured are the model's."""
    params = parameters(device)
    optimizer = YellowFin(
        [{"params": params[:2]}, {"params": params[2:4], "lr": 0.5, "weight_decay": 0.1}]
    )
    optimizer.add_param_group(
        {"params": params[4:], "lr": torch.tensor([2.0], device=device), "weight_decay": 0.2}
    )
    plain = parameters(device)
    other = YellowFin(plain)
    wanted = [p.detach().clone() for p in plain]
    speeds = [torch.zeros_like(p) for p in plain]
    factors, decays = [1, 1, 0.5, 0.5, 2, 2, 2], [0, 0, 0.1, 0.1, 0.2, 0.2, 0.2]
    for step in range(6):
        for ps in (params, plain):
            set_grads(ps, step)
        clips = other.curvature_range()[1].sqrt()
        size = torch.cat([p.grad.flatten() for p in plain]).norm()
        clip = min(1.0, float(clips / size)) if step else 1.0
        optimizer.step()
        other.step()
        lr, mu = (float(t) for t in other.tuned())
        assert [float(t) for t in optimizer.tuned()] == [lr, mu]
        for i, p in enumerate(plain):
            g = clip * p.grad + decays[i] * wanted[i]
            speeds[i] = mu * speeds[i] - factors[i] * lr * g
            wanted[i] = wanted[i] + speeds[i]
    for p, q in zip(params, wanted, strict=True):
        tolerance = 6 * EPSILONS * EPS
        torch.testing.assert_close(p.detach(), q, rtol=tolerance, atol=tolerance)


def test_layouts_make_no_difference(device: str) -> None:
    """Gradients in other strides than the parameters', expanded ones among them."""
    ours, theirs = (
        parameters(device),
        [nn.Parameter(p.detach().contiguous()) for p in parameters(device)],
    )
    a, b = YellowFin(ours, weight_decay=0.1), YellowFin(theirs, weight_decay=0.1)
    for step in range(4):
        set_grads(ours, step)
        ours[2].grad = torch.full((1, 1), 0.5, device=device).expand(5, 7)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.contiguous()
        a.step()
        b.step()
    for p, q, shape in zip(ours, theirs, SHAPES, strict=True):
        assert p.stride() == parameters(device)[SHAPES.index(shape)].stride()
        torch.testing.assert_close(p, q, rtol=4 * EPSILONS * EPS, atol=4 * EPSILONS * EPS)


def test_a_parameter_without_a_gradient_is_left_alone(device: str) -> None:
    """Its velocity too; for the averages its gradient is zero."""
    params, others = parameters(device), parameters(device)
    optimizer, other = YellowFin(params, weight_decay=0.1), YellowFin(others, weight_decay=0.1)
    for step in range(6):
        set_grads(params, step, missing=2 if step % 2 else None)
        set_grads(others, step)
        if step % 2:
            others[2].grad.zero_()
        before = [params[2].detach().clone(), optimizer.state[params[2]]["momentum_buffer"].clone()]
        optimizer.step()
        other.step()
        after = [params[2].detach(), optimizer.state[params[2]]["momentum_buffer"]]
        assert same(before, after) == bool(step % 2)
        assert [float(t) for t in optimizer.tuned()] == [float(t) for t in other.tuned()]
    assert torch.equal(params[1], others[1])
    optimizer.zero_grad()
    before = everything(optimizer)
    optimizer.step()
    assert same(everything(optimizer), before)


def test_an_overflow_skips_bitwise(device: str) -> None:
    params = parameters(device)
    with torch.no_grad():
        params[1][0] = -0.0
    optimizer = YellowFin(params, weight_decay=0.1)
    optimizer.grad_scale = torch.tensor(4.0, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    for first in (True, False):
        before = everything(optimizer)
        for value in (torch.inf, torch.nan, 1.0):
            set_grads(params, 0)
            params[0].grad[0] = value
            optimizer.step()
            assert same(everything(optimizer), before)
        if first:
            optimizer.found_inf.zero_()  # type: ignore[attr-defined]
            run(optimizer, params, range(3))
            optimizer.found_inf.fill_(1.0)  # type: ignore[attr-defined]
    optimizer.found_inf.zero_()  # type: ignore[attr-defined]
    set_grads(params, 3)
    with ReadsOnTheHost():
        optimizer.step()
    assert not same(everything(optimizer), before)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("make", [LossScaler, torch.amp.GradScaler])
@given(pattern=st.lists(st.booleans(), max_size=8))
def test_scaled_and_skipped_as_if_neither(
    device: str, make: Callable[..., Any], unscales: bool, pattern: list[bool]
) -> None:
    """Scales are powers of two: the clean steps of a scaled run are an unscaled run's, bitwise."""
    ours, theirs = parameters(device), parameters(device)
    mine, other = YellowFin(ours), YellowFin(theirs)
    scaler = make(**({"device": device} if make is torch.amp.GradScaler else {}), growth_interval=2)
    for step, overflow in enumerate(pattern):
        scaler.scale(torch.zeros((), device=device))
        set_grads(ours, step, scale=scaler.get_scale())
        if overflow:
            ours[6].grad[1] = torch.inf
        if unscales:
            scaler.unscale_(mine)
        scaler.step(mine)
        scaler.update()
        if not overflow:
            set_grads(theirs, step)
            other.step()
    assert same(everything(mine), everything(other))


def test_the_host_never_waits(device: str) -> None:
    params = parameters(device)
    optimizer, scaler = YellowFin(params, weight_decay=0.1), LossScaler()
    for step in range(4):
        scaler.scale(torch.zeros((), device=device))
        set_grads(params, step, missing=3, scale=65536.0)
        if step == 1:
            params[0].grad[0] = torch.inf
        with ReadsOnTheHost():
            if step == 2:
                scaler.unscale_(optimizer, norm=True)
            stepped = scaler.step(optimizer)
            scaler.update()
        assert bool(stepped) == (step != 1)


def test_without_a_scaler_nan_shows(device: str) -> None:
    """In the weights, as with any optimizer; what was learnt stays clean."""
    params = parameters(device)
    optimizer = YellowFin(params)
    run(optimizer, params, range(2))
    known = optimizer.curvature_range()
    set_grads(params, 2)
    params[1].grad[0] = torch.nan
    optimizer.step()
    assert params[1].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(optimizer.curvature_range(), known, strict=True))


def test_a_closure_and_autograd(device: str) -> None:
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = YellowFin([p])
    assert float(optimizer.step(squares(p)).detach()) == 3.0
    assert float(p.detach().square().sum()) < 3.0
    optimizer.zero_grad()
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_gradients_are_refused_in_words(device: str) -> None:
    model = nn.Embedding(10, 3, sparse=True, device=device)
    optimizer = YellowFin(model.parameters())
    model(torch.tensor([1, 2], device=device)).sum().backward()
    with pytest.raises(RuntimeError, match="YellowFin does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": -1.0}, "lr: expected a factor of 0 or more, got -1.0"),
        ({"lr": float("nan")}, "lr: expected a factor of 0 or more, got nan"),
        ({"lr": torch.ones(2)}, r"lr: expected a tensor of one element, got \[2\]"),
        ({"beta": 1.0}, "beta: expected a number between 0 and 1, got 1.0"),
        ({"beta": float("nan")}, "beta: expected a number between 0 and 1, got nan"),
        ({"curvature_window": 0}, "curvature_window: expected a whole number above 0, got 0"),
        ({"curvature_window": 2.5}, "curvature_window: expected a whole number above 0, got 2.5"),
        ({"weight_decay": -0.1}, "weight_decay: expected 0 or more, got -0.1"),
        ({"params": [torch.ones(2).half()]}, "expected fp32 parameters, got torch.float16 for"),
        ({"params": [torch.ones(2).double()]}, "expected fp32 parameters, got torch.float64 for"),
        ({"params": [torch.ones(2), torch.ones(2, device="meta")]}, "on one device, got cpu and"),
        ({"params": [torch.eye(2).to_sparse()]}, "expected dense parameters, got torch.sparse_coo"),
        ({"params": []}, "empty parameter list"),
    ],
)
def test_wrong_input_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {"params": [torch.ones(2)]}
    with pytest.raises(ValueError, match=words):
        YellowFin(**(right | change))


def test_what_is_refused_changes_nothing(device: str) -> None:
    params = parameters(device)
    optimizer = YellowFin(params)
    run(optimizer, params, range(2))
    before = everything(optimizer)
    more = [torch.ones(3, device=device)]
    for name, value in (("beta", 0.9), ("curvature_window", 5), ("clip", False)):
        with pytest.raises(ValueError, match=f"{name}: expected the same in all groups"):
            optimizer.add_param_group({"params": more, name: value})
    with pytest.raises(ValueError, match="expected the state of a YellowFin, got another's"):
        optimizer.load_state_dict(torch.optim.SGD(params, lr=0.1, momentum=0.9).state_dict())
    short = YellowFin(parameters(device), curvature_window=5).state_dict()
    with pytest.raises(ValueError, match="in a window of 20 gradients, got curvature_window = 5"):
        optimizer.load_state_dict(short)
    others = YellowFin([p.detach().flatten() for p in parameters(device)]).state_dict()
    with pytest.raises(
        ValueError, match=r"of parameter \d is \[.*\], and the parameter \[.*same model"
    ):
        optimizer.load_state_dict(others)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(YellowFin(parameters(device)[:3]).state_dict())
    assert len(optimizer.param_groups) == 1 and same(everything(optimizer), before)
    run(optimizer, params, range(2, 3))


@pytest.mark.gpu
def test_a_step_waits_for_no_gpu_and_is_captured() -> None:
    """A graph's replays are eager steps, bitwise, and skip when found_inf says so."""
    ours, theirs = parameters("cuda"), parameters("cuda")
    factor = torch.ones((), device="cuda")
    captured, eager = YellowFin(ours, lr=factor), YellowFin(theirs)
    found_inf = torch.zeros((), device="cuda")
    captured.found_inf = found_inf  # type: ignore[attr-defined]
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error" if step else before)
        try:
            captured.step()
            eager.step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    set_grads(ours, 3)
    grads = [p.grad for p in ours]
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(3, 8):
        set_grads(ours, step)
        for grad, p in zip(grads, ours, strict=True):
            grad.copy_(p.grad)
        factor.fill_(0.1 if step > 5 else 1.0)
        found_inf.fill_(float(step == 4))
        graph.replay()
        if step != 4:
            set_grads(theirs, step)
            eager.param_groups[0]["lr"] = float(factor)
            eager.step()
    assert same([p.detach() for p in ours], [p.detach() for p in theirs])
    assert torch.equal(torch.stack(captured.tuned()), torch.stack(eager.tuned()))
