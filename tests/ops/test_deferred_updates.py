"""Running statistics of many BatchNorms in one launch: bitwise those of a launch each."""

import copy

import pytest
import torch
from ops.norm_relu_conv2d_equality import few_programs
from torch import Tensor, nn

from fastres.kernels import _launch
from fastres.models import ResNet
from fastres.ops import Norm, PreActUnit, RunningUpdate, deferred_updates, update_every_stats
from fastres.ops._norm import update_stats


def norms(device: str) -> tuple[list[Norm], list[RunningUpdate]]:
    """With a counter and without, cumulative and not, several blocks of channels."""
    torch.manual_seed(3)
    made, updates = [], []
    for C, momentum, counted in ((5, 0.1, True), (300, None, True), (16, 0.3, False)):
        mean, var, batch_mean, batch_var = torch.rand(4, C, device=device)
        batches = torch.tensor(4, device=device) if counted else None
        norm = Norm(mean, var, None, None, True, momentum, 1e-5, batches)
        made.append(norm)
        updates.append(RunningUpdate(norm, batch_mean, batch_var, C + 7))
    return made, updates


def tensors(several: list[Norm]) -> list[Tensor]:
    found = [t for n in several for t in (*n[:2], n.num_batches_tracked)]
    return [t for t in found if t is not None]


@pytest.mark.parametrize("applies", [None, True, False])
def test_every_norm_at_once(device: str, applies: bool | None) -> None:
    (once, updates), (in_turn, others) = norms(device), norms(device)
    told = None if applies is None else torch.tensor(applies, device=device)
    before = [t.clone() for t in tensors(once)]
    with _launch.record() as launches:
        update_every_stats(updates, told)
    assert len(launches) == 1
    update_every_stats(updates, told)
    for update in others:
        update_stats(*update)
    wanted = before if applies is False else tensors(in_turn)
    for a, b in zip(tensors(once), wanted, strict=True):
        assert torch.equal(a, b)


def test_a_norm_twice_moves_twice(device: str) -> None:
    (once, updates), (in_turn, others) = norms(device), norms(device)
    update_every_stats([*updates, updates[1]])
    for update in (*others, others[1]):
        update_stats(*update)
    for a, b in zip(tensors(once), tensors(in_turn), strict=True):
        assert torch.equal(a, b)


def test_a_network_defers_what_its_units_would_do(device: str) -> None:
    net = ResNet(8, fused_units=True, keep_units=1).to(device).train()
    other = copy.deepcopy(net)
    x = torch.randn(2, 3, 4, 4, device=device)
    target = torch.tensor([1, 2], device=device)
    before = [b.clone() for b in net.buffers()]
    with few_programs():
        with deferred_updates() as updates:
            net(x, target)
        other(x, target)
    assert len(updates) == 3 and all(map(torch.equal, net.buffers(), before))
    update_every_stats(updates)
    assert all(map(torch.equal, net.buffers(), other.buffers()))
    assert not any(map(torch.equal, net.buffers(), before))


def test_what_is_not_deferred_is_done(device: str) -> None:
    """Half-precision statistics move at once; nothing is collected twice, nor after an error."""
    unit = PreActUnit(16, 16).to(device).half()
    with few_programs(), deferred_updates() as updates:
        unit(torch.randn(2, 16, 2, 2, device=device).half())
        with pytest.raises(RuntimeError, match="entered already"), deferred_updates():
            pass
    assert updates == [] and unit.bn1.num_batches_tracked == unit.bn2.num_batches_tracked == 1
    with pytest.raises(ZeroDivisionError), deferred_updates():
        _ = 1 / 0
    with deferred_updates() as updates:
        nn.BatchNorm2d(4).to(device)(torch.randn(2, 4, 1, 1, device=device))
    assert updates == []
    update_every_stats([])
