"""YellowFin's tuning: the cubic root, the whole algorithm in NumPy, and quadratics."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastres.optim import YellowFin
from fastres.optim.yellowfin import one_minus_root_momentum


def root_in_numpy(p: float) -> float:
    """The real root of y^3 + py + p, between -1 and 0."""
    roots = np.roots([1.0, 0.0, p, p])
    (y,) = roots[np.abs(roots.imag) == 0].real
    return float(y)


@given(exponent=st.floats(-12, 12))
def test_the_cubic_root_is_numpys(device: str, exponent: float) -> None:
    p = 10.0**exponent
    y = -float(one_minus_root_momentum(torch.tensor(p, dtype=torch.float64, device=device)))
    assert -1 < y < 0
    # np.roots loses digits of the small root that stands beside two large ones.
    assert y == pytest.approx(root_in_numpy(p), rel=1e-9)
    # The equation itself, to the last bits of its largest term.
    assert abs(y**3 + p * y + p) <= 16 * np.finfo(float).eps * p
    assert (-y) ** 3 / p == pytest.approx(1 + y, abs=1e-14)


class Reference:
    """The paper's algorithm for one vector, in fp64, step by step."""

    def __init__(
        self, w: np.ndarray, beta: float, window: int, decay: float = 0.0, clip: bool = True
    ) -> None:
        self.w, self.v, self.mean = w.astype(float), np.zeros(w.size), np.zeros(w.size)
        self.beta, self.window, self.decay, self.clip = beta, window, decay, clip
        self.seen: list[float] = []
        self.log_min = self.log_max = self.norm = self.square = self.distance = 0.0
        self.h_max = math.inf

    def average(self, old: Any, x: Any) -> Any:
        return self.beta * old + (1 - self.beta) * x

    def step(self, g: np.ndarray, factor: float = 1.0) -> tuple[float, float]:
        bound = self.h_max if self.clip else math.inf
        size = float(np.sqrt((g**2).sum()))
        told = g * min(1.0, math.sqrt(100 * bound) / size)
        used = g * min(1.0, math.sqrt(bound) / size)
        # Curvature range
        h = float((told**2).sum())
        self.seen.append(h)
        t = len(self.seen)
        latest = self.seen[-self.window :]
        self.log_min = self.average(self.log_min, math.log(min(latest)))
        self.log_max = self.average(self.log_max, math.log(max(latest)))
        unbiased = 1 - self.beta**t
        h_min, self.h_max = math.exp(self.log_min / unbiased), math.exp(self.log_max / unbiased)
        # Variance
        self.mean = self.average(self.mean, told)
        self.square = self.average(self.square, h)
        second = self.square / unbiased
        variance = max(second - ((self.mean / unbiased) ** 2).sum(), 1e-6 * second)
        # Distance
        self.norm = self.average(self.norm, math.sqrt(h))
        self.distance = self.average(self.distance, self.norm / self.square)
        distance = self.distance / unbiased
        # Single step
        p = distance**2 * h_min**2 / (2 * variance)
        ratio = math.sqrt(self.h_max / h_min)
        mu = max((1 + root_in_numpy(p)) ** 2, ((ratio - 1) / (ratio + 1)) ** 2)
        lr = (1 - math.sqrt(mu)) ** 2 / h_min * min(1.0, t / (10 * self.window))
        self.v = mu * self.v - factor * lr * (used + self.decay * self.w)
        self.w = self.w + self.v
        return lr, mu


