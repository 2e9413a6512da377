"""LossScaler against torch.amp.GradScaler: lockstep, optimizers, recovery, clipping."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gradient_lists import ReadsOnTheHost
from scaled_steps import backward, parameters, train
from tolerances import EPS, EPSILONS
from torch import Tensor, nn

from fastres.amp import LossScaler
from fastres.optim import FusedSGD, YellowFin

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
# Optimizers that take found_inf and the scale as tensors; and some that do not.
ON_DEVICE: dict[str, Any] = {
    "FusedSGD": lambda p: FusedSGD(p, **SGD),
    "YellowFin": lambda p: YellowFin(p, weight_decay=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, fused=True, **SGD),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}
ON_HOST: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, **SGD),
    "SGD fused, dampening": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, dampening=0.5, fused=True
    ),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}
# torch 2.11 has an Adagrad that is fused and takes neither.
if not hasattr(ON_DEVICE["Adagrad fused"]([torch.ones(1)]), "_step_supports_amp_scaling"):
    ON_HOST["Adagrad fused"] = ON_DEVICE.pop("Adagrad fused")


@pytest.mark.parametrize("name", [*ON_DEVICE, *ON_HOST])
@given(pattern=st.lists(st.booleans(), max_size=10), interval=st.integers(1, 4))
def test_in_lockstep_with_grad_scaler(
    path: str, device: str, name: str, pattern: list[bool], interval: int
) -> None:
    make = (ON_DEVICE | ON_HOST)[name]
    # GradScaler leaves a momentum uninitialised where torch's fused SGD's first step is skipped.
    pattern = [False, *pattern]
    ours, theirs = parameters(device), parameters(device)
    mine = LossScaler(growth_interval=interval)
    peer = torch.amp.GradScaler(device, growth_interval=interval)
    peer_make = torch.optim.SGD if name == "FusedSGD" else make
    other = peer_make(theirs, **SGD) if name == "FusedSGD" else make(theirs)
    assert train(mine, make(ours), ours, pattern) == train(peer, other, theirs, pattern)
    state, state_peer = mine.state_dict(), peer.state_dict()
    assert state.pop("skipped_in_a_row") == (pattern[::-1] + [False]).index(False)
    assert state == state_peer
    for p, q in zip(ours, theirs, strict=True):
        atol = len(pattern) * EPSILONS * EPS
        torch.testing.assert_close(p, q, rtol=atol, atol=atol)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_the_host_never_waits(path: str, device: str, name: str) -> None:
    params = parameters(device)
    optimizer, scaler = ON_DEVICE[name](params), LossScaler()
    model = nn.BatchNorm1d(3, device=device)
    scaler.watch(model)
    for step in range(3):
        model(torch.randn(4, 3, device=device))
        backward(scaler, params, step, overflow=step == 1)
        with ReadsOnTheHost():
            if step == 2:
                scaler.unscale_(optimizer, norm=True)
            stepped = scaler.step(optimizer)
            scaler.update()
        assert bool(stepped) == (step != 1)


@pytest.mark.parametrize("name", ON_HOST)
def test_others_wait_once_a_step(path: str, device: str, name: str) -> None:
    params = parameters(device)
    optimizer, scaler = ON_HOST[name](params), LossScaler()
    backward(scaler, params, 0, overflow=True)
    with ReadsOnTheHost(), pytest.raises(AssertionError, match="makes the host wait"):
        scaler.step(optimizer)


@pytest.mark.parametrize("name", [*ON_DEVICE, *ON_HOST])
def test_a_skipped_first_step_leaves_no_trace(path: str, device: str, name: str) -> None:
    """Afterwards all goes on as if it had never been."""
    make = (ON_DEVICE | ON_HOST)[name]
    results = []
    for pattern in ([True, False, False], [False, False]):
        params = parameters(device)
        optimizer, scaler = make(params), LossScaler(init_scale=4.0)
        for step, overflow in enumerate(pattern):
            backward(scaler, params, step - len(pattern), overflow)
            before = [p.detach().clone() for p in params]
            stepped = scaler.step(optimizer)
            assert (stepped.dtype, stepped.shape, bool(stepped)) == (torch.bool, (), not overflow)
            if overflow:
                assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
            scaler.update()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q, rtol=EPSILONS * EPS, atol=EPSILONS * EPS)


def test_recovers_from_a_forced_overflow(path: str, device: str) -> None:
    """fp16 overflows at the first scale: it is halved until it does not, and training goes on."""
    p = nn.Parameter(torch.full((4,), 2.0, device=device, dtype=torch.float16))
    optimizer, scaler = FusedSGD([p], lr=0.1), LossScaler(init_scale=2.0**20)
    skips = []
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(p.square().float().sum() / 4).backward()
        skips.append(not bool(scaler.step(optimizer)))
        scaler.update()
    # The gradient is p / 2 * scale = scale: infinite from 2^16 on.
    assert skips == [True] * 5 + [False] * 7
    assert scaler.get_scale() == 2.0**15
    assert float(p.detach()[0]) == pytest.approx(2 * 0.95**7, rel=1e-3)


def test_the_scale_has_a_floor_and_skips_are_counted(path: str, device: str) -> None:
    params = parameters(device)
    optimizer, scaler = FusedSGD(params, lr=0.1), LossScaler(init_scale=8.0, min_scale=2.0)
    assert int(scaler.skipped_in_a_row) == 0
    scales = train(scaler, optimizer, params, [True] * 5)
    assert scales == [4.0, 2.0, 2.0, 2.0, 2.0]
    skipped = scaler.skipped_in_a_row
    assert (skipped.dtype, skipped.device.type, int(skipped)) == (torch.int32, device, 5)
    train(scaler, optimizer, params, [False])
    assert int(scaler.skipped_in_a_row) == 0


def test_a_scale_below_the_floor_is_its_own_floor(path: str, device: str) -> None:
    params = parameters(device)
    for scaler in (LossScaler(init_scale=0.25), LossScaler()):
        optimizer = FusedSGD(params, lr=0.1)
        scaler.load_state_dict(LossScaler(init_scale=0.25).state_dict())
        for step, overflow in enumerate((False, True)):
            backward(scaler, params, step, overflow)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 0.25


def test_a_fused_optimizer_that_loads_a_state_and_is_fused_no_more(path: str, device: str) -> None:
    """FusedSGD's state leaves it to torch.optim.SGD which of its loops to take."""
    params = parameters(device)
    optimizer, scaler = torch.optim.SGD(params, fused=True, **SGD), LossScaler()
    optimizer.load_state_dict(FusedSGD(parameters(device), **SGD).state_dict())
    before = [p.detach().clone() for p in params]
    for step, overflow in enumerate((True, False)):
        backward(scaler, params, step, overflow)
        assert bool(scaler.step(optimizer)) is not overflow
        scaler.update()
        assert overflow == all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unscale_measures_and_clips(path: str, device: str, dtype: torch.dtype) -> None:
    """The norm is clip_grad_norm_'s; clipped gradients are stepped by, half ones in fp32."""
    params: list[Any] = [nn.Parameter(p.detach().to(dtype)) for p in parameters(device)]
    optimizer, scaler = FusedSGD(params, lr=1.0), LossScaler(init_scale=256.0)
    backward(scaler, params, 0)
    wanted = torch.cat([(p.grad.double() / 256).flatten() for p in params])
    before = [m.detach().clone() for m in optimizer.masters()]
    norm = scaler.unscale_(optimizer, norm=True)
    assert norm is not None and float(norm) == pytest.approx(float(wanted.norm()), rel=1e-5)
    clipped = nn.utils.clip_grad_norm_(optimizer.masters(), 0.5)
    assert float(clipped) == pytest.approx(float(norm), rel=1e-5)
    assert bool(scaler.step(optimizer))
    steps = [(b - m).flatten() for b, m in zip(before, optimizer.masters(), strict=True)]
    moved = torch.cat([step.detach().double() for step in steps])
    torch.testing.assert_close(moved, wanted * 0.5 / wanted.norm(), rtol=1e-4, atol=1e-5)
    # The fp32 gradients are used once.
    scaler.update()
    backward(scaler, params, 1)
    assert bool(scaler.step(optimizer))
    if dtype == torch.float16:
        assert all(m.grad is None for m in optimizer.masters())


