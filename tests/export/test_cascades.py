"""Cascades on recorded answers: the published figures, and what the formulas say of themselves."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.export.budgeted import for_runtime
from lissom.export.calibration import _order, fit_thresholds, never_tested
from lissom.export.cascades import best_pair, complementarity, find_threshold, fit_temperature, run_cascade
from lissom.runtime.decisions import confidence, difference, normalised_entropy


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return json.loads((Path(folder) / "dual_cnn" / "cases.json").read_text())


def test_published_scores(cases: dict[str, Any]) -> None:
    for case in cases["scores"]:
        logits = np.array(case["logits"])
        assert confidence(logits) == pytest.approx(case["maxp"], abs=1e-6)
        assert difference(logits) == pytest.approx(case["difference"], abs=1e-6)
        assert normalised_entropy(logits) == pytest.approx(case["entropy_normalised"], abs=1e-6)


def test_published_complementarity(cases: dict[str, Any]) -> None:
    case = cases["complementarity"]
    true = np.array(case["true"])
    a, b = np.array(case["pred_a"]) == true, np.array(case["pred_b"]) == true
    assert complementarity(a, b) == pytest.approx(case["paper_formula"], abs=1e-12)
    assert complementarity(a, b, penalty=False) == pytest.approx(case["code_symmetric_difference"], abs=1e-12)


def recorded(case: dict[str, Any]) -> tuple[np.ndarray, ...]:
    true = np.array(case["true"])
    return (
        np.array(case["score_a"]),
        np.array(case["score_b"]),
        np.array(case["pred_a"]) == true,
        np.array(case["pred_b"]) == true,
    )


@pytest.mark.parametrize(("name", "postcheck"), [("no_postcheck", False), ("postcheck", True)])
def test_published_cascades(cases: dict[str, Any], name: str, postcheck: bool) -> None:
    case = cases["threshold_search"]
    a, b, right_a, right_b = recorded(case)
    for row in case[name]:
        second, called = run_cascade(a, b, row["threshold"], postcheck)
        assert int(np.where(second, right_b, right_a).sum()) == row["correct"]
        assert int(called.sum()) == row["second_model_calls"]
    grid = [row["threshold"] for row in case[name]]
    found = find_threshold(a, b, right_a, right_b, postcheck=postcheck, tolerance=0, grid=grid)
    assert found.value == case[f"best_threshold_{name}"]
    row = grid.index(found.value)
    assert found.accuracy == pytest.approx(100 * case[name][row]["correct"] / len(a))
    assert found.calls == pytest.approx(case[name][row]["second_model_calls"] / len(a))


def test_published_entropy_runs_the_other_way(cases: dict[str, Any]) -> None:
    """The first stays where its entropy is at most the threshold: minus the entropy is the score."""
    case = cases["threshold_search"]
    _, _, right_a, right_b = recorded(case)
    a, b = (-np.array(case["entropy_like"][key]) for key in ("score_a", "score_b"))
    for row in case["entropy_like"]["postcheck"]:
        second, called = run_cascade(a, b, -row["threshold"])
        assert int(np.where(second, right_b, right_a).sum()) == row["correct"]
        assert int(called.sum()) == row["second_model_calls"]


def made(seed: int, n: int = 300) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    a, b = rng.random(n).round(2), rng.random(n).round(2)  # with ties
    return a, b, rng.random(n) < 0.5 + a / 2, rng.random(n) < 0.55 + b / 2


@pytest.mark.parametrize("postcheck", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_one_sort_finds_what_trying_every_threshold_finds(seed: int, postcheck: bool) -> None:
    a, b, right_a, right_b = made(seed)
    grid = np.linspace(0, 1, 2000)
    tried = []
    for value in grid:
        second, called = run_cascade(a, b, value, postcheck)
        tried.append((np.where(second, right_b, right_a).sum(), called.mean()))
    right = np.array([t[0] for t in tried])
    best = find_threshold(a, b, right_a, right_b, postcheck=postcheck, tolerance=0, grid=grid)
    assert best.value == grid[right.argmax()]
    assert best.accuracy == pytest.approx(100 * right.max() / len(a))
    assert best.calls == tried[int(right.argmax())][1]
    # Without a grid none is better, and the one that calls least among equals is found.
    free = find_threshold(a, b, right_a, right_b, postcheck=postcheck, tolerance=0)
    assert free.accuracy >= best.accuracy
    near = find_threshold(a, b, right_a, right_b, postcheck=postcheck, tolerance=1.0)
    assert near.value <= free.value
    assert near.calls <= free.calls
    assert free.accuracy - 1.0 <= near.accuracy
    second, called = run_cascade(a, b, near.value, postcheck)
    assert near.accuracy == pytest.approx(100 * np.where(second, right_b, right_a).mean())
    assert near.calls == called.mean()


def test_ends_of_the_threshold() -> None:
    a, b, _, _ = made(0)
    assert not run_cascade(a, b, 0.0)[1].any()  # no score is below 0
    second, called = run_cascade(a, b, 1.0 + 1e-9)
    assert called.all()
    np.testing.assert_array_equal(second, b > a)  # the surer of both
    low = confidence(np.random.default_rng(0).standard_normal((50, 4)))
    assert not run_cascade(low, low, 0.25)[1].any()  # the largest of four shares is a quarter or more


def test_the_runtime_leaves_whom_the_published_rule_leaves() -> None:
    a = np.random.default_rng(0).random(1000).astype(np.float32)
    for value in a[:5]:
        np.testing.assert_array_equal(~run_cascade(a, a, float(value))[1], a > for_runtime(np.array([value])))


@pytest.mark.parametrize("seed", range(5))
def test_complementarity_of_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random(200) < 0.8, rng.random(200) < 0.7
    assert complementarity(a, a) == 0 == complementarity(a, a, penalty=False)
    assert complementarity(a, b) == complementarity(b, a)
    # As the paper writes it, and its bound.
    paper = ((a | b).sum() - (a & b).sum() - abs(int(a.sum()) - int(b.sum()))) / len(a)
    assert complementarity(a, b) == pytest.approx(paper)
    assert complementarity(a, b) <= 2 * (1 - max(a.mean(), b.mean())) + 1e-12
    assert complementarity(a, b) <= complementarity(a, b, penalty=False)
    level = b.copy()
    level[np.flatnonzero(~b)[: a.sum() - b.sum()]] = True  # as often right as a
    assert level.sum() == a.sum()
    assert complementarity(a, level) == complementarity(a, level, penalty=False)


def test_a_pair_is_chosen_within_the_budget_and_the_cheaper_goes_first() -> None:
    right = np.zeros((4, 10), bool)
    right[0, :6] = right[1, 4:] = True  # make up for each other
    right[2, :7] = True
    right[3] = True  # always right, dear
    found = best_pair(right, [5, 2, 1, 100])
    assert (found.first, found.second) == (1, 0)
    assert found.complementarity == pytest.approx(0.8)
    assert found.cost == 7
    cheap = best_pair(right, [5, 2, 1, 100], budget=6)
    assert (cheap.first, cheap.second, cheap.complementarity) == (2, 1, pytest.approx(0.6))
    assert (best_pair(right[[0, 1]], [1, 1]).first, best_pair(right[[0, 2]], [1, 1]).first) == (0, 1)
    dear = best_pair(right[1:], [2, 3, 100], budget=6, order="accurate")
    assert (dear.first, dear.second) == (1, 0)
    assert best_pair(right[1:], [2, 3, 100], budget=6) == replace(dear, first=0, second=1)
    assert best_pair(right[[0, 1]], [2, 1], order="accurate").first == 1  # right as often: the cheaper
    with pytest.raises(LissomError, match="order is one of 'cheaper', 'accurate', not 'dearer'"):
        best_pair(right, [5, 2, 1, 100], order="dearer")
    with pytest.raises(LissomError, match="the cheapest two cost 3"):
        best_pair(right, [5, 2, 1, 100], budget=2)
    with pytest.raises(LissomError, match="two or more"):
        best_pair(right[:1], [1])
    # A weak one looks complementary without the penalty.
    weak = np.stack([right[3], np.arange(10) < 1, right[3] & (np.arange(10) > 0)])
    assert 1 in (best_pair(weak, [1, 1, 1], penalty=False).first, best_pair(weak, [1, 1, 1], penalty=False).second)


def test_a_temperature_is_found_again() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((20_000, 5))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (shares.cumsum(1) > rng.random((len(logits), 1))).argmax(1)
    for temperature in (0.5, 1.0, 2.5):
        assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)
        assert fit_temperature(temperature * logits, labels, spread=math.inf) == pytest.approx(temperature, rel=0.03)


def test_a_few_samples_that_are_all_right_do_not_make_it_cold() -> None:
    logits = np.eye(4)[[0, 1, 2, 3]] * 3
    assert fit_temperature(logits, np.arange(4), spread=math.inf) == pytest.approx(1 / 8, rel=1e-3)
    assert 0.5 < fit_temperature(logits, np.arange(4)) < 1


@pytest.mark.parametrize(
    ("n", "risk", "delta"), [(900, 0.01, 0.05), (120, 0.005, 0.001), (50, 0.2, 0.05), (7, 0.5, 0.5)]
)
def test_no_row_that_a_temperature_sees_is_tested(n: int, risk: float, delta: float) -> None:
    scores = np.random.default_rng(0).random((n, 1))
    found = fit_thresholds(scores, np.zeros((n, 1), bool), np.array([0.4, 1.0]), risk=risk, delta=delta, seed=3)
    rows = never_tested(n, seed=3)
    assert len(rows) == round(n / 10)
    assert not set(rows) & set(_order(n, 3)[: found.n_test])
    assert not np.array_equal(rows, never_tested(n, seed=4)) or n < 10


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: complementarity(np.ones(3), np.ones(4)), "of each, not"),
        (lambda: complementarity(np.array([0.5]), np.array([1])), "truth value"),
        (lambda: run_cascade(np.array([np.nan]), np.array([1.0]), 0.5), "finite"),
        (lambda: find_threshold(np.ones(3), np.ones(3), np.ones(2), np.ones(3)), "of each classifier"),
        (lambda: find_threshold(*made(0), grid=[0.5, 0.1]), "rising order"),
        (lambda: find_threshold(*made(0), grid=[math.nan]), "rising order"),
        (lambda: find_threshold(*made(0), grid=[0.1, math.nan, 0.5]), "rising order"),
        (lambda: find_threshold(*made(0), tolerance=-1), "at least 0"),
        (lambda: fit_temperature(np.ones((2, 3)), np.array([0, 3])), "outside of 0 to 2"),
        (lambda: fit_temperature(np.ones((2, 3)), np.array([0])), "labels"),
        (lambda: difference(np.ones((4, 1))), "two classes"),
    ],
)
def test_what_does_not_fit_is_said(call: Any, says: str) -> None:
    with pytest.raises(LissomError, match=says):
        call()