@pytest.mark.parametrize("clip", [True, False])
@given(
    beta=st.sampled_from([0.9, 0.99, 0.999]),
    window=st.integers(1, 7),
    decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 100),
)
def test_fifty_steps_as_in_numpy(
    device: str, clip: bool, beta: float, window: int, decay: float, scale: float, seed: int
) -> None:
    """Noise around a mean that moves, now and then twenty times as long as usual."""
    decay = decay if scale >= 1 else 0.0  # of rates like 1e12 it makes an explosion
    random = np.random.default_rng(seed)
    start = random.standard_normal(40).astype(np.float32)
    mine = [nn.Parameter(torch.from_numpy(w.copy()).to(device)) for w in np.split(start, [7, 19])]
    optimizer = YellowFin(mine, beta=beta, curvature_window=window, weight_decay=decay, clip=clip)
    reference = Reference(start, beta, window, decay, clip)
    for step in range(50):
        g = random.standard_normal(40) * np.exp(0.5 * random.standard_normal()) + 0.3
        g = (g * scale * (20.0 if step % 13 == 12 else 1.0)).astype(np.float32)
        factor = 1.0 if step < 30 else 0.1
        for group in optimizer.param_groups:
            group["lr"] = factor
        for p, part in zip(mine, np.split(g, [7, 19]), strict=True):
            p.grad = torch.from_numpy(part.copy()).to(device)
        optimizer.step()
        lr, mu = reference.step(g.astype(float), factor)
        tuned = [float(t) for t in optimizer.tuned()]
        # E g is kept in fp32, and C is a difference with its square.
        assert tuned == pytest.approx([lr, mu], rel=1e-4)
    got = torch.cat([p.detach().flatten() for p in mine]).double().cpu().numpy()
    size = np.abs(reference.w).max()
    np.testing.assert_allclose(got, reference.w, rtol=1e-4, atol=1e-4 * size)


def feed(optimizer: YellowFin, p: Any, gradients: Iterator[Tensor]) -> None:
    for g in gradients:
        p.grad = g
        optimizer.step()


def measured(optimizer: YellowFin) -> list[float]:
    low, high = optimizer.curvature_range()
    found = (low, high, optimizer.grad_variance(), optimizer.dist_to_opt(), *optimizer.tuned())
    return [float(t) for t in found]


def test_one_curvature_in_one_dimension(device: str) -> None:
    """Gradients of a Gaussian's log-likelihood at its mean: E g = 0, g^2 = h, so D = h^-1/2.

    Then p = 1/2, whatever h, and the best momentum is known.
    """
    for h in (0.01, 4.0, 300.0):
        p = nn.Parameter(torch.zeros(1, device=device))
        optimizer = YellowFin([p], lr=0.0)
        signs = (torch.full((1,), h**0.5 * (-1) ** i, device=device) for i in range(400))
        feed(optimizer, p, signs)
        y = root_in_numpy(0.5)
        wanted = [h, h, h, h**-0.5, y**2 / h, (1 + y) ** 2]
        assert measured(optimizer) == pytest.approx(wanted, rel=1e-4)
        assert wanted[5] == pytest.approx(0.168, abs=1e-3)


def test_curvatures_from_h_to_kappa_h_contract_alike(device: str) -> None:
    """Where the range rules, momentum and rate are the robust region's: sqrt(mu) at every h."""
    h, kappa = 0.5, 4.0
    p = nn.Parameter(torch.zeros(1, device=device))
    optimizer = YellowFin([p], lr=0.0)
    # One gradient of each window from the flattest direction, and little noise.
    sizes = (math.sqrt(h if i % 20 == 0 else h * kappa) for i in range(400))
    feed(optimizer, p, (torch.full((1,), size, device=device) for size in sizes))
    low, high, _, _, lr, mu = measured(optimizer)
    # The first gradient was alone in its window.
    assert [low, high] == pytest.approx([h, h * kappa], rel=0.01)
    root = math.sqrt(high / low)
    assert mu == pytest.approx(((root - 1) / (root + 1)) ** 2, rel=1e-9)
    assert lr == pytest.approx((1 - math.sqrt(mu)) ** 2 / low, rel=1e-9)
    for curvature in np.geomspace(low, high, 7):
        operator = np.array([[1 - lr * curvature + mu, -mu], [1.0, 0.0]])
        radius = np.abs(np.linalg.eigvals(operator)).max()
        # A double root of the operator at both ends is known to half its digits.
        assert radius == pytest.approx(math.sqrt(mu), rel=1e-6)