def test_an_expanded_gradient(path: str, device: str) -> None:
    """As x.sum().backward() leaves it to a hook, or DDP: unscaled in a tensor of its own."""
    p = nn.Parameter(torch.zeros(3, 4, device=device))
    for make in (FusedSGD, torch.optim.SGD):
        optimizer, scaler = make([p], lr=1.0), LossScaler(init_scale=4.0)
        for unscales in (True, False):
            with torch.no_grad():
                p.zero_()
            scaler.scale(torch.zeros((), device=device))
            p.grad = torch.full((1, 1), 8.0, device=device).expand(3, 4)
            if unscales:
                scaler.unscale_(optimizer)
            assert bool(scaler.step(optimizer))
            scaler.update()
            assert torch.equal(p.detach(), torch.full_like(p, -2.0))


def test_several_optimizers(path: str, device: str) -> None:
    """Each skips by its own gradients; one overflow backs the scale off."""
    params = parameters(device)
    optimizers = [FusedSGD(params[:1], lr=0.1), torch.optim.SGD(params[1:], lr=0.1)]
    scaler = LossScaler()
    backward(scaler, params, 0, overflow=True)
    assert [bool(scaler.step(optimizer)) for optimizer in optimizers] == [True, False]
    scaler.update()
    assert (scaler.get_scale(), int(scaler.skipped_in_a_row)) == (32768.0, 1)


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        (1, ["_sgd_step_fwd_kernel"]),
        # Neither step would see the other's gradients.
        (2, ["_unscale_fwd_kernel", "_sgd_step_fwd_kernel", "_sgd_step_fwd_kernel"]),
    ],
)
def test_launches_of_a_scaled_step(device: str, groups: int, names: list[str]) -> None:
    """Of one buffer a step finds the overflow itself; of two it is found before it."""
    params = parameters(device)
    cut = len(params) // groups
    optimizer = FusedSGD([{"params": params[:cut]}, {"params": params[cut:]}][:groups], **SGD)
    scaler = LossScaler()
    backward(scaler, params, 0, overflow=False)
    launched: list[str] = []

    @contextlib.contextmanager
    def see(launch: Any) -> Iterator[None]:
        launched.append(launch.kernel.__name__)
        yield

    with importlib.import_module("fastres.kernels._launch").watch(see):
        assert bool(scaler.step(optimizer))
        assert launched == names
        scaler.update()
    assert launched == [*names, "_update_scale_fwd_kernel"]


