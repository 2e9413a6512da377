"""BatchNormReLU2d in nn.BatchNorm2d's place, and batch_norm_relu under PyTorch's tracers."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import COMPILED_ATOL
from torch import Tensor, nn

from fastres.ops import BatchNormReLU2d, batch_norm_relu

OPTIONS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float16},
]


@pytest.fixture
def pair(request: pytest.FixtureRequest, device: str) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """Ours, and PyTorch's with the same numbers in it."""
    options = {"device": device, **request.param}
    ours, peer = BatchNormReLU2d(6, **options), nn.BatchNorm2d(6, **options)
    for v in peer.state_dict().values():
        if v.is_floating_point():
            v.uniform_(0.5, 1.5)
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def _steps(module: nn.Module, dtype: torch.dtype, device: str, relu: bool) -> list[Tensor]:
    """Three steps in training, one in evaluation: outputs, gradients, and the state after each."""
    generator, seen = torch.Generator().manual_seed(1), []
    for step in range(4):
        module.train(step < 3)
        x, residual = (torch.randn(3, 6, 4, 5, generator=generator) for _ in range(2))
        x = (x + step).to(device, dtype).requires_grad_()
        residual = residual.to(device, dtype)
        if step == 1:
            x = x[:0]
        y = torch.relu(module(x) + residual[: len(x)]) if relu else module(x, residual[: len(x)])
        module.zero_grad()
        y.float().square().sum().backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        seen += [v.clone() for v in (y.detach(), *grads, *module.state_dict().values())]
    return seen


@pytest.mark.parametrize("pair", OPTIONS, ids=str, indirect=True)
def test_trains_and_evaluates_as_batch_norm_2d(
    path: str, pair: tuple[nn.BatchNorm2d, nn.BatchNorm2d], device: str
) -> None:
    """With every constructor option, an empty batch among the others, and the batch counter."""
    ours, peer = pair
    dtype = torch.float32 if ours.weight is None else ours.weight.dtype
    got, want = _steps(ours, dtype, device, False), _steps(peer, dtype, device, True)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        # Equality proper is tested in test_batch_norm_relu.py; fp16 rounds y before the sum there.
        rtol, atol = (5e-3, 2e-2) if dtype == torch.float16 else (None, None)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("pair", OPTIONS, ids=str, indirect=True)
def test_state_dicts_are_one_anothers(pair: tuple[nn.BatchNorm2d, nn.BatchNorm2d]) -> None:
    ours, peer = pair
    assert ours.state_dict().keys() == peer.state_dict().keys()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in peer.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in peer.named_buffers()]
    peer.load_state_dict(ours.state_dict())
    for name, v in ours.state_dict().items():
        assert torch.equal(v, peer.state_dict()[name]), name
    assert repr(ours).removeprefix("BatchNormReLU2d") == repr(peer).removeprefix("BatchNorm2d")
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(ours, name) == getattr(peer, name)


@pytest.mark.parametrize("pair", [{"momentum": None}], indirect=True)
def test_copies(pair: tuple[nn.BatchNorm2d, nn.BatchNorm2d], device: str) -> None:
    ours, _ = pair
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    copies = [copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    copies.append(torch.load(saved, weights_only=False))
    want = _steps(copy.deepcopy(ours), torch.float32, device, False)
    for other in copies[1:]:
        got = _steps(other, torch.float32, device, False)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert copies[0].weight is ours.weight


def test_frozen_statistics_are_used_in_evaluation_only(device: str) -> None:
    """track_running_stats set to False later: nn.BatchNorm2d then trains by the batch, updates
    nothing, and still evaluates by the running statistics that it has."""
    for training in (True, False):
        results = []
        for kind in (BatchNormReLU2d, nn.BatchNorm2d):
            torch.manual_seed(0)
            module = kind(3, device=device).train(training)
            assert module.running_mean is not None
            module.running_mean.fill_(0.5)
            module.track_running_stats = False
            y = module(torch.randn(2, 3, 4, 4, device=device))
            results.append((y.relu(), *module.state_dict().values()))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def test_one_value_per_channel_is_an_error_and_updates_nothing(device: str) -> None:
    module = BatchNormReLU2d(3, device=device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.zeros(1, 3, 1, 1, device=device))
    assert module.num_batches_tracked == 0
    assert module.eval()(torch.ones(1, 3, 1, 1, device=device)).shape == (1, 3, 1, 1)


def _compiled_agrees(
    f: Callable[..., Tensor], state: nn.Module, *shapes: tuple[int, ...], backend: str, device: str
) -> None:
    """f compiled in one graph gives what f gives: y, gradients, and the state that it leaves."""
    torch._dynamo.reset()
    other = copy.deepcopy(state)
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for shape in shapes:
        x = torch.randn(shape, device=device)
        results = []
        for op, module in ((f, state), (compiled, other)):
            leaves = [x.clone().requires_grad_(), x.flip(0).requires_grad_()]
            y = op(module, *leaves)
            dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)
            grads = torch.autograd.grad(y, [*leaves, *module.parameters()], dy)
            results.append((y, *grads, *module.state_dict().values()))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=COMPILED_ATOL, atol=COMPILED_ATOL)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_module_compiles_in_one_graph(
    path: str, training: bool, momentum: float | None, device: str
) -> None:
    module = BatchNormReLU2d(5, momentum=momentum, device=device).train(training)
    # The second shape makes the compiler trace with symbolic sizes.
    _compiled_agrees(
        lambda m, x, residual: m(x, residual), module, (2, 5, 4, 4), (3, 5, 4, 6),
        backend="aot_eager", device=device,
    )  # fmt: skip


