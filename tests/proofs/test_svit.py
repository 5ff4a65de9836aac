"""The SViT proof: its task, which needs reach; its arms, alike but for what attends; verdicts by the figures."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from lissom.ops.super_token_attention import MapAttention
from lissom.proofs import svit
from lissom.proofs.arms import Trained, built, generator
from lissom.proofs.base import NOT_SHOWN, SHOWS, ProofResult, run_proof


@pytest.fixture(scope="module")
def result() -> ProofResult:
    return run_proof("svit", quick=True, seeds=2)


def test_every_arm_and_cost_is_a_row(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    arms = (svit.SUPER_TOKENS, svit.FULL_ATTENTION, svit.WINDOWS)
    assert {rows[name, "accuracy"].cost["parameters"] for name in arms} == {11_476}
    assert {rows[name, "accuracy"].cost["steps"] for name in arms} == {svit.QUICK.budget.steps}
    for side in svit.QUICK.sides:
        own, table, fused = (
            rows[f"{name}, {side} x {side}", "time of the operator"].cost
            for name in (svit.SUPER_TOKENS, svit.TABLE, svit.FULL_ATTENTION)
        )
        assert own["10^6 MACs"] < table["10^6 MACs"] == fused["10^6 MACs"]
        assert table["MB"] > 4 * side**4 / 1e6  # the table alone
        assert fused["MB"] < table["MB"]
    assert len(result.claims) == 6
    assert all(claim.evidence for claim in result.claims)


def test_the_colour_stands_opposite_of_the_first_marker() -> None:
    maps, targets = svit.retrieval(200, 16, generator(0))
    assert maps.shape == (200, svit.CHANNELS, 16, 16)
    for picture, (colour, pixel) in zip(maps, targets.tolist(), strict=True):
        first, second = picture[0].nonzero(), picture[1 : 1 + svit.COLOURS].nonzero()
        assert first.tolist() == [[pixel // 16, pixel % 16]]
        assert len(second) == 1
        assert second[0, 0] == colour
        apart = (second[0, 1:] - first[0]).abs()
        assert apart.min() >= 16 - 2 * svit.REGION + 1
    assert set(targets[:, 0].tolist()) == {0, 1, 2, 3}
    assert len(set((targets[:, 1] // 16 // 8 * 2 + targets[:, 1] % 16 // 8).tolist())) == 4


def test_windows_cannot_reach_the_second_marker_and_the_others_can() -> None:
    """What the answer at the first marker depends on, by its gradient."""
    for name in (svit.WINDOWS, svit.FULL_ATTENTION, svit.SUPER_TOKENS):
        model = built(partial(svit._network, 24, name), 0).eval()
        x = torch.randn(1, svit.CHANNELS, 16, 16, generator=generator(1)).requires_grad_()
        model(x)[0, :, svit.REGION - 1, svit.REGION - 1].sum().backward()
        reached = x.grad.abs().sum((0, 1))[-svit.REGION :, -svit.REGION :]
        assert (reached.max() == 0) == (name == svit.WINDOWS), name


def test_the_forms_of_full_attention_agree() -> None:
    x = torch.randn(2, 12, 5, 6, generator=generator(2))
    plain = built(lambda: MapAttention(12, 3), 0)
    for form in (svit._FusedAttention, svit._TableAttention):
        other = built(lambda form=form: form(12, 3), 0)
        torch.testing.assert_close(other(x), plain(x))
    windows = svit._Windows(plain)(x := torch.randn(2, 12, 8, 12, generator=generator(3)))
    torch.testing.assert_close(windows[:, :, 4:, 8:], plain(x[:, :, 4:, 8:]))


def judged(accuracies: dict[str, float], speed: float) -> list[str]:
    """Verdicts on planted figures of three seeds; the super tokens' times are ``speed`` times shorter."""
    found = {
        name: [Trained(name, seed, value + 0.1 * seed, 100, 1, 1, 1, 1.0) for seed in range(3)]
        for name, value in accuracies.items()
    }
    noise = (1.0, 1.01, 0.99)
    whole = {name: [10 * n for n in noise] for name in found}
    whole[svit.SUPER_TOKENS] = [10 * n * n / speed for n in noise]
    costs = {}
    for side in (32, 96):
        for name in (svit.SUPER_TOKENS, svit.FULL_ATTENTION, svit.TABLE):
            exponent = 2 if name == svit.SUPER_TOKENS else 4
            factor = 1 / speed if name == svit.SUPER_TOKENS else 1
            power = (side / 32) ** exponent
            costs[name, side] = svit._Cost(tuple(factor * n * power for n in noise), 1, int(1e6 * power))
    scale = svit._Scale(16, 24, svit.FULL.budget, 100, (32, 96), 1)
    return [claim.verdict for claim in svit._judged(scale, found, whole, costs).claims]


def test_verdicts_follow_the_figures() -> None:
    good = {svit.SUPER_TOKENS: 100.0, svit.FULL_ATTENTION: 100.0, svit.WINDOWS: 25.0}
    assert judged(good, 3.0) == [SHOWS] * 6
    bad = {svit.SUPER_TOKENS: 25.0, svit.FULL_ATTENTION: 100.0, svit.WINDOWS: 25.0}
    assert judged(bad, 0.5) == [NOT_SHOWN] * 4 + [SHOWS] * 2
