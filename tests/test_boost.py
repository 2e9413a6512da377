"""fastres.boost against an independent NumPy computation, and the theorem on a small problem."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import BOOST_RELATIVE
from torch import Tensor

from fastres import boost
from fastres.boost import BoostError, Boosting, boosting_loss, training_costs
from fastres.data import split, synthetic
from fastres.models import ResNet

Array = npt.NDArray[np.float64]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """At this size more of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Reference:
    """Boosting as it is written in the paper, image by image and class by class, in NumPy."""

    def __init__(self, labels: list[int], classes: int) -> None:
        self.labels, self.classes = labels, classes
        self.s = np.zeros((len(labels), classes))
        self.last_o, self.last_alpha, self.last_edge = np.zeros_like(self.s), 0.0, 0.0
        self.gammas: list[float] = []

    def costs(self) -> Array:
        C = np.zeros_like(self.s)
        for i, y in enumerate(self.labels):
            for k in range(self.classes):
                if k != y:
                    C[i, k] = math.exp(self.s[i, k] - self.s[i, y])
            C[i, y] = -sum(C[i, k] for k in range(self.classes) if k != y)
        return C

    def add(self, o: Array) -> dict[str, float]:
        C = self.costs()
        Z = sum(abs(c) for row in C for c in row)
        edge = -sum(C[i, k] * o[i, k] for i, k in np.ndindex(*o.shape)) / Z
        gamma = (edge**2 - self.last_edge**2) / (1 - self.last_edge**2)
        alpha = 0.5 * math.log((1 + edge) / (1 - edge))
        pairs = [
            (C[i, k], (o[i, y] - o[i, k]) / 2)
            for i, y in enumerate(self.labels)
            for k in range(self.classes)
            if k != y
        ]
        losses = [math.exp(-alpha * m) for _, m in pairs]
        weighted = sum(c * loss for (c, _), loss in zip(pairs, losses, strict=True))
        self.s += alpha * o - self.last_alpha * self.last_o
        self.last_o, self.last_alpha, self.last_edge = o, alpha, edge
        self.gammas.append(gamma)
        return {
            "z": Z,
            "edge": edge,
            "gamma_squared": gamma,
            "alpha": alpha,
            "bound": math.exp(-0.5 * sum(self.gammas)),
            "pair_error": sum(m <= 0 for _, m in pairs) / len(pairs),
            "covariance": sum(losses) / len(losses) - weighted / sum(c for c, _ in pairs),
        }


