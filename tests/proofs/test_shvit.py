"""The SHViT proof: its arms have the sheet's sizes and differ in their mixer alone, and verdicts follow the figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.meters.costs import total
from lissom.proofs import shvit
from lissom.proofs.arms import Trained, built, generator
from lissom.proofs.base import NOT_SHOWN, SHOWS, ProofResult, run_proof

ARMS = (shvit.ONE, shvit.MANY, shvit.NONE)


@pytest.fixture(scope="module")
def result() -> ProofResult:
    return run_proof("shvit", quick=True, seeds=2)


@pytest.mark.full
def test_every_arm_is_a_row_of_the_same_budget(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    for part, budget in (("digits", shvit.QUICK.digits.budget), ("far colour", shvit.QUICK.far)):
        sizes = [rows[f"{part}, {name}", "accuracy"].cost for name in ARMS]
        assert [size["steps"] for size in sizes] == [budget.steps] * 3
        assert sizes[1]["parameters"] > sizes[0]["parameters"] > sizes[2]["parameters"]
    assert rows[shvit.ONE, "time of the operator"].cost["10^6 MACs"] == pytest.approx(13.1, abs=0.1)
    assert rows[shvit.MANY, "time of the operator"].cost["10^6 MACs"] == pytest.approx(56.5, abs=0.1)
    assert rows[shvit.STRIDE_16, "time of a batch, forward"].cost["parameters"] == 6_330_808
    assert len(result.claims) == 7
    assert all(claim.evidence for claim in result.claims)


def test_the_networks_are_the_sheets() -> None:
    sizes = [sum(p.numel() for p in shvit._image_network(name, shvit.DIGITS, 10).parameters()) for name in ARMS]
    assert sizes == [53_114, 83_546, 41_450]
    assert total(shvit._image_network(shvit.ONE, shvit.CIFAR, 10).eval(), (3, 32, 32))[1] > 1e6


def test_many_heads_are_attention_in_both_forms() -> None:
    x = torch.randn(2, 24, 3, 5, generator=generator(0))
    plain, fused = (built(lambda f=f: shvit.MultiHead(24, 4, f), 0).eval() for f in (False, True))
    for module in (plain, fused):
        torch.nn.init.ones_(module.proj[1].bn.weight)
    torch.testing.assert_close(plain(x), fused(x), atol=1e-5, rtol=1e-5)
    assert plain(x).abs().max() > 0.01
    turned = x.flip(3)  # no positions: what is moved in is moved out
    torch.testing.assert_close(plain(turned), plain(x).flip(3), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="5 heads"):
        shvit.MultiHead(24, 5)


def test_without_a_mixer_nothing_far_is_seen() -> None:
    for name in ARMS:
        model = built(lambda name=name: shvit._far_network(name), 0).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)
        x = torch.randn(1, shvit.CHANNELS, 16, 16, generator=generator(1)).requires_grad_()
        model(x)[0, :, 2, 2].sum().backward()
        assert (x.grad[..., 13:, 13:].abs().max() == 0) == (name == shvit.NONE), name


def judged(one: float, speed: float) -> list[str]:
    """Verdicts on planted figures: accuracy of one head (many: 95, none: 80), and its speed, in times of its rival."""

    def arms(values: tuple[float, ...]) -> dict[str, list[Trained]]:
        return {
            name: [Trained(name, seed, value + 0.05 * seed, 9, 1, 1, 1, 1.0) for seed in range(3)]
            for name, value in zip(ARMS, values, strict=True)
        }

    def times(fast: str, *slow: str) -> dict[str, list[float]]:
        return {name: [8.0, 8.01, 7.99] for name in slow} | {fast: [8 / speed] * 3}

    fused = f"{shvit.MANY}, fused"
    trained = {"digits": shvit._Set(arms((one, 95, 80)), times(shvit.ONE, shvit.MANY, shvit.NONE))}
    macro = times(shvit.STRIDE_16, shvit.STRIDE_4), {shvit.STRIDE_4: {"a": 1.0}, shvit.STRIDE_16: {"a": 1.0}}
    macs = {shvit.ONE: 1, shvit.MANY: 4, fused: 4}
    operator = times(shvit.ONE, shvit.MANY, fused), macs
    return [c.verdict for c in shvit._judged(shvit.FULL, operator, arms((one, 95, 80)), trained, macro, 3).claims]


def test_verdicts_follow_the_figures() -> None:
    assert judged(95.0, 4.0) == [SHOWS] * 7
    assert judged(80.0, 0.5) == [NOT_SHOWN] * 7
