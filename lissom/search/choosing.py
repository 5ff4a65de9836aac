"""Which trials are worth keeping: the Pareto set, and the best one for a budget."""

from __future__ import annotations

from collections.abc import Sequence

from lissom.search.budget import Budget, relative
from lissom.search.trials import Metrics, Trial

__all__ = ["cost", "pareto", "promising", "rank"]


def cost(quantity: str, metrics: Metrics, baseline: Metrics) -> float:
    """The quantity relative to the baseline, smaller being better; infinite where it is not available."""
    value = relative(quantity, metrics, baseline)
    if value is None or value <= 0:
        return float("inf")
    return 1 / value if quantity == "throughput" else value


def pareto(trials: Sequence[Trial], quantity: str, baseline: Metrics) -> list[int]:
    """Numbers of the trials that no other beats in quality and in cost, cheapest first."""
    points = [
        (cost(quantity, t.metrics, baseline), -(t.metrics.quality or 0.0), t.number)
        for t in trials
        if t.ok and t.metrics.quality is not None
    ]
    front: list[int] = []
    best = float("inf")
    for _, worse, number in sorted(points):
        if worse < best:
            front.append(number)
            best = worse
    return front


def rank(trials: Sequence[Trial], budget: Budget, baseline: Metrics) -> list[Trial]:
    """The measured trials, best first: within budget before outside, then cheaper; outside, those that keep the
    quality before those that do not, then by how little they miss."""

    def key(trial: Trial) -> tuple[bool, bool, float, float]:
        m = trial.metrics
        price = cost(budget.cost, m, baseline)
        if budget.met(m, baseline):
            return False, False, 0.0, price
        return True, not budget.keeps_quality(m, baseline), budget.excess(m, baseline), price

    return sorted((t for t in trials if t.ok), key=key)


def promising(trials: Sequence[Trial], budget: Budget, baseline: Metrics, points: float) -> list[Trial]:
    """Trials that would be better than the best if they kept a little more quality: those that miss the budget's limits
    on quality by ``points`` at most and no other, and are cheaper than what is within budget. Of them those that no
    other beats, the one of the best quality first, so that each is cheaper than the one before it."""
    ranked = rank(trials, budget, baseline)
    most = float("inf")
    if ranked and budget.met(ranked[0].metrics, baseline):
        most = cost(budget.cost, ranked[0].metrics, baseline)

    def missed(metrics: Metrics) -> float:
        """Points of quality that the trial lacks; infinite where another limit does not hold."""
        found = 0.0
        for limit in budget.limits:
            if limit.holds(metrics, baseline):
                continue
            value = limit.reached(metrics, baseline)
            if value is None or limit.quantity not in ("drop", "quality"):
                return float("inf")
            found = max(found, abs(value - limit.bound))
        return found

    near = [
        t
        for t in ranked
        if not budget.keeps_quality(t.metrics, baseline)
        and missed(t.metrics) <= points
        and cost(budget.cost, t.metrics, baseline) < most
    ]
    numbers = pareto(near, budget.cost, baseline)
    return [next(t for t in near if t.number == number) for number in reversed(numbers)]