@given(seed=st.integers(0, 2**20), n=st.integers(2, 9), classes=st.integers(2, 6))
def test_costs_edge_alpha_and_state_are_the_papers(seed: int, n: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    labels = [0, 1, *random.integers(0, classes, n - 2).tolist()]
    reference, boosting = Reference(labels, classes), Boosting(torch.tensor(labels), classes)
    for unit in range(5):
        o = random.uniform(-1, 1, (n, classes))
        o[range(n), labels] = np.clip(o[range(n), labels] + 0.2 * unit, -1, 1)
        np.testing.assert_allclose(boosting.costs(), reference.costs(), rtol=BOOST_RELATIVE)
        expected, verdict = reference.add(o), boosting.add(torch.from_numpy(o))
        for name, value in expected.items():
            got = getattr(verdict, name)
            assert got == pytest.approx(value, rel=BOOST_RELATIVE, abs=BOOST_RELATIVE), name
        np.testing.assert_allclose(
            boosting.state, reference.s, rtol=BOOST_RELATIVE, atol=BOOST_RELATIVE
        )
        # The sum telescopes.
        np.testing.assert_allclose(boosting.state, verdict.alpha * o, atol=BOOST_RELATIVE)
    assert boosting.units == 5 and boosting.bound == pytest.approx(expected["bound"])


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """A perfect classifier's outputs."""
    return torch.eye(classes, dtype=torch.float64)[labels] * 2 - 1


def test_a_perfect_classifier_has_an_edge_of_1_and_a_finite_alpha() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    boosting = Boosting(labels, 3)
    verdict = boosting.add(one_hot(labels, 3))
    assert verdict.edge == 1.0 and verdict.clamped and verdict.holds and verdict.error == 0
    assert verdict.alpha == pytest.approx(0.5 * math.log(2e6), abs=1e-6)
    C = boosting.costs()
    assert C.isfinite().all() and C.abs().min() > 1e-13
    # What comes next has no greater edge; and the most expensive mistake stays finite, too.
    again = boosting.judge(one_hot(labels, 3))
    assert again.gamma_squared == 0.0 and not again.holds
    worst = boosting.add(-one_hot(labels, 3))
    assert worst.edge == -1.0 and not worst.holds and math.isfinite(worst.alpha)
    assert boosting.costs().isfinite().all() and math.isfinite(boosting.bound)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_constant_classifier_violates_weak_learning(value: float) -> None:
    """Whatever it answers, though a share of 5 to 1 gives the answer 0 an edge."""
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    o = torch.zeros(6, 2, dtype=torch.float64)
    o[:, 0] = value
    boosting = Boosting(labels, 2, min_gamma=-0.5)
    verdict = boosting.judge(o)
    assert verdict.constant and not verdict.holds
    assert verdict.edge == pytest.approx(value / 3) and verdict.alpha == pytest.approx(
        math.atanh(value / 3)
    )
    assert boosting.units == 0 and not boosting.state.any()  # judging changes nothing


def test_an_edge_of_0_to_rounding_violates_weak_learning() -> None:
    labels = torch.tensor([0, 1, 2] * 5)
    o = torch.rand(15, 1, dtype=torch.float64).expand(15, 3) * 2 - 1  # of no class at all
    boosting = Boosting(labels, 3, min_gamma=-1.0)
    boosting.add(boost.outputs(torch.randn(15, 3) + torch.eye(3)[labels]))
    verdict = boosting.judge(o)
    assert abs(verdict.edge) < 1e-12 and not verdict.constant and not verdict.holds


def test_a_unit_must_beat_the_one_before_by_min_gamma() -> None:
    labels = torch.arange(4).repeat(3)
    good = 0.5 * one_hot(labels, 4)
    for min_gamma, holds in ((0.0, True), (0.2, False), (-0.2, True)):
        boosting = Boosting(labels, 4, min_gamma)
        assert boosting.add(good).holds
        C = boosting.costs()
        better = 0.51 * one_hot(labels, 4)
        verdict = boosting.judge(better)
        assert verdict.edge == pytest.approx(boost.edge(C, better)) and verdict.holds == holds
    boosting = Boosting(labels, 4, -0.2)
    boosting.add(good)
    assert boosting.judge(0.49 * one_hot(labels, 4)).holds  # tolerated
    assert not boosting.judge(0.3 * one_hot(labels, 4)).holds


def test_outputs_are_bounded_and_of_their_own_row() -> None:
    logits = torch.randn(5, 3) * 100
    o = boost.outputs(logits)
    assert o.dtype == torch.float64 and o.min() >= -1 and o.max() <= 1
    assert torch.allclose(o.sum(1), torch.full((5,), 2.0 - 3, dtype=torch.float64))
    assert torch.equal(boost.outputs(logits[2:3]), o[2:3])  # no softmax over the batch


@pytest.mark.parametrize("kind", boost.LOSSES)
def test_the_loss_by_its_formula(kind: Any) -> None:
    labels, z = torch.tensor([0, 2, 1, 2]), torch.randn(4, 3)
    boosting = Boosting(labels, 3)
    boosting.add(boost.outputs(torch.randn(4, 3)))
    C = training_costs(boosting.costs())
    assert float(-C[range(4), labels].mean()) == pytest.approx(1.0)
    expected = 0.0
    for i, y in enumerate(labels.tolist()):
        w = -float(C[i, y])
        inner = 1.0
        for k in {0, 1, 2} - {y}:
            inner += 2 * float(C[i, k]) / w * math.exp(float(z[i, k] - z[i, y]))
        loss = math.log(inner)
        if kind == "exp":
            loss = inner if inner < 3 else 3 + 3 * (loss - math.log(3))
        expected += w * loss / 4
    assert float(boosting_loss(z, labels, C, kind)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", boost.LOSSES)
def test_costs_enter_the_loss(kind: Any) -> None:
    """Gradients differ by example as the costs do, and by wrong class as the costs do."""
    labels = torch.tensor([0, 0, 0])
    state = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 1, -1]], dtype=torch.float64)
    C = training_costs(boost.costs(state, labels))
    z = torch.zeros(3, 3, requires_grad=True)
    boosting_loss(z, labels, C, kind).backward()
    grad = z.grad
    assert grad is not None
    # The second image is known already: the same logits cost exp(-2) of the first's.
    assert torch.allclose(grad[1], grad[0] * math.exp(-2), rtol=1e-5)
    # The third image's wrong classes are to each other as exp(1) to exp(-1), in any loss.
    assert float(grad[2, 1] / grad[2, 2]) == pytest.approx(math.exp(2), rel=1e-5)
    assert torch.allclose(grad.sum(1), torch.zeros(3), atol=1e-6)


