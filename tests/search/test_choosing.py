"""The Pareto set, and the order of trials under a budget."""

from lissom.search.budget import Budget
from lissom.search.choosing import pareto, rank
from lissom.search.trials import Metrics, Trial


def trial(number, quality, speedup, status="ok"):
    metrics = Metrics(quality=quality, drop=90 - quality, latency_ms=10 / speedup, speedup=speedup)
    return Trial(number, "random", f"r{number}", status, metrics=metrics, resolved=f"r{number}")


TRIALS = [trial(0, 90, 1.0), trial(1, 89.8, 1.5), trial(2, 89.0, 1.4), trial(3, 70, 3.0), trial(4, 95, 9, "failed")]
BASE = TRIALS[0].metrics


def test_pareto_leaves_out_what_is_beaten():
    assert pareto(TRIALS, "latency", BASE) == [3, 1, 0]


def test_the_best_is_the_cheapest_within_budget():
    assert [t.number for t in rank(TRIALS, Budget.parse("drop<=1.0"), BASE)] == [1, 2, 0, 3]


def test_best_effort_keeps_quality_before_it_gains_speed():
    ranked = rank(TRIALS, Budget.parse("latency<=0.5x, drop<=1.0"), BASE)
    assert [t.number for t in ranked] == [1, 2, 0, 3]


def test_a_failed_trial_is_never_chosen():
    assert all(t.ok for t in rank(TRIALS, Budget.parse(""), BASE))
