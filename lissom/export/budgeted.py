"""Thresholds of early exits for a budget: which share of the samples should leave where, and what that costs.

The search of Dyn-Perceiver (arXiv 2306.11248) and MSDNet (1703.09844). A family of distributions over the exits runs
from "nearly all leave at the first" to "nearly none leaves early"; each is turned into thresholds on a set of samples
that nothing was trained on, and each has an expected cost. Nothing is promised of the quality, unlike in
``lissom.export.calibration``, whose thresholds ``lissom slim`` uses: here the cost is given and the quality follows.

K exits have scores (N, K), the higher the surer; who leaves nowhere runs to the end. The published rule is "score >=
threshold"; the runtime's is "score > threshold", and ``for_runtime`` translates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lissom.errors import LissomError

__all__ = [
    "Budgeted",
    "budget_curve",
    "exit_distributions",
    "find_thresholds",
    "for_runtime",
    "leave",
    "thresholds_for_budget",
]

KEEP = (0.85, 1.0, 0.5)  # Dyn-Perceiver's: the third exit costs nearly what the end does, so that fewer leave there
COUNT = 33


def exit_distributions(keep: Sequence[float] = KEEP) -> np.ndarray:
    """The 33 wanted distributions of K exits and the end, float64 (33, K + 1), from the cheapest to the dearest.

    ``keep`` has one factor an exit. A distribution begins as w_e = p^e, e = 1 ... K + 1, normalised, for p from 0.2 to
    4; then exit by exit the share is multiplied by its factor, and the shares behind it take what that leaves, in
    proportion. Raises LissomError for no exit or factors that are not between 0 and 1.
    """
    if not len(keep) or not all(0 < factor <= 1 for factor in keep):
        raise LissomError(f"keep is one factor an exit, above 0 and at most 1, not {tuple(keep)}")
    steps = [(i + 4) / 20 for i in range(17)] + [20 / (j + 4) for j in reversed(range(17))]
    rows = []
    for p in steps[:COUNT]:
        shares = p ** np.arange(1, len(keep) + 2, dtype=np.float64)
        shares /= shares.sum()
        for exit, factor in enumerate(keep):
            shares[exit] *= factor
            shares[exit + 1 :] *= (1 - shares[: exit + 1].sum()) / shares[exit + 1 :].sum()
        rows.append(shares)
    return np.array(rows)


def find_thresholds(scores: np.ndarray, distribution: Sequence[float] | np.ndarray) -> np.ndarray:
    """Thresholds (K,) by which samples with these ``scores`` (N, K) leave as ``distribution`` (K + 1,) wants it.

    Exit by exit, of those still there the floor(N share) with the highest scores leave; whoever has the same score
    leaves too. inf is an exit that is never taken: its share is less than one sample, or fewer are left. Thresholds
    are scores that occur, in their precision. Raises LissomError where shapes do not fit or a score is no number.
    """
    scores = _scores(scores)
    shares = np.asarray(distribution, dtype=np.float64)
    samples, exits = scores.shape
    if shares.shape != (exits + 1,) or not (shares >= 0).all() or not np.isclose(shares.sum(), 1, atol=1e-5):
        raise LissomError(f"a distribution of {exits} exits has {exits + 1} shares that add up to 1, unlike {shares}")
    there = np.ones(samples, dtype=bool)
    thresholds = np.full(exits, np.inf, dtype=scores.dtype)
    for exit in range(exits):
        wanted = int(np.floor(samples * shares[exit]))
        waiting = np.sort(scores[there, exit])[::-1]
        if 0 < wanted <= len(waiting):
            thresholds[exit] = waiting[wanted - 1]
            there &= scores[:, exit] < thresholds[exit]
    return thresholds


def leave(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Where samples with ``scores`` (N, K) leave, int64 (N,): the first exit with a score at or above its threshold,
    K for the end."""
    scores = _scores(scores)
    gone = scores >= np.asarray(thresholds)
    return np.where(gone.any(1), gone.argmax(1), scores.shape[1])


def for_runtime(thresholds: np.ndarray) -> np.ndarray:
    """The thresholds as artifacts hold them: float32 (K,) that a float32 score exceeds where it reaches the others.

    inf, an exit that is never taken, stays inf.
    """
    given = np.asarray(thresholds, dtype=np.float32)
    return np.where(given == np.inf, given, np.nextafter(given, np.float32(-np.inf), dtype=np.float32))


@dataclass(frozen=True)
class Budgeted:
    """Thresholds for a budget: ``thresholds`` (K,), the wanted ``distribution`` (K + 1,), the ``shares`` (K + 1,) of
    the samples that did leave at each exit, and their expected ``cost``."""

    thresholds: np.ndarray
    distribution: np.ndarray
    shares: np.ndarray
    cost: float


def budget_curve(
    scores: np.ndarray, costs: Sequence[float] | np.ndarray, keep: Sequence[float] = KEEP
) -> list[Budgeted]:
    """All 33 sets of thresholds on these ``scores`` (N, K), with what they cost there.

    ``costs`` (K + 1,): what a sample costs that leaves at each exit, and one that runs to the end, all that was
    computed up to there included; in any unit.
    """
    scores, costs = _scores(scores), np.asarray(costs, dtype=np.float64)
    exits = scores.shape[1]
    if costs.shape != (exits + 1,) or not np.isfinite(costs).all():
        raise LissomError(f"costs are one for each of {exits} exits and one for the end, not of shape {costs.shape}")
    if len(keep) != exits:
        raise LissomError(f"there are {exits} exits and {len(keep)} factors; give keep=(...), one an exit")
    found = []
    for distribution in exit_distributions(keep):
        thresholds = find_thresholds(scores, distribution)
        shares = np.bincount(leave(scores, thresholds), minlength=exits + 1) / len(scores)
        found.append(Budgeted(thresholds, distribution, shares, float(shares @ costs)))
    return found


def thresholds_for_budget(
    scores: np.ndarray, costs: Sequence[float] | np.ndarray, budget: float, keep: Sequence[float] = KEEP
) -> Budgeted:
    """The dearest of the 33 that stays within ``budget``, in the unit of ``costs``. Arguments as in ``budget_curve``.

    Raises LissomError where none does.
    """
    found = budget_curve(scores, costs, keep)
    within = [each for each in found if each.cost <= budget]
    if not within:
        raise LissomError(
            f"no distribution costs {budget:g} or less; the cheapest costs {min(f.cost for f in found):g}"
        )
    return max(within, key=lambda each: each.cost)


def _scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or not all(scores.shape) or scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise LissomError(f"scores are finite numbers (samples, exits), at least one of each, not {scores.shape}")
    return scores