@given(seed=st.integers(0, 1000))
def test_nothing_on_a_grid_is_better(device: str, seed: int) -> None:
    """mu D^2 + alpha^2 C over the feasible momenta."""
    random = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.zeros(5, device=device))
    optimizer = YellowFin([p], lr=0.0, beta=0.9, curvature_window=5)
    mean = torch.randn(5, generator=random)
    noise = (mean + torch.randn(5, generator=random) for _ in range(60))
    feed(optimizer, p, (g.to(device) for g in noise))
    low, high, variance, distance, lr, mu = measured(optimizer)
    root = math.sqrt(high / low)
    grid = np.linspace(((root - 1) / (root + 1)) ** 2, 1, 20001)
    cost = grid * distance**2 + ((1 - np.sqrt(grid)) ** 2 / low) ** 2 * variance
    found = mu * distance**2 + lr**2 * variance
    assert found <= cost.min() * (1 + 1e-9)
    assert mu >= grid[0] * (1 - 1e-9)


def test_a_noisy_quadratic_converges_at_the_predicted_rate(device: str) -> None:
    """E|w_t|^2 of momentum SGD is known step by step, for one curvature and one variance.

    The noise is split over many dimensions, so that one run shows the mean, and so large that |g|^2
    is the curvature h, as it is of a log-likelihood: mu and alpha are those of p = 1/2.
    """
    h, n, steps = 2.0, 20_000, 12
    random = torch.Generator(device).manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(n, generator=random, device=device) * math.sqrt(h / n)

    p = nn.Parameter(torch.zeros(n, device=device))
    optimizer = YellowFin([p], lr=0.0, clip=False)  # |w| stretches gradients past h_max
    feed(optimizer, p, (noise() for _ in range(300)))
    *_, lr, mu = measured(optimizer)
    y = root_in_numpy(0.5)
    # E g is not quite zero after so few steps; h and D are.
    assert [lr, mu] == pytest.approx([y**2 / h, (1 + y) ** 2], rel=0.03)

    with torch.no_grad():
        p.copy_(torch.randn(n, generator=random, device=device) / math.sqrt(n * h))
    optimizer.param_groups[0]["lr"] = 1.0
    start = float(p.detach().square().sum())
    lr, mu = y**2 / h, (1 + y) ** 2
    # Of one coordinate, (w_t, w_{t-1}): the mean's operator and the second moments'.
    operator = np.array([[1 - lr * h + mu, -mu], [1.0, 0.0]])
    moments = np.full((2, 2), start / n)
    for t in range(steps):
        moments = operator @ moments @ operator.T + np.diag([lr**2 * h / n, 0.0])
        p.grad = p.detach() * h + noise()
        optimizer.step()
        got = float(p.detach().square().sum())
        # Of n = 20,000 samples, one in a hundred; the statistics drift by a little too.
        assert got == pytest.approx(n * moments[0, 0], rel=0.05), t
    assert np.abs(np.linalg.eigvals(operator)).max() == pytest.approx(math.sqrt(mu), rel=1e-6)
    # From the first distance to that of the noise alone.
    assert got < 0.5 * start


def test_what_is_learnt_outlasts_the_phases_of_a_schedule(device: str) -> None:
    """Two schedules and none see the same gradients: the same rate and momentum, other steps."""
    ends, tuned = [], []
    for milestones in ([], [5], [2, 9]):
        p = nn.Parameter(torch.ones(6, device=device))
        optimizer = YellowFin([p], curvature_window=4)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
        random = torch.Generator().manual_seed(1)
        for _ in range(12):
            p.grad = torch.randn(6, generator=random).to(device)
            optimizer.step()
            schedule.step()
        ends.append(p.detach())
        tuned.append(measured(optimizer))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 ** len(milestones))
    assert tuned[0] == tuned[1] == tuned[2]
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])


