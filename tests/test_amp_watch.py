"""LossScaler.watch: a skipped step leaves BatchNorm's statistics and counters as they were."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.amp import LossScaler
from fastres.ops import BatchNormReLU2d
from fastres.optim import FusedSGD


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), BatchNormReLU2d(5), nn.Conv2d(5, 3, 1),
        nn.BatchNorm2d(3, momentum=None), nn.InstanceNorm2d(3, track_running_stats=True),
        nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.LazyLinear(2),
    ).to(device)  # fmt: skip


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


class Run:
    """A network, FusedSGD and a scaler that watches the network."""

    def __init__(self, device: str, watched: bool = True) -> None:
        self.device, self.model = device, network(device)
        self.model(torch.zeros(2, 2, 6, 6, device=device))  # the lazy layer's shape
        self.optimizer: Any = FusedSGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.scaler = LossScaler(init_scale=4.0)
        if watched:
            self.scaler.watch(self.model)

    def step(self, step: int, overflow: bool = False, parts: int = 1) -> bool:
        self.optimizer.zero_grad()
        for part in range(parts):
            x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(10 * step + part))
            x = x.to(self.device)
            if overflow and part == 0:
                x[0, 0, 0, 0] = torch.inf
            self.scaler.scale(self.model(x).square().mean()).backward()
        stepped = self.scaler.step(self.optimizer)
        self.scaler.update()
        return bool(stepped)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in got:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("parts", [1, 2])
def test_a_skipped_step_leaves_statistics_and_counters(path: str, device: str, parts: int) -> None:
    """Bitwise, with gradients accumulated over several forwards too; a taken step keeps them."""
    run, plain = Run(device), Run(device, watched=False)
    assert run.step(0, parts=parts) and plain.step(0, parts=parts)
    before = statistics(run.model)
    assert_equal(before, statistics(plain.model))
    weights = [p.detach().clone() for p in run.model.parameters()]
    for step in (1, 2):
        assert not run.step(step, overflow=True, parts=parts)
        assert_equal(statistics(run.model), before)
    assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), weights, strict=True))
    # And on as if it had never been; without watching, one NaN has poisoned them for good.
    assert run.step(3, parts=parts) and plain.step(3, parts=parts)
    assert_equal(statistics(run.model), statistics(plain.model))
    plain.step(4, overflow=True)
    assert any(not s.isfinite().all() for s in statistics(plain.model).values())


def test_evaluation_takes_no_copy(path: str, device: str) -> None:
    """What is loaded between an evaluation and the next step is not undone by a skipped one."""
    run = Run(device)
    run.step(0)
    run.model.eval()
    run.model(torch.zeros(1, 2, 6, 6, device=device))
    run.model.train()
    loaded = {n: b + 1 if b.is_floating_point() else b for n, b in statistics(run.model).items()}
    run.model.load_state_dict(loaded, strict=False)
    assert not run.step(1, overflow=True)
    assert_equal(statistics(run.model), loaded)


def test_moved_statistics_are_found_again(path: str, device: str) -> None:
    run = Run(device)
    run.step(0)
    for module in run.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()  # as model.to(...) makes others
    before = statistics(run.model)
    assert not run.step(1, overflow=True)
    assert_equal(statistics(run.model), before)


def test_saves_loads_and_copies_as_ever(path: str, device: str, tmp_path: Any) -> None:
    run = Run(device)
    run.step(0)
    torch.save(run.model.state_dict(), tmp_path / "model.pt")
    other = Run(device)
    other.model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_equal(statistics(other.model), statistics(run.model))
    twin = copy.deepcopy(run.model)
    before = statistics(twin)
    run.step(1)
    assert_equal(statistics(twin), before)
    twin(torch.randn(3, 2, 6, 6, device=device))
    assert int(twin.get_buffer("1.num_batches_tracked")) == int(before["1.num_batches_tracked"]) + 1


def test_a_model_without_statistics_and_one_watched_twice(device: str) -> None:
    scaler, model = LossScaler(), nn.Linear(2, 2, device=device)
    scaler.watch(model)
    with pytest.raises(ValueError, match="watched already"):
        scaler.watch(model)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    scaler.scale(model(torch.ones(1, 2, device=device)).sum()).backward()
    assert bool(scaler.step(optimizer))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model(device: str, backend: str) -> None:
    run = Run(device)
    # None breaks a full graph in nn.BatchNorm2d itself.
    run.model.get_submodule("3").momentum = 0.1  # type: ignore[assignment]  # a BatchNorm
    torch._dynamo.reset()
    inner = run.model
    run.model = torch.compile(inner, backend=backend, fullgraph=True)  # type: ignore[assignment]  # called alike
    assert run.step(0)
    before = statistics(inner)
    assert not run.step(1, overflow=True)
    assert_equal(statistics(inner), before)
    assert run.step(2)
    assert int(inner.get_buffer("1.num_batches_tracked")) == 3


def test_pure_fp16_with_fp32_masters(path: str, device: str) -> None:
    """The whole mode: fp16 weights, fp32 BatchNorm, an overflow, recovery, a falling loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ).to(device, torch.float16)
    model[1].float()
    optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scaler = LossScaler(init_scale=2.0**22, growth_interval=50)
    scaler.watch(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16, torch.float32}
    assert {m.dtype for m in optimizer.masters()} == {torch.float32}
    x = torch.randn(8, 2, 6, 6, device=device, dtype=torch.float16)
    labels = (x.float().mean((1, 2, 3)) > 0).long()
    losses, skips = [], 0
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), labels)
        scaler.scale(loss).backward()
        skips += int(not scaler.step(optimizer))
        scaler.update()
        losses.append(loss.item())
    assert 0 < skips < 10 and losses[-1] < 0.5 * losses[0]
    assert int(model.get_buffer("1.num_batches_tracked")) == 20 - skips
    for p, master in zip(model.parameters(), optimizer.masters(), strict=True):
        assert torch.allclose(p.detach().float(), master.detach(), rtol=1e-3, atol=1e-7)
