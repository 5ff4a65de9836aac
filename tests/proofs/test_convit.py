"""The ConViT proof: its arms begin as they are called, gates and distances are read right, verdicts follow figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lissom.models.convit import gates
from lissom.proofs import convit
from lissom.proofs.arms import Trained, built, generator
from lissom.proofs.base import NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.proofs.convit import ARMS, FIXED, LOCAL, PLAIN, QUICK, RANDOM


@pytest.fixture(scope="module")
def result() -> ProofResult:
    return run_proof("convit", quick=True, seeds=2)


@pytest.mark.full
def test_every_arm_is_a_row_of_the_same_budget(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    for size in QUICK.sizes:
        costs = [rows[f"{size} images, {name}", "accuracy"].cost for name in ARMS]
        assert {cost["steps"] for cost in costs} == {QUICK.budget.steps}
        plain, local, random, fixed = (cost["parameters"] for cost in costs)
        # A gated layer has a positional projection of 4 numbers a head, and a gate.
        assert local == random == plain + 4 * 9 * 5
        assert fixed == plain + 4 * 9 * 4
    many = QUICK.sizes[-1]
    for block in range(4):
        for kind in ("mean gate", "lowest gate", "distance"):
            assert (f"{many} images, {LOCAL}", f"{kind}, block {block}") in rows
    assert len(result.claims) == 7
    assert all(claim.evidence for claim in result.claims)


def model(arm: str) -> nn.Module:
    return built(lambda: convit.convit_small_scale(arm, QUICK, 10), 0)


def test_the_arms_begin_as_they_are_called() -> None:
    assert gates(model(PLAIN)) == {}
    local, random, fixed = (model(arm) for arm in (LOCAL, RANDOM, FIXED))
    assert set(gates(local)) == {f"blocks.{i}.attn" for i in range(4)}
    assert all(value.allclose(torch.tensor(convit.START_GATE), atol=1e-3) for value in gates(local).values())
    assert all((value == 1).all() for value in gates(fixed).values())
    assert "blocks.0.attn.gating_param" not in dict(fixed.named_parameters())
    width = 9 * QUICK.head
    assert torch.equal(local.blocks[0].attn.v.weight, torch.eye(width))
    assert not torch.equal(random.blocks[0].attn.v.weight, torch.eye(width))
    # What all arms have begins alike.
    assert torch.equal(local.patch_embed.proj.weight, random.patch_embed.proj.weight)
    images = torch.randn(3, 3, QUICK.side, QUICK.side, generator=generator(0))
    near, far = (convit._distances(m, images) for m in (local, random))
    assert set(near) == {f"distance, block {i}" for i in range(4)}
    assert all(near[key] < far[key] for key in near)


def judged(gaps: tuple[float, ...], lowest: float, further: float) -> list[str]:
    """Verdicts on planted figures: what (b) has more than the others by number of images, gates, growth of reach."""
    found = {}
    for size, gap in zip(convit.CIFAR.sizes, gaps, strict=True):
        accuracy = {PLAIN: 50.0, LOCAL: 50 + gap, RANDOM: 50 + gap / 2, FIXED: 50.0}
        figures = {}
        for block in range(4):
            figures |= {f"mean gate, block {block}": 0.5, f"lowest gate, block {block}": lowest}
            figures[f"distance, block {block}"] = 1.5 + further
        found[size] = {
            name: [Trained(name, seed, value + 0.05 * seed, 9, 1, 1, 1, 1.0, figures) for seed in range(3)]
            for name, value in accuracy.items()
        }
    return [claim.verdict for claim in convit._judged("cifar10", convit.CIFAR, found, [1.5, 1.5, 1.5]).claims]


def test_verdicts_follow_the_figures() -> None:
    assert judged((8.0, 4.0, 2.0), 0.1, 1.0) == [SHOWS] * 8
    assert judged((-4.0, -4.0, -4.0), 0.7, 0.0) == [NOT_SHOWN] * 8
