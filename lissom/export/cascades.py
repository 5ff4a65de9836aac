"""Cascades of two classifiers: which two, how sure the first must be, and what comes of it. NumPy, on recorded answers.

The first classifier always runs; where its score is below a threshold the second runs as well. With post-check the
surer of the two answers stands, without it the second's (Kinnas et al. 2025, arXiv 2412.01039). Nothing here promises a
quality, unlike ``lissom.export.calibration``, whose threshold artifacts get; these are the published choices.

Scores are higher where an answer is surer (``lissom.runtime.decisions``: ``confidence``, ``difference``, and minus
``normalised_entropy``). The published rule keeps the first answer where its score is at or above the threshold, the
runtime's where it is above: ``lissom.export.budgeted.for_runtime`` translates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lissom.errors import LissomError

__all__ = [
    "Pair",
    "Threshold",
    "best_pair",
    "complementarity",
    "find_threshold",
    "fit_temperature",
    "run_cascade",
]

ORDERS = ("cheaper", "accurate")
TOLERANCE = 0.1  # points of accuracy: the curve over thresholds is flat, and second calls are not free
COLDEST, HOTTEST = 1 / 8, 8.0  # temperatures that are looked at


def complementarity(correct_a: np.ndarray, correct_b: np.ndarray, penalty: bool = True) -> float:
    """How well two classifiers make up for each other, from what each got right: bool (N,) and (N,) -> [0, 1].

    With A and B the samples that they get right, c = (n(A u B) - n(A n B) - |n(A) - n(B)|) / N, which is
    2 min(n(A - B), n(B - A)) / N: two of equal strength that rescue each other. Without ``penalty`` the last
    difference is left out, as in the published code; a very weak classifier then looks complementary. Raises
    LissomError where the two do not fit together.
    """
    a, b = _truths(correct_a), _truths(correct_b)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise LissomError(f"what two classifiers got right is (samples,) of each, not {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return (2 * min(only_a, only_b) if penalty else only_a + only_b) / len(a)


@dataclass(frozen=True)
class Pair:
    """Two of a pool, by their places in it; ``first`` is the one that always runs."""

    first: int
    second: int
    complementarity: float
    cost: float


def best_pair(
    correct: np.ndarray,
    costs: Sequence[float] | np.ndarray,
    budget: float | None = None,
    penalty: bool = True,
    order: str = "cheaper",
) -> Pair:
    """The most complementary two of a pool that together cost ``budget`` at most (None: whatever they cost).

    ``correct``, bool (M, N): what each of M classifiers got right of N samples that none was trained on. ``costs``
    (M,), in any unit: parameters, or multiply-accumulates. Of equally complementary pairs the one of which either is
    right more often, then the cheaper.

    ``order``: who is first, the "cheaper" one (at equal cost the more accurate), or the more "accurate" (of equals the
    cheaper), which as a rule calls the second less often. Which of the two orders costs less in all hangs on how sure
    the first is, sample by sample, and that is not known here: try both.

    Raises LissomError where there are fewer than two, no two within the budget, and for another order.
    """
    if order not in ORDERS:
        raise LissomError(f"a pair's order is one of {', '.join(map(repr, ORDERS))}, not {order!r}")
    correct, costs = _truths(correct), np.asarray(costs, np.float64)
    if correct.ndim != 2 or len(correct) < 2 or not correct.shape[1]:
        raise LissomError(
            f"a pair is chosen from right answers (classifiers, samples) of two or more, not {correct.shape}"
        )
    if costs.shape != (len(correct),) or not np.isfinite(costs).all() or (costs < 0).any():
        raise LissomError(f"costs are one number for each of {len(correct)} classifiers, none below 0")
    ranked = []
    for one in range(len(correct)):
        for other in range(one + 1, len(correct)):
            cost = float(costs[one] + costs[other])
            if budget is None or cost <= budget:
                either = int((correct[one] | correct[other]).sum())
                ranked.append((complementarity(correct[one], correct[other], penalty), either, -cost, -one, -other))
    if not ranked:
        cheapest = float(np.sort(costs)[:2].sum())
        raise LissomError(f"no two of the pool cost {budget:g} or less together; the cheapest two cost {cheapest:g}")
    value, _, cost, one, other = max(ranked)
    ranks = {i: (costs[i], -int(correct[i].sum())) for i in (-one, -other)}
    first, second = sorted(ranks, key=lambda i: (*(ranks[i] if order == "cheaper" else ranks[i][::-1]), i))
    return Pair(first, second, value, -cost)


def run_cascade(
    score_a: np.ndarray, score_b: np.ndarray, threshold: float, postcheck: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Who answers: scores (N,) and (N,) -> (the second's answer stands, the second was called), bool (N,) each.

    The second is called where ``score_a`` is below ``threshold``. With ``postcheck`` its answer stands where its score
    is strictly higher. Scores of the second where it is not called do not matter. Raises LissomError where shapes do
    not fit.
    """
    a, b = _scores(score_a, score_b)
    called = a < threshold
    return called & (b > a) if postcheck else called, called


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it does on the samples that it was chosen on: ``accuracy`` in points, and ``calls``, the
    share of samples on which the second is called."""

    value: float
    accuracy: float
    calls: float


def find_threshold(
    score_a: np.ndarray,
    score_b: np.ndarray,
    correct_a: np.ndarray,
    correct_b: np.ndarray,
    *,
    postcheck: bool = True,
    tolerance: float = TOLERANCE,
    grid: Sequence[float] | np.ndarray | None = None,
) -> Threshold:
    """The smallest threshold whose accuracy is within ``tolerance`` points of the best.

    Of scores (N,) and what was right, bool (N,), of both classifiers, on samples that neither was trained on and that
    are not those of the final figure. The published choice is ``tolerance=0``: the most accurate, of equals the
    smallest, which calls the second least. ``grid``: thresholds to choose from, in rising order (the published search
    has 2,000 from 0 to 1); None: all that differ in whom they call. One sort serves all of them. Raises LissomError
    where shapes do not fit or ``grid`` falls.
    """
    a, b = _scores(score_a, score_b)
    right_a, right_b = _truths(correct_a), _truths(correct_b)
    if not (right_a.shape == right_b.shape == a.shape) or not len(a):
        raise LissomError(
            f"scores and right answers are (samples,) of each classifier, not {a.shape}, {right_a.shape} and "
            f"{right_b.shape}"
        )
    if not tolerance >= 0:
        raise LissomError(f"the tolerance is in points of accuracy, at least 0, not {tolerance}")
    order = np.argsort(a, kind="stable")
    sorted_a = a[order]
    if grid is None:
        above = np.nextafter(sorted_a[-1], np.inf)
        values = np.unique(np.append(sorted_a, above))
    else:
        values = np.asarray(grid, np.float64)
        if values.ndim != 1 or not len(values) or np.isnan(values).any() or (np.diff(values) < 0).any():
            raise LissomError("a grid of thresholds is a list of numbers in rising order")
    called = np.where(b > a, right_b, right_a) if postcheck else right_b
    # With the k least sure samples called, those are right as ``called`` says and the others as the first is.
    gained = np.concatenate([[0], np.cumsum(called[order].astype(np.int64) - right_a[order])])
    count = np.searchsorted(sorted_a, values, side="left")
    right = int(right_a.sum()) + gained[count]
    least = right.max() - tolerance / 100 * len(a)
    place = int((right >= least - 1e-9).argmax())
    return Threshold(float(values[place]), 100 * float(right[place]) / len(a), float(count[place]) / len(a))


def fit_temperature(logits: np.ndarray, labels: np.ndarray, spread: float = 0.5) -> float:
    """The temperature T by which softmax(logits / T) is most probable for what was right (Guo et al. 2017, 1706.04599).

    ``logits`` (N, classes) of samples that the classifier was not trained on, ``labels`` int (N,). T maximises the
    likelihood times a prior: ln T is normal around 0 with the standard deviation ``spread``, so that a few samples that
    are all right do not make it 0. ``inf`` is the published form. T lies between 1/8 and 8. Raises LissomError where
    shapes do not fit or a logit is not finite.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels) or labels.dtype.kind not in "iu":
        raise LissomError(
            f"a temperature is of logits (samples, classes) and labels (samples,), not {logits.shape}, {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise LissomError(f"a label is outside of 0 to {logits.shape[1] - 1}")
    if not np.isfinite(logits).all():
        raise LissomError("a temperature is of finite logits, and one of these is not")
    if not spread > 0:
        raise LissomError(f"the spread of the prior is above 0, not {spread}")
    shifted = logits - logits.max(1, keepdims=True)
    own = shifted[np.arange(len(labels)), labels]

    def loss(log_t: float) -> float:
        z = math.exp(-log_t)
        wrong = np.log(np.exp(shifted * z).sum(1)) - own * z
        return float(wrong.sum()) + (log_t / spread) ** 2 / 2

    # One hump in T without the prior (the likelihood is concave in 1 / T); with it, a grid finds the right one.
    grid = np.linspace(math.log(COLDEST), math.log(HOTTEST), 129)
    best = int(np.argmin([loss(x) for x in grid]))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return math.exp((low + high) / 2)


def _truths(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype != bool and not np.isin(values, (0, 1)).all():
        raise LissomError("what was right is a truth value a sample")
    return values.astype(bool)


def _scores(score_a: np.ndarray, score_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(score_a), np.asarray(score_b)
    if a.ndim != 1 or a.shape != b.shape:
        raise LissomError(f"scores are (samples,) of each classifier, not {a.shape} and {b.shape}")
    if not all(s.dtype.kind in "fiu" and np.isfinite(s).all() for s in (a, b)):
        raise LissomError("scores are finite numbers, and one of these is not")
    return a.astype(np.float64), b.astype(np.float64)
