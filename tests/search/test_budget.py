"""Reading budgets, and judging by them."""

import pytest

from lissom.errors import LissomError
from lissom.search.budget import Budget, check_direction
from lissom.search.trials import Metrics

BASE = Metrics(quality=90.0, drop=0.0, latency_ms=10.0, p95_ms=12.0, speedup=1.0, throughput=100.0, memory_mb=200.0,
               memory_above_empty_mb=80.0, size_mb=40.0, params=1000, macs=2000)  # fmt: skip
FAST = Metrics(quality=89.5, drop=0.5, latency_ms=6.0, p95_ms=7.0, speedup=1.6, throughput=160.0, memory_mb=150.0,
               memory_above_empty_mb=30.0, size_mb=10.0, params=1000, macs=2000)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("latency<=0.7x", True),  # 1 / 1.6 by the paired ratio, not 6 / 10
        ("latency<=0.61x", False),
        ("latency<=6ms", True),
        ("latency<=5999us", False),
        ("p95<=0.007s", True),
        ("throughput>=160/s", True),
        ("throughput>=1.61x", False),
        ("memory<=0.38x", True),  # above an empty graph: 30 / 80
        ("memory<=0.37x", False),
        ("memory<=150MB", True),
        ("size<=0.25x, drop<=0.5", True),
        ("size<=9999KB", False),
        ("drop<=0.4", False),
        ("accuracy>=89.5%", True),
        ("params<=1K, macs<=2K", True),
        ("", True),
    ],
)
def test_limits(text, met):
    budget = Budget.parse(text)
    assert budget.met(FAST, BASE) is met
    assert (budget.excess(FAST, BASE) == 0) is met


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latncy<=0.7x", "did you mean 'latency'"),
        ("latency<0,7x", "0"),
        ("latency=0.7x", "quantity<=value"),
        ("latency<=12", "needs a unit"),
        ("latency<=12MB", "needs a unit"),
        ("drop<=0.5x", "in points"),
        ("flops<=3", "no quantity"),
    ],
)
def test_typos_are_one_sentence(text, says):
    with pytest.raises(LissomError) as caught:
        Budget.parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_limit_on_the_good_side_is_refused():
    with pytest.raises(LissomError, match="good side"):
        check_direction(Budget.parse("latency>=5ms"))
    with pytest.raises(LissomError, match="good side"):
        check_direction(Budget.parse("throughput<=5/s"))
    check_direction(Budget.parse("latency<=5ms, throughput>=3/s, drop<=1, quality>=80"))


def test_what_cannot_be_measured_is_said():
    with pytest.raises(LissomError, match="energy is not available"):
        Budget.parse("energy<=3mJ").met(FAST, BASE)


def test_the_cost_is_the_first_limited_one():
    assert Budget.parse("drop<=1, size<=0.5x, latency<=1ms").cost == "size"
    assert Budget.parse("drop<=1").cost == "latency"


def test_to_json_says_how_near():
    rows = Budget.parse("latency<=0.5x, drop<=1").to_json(FAST, BASE)["limits"]
    assert [r["met"] for r in rows] == [False, True]
    assert rows[0]["reached"] == pytest.approx(0.625)
    assert rows[0]["unit"] == "x"
