"""Thresholds of early exits with a promise: the harm that the exits do stays within a stated risk.

Exit k answers a sample when its score exceeds the k-th threshold and no earlier exit answered. Exits save time and do
harm; how much of either depends on the thresholds, which are fitted here on recorded scores by Learn then Test
(Angelopoulos et al. 2021, arXiv 2110.01052) with fixed-sequence testing:

1. The samples are split. On the ``design`` part a path of thresholds is laid from "no exit" to "leave early", greedily:
   each step lowers one exit's threshold by one level, where the most cost is saved for the harm added.
2. On the rest, the path is walked. The hypothesis of step j is "the harm rate of these thresholds is above the risk";
   with h harmful answers among n samples its p-value is the binomial tail P(Bin(n, risk) <= h), exact for any n. The
   walk ends at the first p-value above delta, and the thresholds of the step before are the answer.

The path does not know the samples that it is tested on, so a step that breaks the promise is passed only where the
first such step is, which has probability delta at most: with probability 1 - delta over the draw of the samples, the
true harm rate of the answer is within the risk. Poor scores cost savings, never the promise. Two things it does ask
for: the samples are drawn from what the model will meet, each by itself (frames of one film are not), and the promise
is of one fit. Where many models are calibrated on the same samples and one is kept, divide delta by their number.

One sequence is tested, with all of delta. More steps cost no power, since a path that goes on to more and more harm
fails where the count first exceeds what the binomial allows, however finely it is cut. A second sequence does, since
each then has half of delta.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

from lissom.errors import LissomError
from lissom.runtime.decisions import first_exit

__all__ = ["Calibration", "apply", "fit_thresholds", "minimum_samples", "never_tested"]

# A step is worth the cost that it saves divided by the harm that it adds, in samples, plus this. Without it every step
# that shows no harm among a few hundred samples would be worth the same, however little it saves.
UNSEEN_HARM = 0.3

# The path ends where it shows more harm on the design samples than this multiple of what the risk allows, plus a few
# samples: thresholds within the risk practically never do.
END_FACTOR, END_SAMPLES = 2, 5

# The design part may shrink to this share where the test part would otherwise be too small to pass anything.
SMALLEST_DESIGN = 0.1


@dataclass(frozen=True)
class Calibration:
    """Fitted thresholds and what is known of them, for K exits.

    ``thresholds``: K numbers; inf is an exit that is never taken. ``shares``: K + 1, the share of all samples that
    leaves at each exit and, last, at the end. ``harm``: the rate of harmful answers on all samples. ``risk``: the harm
    rate that is promised with probability 1 - ``delta``. ``n`` samples were given, the promise was tested on ``n_test``
    of them, and ``tested`` steps of the path passed. ``cost``: the expected cost, where running every sample to the end
    is 1. ``note``: why no exit is taken, where none is.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    harm: float
    risk: float
    delta: float
    n: int
    n_test: int
    tested: int
    cost: float
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same as a JSON object; infinity, which JSON lacks, is written as null."""
        thresholds = [None if math.isinf(threshold) else threshold for threshold in self.thresholds]
        return {**asdict(self), "thresholds": thresholds, "shares": list(self.shares)}


def minimum_samples(risk: float, delta: float = 0.05) -> int:
    """The fewest test samples that can prove a harm rate of at most ``risk`` with probability 1 - ``delta``.

    That is the smallest n with (1 - risk)^n <= delta: even thresholds without any harm need so many to show it.
    Raises LissomError where risk or delta is not between 0 and 1.
    """
    _within(risk=risk, delta=delta)
    n = max(1, math.floor(math.log(delta) / math.log1p(-risk)))
    while binom.cdf(0, n, risk) > delta:
        n += 1
    return n


def never_tested(n: int, seed: int = 0) -> np.ndarray:
    """Rows, int64 in order, that ``fit_thresholds`` with this seed never tests its promise on, whatever risk and delta
    (and a design part of a tenth or more): a tenth of ``n``. What else must be fitted on the samples may look at these.
    """
    return np.sort(_order(n, seed)[n - round(n * SMALLEST_DESIGN) :])


def _order(n: int, seed: int) -> np.ndarray:
    """The samples in the order in which they are divided: those to test on first."""
    # Not the generator of the seed alone: whoever drew the samples by the same seed would get a split that knows them.
    return np.random.default_rng((seed, 1)).permutation(n)


def apply(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Where each sample leaves, int64 (n,): the first k with ``scores`` (n, K) above ``thresholds`` (K,), K for none.

    It compares as the runtime does (``lissom.runtime.decisions.first_exit``). Raises LissomError where a score is not a
    finite number or the shapes do not fit.
    """
    return first_exit(_scores(scores), thresholds)


