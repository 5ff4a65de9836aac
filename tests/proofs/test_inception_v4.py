"""The Inception proof: curves by hand, arms of one start, dead networks; run very small."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lissom.models.inception_resnet import ResidualInception
from lissom.proofs import inception_v4
from lissom.proofs.arms import Trained, built
from lissom.proofs.base import NOT_SHOWN, SHOWS, ProofResult, run_proof

TINY = replace(inception_v4.QUICK, train=40, held_out=50, steps=3, batch=8, wide_steps=1, wide_batch=2)


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_v4, "QUICK", TINY)
        patch.setattr(inception_v4, "WIDE", 32)
        return run_proof("inception_v4", quick=True, seeds=2)


def test_every_arm_has_a_figure_a_seed(result: ProofResult) -> None:
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    arms = {row.name: row.cost for row in result.rows if row.metric == "accuracy" and row.cost}
    assert list(arms) == [f"digits, {name}" for name in (*inception_v4.ARMS, inception_v4.FOURTH)]
    assert len({(cost["parameters"], cost["10^6 MACs"], cost["steps"]) for cost in arms.values()}) == 1
    needed = {row.name: row.values for row in result.rows if row.metric.startswith("steps to")}
    assert set(needed) == set(inception_v4.ARMS)
    assert all(1 <= steps <= 3 for values in needed.values() for steps in values)
    assert {row.metric for row in result.rows if row.name.startswith("wide")} == {"dead", "loss not finite"}
    assert len(result.claims) == 5
    assert all(claim.evidence for claim in result.claims)


def test_arms_have_the_same_start_and_differ_in_the_addition() -> None:
    one, other, none = (
        built(lambda s=s, r=r: inception_v4.small_network((1, 1, 1), 10, s, r), 0)
        for s, r in inception_v4.ARMS.values()
    )
    for network in (other, none):
        for a, b in zip(one.parameters(), network.parameters(), strict=True):
            assert torch.equal(a, b)
    blocks = [[m for m in net.modules() if isinstance(m, ResidualInception)] for net in (one, other, none)]
    assert {(b.scale, b.residual) for b in blocks[0]} == {(0.17, True)}
    assert {(b.scale, b.residual) for b in blocks[1]} == {(1.0, True)}
    assert {b.residual for b in blocks[2]} == {False}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert [net.eval()(x).shape for net in (one, none)] == [(2, 10)] * 2
        assert one.forward_intermediates(x, intermediates_only=True)[0].shape[-1] == 32  # nothing lost before the pool


def test_curves_by_hand() -> None:
    losses = [4.0] * 20 + [2.0] * 10 + [1.0] * 10  # 40 steps: two make a mean
    curve = inception_v4.smoothed(losses)
    assert (len(curve), curve[0], curve[-1]) == (39, 4.0, 1.0)
    assert inception_v4.steps_to(losses, 3.0) == 21
    assert inception_v4.steps_to(losses, 2.0) == 22
    assert inception_v4.steps_to(losses, 1.0) == 32
    assert inception_v4.steps_to(losses, 0.5) == 40
    assert inception_v4.smoothed([5.0, 3.0]) == [5.0, 3.0]


def test_a_dead_network_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception_v4, "WIDE", 16)
    network = built(lambda: inception_v4.wide_network(1.0, 10), 0)
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        assert float(network.before_pool(x).mean()) > inception_v4.DEAD
        for block in network.blocks:
            block.conv2d.bias.fill_(-1e3)
        assert float(network.before_pool(x).mean()) < inception_v4.DEAD
    alive = inception_v4._end(0.1, 1e-3, TINY, 0)
    assert alive > inception_v4.DEAD
    assert math.isnan(inception_v4._end(1.0, 1e12, replace(TINY, wide_steps=4), 0))


def test_verdicts_follow_the_figures() -> None:
    def arms(*values: float) -> list[Trained]:
        return [Trained("a", seed, value, 100, 1, 1, 1, 1.0) for seed, value in enumerate(values)]

    found = {"scale 0.17": arms(60, 61, 62), "scale 1": arms(59, 60, 61), "no addition": arms(55, 56, 57.5)}
    needed = {"scale 0.17": [100.0, 110, 105], "scale 1": [200.0, 200, 200], "no addition": [200.0, 200, 200]}
    claims = inception_v4._sooner(needed, found, "digits", replace(inception_v4.QUICK, steps=200))
    assert [claim.verdict for claim in claims] == [SHOWS, NOT_SHOWN, SHOWS]
    assert inception_v4._ensemble(found, [62.0, 63, 63.9], "digits").verdict == SHOWS
    assert inception_v4._ensemble(found, [59.0, 60, 61.1], "digits").verdict == NOT_SHOWN
