"""Predictors of SimQ-NAS (arXiv 2312.13301): ridge regression or a support vector machine on one-hot features.

One predictor an objective, fitted anew on everything measured so far. Two regressors are tried, each over a grid of one
setting by cross-validation; the one with the smaller mean absolute percentage error predicts. Labels are brought to the
same size first: divided by 10^(floor(log10 max|y|) - 1), they reach from 10 to 100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.search.encoding import SearchSpace

__all__ = ["OneHot", "Predictor", "kendall", "live_entries", "normalisation", "transformer_features"]

ALPHAS = tuple(n / 10 for n in range(1, 101))  # ridge: 0.1, 0.2, ..., 10.0
COSTS = tuple(float(n) for n in range(1, 101))  # support vector machine: 1, 2, ..., 100
COARSE_ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0)
COARSE_COSTS = (1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS = 5
LEAST = 0.1  # of normalised labels: 1/100 to 1/1000 of the largest


@dataclass(frozen=True)
class OneHot:
    """One place for each value of each slot. Place i is 1 where slot ``slots[i]`` holds ``values[i]``, else 0.

    ``seen`` knows the values in a table only, so that a value it never saw leaves all places of its slot at 0;
    ``full`` knows all values of a space.
    """

    slots: np.ndarray  # int64 (places,)
    values: np.ndarray  # (places,)

    @classmethod
    def seen(cls, table: np.ndarray) -> OneHot:
        """Of ``table`` (n, slots): a place for each value that stands in it, by slot and then by value."""
        found = [np.unique(column) for column in table.T]
        return cls(np.repeat(np.arange(len(found)), [len(values) for values in found]), np.concatenate(found))

    @classmethod
    def full(cls, sizes: np.ndarray) -> OneHot:
        """Of vectors whose entry i is one of 0 to sizes[i] - 1, as ``SearchSpace.one_hot`` lays them out."""
        return cls(np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes]))

    def __call__(self, table: np.ndarray) -> np.ndarray:
        """table (n, slots) -> float64 (n, places)."""
        return (np.asarray(table)[:, self.slots] == self.values).astype(np.float64)


def normalisation(labels: Sequence[float] | np.ndarray) -> float:
    """What the labels are divided by: 10^(floor(log10 max|y|) - 1); 1 where all are 0."""
    largest = float(np.abs(np.asarray(labels, np.float64)).max(initial=0.0))
    return 1.0 if largest == 0 else 10.0 ** (math.floor(math.log10(largest)) - 1)


class Predictor:
    """Predicts one objective from tables (n, slots) of numbers that are names, not amounts.

    The paper's grid is ridge regression with alpha = 0.1, 0.2, ..., 10 and a support vector machine (radial basis
    functions, gamma 1 / features, epsilon 0) with C = 1, 2, ..., 100, both in 5 folds: about a second at 60 rows, four
    at 200. ``coarse`` takes 5 values of each, evenly spaced by ratio. ``encoding`` (default: one-hot over the values
    seen in ``fit``) turns a table into features; those that are the same in all rows of ``fit`` are left out.

    With 2 to 4 rows there are as many folds as rows. With 1 row, or rows without a difference, the labels' mean is
    predicted. After ``fit``, ``kind`` is "ridge", "svr" or "mean", ``setting`` its alpha or C (0 for the mean),
    ``error`` its mean absolute percentage error over the folds, as a share (infinite for the mean, which has none),
    and ``scale`` what labels were divided by. A label below 0.1 after that division counts as 0.1 where errors are
    divided by labels: a single label near 0 would decide otherwise.
    """

    def __init__(self, *, coarse: bool = False, encoding: OneHot | None = None) -> None:
        self.coarse, self._given = coarse, encoding
        self.kind, self.setting, self.error, self.scale = "", 0.0, math.inf, 1.0

    def fit(self, table: np.ndarray, labels: Sequence[float] | np.ndarray) -> Predictor:
        """Fit from scratch on ``table`` (n, slots) and ``labels`` (n,).

        Raises LissomError for no rows, another number of labels than rows, and labels that are not finite.
        """
        table, values = np.asarray(table), np.asarray(labels, np.float64)
        if table.ndim != 2 or values.shape != (len(table),) or not len(table):
            raise LissomError(
                f"a predictor needs a row and a label for each candidate, not shapes {table.shape} and {values.shape}"
            )
        if not np.isfinite(values).all():
            raise LissomError("a label is not finite; leave out candidates that could not be measured")
        self._encoding = self._given or OneHot.seen(table)
        features = self._encoding(table)
        self._varied = features.min(0) < features.max(0)
        self.scale = normalisation(values)
        values = values / self.scale
        self._mean = float(values.mean())
        if not self._varied.any():
            self.kind, self.setting, self.error, self._regressor = "mean", 0.0, math.inf, None
            return self
        fits = [_searched(name, features[:, self._varied], values, self.coarse) for name in ("ridge", "svr")]
        self.kind, self.setting, self.error, self._regressor = min(fits, key=lambda fit: fit[2])
        return self

    def predict(self, table: np.ndarray) -> np.ndarray:
        """table (n, slots) -> float64 (n,), in the labels' unit. Raises LissomError before ``fit``."""
        if not self.kind:
            raise LissomError("the predictor has not been fitted")
        if self._regressor is None:
            return np.full(len(table), self._mean * self.scale)
        return self._regressor.predict(self._encoding(table)[:, self._varied]) * self.scale


