"""What a decision costs beside the graphs: a plan with exits timed against the sum of its graphs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from lissom.errors import LissomError
from lissom.runtime.backends import Stages

__all__ = ["Overhead", "decision_overhead"]

WARM = 200


@dataclass(frozen=True)
class Overhead:
    """Medians of ``calls`` runs in microseconds: of the plan (``plan_us``), of its graphs one after the other
    (``graphs_us``), and what of the difference falls to each of ``decisions`` (``decision_us``)."""

    calls: int
    decisions: int
    plan_us: float
    graphs_us: float

    @property
    def decision_us(self) -> float:
        return (self.plan_us - self.graphs_us) / self.decisions


def decision_overhead(stages: Stages, x: np.ndarray, calls: int = 10_000) -> Overhead:
    """Time ``stages`` on one float32 sample ``x`` (1, ...), on the path that it takes, whichever that is.

    Plan and graphs run in turn, so that what slows the machine slows both; the graphs are handed the very tensors
    that the plan hands them. Raises LissomError where there is no decision, or the batch is not 1.
    """
    if not stages.thresholds or len(x) != 1:
        raise LissomError("the overhead of decisions is that of a plan with exits on one sample")
    _, left = stages.run_exits(x)
    last = int(left[0])
    graphs = stages.graphs[: last + 1]
    given: list[np.ndarray | list[np.ndarray]] = [x]
    for graph in graphs[:-1]:
        found = graph.run(given[-1])
        assert isinstance(found, list)
        given.append(found[2:])
    runs = [(graph.run, tensors) for graph, tensors in zip(graphs, given, strict=True)]
    plan, alone = np.empty(calls), np.empty(calls)
    clock = time.perf_counter
    for call in range(-WARM, calls):
        start = clock()
        stages.run_exits(x)
        middle = clock()
        for run, tensors in runs:
            run(tensors)
        end = clock()
        if call >= 0:
            plan[call], alone[call] = middle - start, end - middle
    decisions = min(last + 1, len(stages.thresholds))
    return Overhead(calls, decisions, 1e6 * float(np.median(plan)), 1e6 * float(np.median(alone)))
