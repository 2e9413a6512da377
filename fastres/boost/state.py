"""The state of boosting: what every training image has been told so far, and what it costs.

    o = 2 softmax(z) - 1                                  a classifier's outputs, |o| <= 1
    C[i, l] = exp(s[i, l] - s[i, y]),  C[i, y] = -sum_l   costs
    Z = sum |C|,  edge = -sum(C * o) / Z                  in [-1, 1], 1 is perfect, 0 is chance
    alpha = 1/2 ln((1 + edge) / (1 - edge))
    s += alpha_new o_new - alpha_old o_old                the telescoping sum: s = alpha o
    gamma^2 = (edge_new^2 - edge_old^2) / (1 - edge_old^2)

Softmax runs over the classes, and 2 p - 1 takes it to the whole of [-1, 1]: the margin of a pair of
image i and wrong class l, m = (o[i, y] - o[i, l]) / 2 = p[y] - p[l], is then 1 where the classifier
is sure and right, and since sum |C| counts every pair twice the edge is the mean of m weighted by
C. p itself would end at an edge of 1/2; logits have no bound.

The theorem. Weighted by C, mean exp(-alpha m) <= sqrt(1 - edge^2), by convexity and the choice of
alpha. The plain mean is the weighted one and `Verdict.covariance`; the theorem wants that to be 0
or less, which it is as long as what is lost is what was expensive. And the plain mean is no less
than the share of pairs with m <= 0. With edge_0 = 0 the product of 1 - gamma_t^2 telescopes:

    share of pairs in error <= sqrt(1 - edge^2)
                             = prod sqrt(1 - gamma_t^2) <= exp(-1/2 sum gamma_t^2)

An image in error has such a pair: with two classes the share is the training error, with k it is at
least the training error / (k - 1).

Source: Huang, Ash, Langford and Schapire 2018, arXiv:1706.04964.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.boost.errors import BoostError

# An edge beyond it counts as it: alpha would be infinite at 1. Its alpha is 7.25, and costs stay
# within exp(-29) to exp(29).
EDGE_LIMIT = 1.0 - 1e-6
# An edge is a sum of fp64 terms that cancel where it is 0; a real one is far greater.
_ROUNDING = 1e-12


def outputs(logits: Tensor) -> Tensor:
    """A classifier's bounded outputs, o = 2 softmax(z) - 1 over the classes.

    Args:
        logits: [N, classes], any float dtype.
    Returns:
        fp64 [N, classes] in [-1, 1].
    """
    return logits.double().softmax(1).mul_(2).sub_(1)


def costs(state: Tensor, labels: Tensor) -> Tensor:
    """C[i, l] = exp(s[i, l] - s[i, y]) for l other than y, C[i, y] = -sum of the others.

    Args:
        state: fp64 [N, classes].
        labels: int64 [N], y.
    Returns:
        fp64 [N, classes]; every row sums to 0.
    """
    own = labels[:, None]
    C = torch.exp(state - state.gather(1, own)).scatter_(1, own, 0.0)
    return C.scatter_(1, own, -C.sum(1, keepdim=True))


def total(C: Tensor) -> Tensor:
    """Z = sum |C|, fp64 []: over l other than y alone a perfect classifier's edge would be 2."""
    return C.abs().sum()


def edge(C: Tensor, o: Tensor) -> float:
    """-sum(C * o) / Z, in [-1, 1]."""
    return float(-(C * o).sum() / total(C))


def clamp_edge(value: float) -> float:
    return min(max(value, -EDGE_LIMIT), EDGE_LIMIT)


def alpha(value: float) -> float:
    """1/2 ln((1 + edge) / (1 - edge)) of an edge that is first held within EDGE_LIMIT."""
    return math.atanh(clamp_edge(value))


def gamma_squared(new: float, old: float) -> float:
    """(new^2 - old^2) / (1 - old^2) of two edges held within EDGE_LIMIT; below 0 if new < old."""
    new, old = clamp_edge(new), clamp_edge(old)
    return (new * new - old * old) / (1.0 - old * old)


def bound(gammas_squared: list[float]) -> float:
    """exp(-1/2 sum gamma_t^2)."""
    return math.exp(-0.5 * math.fsum(gammas_squared))


@dataclass(frozen=True)
class Verdict:
    """What a unit's classifier is worth on the costs of the units before it.

    Attributes:
        z: sum |C|.
        edge: as measured, in [-1, 1].
        gamma_squared: see gamma_squared; the edge before is the last accepted unit's, 0 at first.
        alpha: weight of the outputs.
        constant: whether all images have the same outputs.
        clamped: whether the edge is beyond EDGE_LIMIT: there is nothing left to boost.
        covariance: plain mean less cost-weighted mean of exp(-alpha m) over all pairs; the theorem
            wants 0 or less.
        pair_error: share of pairs (image, wrong class) with m <= 0.
        error: share of images whose greatest output is another class's, ties counted as errors.
        bound: exp(-1/2 sum gamma_t^2), this unit among the t.
        holds: whether the unit satisfies the weak learning condition.
    """

    z: float
    edge: float
    gamma_squared: float
    alpha: float
    constant: bool
    clamped: bool
    covariance: float
    pair_error: float
    error: float
    bound: float
    holds: bool

    @property
    def gamma(self) -> float:
        """gamma with the sign of gamma^2."""
        return math.copysign(math.sqrt(abs(self.gamma_squared)), self.gamma_squared)