def test_the_function_compiles_in_one_graph(path: str, device: str) -> None:
    def f(m: nn.BatchNorm2d, x: Tensor, residual: Tensor) -> Tensor:
        # Inductor's backward is wrong (torch 2.15, for PyTorch's own F.batch_norm alike) where one
        # graph updates running statistics and then evaluates by them: no such thing here.
        y = batch_norm_relu(x, m.running_mean, m.running_var, m.weight, m.bias, training=True)
        return batch_norm_relu(y, None, None, None, m.bias, True, residual=residual, relu=False)

    module = BatchNormReLU2d(5, device=device)
    _compiled_agrees(f, module, (2, 5, 4, 4), backend="inductor", device=device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_module_exports_with_a_batch_of_any_size(
    path: str, training: bool, device: str
) -> None:
    module = BatchNormReLU2d(5, device=device).train(training)
    x = torch.randn(4, 5, 4, 4, device=device)
    batch = {0: torch.export.Dim("batch", min=2, max=512)}
    exported = torch.export.export(module, (x, x.flip(0)), dynamic_shapes=(batch, batch))
    other = copy.deepcopy(module)
    smaller = x[:3]
    torch.testing.assert_close(exported.module()(smaller, smaller), other(smaller, smaller))


def _samples(device: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of fastres::batch_norm_relu."""

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    def stats(n: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(n, device=device), torch.ones(n, device=device)

    x = torch.randn(2, 3, 4, 5, device=device)
    nhwc = x.to(memory_format=torch.channels_last).requires_grad_()
    picked = torch.tensor([2, 0], device=device)
    half, none = leaf(2, 3, 4, 5, dtype=torch.float16), (None, None)
    expanded = x[:, :1].expand(2, 3, 4, 5)
    transposed = x.transpose(2, 3).detach().requires_grad_()
    return [
        ((leaf(2, 3, 4, 5), None, leaf(3), leaf(3), None, *none, 1e-5, True), {}),
        ((nhwc, None, leaf(3), leaf(3), leaf(2, 3, 4, 5), *none, 1e-5, True), {}),
        ((half, None, None, None, half.detach(), *stats(3), 1e-3, True), {}),
        ((transposed, None, None, leaf(3), None, *stats(3), 0.1, False), {}),
        ((expanded, None, leaf(3), None, leaf(2, 3, 4, 5), *none, 1e-5, True), {}),
        ((leaf(0, 3, 4, 5), None, leaf(3), leaf(3), None, *none, 1e-5, True), {}),
        ((leaf(3, 3, 4, 5), picked, leaf(3), leaf(3), None, *none, 1e-5, True), {}),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(7))
def test_opcheck_of_the_forward(number: int, device: str) -> None:
    args, kwargs = _samples(device)[number]
    torch.library.opcheck(torch.ops.fastres.batch_norm_relu.default, args, kwargs)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 6])
def test_opcheck_of_the_backward(number: int, device: str) -> None:
    args, _ = _samples(device)[number]
    x, index, weight, bias, residual, running_mean, running_var, eps, relu = (
        a.detach() if isinstance(a, Tensor) else a for a in args
    )
    training = running_mean is None
    y, mean, var, mask = torch.ops.fastres.batch_norm_relu(
        x, index, weight, bias, residual, running_mean, running_var, eps, relu
    )
    stats = (mean, var) if training else (running_mean, running_var)
    # There is no residual beside an index.
    for needs in ([True, True, True, index is None], [False, True, False, residual is not None]):
        torch.library.opcheck(
            torch.ops.fastres.batch_norm_relu_backward.default,
            (y, x, index, weight, bias, *stats, mask, eps, relu, training, needs),
        )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_opcheck_of_the_update(momentum: float | None, device: str) -> None:
    batches = torch.tensor(3, device=device)
    stats = [torch.rand(5, device=device) for _ in range(4)]
    torch.library.opcheck(
        torch.ops.fastres.batch_norm_update_stats.default,
        (*stats[:2], batches, *stats[2:], momentum, 12),
    )
