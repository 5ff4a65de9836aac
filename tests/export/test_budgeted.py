"""Thresholds for a budget: the published distributions and exits, ties, what is never taken, and the runtime's rule."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.export.budgeted import (
    budget_curve,
    exit_distributions,
    find_thresholds,
    for_runtime,
    leave,
    thresholds_for_budget,
)
from lissom.runtime.decisions import first_exit

COSTS = (0.459, 1.065, 1.228, 1.298)


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    folder = os.environ.get("LISSOM_PARITY")
    if folder is None:
        pytest.skip("set LISSOM_PARITY to the folder of published figures")
    return json.loads((Path(folder) / "dyn_perceiver" / "cases.json").read_text())["threshold_search"]


def test_the_published_search(cases: dict[str, Any]) -> None:
    confidence = np.array(cases["confidence"], dtype=np.float32)  # (4, N)
    scores, right = confidence[:3].T, np.array(cases["prediction"]) == np.array(cases["target"])
    curve = budget_curve(scores, cases["costs"])
    assert len(curve) == 33
    for run in cases["runs"]:
        found = curve[run["distribution_index"]]
        np.testing.assert_allclose(found.distribution, run["probs"], atol=1e-6)
        wanted = np.array(run["thresholds"][:3])
        np.testing.assert_allclose(np.where(np.isinf(found.thresholds), 1e8, found.thresholds), wanted, rtol=1e-6)
        left = leave(scores, found.thresholds)
        assert left.tolist() == run["exit_of_sample"]
        assert 100 * right[left, np.arange(len(left))].mean() == pytest.approx(run["accuracy"])
        assert found.cost == pytest.approx(run["expected_cost"], rel=1e-6)


def test_distributions_go_from_cheap_to_dear() -> None:
    shares = exit_distributions()
    np.testing.assert_allclose(shares.sum(1), 1)
    assert shares.shape == (33, 4)
    assert (np.diff(shares @ np.array(COSTS)) >= -1e-12).all()
    np.testing.assert_allclose(shares[16], [0.2125, 0.2625, 0.13125, 0.39375])  # of equal shares, by hand
    assert exit_distributions((0.5,)).shape == (33, 2)


def test_ties_leave_together_and_shares_below_one_sample_are_never_taken() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.3], [0.8, 0.9], [0.1, 0.9], [0.2, 0.4]], np.float32)
    found = find_thresholds(scores, (1 / 3, 1 / 3, 1 / 3))
    np.testing.assert_array_equal(found, np.array([0.8, 0.4], np.float32))
    assert leave(scores, found).tolist() == [0, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(find_thresholds(scores, (0.1, 0.1, 0.8)), [np.inf, np.inf])
    assert leave(scores, np.full(2, np.inf)).tolist() == [2] * 6
    # Ties took more than their share: too few are left for the second exit's.
    np.testing.assert_array_equal(find_thresholds(scores, (0.4, 0.6, 0.0))[1], np.inf)


def test_the_runtime_lets_the_same_samples_leave() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((500, 3)).astype(np.float32)
    for found in budget_curve(scores, COSTS):
        np.testing.assert_array_equal(
            first_exit(scores, for_runtime(found.thresholds)), leave(scores, found.thresholds)
        )
        assert found.shares.sum() == pytest.approx(1)


def test_an_exit_that_is_never_taken_has_no_threshold_for_the_runtime_either() -> None:
    found = for_runtime(np.array([0.5, np.inf]))
    assert found.dtype == np.float32
    assert found[0] == np.nextafter(np.float32(0.5), np.float32(0))
    assert found[1] == np.inf


def test_a_budget_is_kept() -> None:
    scores = np.random.default_rng(0).random((400, 3))
    costs = [found.cost for found in budget_curve(scores, COSTS)]
    for budget in (0.7, 0.9, 1.1, 5.0):
        found = thresholds_for_budget(scores, COSTS, budget)
        assert found.cost == max(cost for cost in costs if cost <= budget)
    with pytest.raises(LissomError, match=r"no distribution costs 0\.4 or less; the cheapest costs 0\."):
        thresholds_for_budget(scores, COSTS, 0.4)


def test_what_is_refused() -> None:
    scores = np.random.default_rng(0).random((5, 2))
    for call, sentence in (
        (lambda: find_thresholds(scores, (0.5, 0.5)), "2 exits has 3 shares"),
        (lambda: find_thresholds(scores, (0.5, 0.6, -0.1)), "add up to 1"),
        (lambda: find_thresholds(scores[0], (1.0,)), "scores are finite numbers"),
        (lambda: find_thresholds(scores * np.nan, (0.5, 0.25, 0.25)), "scores are finite numbers"),
        (lambda: exit_distributions(()), "one factor an exit"),
        (lambda: exit_distributions((0.5, 0.0)), "one factor an exit"),
        (lambda: budget_curve(scores, (1, 2), (1.0, 1.0)), "one for each of 2 exits"),
        (lambda: budget_curve(scores, (1, 2, 3)), "2 exits and 3 factors"),
    ):
        with pytest.raises(LissomError, match=sentence):
            call()