def fit_thresholds(
    scores: np.ndarray,
    harm: np.ndarray,
    costs: np.ndarray,
    *,
    risk: float,
    delta: float = 0.05,
    design: float = 0.3,
    seed: int = 0,
    levels: int = 100,
) -> Calibration:
    """Thresholds whose true harm rate is at most ``risk`` with probability 1 - ``delta``, and that save what they can.

    ``scores``, float (n, K): the score of every sample at every exit, in order of execution, computed as at run time
    (thresholds are taken from among them, so that float32 scores give thresholds that float32 holds exactly).
    ``harm``, bool (n, K): whether it is harmful to let this exit answer this sample. Without labels: its answer is not
    the full model's. With labels: the full model is right and the exit is wrong, and the drop in accuracy is at most
    the rate of that.
    ``costs``, (K + 1,), in any unit: what a sample costs that leaves at each exit, and one that runs to the end, with
    all that was computed up to there.
    ``design`` is the share of the samples, drawn by ``seed``, on which the path is laid; it shrinks to a tenth where
    the rest would be too small to prove anything. Each exit's threshold takes at most ``levels`` values, at equal steps
    of the share of design samples above it.

    Where nothing can be proved, no exit is taken and the ``note`` says why. A smaller risk or delta never gives a lower
    threshold, so long as the split is the same. Raises LissomError where shapes do not fit, a score is not finite,
    ``harm`` is not of truth values, costs fall from one exit to the next, there is no exit or no sample, or risk, delta
    or design is not between 0 and 1.
    """
    _within(risk=risk, delta=delta, design=design)
    if levels < 1:
        raise LissomError(f"an exit's threshold takes at least 1 level, not {levels}")
    scores = _scores(scores)
    n, exits = scores.shape
    if exits == 0 or n == 0:
        raise LissomError(f"thresholds need at least one exit and one sample; the scores have the shape {scores.shape}")
    harm = _harm(harm, scores.shape)
    costs = _costs(costs, exits)

    n_test = min(max(n - round(n * design), minimum_samples(risk, delta)), n - round(n * min(design, SMALLEST_DESIGN)))
    order = _order(n, seed)
    test, drawn = order[:n_test], order[n_test:]

    thresholds, tested = np.full(exits, np.inf), 0
    if len(drawn):
        values = _values(scores[drawn], levels)
        limit = END_FACTOR * risk * len(drawn) + END_SAMPLES
        path = _path(scores[drawn], harm[drawn], costs, values, limit)
        if len(path):
            harmful = _harm_along(path, scores[test], harm[test], values)
            refused = binom.cdf(harmful, n_test, risk) > delta
            tested = int(refused.argmax()) if refused.any() else len(path)
        lowered = np.bincount(path[:tested], minlength=exits)
        thresholds = np.array([values[k][lowered[k] - 1] if lowered[k] else np.inf for k in range(exits)])

    leaves = first_exit(scores, thresholds)
    shares = np.bincount(leaves, minlength=exits + 1) / n
    return Calibration(
        thresholds=tuple(float(threshold) for threshold in thresholds),
        shares=tuple(float(share) for share in shares),
        harm=float(_with_the_end(harm)[np.arange(n), leaves].mean()),
        risk=risk,
        delta=delta,
        n=n,
        n_test=n_test,
        tested=tested,
        cost=float(shares @ costs / costs[-1]),
        note="" if np.isfinite(thresholds).any() else _why_no_exit(n, n_test, risk, delta),
    )


def _why_no_exit(n: int, n_test: int, risk: float, delta: float) -> str:
    needed = minimum_samples(risk, delta)
    if n_test >= needed:
        return f"no exit that saves anything was shown to keep its harm within {risk:.2%}"
    smallest = 1 - delta ** (1 / n_test) if n_test else 1.0
    return (
        f"with {n} samples the smallest risk that can be promised at {1 - delta:.0%} is {smallest:.2%}; "
        f"{risk:.2%} takes at least {needed} test samples, and there were {n_test}"
    )


# The path. A level of an exit is an index into its candidate thresholds, from the highest down. A path is written as
# the exits whose threshold is lowered by one level, step by step: int (steps,).


def _values(scores: np.ndarray, levels: int) -> list[np.ndarray]:
    """Each exit's candidate thresholds from the highest down: the scores at equal steps of rank, without repetition.

    A threshold is a score that occurs, so the samples that bear it stay; the last one lies just below the lowest.
    """
    n = len(scores)
    tiny = np.finfo(scores.dtype).tiny  # nearer to zero, some processors take a number for zero
    ranks = np.unique(np.ceil(np.arange(1, levels + 1) * n / levels).astype(int))
    values = []
    for column in np.sort(scores, axis=0)[::-1].T:
        below = min(np.nextafter(column[-1], column.dtype.type(-np.inf)), column[-1] - tiny)
        candidates = np.unique(np.append(column, below)[ranks])[::-1]
        values.append(candidates[candidates < column[0]])  # at the highest score itself nobody leaves
    return values


