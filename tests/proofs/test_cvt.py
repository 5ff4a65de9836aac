"""The CvT proof: its arms are what they are called, and verdicts follow the figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.meters.costs import total
from lissom.proofs import cvt
from lissom.proofs.arms import Trained, built, generator
from lissom.proofs.base import NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.proofs.cvt import ARMS, BARE, CONV, DENSE, POSITIONS


@pytest.fixture(scope="module")
def result() -> ProofResult:
    return run_proof("cvt", quick=True, seeds=2)


def test_every_arm_is_a_row_of_the_same_budget(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    costs = {name: rows[name, "accuracy"].cost for name in ARMS}
    assert {cost["steps"] for cost in costs.values()} == {cvt.QUICK.budget.steps}
    assert costs[POSITIONS]["parameters"] == costs[BARE]["parameters"] + 64 * 16
    assert costs[CONV]["parameters"] == costs[DENSE]["parameters"]
    assert costs[DENSE]["10^6 MACs"] > costs[CONV]["10^6 MACs"]
    assert len(result.claims) == 5
    assert all(claim.evidence for claim in result.claims)


def test_the_arms_are_what_they_are_called() -> None:
    images = torch.randn(2, 3, 32, 32, generator=generator(0))
    for arm in ARMS:
        model = built(lambda arm=arm: cvt.SmallCvT(arm, 32, (48, 96), (1, 3), 10), 0).eval()
        assert model(images).shape == (2, 10)
        blocks = [block for stage in model.stages for block in stage.blocks]
        assert len(blocks) == 4
        keys = {getattr(block.attn.conv_proj_k, "conv", None) for block in blocks}
        strides = {getattr(layer, "stride", None) for layer in keys}
        assert strides == {POSITIONS: {None}, BARE: {None}, CONV: {(2, 2)}, DENSE: {(1, 1)}}[arm]
        assert any("table" in name for name, _ in model.named_parameters()) == (arm == POSITIONS)


def test_a_layer_with_fewer_keys_costs_less() -> None:
    macs = [total(cvt._OnMaps(cvt.ConvAttention(48, stride_kv=stride)), (48, 16, 16))[1] for stride in (2, 1)]
    # q, k, v and output layers, depthwise convolutions, and two products of all queries with the keys.
    for found, keys in zip(macs, (64, 256), strict=True):
        linear = 48 * 48 * (2 * 256 + 2 * keys)
        assert found == linear + 9 * 48 * (256 + 2 * keys) + 2 * 256 * keys * 48


def judged(conv: float, speed: float) -> list[str]:
    """Verdicts on planted figures: the accuracy of (c) (others 70), and its speed in times of (d)'s."""
    accuracy = {POSITIONS: 70.0, BARE: 65.0 if conv >= 70 else 70.0, CONV: conv, DENSE: 70.0}
    found = {
        name: [Trained(name, seed, value + 0.05 * seed, 9, 1, 1, 1, 1.0) for seed in range(3)]
        for name, value in accuracy.items()
    }
    times = {"forward": {DENSE: [8.0, 8.1, 8.2], CONV: [8 / speed] * 3}}
    return [c.verdict for c in cvt._judged("cifar10", cvt.CIFAR, found, times, {CONV: 1, DENSE: 2}).claims]


def test_verdicts_follow_the_figures() -> None:
    assert judged(70.0, 2.0) == [SHOWS] * 5
    assert judged(60.0, 0.5) == [NOT_SHOWN] * 5
