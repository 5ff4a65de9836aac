"""The InceptionNeXt proof: its arms have the sheet's sizes and differ in their mixer; verdicts follow figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.proofs import inceptionnext
from lissom.proofs.arms import Trained
from lissom.proofs.base import NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.proofs.inceptionnext import INCEPTION, MIXERS, NONE, SEVEN, THREE


@pytest.fixture(scope="module")
def result() -> ProofResult:
    return run_proof("inceptionnext", quick=True, seeds=2)


def test_every_arm_is_a_row_of_the_same_budget(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    for name in MIXERS:
        assert rows[f"digits, {name}", "accuracy"].cost["steps"] == inceptionnext.QUICK.digits.budget.steps
        assert rows[f"digits, {name}", "training step"].cost["images/s"] > 0
    macs = {name: rows[name, "mixer alone"].cost["10^6 MACs"] for name in (INCEPTION, SEVEN, THREE)}
    assert macs[SEVEN] / macs[INCEPTION] == pytest.approx(49 * 96 / (31 * 12))
    assert macs[SEVEN] / macs[THREE] == pytest.approx(49 / 9)
    assert len(result.claims) == 6
    assert all(claim.evidence for claim in result.claims)


def test_the_networks_are_the_sheets() -> None:
    def size(mixer: str) -> int:
        return sum(p.numel() for p in inceptionnext.network(mixer, inceptionnext.DIGITS, 10).parameters())

    assert (size(INCEPTION), size(SEVEN)) == (13_762, 18_154)
    assert size(SEVEN) - size(THREE) == 3 * 32 * 40
    assert size(THREE) - size(NONE) == 3 * 32 * 10
    model = inceptionnext.network(INCEPTION, inceptionnext.CIFAR, 10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert all(float(block.gamma.detach().min()) == 1 for block in model.modules() if hasattr(block, "gamma"))


def judged(inception: float, speed: float) -> list[str]:
    """Verdicts on planted figures: Inception's accuracy (7 x 7: 90, none: 60), its speed in times of 7 x 7's."""
    accuracies = {INCEPTION: inception, SEVEN: 90.0, THREE: 90.0, NONE: 60.0}
    found = {
        name: [Trained(name, seed, value + 0.05 * seed, 9, 1, 1, 1, 1.0) for seed in range(3)]
        for name, value in accuracies.items()
    }
    times = {name: [8.0, 8.01, 7.99] for name in MIXERS} | {INCEPTION: [8 / speed] * 3}
    part = inceptionnext._Set(found, times, times, 64)
    timed = {what: (times, dict.fromkeys(MIXERS, 1)) for what in ("mixer alone", "block", "block, training step")}
    result = inceptionnext._judged(inceptionnext.FULL, {"digits": part}, timed)
    return [claim.verdict for claim in result.claims]


def test_verdicts_follow_the_figures() -> None:
    assert judged(90.0, 6.0) == [SHOWS] * 6
    assert judged(60.0, 0.9) == [NOT_SHOWN] * 6