class _Walk:
    """Samples as they leave earlier and earlier along a path. ``leaves`` (n,) is the exit where each leaves now.

    ``level`` (n, K): the first level of each exit at which the sample would leave there, as many as there are for none.
    """

    def __init__(self, scores: np.ndarray, values: list[np.ndarray]) -> None:
        self.exits = len(values)
        # values fall, hence the signs; right of the equal ones, since an equal score does not exceed the threshold
        self.level = np.stack([np.searchsorted(-v, -scores[:, k], side="right") for k, v in enumerate(values)], 1)
        self.leaves = np.full(len(scores), self.exits)
        self._reached = [0] * self.exits
        self._order = [np.argsort(self.level[:, k], kind="stable") for k in range(self.exits)]
        self._bounds = [
            np.searchsorted(self.level[order, k], np.arange(len(values[k]) + 1)) for k, order in enumerate(self._order)
        ]

    def step(self, k: int) -> np.ndarray:
        """Lower exit k by one level; the indices of the samples that leave there from now on, still to be moved."""
        reached, bounds = self._reached[k], self._bounds[k]
        self._reached[k] += 1
        members = self._order[k][bounds[reached] : bounds[reached + 1]]
        return members[self.leaves[members] > k]


def _path(
    scores: np.ndarray, harm: np.ndarray, costs: np.ndarray, values: list[np.ndarray], limit: float
) -> np.ndarray:
    """The greedy path on these samples, until ``limit`` harmful answers are exceeded or nothing more can be saved.

    At every step each exit and each of its lower levels is looked at: what would be saved and harmed by going there at
    once? The exit of the best goes down by one level, and all is looked at anew. Looking at all levels lets an exit
    pass levels that save nothing (their samples have left already) or that do much harm for little, while going by
    single steps keeps the tested sequence fine.
    """
    walk = _Walk(scores, values)
    exits, width = walk.exits, max(len(v) for v in values) + 1
    cells = walk.level + width * np.arange(exits)
    harm = _with_the_end(harm).astype(np.int64)
    # What moving the samples of one level to their exit saves and harms, each against where they leave now.
    saved, harmed = np.zeros((2, exits * width))

    def account(members: np.ndarray, sign: int) -> None:
        """Add (sign 1) or take out (-1) these samples, at all exits before the one where they leave."""
        left = walk.leaves[members]
        open_ = np.arange(exits) < left[:, None]
        cell = cells[members][open_]
        gain = (costs[left][:, None] - costs[:exits])[open_]
        loss = (harm[members, :exits] - harm[members, left][:, None])[open_]
        saved[:] += sign * np.bincount(cell, gain, len(saved))
        harmed[:] += sign * np.bincount(cell, loss, len(saved))

    account(np.arange(len(scores)), 1)
    real = np.arange(width) < np.array([len(v) for v in values])[:, None]  # the others are for those who never leave
    path: list[int] = []
    total = 0
    while total <= limit:
        # Levels already passed hold nobody, so that sums from the first level are sums from the present one.
        gains, losses = saved.reshape(exits, width).cumsum(1), harmed.reshape(exits, width).cumsum(1)
        worth = np.where(real, gains / (np.maximum(losses, 0) + UNSEEN_HARM), 0)
        best = int(worth.argmax())
        if worth.flat[best] <= 1e-6 * costs[-1]:  # what rounding leaves
            break
        k = best // width
        path.append(k)
        members = walk.step(k)
        if len(members):
            account(members, -1)
            total += int((harm[members, k] - harm[members, walk.leaves[members]]).sum())
            walk.leaves[members] = k
            account(members, 1)
    return np.array(path, dtype=np.int64)


def _harm_along(path: np.ndarray, scores: np.ndarray, harm: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """How many of these samples are answered harmfully after each step of the path, int64 (steps,)."""
    walk = _Walk(scores, values)
    harm = _with_the_end(harm).astype(np.int64)
    added = np.zeros(len(path), dtype=np.int64)
    for step, k in enumerate(path):
        members = walk.step(k)
        added[step] = (harm[members, k] - harm[members, walk.leaves[members]]).sum()
        walk.leaves[members] = k
    return added.cumsum()


def _with_the_end(harm: np.ndarray) -> np.ndarray:
    """Harm (n, K) with the end as one more column: running to the end does none."""
    return np.concatenate([harm, np.zeros((len(harm), 1), dtype=harm.dtype)], axis=1)


# What is given, checked.


def _within(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 < share < 1:
            raise LissomError(f"{name} is a share between 0 and 1, not {share}")


def _scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.dtype.kind not in "fiu":
        raise LissomError(f"scores are numbers of shape (samples, exits), not {scores.dtype} {scores.shape}")
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        sample, exit_ = np.argwhere(~np.isfinite(scores))[0]
        raise LissomError(f"scores are finite numbers; that of sample {sample} at exit {exit_} is not")
    return scores


def _harm(harm: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    harm = np.asarray(harm)
    if harm.shape != shape:
        raise LissomError(f"harm has the shape of the scores, {shape}, not {harm.shape}")
    if harm.dtype != bool and not np.isin(harm, (0, 1)).all():
        raise LissomError("harm holds truth values: whether letting an exit answer a sample is harmful")
    return harm.astype(bool)


def _costs(costs: np.ndarray, exits: int) -> np.ndarray:
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != (exits + 1,):
        raise LissomError(f"costs are one for each of {exits} exits and one for the end, not of shape {costs.shape}")
    if not np.isfinite(costs).all() or costs[0] < 0 or costs[-1] <= 0 or (np.diff(costs) < 0).any():
        raise LissomError(f"costs are sums up to each exit and never fall, unlike {costs.tolist()}")
    return costs
