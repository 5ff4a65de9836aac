"""Thresholds of early exits: the promise is kept on populations whose true harm is known, and the exits are used.

A population here is a finite table of rows; samples are drawn from it with replacement, so that the true harm rate of
any thresholds is the rate over its rows, exactly.
"""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import binomtest

from lissom.errors import LissomError
from lissom.export.calibration import (
    UNSEEN_HARM,
    Calibration,
    _harm_along,
    _path,
    _values,
    apply,
    fit_thresholds,
    minimum_samples,
)


class Population(NamedTuple):
    scores: np.ndarray
    harm: np.ndarray
    costs: np.ndarray

    def draw(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.random.default_rng(seed).integers(len(self.scores), size=n)
        return self.scores[rows], self.harm[rows], self.costs

    def truth(self, fitted: Calibration) -> tuple[float, float]:
        """The true harm rate of these thresholds, and the true share of the cost that they save."""
        left = apply(self.scores, np.array(fitted.thresholds))
        harm = np.concatenate([self.harm, np.zeros((len(left), 1), bool)], 1)[np.arange(len(left)), left]
        return float(harm.mean()), float(1 - self.costs[left].mean() / self.costs[-1])


def population(
    exits: int, skill: float, noise: float = 0.7, overconfident: float = 0.0, rows: int = 10_000
) -> Population:
    """Later exits are better, and an exit is surer where it is right: scores in (0, 1), float32.

    ``skill`` of the first exit against a difficulty of mean 0 and deviation 1; ``noise`` of the scores' log-odds; that
    share of the samples is ``overconfident`` at an exit: among its highest scores, and wrong in 8 % of the cases.
    """
    rng = np.random.default_rng(exits)
    depth = np.arange(1, exits + 1) / (exits + 1)
    odds = 2.5 * (skill + 3 * depth - rng.standard_normal((rows, 1)))
    shared = rng.standard_normal((rows, 1))  # a sample that one exit gets wrong is hard for the others too
    harm = odds + 0.6 * rng.logistic(size=(rows, exits)) + 0.8 * shared < 0
    scores = 1 / (1 + np.exp(-odds - noise * rng.standard_normal((rows, exits))))
    odd = rng.random((rows, exits)) < overconfident
    harm = np.where(odd, rng.random((rows, exits)) < 0.08, harm)
    scores = np.where(odd, 1 - 1e-4 * (1 - scores), scores)
    return Population(scores.astype(np.float32), harm, np.append(depth, 1.0) + 0.02 * np.arange(1, exits + 2))


@pytest.mark.parametrize(
    ("exits", "skill", "noise", "overconfident", "n", "risk", "saved"),
    [
        (1, 0.5, 0.7, 0.0, 1500, 0.01, 0.40),
        (3, 0.5, 0.7, 0.0, 2000, 0.005, 0.42),
        (3, 1.5, 0.7, 0.0, 500, 0.02, 0.65),
        (3, -1.0, 1.0, 0.0, 1500, 0.02, 0.18),
        (8, 1.0, 2.0, 0.0, 1500, 0.01, 0.55),
        (3, 0.5, 0.7, 0.03, 3000, 0.01, 0.38),
    ],
    ids=["one exit", "three exits", "easy", "hard", "eight exits, poor scores", "overconfident"],
)
def test_the_true_harm_is_within_the_risk_and_the_exits_are_used(
    exits: int, skill: float, noise: float, overconfident: float, n: int, risk: float, saved: float
) -> None:
    known = population(exits, skill, noise, overconfident)
    fits = [fit_thresholds(*known.draw(n, i), risk=risk, seed=i, levels=25) for i in range(100)]
    truths = np.array([known.truth(fit) for fit in fits])
    assert (truths[:, 0] <= risk).mean() >= 0.9  # 95 of 100 are expected at least
    assert truths[:, 1].mean() > saved


def test_scores_that_say_nothing_break_no_promise() -> None:
    rng = np.random.default_rng(0)
    known = Population(rng.random((20_000, 3)), rng.random((20_000, 3)) < 0.2, np.array([1, 2, 3, 4.0]))
    truths = np.array([known.truth(fit_thresholds(*known.draw(1000, i), risk=0.01, seed=i)) for i in range(40)])
    assert (truths[:, 0] <= 0.01).mean() >= 0.9
    assert truths[:, 1].max() < 0.1


def test_a_smaller_risk_or_delta_never_lowers_a_threshold() -> None:
    drawn = population(4, 0.5).draw(4000, 0)
    for name, values in {"risk": (0.04, 0.02, 0.01, 0.005), "delta": (0.5, 0.1, 0.01, 1e-4)}.items():
        fits = [fit_thresholds(*drawn, **{"risk": 0.01, name: value}) for value in values]
        thresholds = np.array([fit.thresholds for fit in fits])
        assert (thresholds[1:] >= thresholds[:-1]).all()
        steps = [fit.tested for fit in fits]
        assert steps == sorted(set(steps), reverse=True)  # and it does matter


def test_what_is_said_of_the_fit_is_so() -> None:
    scores, harm, costs = population(3, 0.5).draw(2000, 1)
    fit = fit_thresholds(scores, harm, costs, risk=0.01, delta=0.1, seed=3)
    left = apply(scores, np.array(fit.thresholds))
    assert (fit.risk, fit.delta, fit.n, fit.n_test, fit.note) == (0.01, 0.1, 2000, 1400, "")
    assert fit.tested > 0
    np.testing.assert_allclose(fit.shares, [(left == k).mean() for k in range(4)])
    assert fit.harm == pytest.approx(np.mean([k < 3 and harm[i, k] for i, k in enumerate(left)]))
    assert fit.cost == pytest.approx(costs[left].mean() / costs[-1])
    assert fit == fit_thresholds(scores, harm, costs, risk=0.01, delta=0.1, seed=3)
    assert fit != fit_thresholds(scores, harm, costs, risk=0.01, delta=0.1, seed=4)


def test_the_harm_that_is_tested_stays_below_the_exact_bound() -> None:
    """Of the test samples, as the upper confidence bound of Clopper and Pearson says it in another way."""
    scores, harm, costs = population(3, 0.5).draw(3000, 2)
    fit = fit_thresholds(scores, harm, costs, risk=0.01, seed=5)
    test = np.random.default_rng((5, 1)).permutation(3000)[: fit.n_test]
    left = apply(scores[test], np.array(fit.thresholds))
    count = int(np.append(harm, np.zeros((3000, 1), bool), 1)[test, left].sum())
    assert binomtest(count, fit.n_test, alternative="less").proportion_ci(0.95).high <= 0.01
    # It is the last step that passes: a few samples more would not.
    assert binomtest(count + 5, fit.n_test, alternative="less").proportion_ci(0.95).high > 0.01


def thresholds_along(path: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """The thresholds after each step, (steps, K)."""
    lowered = np.cumsum(path[:, None] == np.arange(len(values)), axis=0)
    return np.stack([np.append(np.inf, v)[lowered[:, k]] for k, v in enumerate(values)], 1)


def test_the_path_is_the_greedy_one_said_plainly() -> None:
    """Every step against an evaluation of all exits and levels from scratch, and the harm along the path too."""
    scores, harm, costs = population(3, 0.5, noise=2.0).draw(120, 3)
    scores = scores.round(1)  # many ties
    values = _values(scores, 8)
    ended = np.append(harm, np.zeros((120, 1), bool), 1)

    def measure(thresholds: np.ndarray) -> tuple[float, int]:
        left = apply(scores, thresholds)
        return costs[left].sum(), int(ended[np.arange(120), left].sum())

    now, steps = np.full(3, np.inf), []
    level = [0, 0, 0]
    while measure(now)[1] <= 20:
        options = []
        for k in range(3):
            for j in range(level[k], len(values[k])):
                cost, bad = measure(np.where(np.arange(3) == k, values[k][j], now))
                gain, loss = measure(now)[0] - cost, max(bad - measure(now)[1], 0)
                options.append((round(gain / (loss + UNSEEN_HARM), 9), -k))
        if max(options, default=(0, 0))[0] <= 0:
            break
        k = -max(options)[1]
        now[k] = values[k][level[k]]
        level[k] += 1
        steps.append(k)
    path = _path(scores, harm, costs, values, limit=20)
    assert path.tolist() == steps
    along = thresholds_along(path, values)
    assert (along[1:] <= along[:-1]).all()  # nested
    assert _harm_along(path, scores, harm, values).tolist() == [measure(row)[1] for row in along]


def test_levels_that_save_nothing_are_passed() -> None:
    """The surest half leaves at the first exit; at the second, the rest come after all of them."""
    rng = np.random.default_rng(0)
    n = 4000
    easy = np.arange(n) < n // 2
    first = np.where(easy, 0.9, 0.1) + 0.01 * rng.random(n)
    second = np.where(easy, 0.9, 0.5) + 0.01 * rng.random(n)
    harm = np.stack([~easy, np.zeros(n, bool)], 1)
    fit = fit_thresholds(np.stack([first, second], 1), harm, np.array([1, 2, 3.0]), risk=0.01)
    assert fit.shares == pytest.approx((0.5, 0.5, 0.0), abs=0.02)
    assert fit.harm <= 0.01


def test_ranks_alone_count() -> None:
    """Scores in another unit, or costs in another, give the same exits."""
    scores, harm, costs = population(3, 0.5).draw(2000, 7)
    fit = fit_thresholds(scores, harm, costs, risk=0.01)
    odds = np.log(scores.astype(np.float64)) * np.array([1, 10, 0.1])
    for other in (fit_thresholds(odds, harm, costs, risk=0.01), fit_thresholds(scores, harm, 1e4 * costs, risk=0.01)):
        assert (other.shares, other.harm, other.tested) == (fit.shares, fit.harm, fit.tested)
        assert other.cost == pytest.approx(fit.cost)


def test_float32_scores_give_float32_thresholds() -> None:
    fit = fit_thresholds(*population(3, 0.5).draw(2000, 8), risk=0.01)
    finite = [threshold for threshold in fit.thresholds if math.isfinite(threshold)]
    assert finite
    assert all(type(threshold) is float and float(np.float32(threshold)) == threshold for threshold in finite)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_equal_scores_leave_together_or_not_at_all(dtype: type) -> None:
    scores, costs = np.ones((1000, 2), dtype), np.array([1, 2, 3.0])
    safe = fit_thresholds(scores, np.zeros((1000, 2), bool), costs, risk=0.01)
    assert safe.shares == (1.0, 0.0, 0.0)
    assert safe.cost == pytest.approx(1 / 3)
    harmful = np.zeros((1000, 2), bool)
    harmful[::20] = True
    fit = fit_thresholds(scores, harmful, costs, risk=0.01)
    assert fit.thresholds == (math.inf, math.inf)
    assert "no exit that saves anything" in fit.note


def test_a_saturated_score_is_used() -> None:
    """Softmax in float32 answers exactly 1 to many samples: they leave together."""
    rng = np.random.default_rng(0)
    certain = rng.random((3000, 1)) < 0.6
    scores = np.where(certain, 1, 0.9 * rng.random((3000, 1))).astype(np.float32)
    harm = ~certain & (rng.random((3000, 1)) < 0.5)
    fit = fit_thresholds(scores, harm, np.array([0.5, 1.0]), risk=0.01)
    assert 0.58 < fit.shares[0] < 0.7
    assert fit.thresholds[0] < 1


def test_an_exit_that_saves_nothing_is_never_taken() -> None:
    scores, harm, _ = population(3, 2.0).draw(2000, 0)
    fit = fit_thresholds(scores, harm, np.array([0.5, 1, 1, 1.0]), risk=0.01)
    assert fit.shares[0] > 0.3
    assert fit.thresholds[1:] == (math.inf, math.inf)
    assert fit_thresholds(scores, harm, np.ones(4), risk=0.01).thresholds == (math.inf,) * 3


def test_too_few_samples_take_no_exit_and_say_what_they_could_promise() -> None:
    scores, harm, costs = np.random.default_rng(0).random((200, 2)), np.zeros((200, 2), bool), np.array([1, 2, 3.0])
    fit = fit_thresholds(scores, harm, costs, risk=0.01)
    assert fit.thresholds == (math.inf, math.inf)
    assert (fit.shares, fit.cost, fit.tested, fit.n_test) == ((0, 0, 1), 1, 0, 180)
    assert "with 200 samples the smallest risk that can be promised at 95% is 1.65%" in fit.note
    assert "at least 299 test samples" in fit.note
    # And they can: the design part has shrunk to a tenth.
    fit = fit_thresholds(scores, harm, costs, risk=0.0166)
    assert fit.cost < 0.5
    assert fit.n_test == minimum_samples(0.0166) <= 180
    for n in (1, 2, 3):
        fit = fit_thresholds(scores[:n], harm[:n], costs, risk=0.01)
        assert fit.cost == 1
        assert f"with {n} samples" in fit.note


def test_minimum_samples() -> None:
    assert [minimum_samples(risk) for risk in (0.005, 0.01, 0.02, 0.5)] == [598, 299, 149, 5]
    assert minimum_samples(0.01, 0.5) == 69
    assert minimum_samples(0.9999) == 1
    for risk, delta in [(0.003, 0.02), (0.1, 0.05), (1e-6, 0.3), (0.25, 0.25)]:
        n = minimum_samples(risk, delta)
        assert (1 - risk) ** n <= delta * (1 + 1e-9)
        assert (1 - risk) ** (n - 1) > delta * (1 - 1e-9)


def test_apply_is_the_first_exit_above_its_threshold() -> None:
    rng = np.random.default_rng(0)
    scores, thresholds = rng.random((500, 4)).round(1), np.array([0.9, np.inf, 0.5, 0.5])
    want = [next((k for k in range(4) if row[k] > thresholds[k]), 4) for row in scores]
    assert apply(scores, thresholds).tolist() == want


def test_a_calibration_is_written_as_strict_json() -> None:
    scores, harm, costs = population(3, 0.5).draw(1000, 0)
    harm[:, 1] = True
    fit = fit_thresholds(scores, harm, costs, risk=0.02)
    written = json.loads(json.dumps(fit.to_json(), allow_nan=False))
    assert written["thresholds"] == [None if math.isinf(t) else t for t in fit.thresholds]
    assert None in written["thresholds"]
    assert written["shares"] == list(fit.shares)
    assert set(written) == {
        "thresholds", "shares", "harm", "risk", "delta", "n", "n_test", "tested", "cost", "note",
    }  # fmt: skip


def test_bad_input_is_one_sentence() -> None:
    scores, harm, costs = np.random.default_rng(0).random((50, 2)), np.zeros((50, 2), bool), np.array([1, 2, 3.0])
    broken = scores.copy()
    broken[7, 1] = np.nan
    cases = [
        ((broken, harm, costs), {}, "sample 7 at exit 1 is not"),
        ((scores + np.inf, harm, costs), {}, "scores are finite"),
        ((scores[:, 0], harm, costs), {}, "of shape \\(samples, exits\\)"),
        ((scores > 0.5, harm, costs), {}, "scores are numbers"),
        ((scores, harm[:, :1], costs), {}, "shape of the scores, \\(50, 2\\), not \\(50, 1\\)"),
        ((scores, scores, costs), {}, "truth values"),
        ((scores, harm, costs[:2]), {}, "one for the end"),
        ((scores, harm, costs[::-1]), {}, "never fall"),
        ((scores, harm, 0 * costs), {}, "never fall"),
        ((scores, harm, np.array([1, 2, np.nan])), {}, "never fall"),
        ((scores[:, :0], harm[:, :0], costs[:1]), {}, "at least one exit"),
        ((scores[:0], harm[:0], costs), {}, "one sample"),
        ((scores, harm, costs), {"risk": 0.0}, "risk is a share between 0 and 1, not 0.0"),
        ((scores, harm, costs), {"risk": 1.0}, "risk is a share"),
        ((scores, harm, costs), {"risk": math.nan}, "risk is a share"),
        ((scores, harm, costs), {"delta": 1.5}, "delta is a share"),
        ((scores, harm, costs), {"design": 0.0}, "design is a share"),
        ((scores, harm, costs), {"levels": 0}, "at least 1 level"),
    ]
    for arguments, options, why in cases:
        with pytest.raises(LissomError, match=why):
            fit_thresholds(*arguments, **{"risk": 0.01, **options})
    with pytest.raises(LissomError, match="finite"):
        apply(broken, np.zeros(2))
    with pytest.raises(LissomError, match="do not fit"):
        apply(scores, np.zeros(3))
    with pytest.raises(LissomError, match="risk is a share"):
        minimum_samples(0)
