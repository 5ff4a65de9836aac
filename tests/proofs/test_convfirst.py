"""The convfirst proof: it runs for real on a small network, and its verdicts follow its figures."""

from __future__ import annotations

import pytest
from torch import nn

from lissom.layers.convfirst import ConvFirst
from lissom.meters import peaks
from lissom.meters.waterline import Waterline
from lissom.proofs import convfirst
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peaks, "SECONDS", 0.02)
        patch.setattr(peaks, "_GRAPHS", dict(list(peaks._GRAPHS.items())[:1]))
        patch.setattr(convfirst, "NETWORKS", ("net",))
        patch.setattr(convfirst, "_network", lambda name: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), ConvFirst(8, 8)))
        patch.setattr(convfirst, "QUICK", (1, 32, 0.02))
        return run_proof("convfirst", quick=True, seeds=2)


@pytest.mark.full
def test_rows_hold_one_figure_a_repetition(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row for row in result.rows}
    for kind in convfirst.KINDS:
        assert all(value > 0 for value in rows[f"{kind} convolution", "efficiency"].values)
    assert all(value > 0 for value in rows["net", "latency"].values)
    assert all(len(row.values) == 2 for row in result.rows)


@pytest.mark.full
def test_intensities_are_the_papers(result: ProofResult) -> None:
    intensity = {row.name.split()[0]: row.cost["op/byte"] for row in result.rows if row.metric == "efficiency"}
    # float32, with weights: k^2 C / b = 144, 2 e C / ((1 + e) b) = 25.6, k^2 g / b = 18, k^2 / b = 2.25
    assert 130 < intensity["full"] < 144
    assert 25 < intensity["pointwise"] < 25.6
    assert 17.7 < intensity["grouped"] < 18
    assert 2.2 < intensity["depthwise"] < 2.25


@pytest.mark.full
def test_four_claims_with_figures_behind_them(result: ProofResult) -> None:
    assert len(result.claims) == 4
    assert all(claim.evidence for claim in result.claims)
    assert "full - pointwise" in result.claims[0].evidence


ORDER = {"full": (0.9, 0.91), "pointwise": (0.7, 0.71), "grouped": (0.4, 0.41), "depthwise": (0.1, 0.11)}


def test_the_order_shows_only_where_every_pair_does() -> None:
    assert convfirst._ordered(ORDER).verdict == SHOWS
    assert convfirst._ordered({**ORDER, "depthwise": (0.5, 0.51)}).verdict == NOT_SHOWN
    assert convfirst._ordered({**ORDER, "depthwise": (0.1, 0.5)}).verdict == INCONCLUSIVE


def test_an_efficiency_above_its_roofline_counts_against_the_claim() -> None:
    most = {"full": 1.0, "pointwise": 1.0, "grouped": 1.0, "depthwise": 0.2}
    assert convfirst._below(ORDER, most).verdict == SHOWS
    assert convfirst._below(ORDER, {**most, "depthwise": 0.02}).verdict == NOT_SHOWN


def test_a_network_faster_than_its_bound_counts_against_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convfirst, "NETWORKS", ("net",))
    line = Waterline(ideal_s=1.0, roofline_s=1.5, bound_s=2.0, memory_bound=(True, False))
    assert convfirst._bounded({"net": (3.0, 3.1)}, {"net": line}).verdict == SHOWS
    assert convfirst._bounded({"net": (1.8, 1.81)}, {"net": line}).verdict == NOT_SHOWN
    assert convfirst._closer({"net": (3.0, 3.1)}, {"net": line}).verdict == SHOWS
    assert convfirst._closer({"net": (1.6, 1.61)}, {"net": line}).verdict == NOT_SHOWN


@pytest.mark.full
def test_quick_runs_on_the_three_networks() -> None:
    result = run_proof("convfirst", quick=True, seeds=2)
    assert {row.name for row in result.rows if row.metric == "latency"} == set(convfirst.NETWORKS)