def test_the_slow_start(device: str) -> None:
    """The first step moves by 1 / (10 windows) of what it would; then the rate rises evenly."""
    p = nn.Parameter(torch.zeros(1, device=device))
    optimizer = YellowFin([p], curvature_window=2, beta=0.9)
    rates = []
    for i in range(24):
        p.grad = torch.full((1,), 2.0 * (-1) ** i, device=device)
        optimizer.step()
        lr, mu = (float(t) for t in optimizer.tuned())
        rates.append(lr * 4.0 / (1 - math.sqrt(mu)) ** 2)
    wanted = [min(t / 20, 1.0) for t in range(1, 25)]
    assert rates == pytest.approx(wanted, rel=1e-6)


def test_an_exploding_gradient_is_clipped(device: str) -> None:
    """It moves no further than one of length sqrt(h_max), and shows at most a hundred times it."""
    moved, highs = [], []
    for clip in (True, False):
        p = nn.Parameter(torch.zeros(1, device=device))
        optimizer = YellowFin([p], curvature_window=2, clip=clip)
        feed(optimizer, p, (torch.full((1,), 2.0 * (-1) ** i, device=device) for i in range(50)))
        before, velocity = float(p.detach()), float(optimizer.state[p]["momentum_buffer"])
        p.grad = torch.full((1,), 2e6, device=device)
        optimizer.step()
        lr, mu = (float(t) for t in optimizer.tuned())
        moved.append((before + mu * velocity - float(p.detach())) / lr)
        highs.append(float(optimizer.curvature_range()[1]))
    assert moved == pytest.approx([2.0, 2e6], rel=1e-4)
    # A fiftieth of the logarithms' average.
    weight = 0.001 / (1 - 0.999**51)
    wanted = [4 * 100**weight, 4 * 1e12**weight]
    assert highs == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("pattern", ["zeros", "zeros first", "constant", "tiny", "huge"])
def test_no_nan_from_odd_gradients(device: str, pattern: str) -> None:
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = YellowFin([p], weight_decay=0.1)
    size = {"constant": 1.0, "tiny": 1e-44, "huge": 1e18}.get(pattern, 0.0)
    for step in range(30):
        value = 1.0 if pattern == "zeros first" and step > 4 else size
        p.grad = torch.full((4,), value, device=device)
        optimizer.step()
        lr, mu = (float(t) for t in optimizer.tuned())
        assert math.isfinite(lr) and 0 <= mu < 1
        # At 1e-44 the rate is such that steps exceed fp32.
        assert pattern == "tiny" or p.isfinite().all()
    if pattern == "zeros":
        assert torch.equal(p.detach(), torch.ones_like(p))
        assert int(optimizer.state[p]["steps"]) == 0
    if pattern == "constant":
        # No variance and one curvature: plain gradient descent.
        assert mu < 1e-9 and lr * 4.0 == pytest.approx(30 / 200, rel=1e-4)


def test_one_tensor_or_many(device: str) -> None:
    """The parts of a vector step as the vector does, bitwise: nothing is tuned for each."""
    whole = nn.Parameter(torch.randn(50, device=device))
    parts = [nn.Parameter(t.detach().clone()) for t in whole.split([3, 20, 0, 27])]
    a, b = YellowFin([whole], weight_decay=0.1), YellowFin(parts, weight_decay=0.1)
    for _ in range(10):
        whole.grad = torch.randn(50, device=device)
        for p, g in zip(parts, whole.grad.split([3, 20, 0, 27]), strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    assert torch.equal(torch.cat([p.detach() for p in parts]), whole.detach())
    assert [float(t) for t in a.tuned()] == [float(t) for t in b.tuned()]


def test_it_beats_the_starting_point_on_a_classifier(device: str) -> None:
    """No setting given: logistic regression is solved."""
    torch.manual_seed(0)
    x = torch.randn(200, 5, device=device)
    y = (x @ torch.randn(5, device=device) > 0).long()
    model = nn.Linear(5, 2, device=device)
    optimizer = YellowFin(model.parameters())
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.15 < 0.5 < losses[0]
