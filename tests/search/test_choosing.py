"""The Pareto set, and the order of trials under a budget."""

from lissom.search.budget import Budget
from lissom.search.choosing import pareto, promising, rank
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


def promised(trials, budget, points=3.0):
    return [t.number for t in promising(trials, Budget.parse(budget), BASE, points)]


def test_promising_are_those_that_lack_little_quality_and_are_cheaper():
    within = [trial(0, 90, 1.0), trial(1, 89.2, 2.0)]
    near = [trial(2, 88, 3.0), trial(3, 86.1, 5.0), trial(4, 87, 2.9), trial(5, 88.5, 1.9), trial(6, 85.9, 6.0)]
    failed = trial(7, 88.5, 4.0, "failed")
    # 4 is beaten by 2; 5 is not cheaper than 1, which is within budget; 6 lacks more than three points.
    assert promised([*within, *near, failed], "drop<=1.0") == [2, 3]
    assert promised([*within, *near, failed], "drop<=1.0", points=4) == [2, 3, 6]
    assert promised([*within, *near], "quality>=89") == [2, 3]
    # A limit that is no matter of quality has to hold: 3 is at 0.2, 2 at a third.
    assert promised([*within, *near], "latency<=0.3x, drop<=1.0") == [3]


def test_where_nothing_is_within_budget_all_that_is_near_is_promising():
    assert promised([trial(0, 90, 1.0), trial(1, 88.9, 1.1), trial(2, 88, 1.5)], "latency<=0.95x, drop<=1") == [1, 2]


def test_nothing_is_promising_without_a_limit_on_quality():
    assert promised(TRIALS, "latency<=0.5x") == []
