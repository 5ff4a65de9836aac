"""The proof of dual_cnn: its cascades by hand, its verdicts from its figures, and one run for real, in miniature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lissom.meters.costs import total
from lissom.proofs import dual_cnn
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.proofs.dual_cnn import BIG, QUICK, WAYS, _Answers, _Cascade, _cascade, _distorted, _judged, networks


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_pool_is_small_beside_the_large_network() -> None:
    costs = {name: total(make(), (1, 16, 16))[1] for name, make in networks(16, 10).items()}
    large = costs.pop(BIG)
    assert len(costs) == 6
    assert sum(sorted(costs.values())[-2:]) < large / 2
    assert networks(16, 10)["wide"]()(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_distortion_keeps_the_image_in_its_frame() -> None:
    image = np.zeros((16, 16), np.uint8)
    image[6:10, 6:10] = 255
    found = [_distorted(image, np.random.default_rng(seed)) for seed in range(20)]
    mass = np.mean([f.astype(float) for f in found], 0)
    assert mass[5:11, 5:11].mean() > mass[:3].mean() + 60
    assert not np.array_equal(found[0], found[1])


def answers(margins: np.ndarray, right: np.ndarray, macs: int) -> _Answers:
    """Two classes, of which 0 is right: logits with these margins."""
    logits = np.stack([np.where(right, margins, 0.0), np.where(right, 0.0, margins)], 1)
    return _Answers(dict.fromkeys(("choose", "report"), logits), dict.fromkeys(("choose", "report"), right), 1.0, macs)


def test_a_cascade_is_judged_with_its_mean_operations() -> None:
    sure = np.array([3.0, 3.0, 0.1, 0.1])
    first = answers(sure, np.array([True, True, False, False]), 10)
    second = answers(sure[::-1].copy(), np.array([False, False, True, True]), 20)
    for way in WAYS:
        found = _cascade(first, second, way)
        assert (found.accuracy, found.calls, found.macs) == (100.0, 0.5, 20.0)


def figures(cascade: float, better: float, large: float, rank: float, plain: float, ran: float = 0.5) -> dict[str, Any]:
    one = _Cascade(cascade, 0.3, 30.0, 0.5)
    return {
        "pair": ("a", "b"), "complementarity": 0.1, "better member": better, "large": large, "large macs": 100.0,
        "gain of any pair": 0.5, "post-check, temperatures": one, "published": one,
        "no post-check": replace(one, accuracy=plain), "rank, paper's formula": rank, "rank, code's formula": rank,
        "accuracies": {"a": 80.0, BIG: large}, "macs": {"a": 20, BIG: 100}, "temperatures": {"a": 1.0, BIG: 1.0},
        "memory": {"ran": ran, "same": 1.0, "exact false": 0.0, "dhash false": 0.1, "invariants false": 0.0},
        "times": {"first network": [0.1]},
    }  # fmt: skip


def verdicts(*found: dict[str, Any]) -> list[str]:
    return [claim.verdict for claim in _judged("digits", found).claims]


def test_verdicts_follow_the_figures() -> None:
    assert verdicts(figures(84, 82, 83.9, 0.6, 83.5), figures(84.1, 82, 84, 0.65, 83.6)) == [SHOWS] * 5
    apart = figures(81, 82, 90, -0.5, 83, ran=0.7), figures(81, 82.1, 90.1, -0.6, 83.1, ran=0.7)
    assert verdicts(*apart) == [NOT_SHOWN] * 5
    assert verdicts(figures(84, 82, 84, 0.6, 83.5)) == [INCONCLUSIVE] * 4 + [SHOWS]  # calls are counted, not drawn


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dual_cnn, "QUICK", replace(QUICK, train=200, choose=150, epochs=1, rounds=3))
        return run_proof("dual_cnn", quick=True, seeds=2)


def test_rows_hold_one_figure_a_seed(result: ProofResult) -> None:
    assert len(result.claims) == 5
    assert all(len(row.values) == 2 for row in result.rows)
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(0 <= row.mean <= 100 for (_, metric), row in rows.items() if metric in ("accuracy", "false hits"))
    for way in WAYS.values():
        assert 0 <= rows[way, "accuracy"].cost["second calls %"] <= 100
    assert rows["memory, exact", "false hits"].values == (0.0, 0.0)
    assert result.claims[4].verdict == SHOWS
    assert "networks ran for 50.00" in result.claims[4].evidence


@pytest.mark.full
def test_quick_for_real() -> None:
    found = run_proof("dual_cnn", quick=True, seeds=2)
    rows = {(row.name, row.metric): row for row in found.rows}
    assert rows[BIG, "accuracy"].mean > 60
    assert rows["cascade", "accuracy"].mean > 50