class Boosting:
    """s, and the units accepted so far.

    Args:
        labels: int64 [N], on the device on which s is to be.
        classes: their number.
        min_gamma: a unit satisfies weak learning if its edge is over 0 and its gamma, with the sign
            of gamma^2, over min_gamma. 0 asks of every unit a greater edge than the last one's;
            less than 0 tolerates a fall. A classifier with an edge of 0 (to rounding, 1e-12) or
            below never does, since alpha would be 0 or turn it round; nor does one whose outputs
            are constant, though the greater of two classes may give it an edge.
    Raises:
        BoostError: less than two classes, or all images of one class: there is nothing to cost.
    """

    def __init__(self, labels: Tensor, classes: int, min_gamma: float = 0.0) -> None:
        if classes < 2:
            raise BoostError(f"boosting needs 2 classes or more, got {classes}")
        if len(labels) == 0 or bool((labels == labels[0]).all()):
            raise BoostError(
                f"boosting needs training images of 2 classes or more; all {len(labels)} of them "
                "are of one class"
            )
        self.labels, self.min_gamma = labels, min_gamma
        # Shift-free: only differences within a row matter.
        self.state = torch.zeros(len(labels), classes, dtype=torch.float64, device=labels.device)
        self._contribution = torch.zeros_like(self.state)
        self.edges: list[float] = []
        self.alphas: list[float] = []
        self.gammas_squared: list[float] = []

    @property
    def units(self) -> int:
        """Units accepted."""
        return len(self.edges)

    @property
    def edge(self) -> float:
        """The last unit's, on the costs that it met; 0 before the first."""
        return self.edges[-1] if self.edges else 0.0

    @property
    def bound(self) -> float:
        """exp(-1/2 sum gamma_t^2)."""
        return bound(self.gammas_squared)

    def costs(self) -> Tensor:
        """C for the next unit, fp64 [N, classes]."""
        return costs(self.state, self.labels)

    def judge(self, o: Tensor) -> Verdict:
        """Measure outputs, fp64 [N, classes], on the costs as they are; nothing changes.

        Raises:
            BoostError: another shape, or not within [-1, 1]: logits in place of outputs, or NaN.
        """
        if o.shape != self.state.shape:
            raise BoostError(
                f"outputs: expected shape {list(self.state.shape)}, got {list(o.shape)}"
            )
        low, high = float(o.min()), float(o.max())
        # Written so that NaN is refused, too.
        if not (low >= -1.0 and high <= 1.0):
            raise BoostError(
                f"outputs: expected -1 to 1, got {low:g} to {high:g}; see fastres.boost.outputs"
            )
        C = self.costs()
        value = edge(C, o)
        square, weight = gamma_squared(value, self.edge), alpha(value)
        own = self.labels[:, None]
        pairs = torch.ones_like(C, dtype=torch.bool).scatter_(1, own, False)
        margin = ((o.gather(1, own) - o) / 2)[pairs]
        losses, weights = torch.exp(-weight * margin), C[pairs]
        covariance = losses.mean() - (losses * weights).sum() / weights.sum()
        wrong = ((o.gather(1, own) <= o) & pairs).any(1)
        constant = bool((o == o[0]).all())
        threshold = math.copysign(self.min_gamma**2, self.min_gamma)
        return Verdict(
            z=float(total(C)),
            edge=value,
            gamma_squared=square,
            alpha=weight,
            constant=constant,
            clamped=abs(value) > EDGE_LIMIT,
            covariance=float(covariance),
            pair_error=float((margin <= 0).double().mean()),
            error=float(wrong.double().mean()),
            bound=bound([*self.gammas_squared, square]),
            holds=value > _ROUNDING and not constant and square > threshold,
        )

    def add(self, o: Tensor) -> Verdict:
        """Accept a unit with these outputs: s += alpha_new o_new - alpha_old o_old."""
        verdict = self.judge(o)
        contribution = verdict.alpha * o
        self.state += contribution - self._contribution
        self._contribution = contribution
        self.edges.append(clamp_edge(verdict.edge))
        self.alphas.append(verdict.alpha)
        self.gammas_squared.append(verdict.gamma_squared)
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed growth needs, as it is now: of what changes in place a copy."""
        return {
            "state": self.state.clone(),
            "contribution": self._contribution,
            "edges": list(self.edges),
            "alphas": list(self.alphas),
            "gammas_squared": list(self.gammas_squared),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            BoostError: it is of another number of images or classes.
        """
        if state["state"].shape != self.state.shape:
            raise BoostError(
                f"the state is of {list(state['state'].shape)} images and classes, not of "
                f"{list(self.state.shape)}"
            )
        self.state.copy_(state["state"])
        self._contribution = state["contribution"].to(self.state.device, copy=True)
        self.edges, self.alphas = list(state["edges"]), list(state["alphas"])
        self.gammas_squared = list(state["gammas_squared"])