def _searched(name: str, features: np.ndarray, labels: np.ndarray, coarse: bool) -> tuple[str, float, float, Any]:
    """Name, best setting, its error over the folds, and the regressor fitted with it on everything."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold
    from sklearn.svm import SVR

    if name == "ridge":
        settings = COARSE_ALPHAS if coarse else ALPHAS
    else:
        settings = COARSE_COSTS if coarse else COSTS

    def fitted(setting: float, x: np.ndarray, y: np.ndarray) -> Any:
        regressor = Ridge(alpha=setting) if name == "ridge" else SVR(gamma="auto", epsilon=0.0, C=setting)
        return regressor.fit(x, y)

    errors = []
    for rest, fold in KFold(min(FOLDS, len(labels))).split(features):
        if name == "ridge":  # one decomposition serves all settings: a label column for each
            several = Ridge(alpha=np.array(settings), solver="svd")
            several.fit(features[rest], np.repeat(labels[rest, None], len(settings), 1))
            predicted = several.predict(features[fold])
        else:
            predicted = np.stack([fitted(s, features[rest], labels[rest]).predict(features[fold]) for s in settings], 1)
        truth = labels[fold, None]
        errors.append((np.abs(predicted - truth) / np.maximum(np.abs(truth), LEAST)).mean(0))
    error = np.mean(errors, 0)
    best = int(error.argmin())
    return name, settings[best], float(error[best]), fitted(settings[best], features, labels)


def kendall(predicted: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray) -> float | None:
    """Kendall's tau-b between predictions (n,) and what was measured then: 1 for the same order, -1 for the reverse.

    None where there is no order to compare: fewer than two, or all equal on one side.
    """
    from scipy.stats import kendalltau

    if len(predicted) < 2 or len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    return float(kendalltau(predicted, measured).statistic)


def live_entries(
    space: SearchSpace,
    vectors: np.ndarray,
    per_block: Mapping[str, int],
    depth: str = "num_layers",
    published: bool = False,
) -> np.ndarray:
    """vectors (n, entries) of an elastic transformer -> bool (n, entries): what exists at each one's depth.

    ``depth`` names the variable with the number of blocks kept, the first ones; ``per_block`` says how many entries
    of a variable each block has. They come block after block; what a variable has beyond its blocks (a pooler, a
    head) stands last and is always live. ``published`` follows the released code, which counts one entry more behind
    the last block, and of what comes after it only the last: for tests of equality with it.
    """
    blocks = np.array(space.variables[depth][1])
    most = int(blocks.max())
    vectors = np.asarray(vectors, np.int64)
    depths = blocks[vectors[:, _place(space, depth)]]  # (n, 1)
    live = np.ones(vectors.shape, bool)
    for name, each in per_block.items():
        count = space.variables[name][0]
        if count < each * most:
            raise LissomError(f"{name} has {count} entries, too few for {each} in each of {most} blocks")
        entry = np.arange(count)
        if published and count > each * most:
            kept = (entry <= each * depths) | (entry == count - 1)
        else:
            kept = (entry < each * depths) | (entry >= each * most)
        live[:, _place(space, name)] = kept
    return live


def transformer_features(
    space: SearchSpace,
    vectors: np.ndarray,
    per_block: Mapping[str, int],
    depth: str = "num_layers",
    published: bool = False,
) -> np.ndarray:
    """vectors (n, entries) -> float64 (n, entries): the chosen values (numbers), 0 where ``live_entries`` is False.

    Two vectors that differ in dead entries only have the same features: a row is also the key of a candidate.
    """
    vectors = np.asarray(vectors, np.int64)
    values = np.empty(vectors.shape)
    for name, (_, choices) in space.variables.items():
        place = _place(space, name)
        values[:, place] = np.array(choices, np.float64)[vectors[:, place]]
    return np.where(live_entries(space, vectors, per_block, depth, published), values, 0.0)


def _place(space: SearchSpace, name: str) -> slice:
    """Where the entries of ``name`` stand in a vector."""
    names = list(space.variables)
    start = sum(space.variables[before][0] for before in names[: names.index(name)])
    return slice(start, start + space.variables[name][0])
