"""What a decision costs: counted for each one made, against the very graphs that ran. The clock is the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lissom.meters.overhead as module
from lissom.errors import LissomError
from lissom.meters.overhead import decision_overhead

X = np.zeros((1, 3), np.float32)


class Clock:
    """Seconds that pass only where something says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))


class Graph:
    def __init__(self, clock: Clock, number: int, score: float | None) -> None:
        self.clock, self.number, self.score = clock, number, score
        self.given: list[Any] = []

    def run(self, x: Any) -> Any:
        self.clock.now += 100e-6 * (self.number + 1)
        self.given.append(x)
        answer = np.zeros((1, 2), np.float32)
        return answer if self.score is None else [answer, np.array([self.score]), np.full((1, 4), self.number)]


class Plan:
    """Three stages, as Stages runs them; each decision takes 7 microseconds."""

    def __init__(self, clock: Clock, scores: tuple[float, float]) -> None:
        self.clock, self.thresholds = clock, [0.5, 0.5]
        self.graphs = [Graph(clock, number, score) for number, score in enumerate((*scores, None))]

    def run_exits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        carried: Any = x
        for stage, threshold in enumerate(self.thresholds):
            found = self.graphs[stage].run(carried)
            self.clock.now += 7e-6
            if found[1].item() > threshold:
                return found[0], np.array([stage])
            carried = found[2:]
        return self.graphs[2].run(carried), np.array([2])


@pytest.mark.parametrize(
    ("scores", "decisions", "graphs"), [((0.1, 0.2), 2, 600.0), ((0.1, 0.9), 2, 300.0), ((0.9, 0.1), 1, 100.0)]
)
def test_decisions_are_those_of_the_path_taken(
    scores: tuple[float, float], decisions: int, graphs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(Clock(monkeypatch), scores)
    found = decision_overhead(plan, X, calls=5)  # type: ignore[arg-type]
    assert found.decisions == decisions
    assert found.graphs_us == pytest.approx(graphs)
    assert found.plan_us == pytest.approx(graphs + 7 * decisions)
    assert found.decision_us == pytest.approx(7)
    for number, graph in enumerate(plan.graphs):  # by itself a graph is handed what the plan hands it
        ran = number < decisions + (scores[decisions - 1] <= 0.5)
        assert bool(graph.given) == ran
        if ran and number:
            assert all(x[0].item(0) == number - 1 for x in graph.given)


def test_a_batch_or_a_plan_without_exits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Clock(monkeypatch), (0.1, 0.1))
    with pytest.raises(LissomError, match="on one sample"):
        decision_overhead(plan, np.concatenate([X, X]), calls=1)  # type: ignore[arg-type]
    plan.thresholds = []
    with pytest.raises(LissomError, match="a plan with exits"):
        decision_overhead(plan, X, calls=1)  # type: ignore[arg-type]