def test_the_exponential_stays_finite_in_half_precisions_range() -> None:
    labels = torch.tensor([0, 1])
    C = training_costs(boost.costs(torch.zeros(2, 2, dtype=torch.float64), labels))
    z = torch.tensor([[-6e4, 6e4], [6e4, -6e4]], requires_grad=True)
    loss = boosting_loss(z, labels, C, "exp")
    loss.backward()
    assert loss.isfinite() and z.grad is not None and z.grad.isfinite().all() and z.grad.any()


def grow(plan: ResNet, x: Tensor, y: Tensor, classes: int, steps: int) -> list[boost.Verdict]:
    """A growth on the library alone."""
    boosting, verdicts, before = Boosting(y, classes), [], None
    generator = torch.Generator().manual_seed(0)
    for number in range(len(plan.units)):
        part = boost.weak_unit(plan, number, before)
        C = training_costs(boosting.costs())
        optimizer = torch.optim.SGD(part.parameters(), 0.1, momentum=0.9)
        for _ in range(steps):
            index = torch.randint(len(x), (64,), generator=generator)
            loss = boosting_loss(part(x[index]), y[index], C[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        before = boost.freeze(part)
        with torch.no_grad():
            verdicts.append(boosting.add(boost.outputs(part(x))))
        x = boost.features(part, x)
    return verdicts


@pytest.mark.usefixtures("native", "one_thread")
@pytest.mark.parametrize("classes", [2, 10])
def test_the_theorem_on_a_small_problem(classes: int) -> None:
    """Errors under exp(-1/2 sum gamma^2) at every unit, and so are the links between them."""
    data = split(synthetic(image_size=8, train_size=200))
    y = data.train.labels % classes
    x = data.train.images.float() / 127.5 - 1.0
    verdicts = grow(ResNet(14, 8, num_classes=classes, zero_init=True), x, y, classes, 60)
    for verdict in verdicts:
        sure = math.sqrt(1 - boost.clamp_edge(verdict.edge) ** 2)
        assert verdict.pair_error <= sure + max(verdict.covariance, 0.0)
        assert sure <= verdict.bound
        assert verdict.error <= verdict.bound
        if classes == 2:
            assert verdict.error == verdict.pair_error
    # It is a growth, and not a bound of 1 over nothing.
    assert verdicts[-1].edge > verdicts[0].edge > 0.01
    assert verdicts[-1].error < verdicts[0].error and verdicts[-1].bound < 0.95


@pytest.mark.usefixtures("native", "one_thread")
def test_the_grown_network_is_the_resnet() -> None:
    """Its eval logits are the last part's and those of a ResNet with its state, bitwise."""
    plan = ResNet(14, 4, num_classes=3)
    parts: list[ResNet] = []
    x = torch.randn(6, 3, 8, 8)
    for number in range(5):  # one is not grown
        part = boost.weak_unit(plan, number, parts[-1] if parts else None)
        features = x
        for before in parts:
            features = boost.features(before, features)
        part.train()
        part(features).sum().backward()  # statistics move
        with torch.no_grad():
            for p in part.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        parts.append(boost.freeze(part))
    net = boost.grown(plan, parts).eval()
    with torch.no_grad():
        logits = net(x)
        assert torch.equal(logits, parts[-1](features))
        resnet = ResNet(14, 4, num_classes=3, keep_units=5)
        resnet.load_state_dict(net.state_dict())
        assert torch.equal(resnet.eval()(x), logits)


def test_frozen_parts_keep_their_statistics() -> None:
    plan = ResNet(8, 4, num_classes=3)
    first = boost.freeze(boost.weak_unit(plan, 0))
    before = {name: t.clone() for name, t in first.state_dict().items()}
    second = boost.weak_unit(plan, 1, first).train()
    second(boost.features(first, torch.randn(4, 3, 8, 8))).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in first.state_dict().items())
    assert all(p.grad is None for p in first.parameters())
    assert second.bn is not None and second.fc.in_features == 8


def test_a_classifier_starts_from_the_one_before() -> None:
    plan = ResNet(14, 4, num_classes=3, zero_init=True)
    first = boost.freeze(boost.weak_unit(plan, 0))
    second = boost.weak_unit(plan, 1, first).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        logits = second(boost.features(first, x))
        assert torch.equal(logits, first(x))  # and so from the same edge: the branch is 0


def test_what_cannot_be_boosted() -> None:
    with pytest.raises(BoostError, match="2 classes or more, got 1"):
        Boosting(torch.tensor([0, 0]), 1)
    with pytest.raises(BoostError, match="all 2 of them are of one class"):
        Boosting(torch.tensor([1, 1]), 3)
    boosting = Boosting(torch.tensor([0, 1]), 2)
    with pytest.raises(BoostError, match="expected -1 to 1, got -3 to 3"):
        boosting.judge(torch.tensor([[3.0, -3.0], [0, 0]]))
    with pytest.raises(BoostError, match="got nan"):
        boosting.judge(torch.full((2, 2), math.nan))
    with pytest.raises(BoostError, match="shape"):
        boosting.judge(torch.zeros(3, 2))
    with pytest.raises(BoostError, match="state is of"):
        Boosting(torch.tensor([0, 1, 1]), 2).load_state_dict(boosting.state_dict())
    with pytest.raises(BoostError, match="preact"):
        boost.weak_unit(ResNet(8, block="postact"), 0)
    with pytest.raises(BoostError, match="unit of 0 to 2, got 3"):
        boost.weak_unit(ResNet(8), 3)
    with pytest.raises(ValueError, match="keep_units: expected 1 to 3, got 4"):
        ResNet(8, keep_units=4)


def test_a_state_goes_on_bitwise() -> None:
    labels, o = torch.tensor([0, 1, 2]), [boost.outputs(torch.randn(3, 3)) for _ in range(3)]
    whole, halved = Boosting(labels, 3), Boosting(labels, 3)
    for t in o:
        whole.add(t)
    for t in o[:2]:
        halved.add(t)
    resumed, state = Boosting(labels, 3), halved.state_dict()
    halved.add(o[2])  # which changes no state that was taken before
    resumed.load_state_dict(state)
    resumed.add(o[2])
    assert torch.equal(resumed.state, whole.state) and resumed.edges == whole.edges
    assert resumed.bound == whole.bound and resumed.alphas == whole.alphas
