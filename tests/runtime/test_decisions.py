"""Decisions: what plan.json keeps of them, the one comparison at run time, and the published rules of early exit."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.runtime.decisions import (
    Decision,
    confidence,
    confidence_exit,
    entropy,
    entropy_exit,
    first_exit,
    patience_exit,
    patient_and_confident_exit,
)

RULES: dict[str, Any] = {
    "confidence": confidence_exit,
    "entropy": entropy_exit,
    "patience": patience_exit,
    "patient_and_confident": lambda logits, both: patient_and_confident_exit(logits, *both),
}


def test_same_exits_as_published() -> None:
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    cases = json.loads((Path(folder) / "lgvit" / "cases.json").read_text())["exit_rules"]
    assert {case["strategy"] for case in cases} == set(RULES)
    for case in cases:
        blocks = [*case["positions"], 12]  # the final head comes after the last of 12 blocks
        logits = np.array([sample["exit_logits"] for sample in case["samples"]])
        left = RULES[case["strategy"]](logits, case["threshold"])
        assert [blocks[k] for k in left] == [sample["exit_block"] for sample in case["samples"]], case["strategy"]


@pytest.mark.parametrize(
    "entry",
    [
        {"rule": "confidence", "threshold": 0.87},
        {"rule": "entropy", "threshold": -0.4, "stage": 2, "note": "kept"},
        {"rule": "confidence", "threshold": None},
    ],
)
def test_a_decision_survives_plan_json(entry: dict[str, Any]) -> None:
    decision = Decision.from_json(json.loads(json.dumps(entry)))
    assert json.loads(json.dumps(decision.to_json(), allow_nan=False)) == entry


def test_a_decision_leaves_above_its_threshold() -> None:
    decision = Decision("confidence", np.float32(0.5))  # type: ignore[arg-type]
    assert type(decision.threshold) is float
    assert decision.leaves(0.6)
    assert not decision.leaves(0.5)
    assert not decision.leaves(math.nan)
    never = Decision("entropy")
    assert never.to_json() == {"rule": "entropy", "threshold": None}
    assert not never.leaves(1e30)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"rule": "mood", "threshold": 1.0}, "no exit rule is called 'mood'"),
        ({"rule": "confidence", "threshold": "high"}, "a threshold is a number"),
        ({"rule": "confidence", "threshold": math.nan}, "a threshold is a number"),
        ({"rule": "confidence", "threshold": -math.inf}, "a threshold is a number"),
        ({"rule": "confidence", "threshold": True}, "a threshold is a number"),
        ({"rule": "confidence"}, "a rule and a threshold"),
        (["confidence", 0.5], "a rule and a threshold"),
    ],
)
def test_what_is_no_decision_is_one_sentence(entry: Any, why: str) -> None:
    with pytest.raises(LissomError, match=why):
        Decision.from_json(entry)


def test_details_do_not_replace_the_decision() -> None:
    with pytest.raises(LissomError, match="cannot replace its threshold"):
        Decision("confidence", 0.5, {"threshold": 0.1})


def test_the_first_exit_above_its_threshold() -> None:
    scores = np.array([[0.9, 0.1, 0.9], [0.5, 0.6, 0.9], [0.5, 0.5, 0.5], [math.nan, 0.7, 0.0]])
    assert first_exit(scores, np.array([0.5, 0.5, 0.5])).tolist() == [0, 1, 3, 1]
    assert first_exit(scores, np.array([np.inf, np.inf, 0.5])).tolist() == [2, 2, 3, 3]
    assert first_exit(scores[0], np.array([1, 1, 0.5])) == 2  # one sample
    assert first_exit(np.empty((4, 0)), np.array([])).tolist() == [0, 0, 0, 0]
    assert first_exit(np.empty((0, 2)), np.array([0.0, 0.0])).shape == (0,)


def test_a_score_is_compared_without_rounding() -> None:
    score = np.float32(0.1)  # a little above 0.1
    assert first_exit(np.array([[score]]), np.array([0.1])).tolist() == [0]
    assert Decision("confidence", 0.1).leaves(score)
    assert first_exit(np.array([[score]]), np.array([float(score)])).tolist() == [1]


@pytest.mark.parametrize("shapes", [((4, 2), (3,)), ((4, 3), (3, 1)), ((), (0,))])
def test_scores_and_thresholds_must_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(LissomError, match="do not fit"):
        first_exit(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_confidence_and_entropy_of_known_distributions() -> None:
    shares = np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    logits = np.log(shares) + 1000  # a constant changes nothing, and must not overflow
    np.testing.assert_allclose(confidence(logits), [0.7, 1 / 3])
    np.testing.assert_allclose(entropy(logits), [-(shares[0] * np.log(shares[0])).sum(), math.log(3)])
    certain = np.array([0.0, -np.inf, -np.inf])
    assert confidence(certain) == 1
    assert entropy(certain) == 0


def test_thresholds_at_the_ends() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 4, 10))
    assert (confidence_exit(logits, 1.0) == 4).all()  # never: the plain model
    assert (confidence_exit(logits, 0.0999) == 0).all()  # below 1 / classes: always
    assert (entropy_exit(logits, 0.0) == 4).all()
    assert (entropy_exit(logits, 2.31) == 0).all()  # above ln 10


def test_the_run_time_comparison_is_the_published_rule() -> None:
    logits = np.random.default_rng(1).normal(size=(300, 4, 5), scale=2)
    tau = np.full(4, 0.6)
    np.testing.assert_array_equal(first_exit(confidence(logits), tau), confidence_exit(logits, 0.6))
    np.testing.assert_array_equal(first_exit(-entropy(logits), -tau), entropy_exit(logits, 0.6))


def of_classes(*classes: int) -> np.ndarray:
    """Logits (K, 3) whose best classes are these."""
    return np.eye(3)[list(classes)]


def test_patience_counts_agreeing_exits() -> None:
    assert patience_exit(of_classes(0, 1, 1, 1, 2), 3) == 3
    assert patience_exit(of_classes(0, 1, 1, 2, 2), 3) == 5
    assert patience_exit(of_classes(2, 2, 0), 2) == 1
    assert patience_exit(of_classes(2, 1, 0), 1) == 0  # the counter is 1 at the first exit
    assert patience_exit(np.empty((7, 0, 3)), 1).tolist() == [0] * 7
    with pytest.raises(LissomError, match="at least 1, not 0"):
        patience_exit(of_classes(0, 0), 0)


def test_patient_and_confident_counts_sure_exits_of_any_class() -> None:
    unsure, a, b = np.zeros(3), np.array([9.0, 0, 0]), np.array([0, 9.0, 0])
    assert patient_and_confident_exit(np.stack([a, unsure, a, b, a]), 0.5, 2) == 3
    assert patient_and_confident_exit(np.stack([a, unsure, a, unsure]), 0.5, 2) == 4
    assert patient_and_confident_exit(np.stack([a, unsure]), 0.5, 1) == 0
    with pytest.raises(LissomError, match="at least 1"):
        patient_and_confident_exit(np.stack([a, b]), 0.5, 0)


def test_logits_have_exits_and_classes() -> None:
    with pytest.raises(LissomError, match="exits, classes"):
        confidence_exit(np.zeros(5), 0.5)
    with pytest.raises(LissomError, match="exits, classes"):
        patience_exit(np.zeros((5, 0)), 1)