def test_momentum_that_begins_later(path: str, device: str) -> None:
    """An overflow then has momentum to put back, too, and room for it."""
    ours, theirs = parameters(device), parameters(device)
    runs = []
    for params, kind in ((ours, FusedSGD), (theirs, torch.optim.SGD)):
        optimizer, scaler = kind(params, lr=0.1), LossScaler()
        for step, overflow in enumerate((False, True, False, True, False)):
            optimizer.param_groups[0]["momentum"] = 0.9 if step >= 2 else 0.0
            backward(scaler, params, step, overflow)
            assert bool(scaler.step(optimizer)) != overflow
            scaler.update()
        runs.append(scaler.get_scale())
    assert runs[0] == runs[1]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * EPSILONS * EPS, atol=4 * EPSILONS * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_backward_that_begins_with_the_scale(path: str, device: str, dtype: torch.dtype) -> None:
    weight = torch.randn(5, device=device, dtype=dtype, requires_grad=True)
    scaler = LossScaler(init_scale=1000.1)
    grads: list[Tensor] = []
    for begun in (False, True):
        weight.grad = None
        loss = weight.square().sum()
        loss.backward(scaler.seed(loss)) if begun else scaler.scale(loss).backward()
        assert weight.grad is not None
        grads.append(weight.grad)
    assert torch.equal(*grads) and grads[0].abs().max() > 100
    assert LossScaler(enabled=False).seed(loss) is None
    for wrong in (loss.half(), weight):
        with pytest.raises(ValueError, match=r"loss: expected one element of torch.float32 or"):
            scaler.seed(wrong)


def test_grad_scaler_drives_fused_sgd(path: str, device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    pattern = [False, True, False, False]
    scales = [
        train(torch.amp.GradScaler(device), FusedSGD(ours, **SGD), ours, pattern),
        train(torch.amp.GradScaler(device), torch.optim.SGD(theirs, **SGD), theirs, pattern),
    ]
    assert scales[0] == scales[1]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * EPSILONS * EPS, atol=4 * EPSILONS * EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_DEVICE)
def test_no_wait_on_a_gpu(name: str) -> None:
    params = parameters("cuda")
    optimizer, scaler = ON_DEVICE[name](params), LossScaler()
    model = nn.BatchNorm1d(3, device="cuda")
    scaler.watch(model)
    x = torch.randn(4, 3, device="cuda")
    infinite = torch.tensor(torch.inf, device="cuda")
    done = []
    before = torch.cuda.get_sync_debug_mode()
    for step in range(4):  # the first compiles
        backward(scaler, params, step)
        torch.cuda.set_sync_debug_mode("error" if step else before)
        try:
            model(x)
            if step == 2:
                params[-1].grad.add_(infinite)
            if step == 3:
                scaler.unscale_(optimizer, norm=True)
            done.append(scaler.step(optimizer))
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert [bool(stepped) for stepped in done] == [True, True, False, True]
