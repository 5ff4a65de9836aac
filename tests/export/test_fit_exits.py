"""fit_exits: what it writes into an artifact's plan, and how recipes that compete share one promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.export.exits import fit_exits
from lissom.export.plan import Exit


class Kept:
    """Takes an artifact's place: keeps what is written."""

    def with_decisions(self, decisions: list[dict[str, Any]], known: dict[str, Any]) -> Kept:
        self.decisions, self.known = decisions, known
        return self


def population(n: int = 4000) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Answers of one exit and of the model, the exit's scores, and labels: the surer the exit, the oftener right."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    scores = rng.random((n, 1)).astype(np.float32)
    right = rng.random(n) < 0.5 + 0.5 * scores[:, 0] ** 0.2
    early = np.eye(3)[np.where(right, labels, (labels + 1) % 3)]
    return [early, np.eye(3)[labels]], scores, labels


def fitted(among: int, **exit: Any) -> tuple[Kept, np.ndarray]:
    answers, scores, labels = population()
    exits = [Exit("blocks.3", "confidence", **{"risk": 2.0, **exit}, cost=0.4, heads=0.01)]
    kept = Kept()
    _, outputs, _ = fit_exits(kept, exits, answers, scores, lambda a: a.argmax(-1) == labels, among=among)
    return kept, outputs


def test_the_more_compete_the_less_each_may_risk() -> None:
    one, _ = fitted(1)
    many, _ = fitted(30)
    assert one.known["delta"] == pytest.approx(0.05)
    assert many.known["delta"] == pytest.approx(0.05 / 30)
    assert (one.known["among"], many.known["among"]) == (1, 30)
    assert many.decisions[0]["threshold"] > one.decisions[0]["threshold"]
    assert many.known["shares"][0] < one.known["shares"][0]


def test_the_answers_are_those_of_where_samples_leave() -> None:
    kept, outputs = fitted(1)
    answers, scores, labels = population()
    left = scores[:, 0] > kept.decisions[0]["threshold"]
    assert np.array_equal(outputs, np.where(left[:, None], answers[0], answers[1]))
    assert kept.known["against"] == "labels"
    assert 0 < left.mean() < 1
    assert (outputs.argmax(-1) != labels).mean() <= 0.02


def test_exits_that_promise_different_things_are_refused() -> None:
    answers, scores, _ = population()
    exits = [Exit("a", "confidence", risk, cost=0.4, heads=0.01) for risk in (0.5, 1.0)]
    with pytest.raises(LissomError, match="share one promise"):
        fit_exits(Kept(), exits, [answers[0], *answers], np.repeat(scores, 2, 1))


def test_nobody_leaves_where_patience_cannot_have_been_had() -> None:
    """Two exits in a row: at the first nobody leaves, though its score would let everybody."""
    answers, scores, labels = population()
    both = np.concatenate([np.full_like(scores, -3.0), scores - 2], 1)
    exits = [Exit(name, "patient_and_confident", 5.0, cost=cost, heads=0.01) for name, cost in (("a", 0.2), ("b", 0.4))]
    kept = Kept()
    _, _, fitted = fit_exits(kept, exits, [answers[1], *answers], both, lambda a: a.argmax(-1) == labels)
    assert kept.decisions[0]["threshold"] is None
    assert kept.decisions[1]["threshold"] is not None
    assert [d["patience"] for d in kept.decisions] == [2, 2]
    assert kept.known["shares"][0] == 0
    assert sum(kept.known["shares"]) == pytest.approx(1)
    assert len(fitted.thresholds) == 2
    with pytest.raises(LissomError, match="2 exits cannot be sure 3 times in a row"):
        fit_exits(Kept(), [replace(e, patience=3) for e in exits], [answers[1], *answers], both)
