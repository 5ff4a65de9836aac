"""The LSNet proof: its generated task and sizes by hand, the unfolded form, and verdicts that follow the figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.ops.ska import ska
from lissom.proofs import lsnet
from lissom.proofs.arms import Trained, generator
from lissom.proofs.base import NOT_SHOWN, SHOWS, ProofResult, run_proof

ARMS = (lsnet.LARGE, lsnet.NARROW, lsnet.STATIC, lsnet.SMALL_MLP, lsnet.SKIPPED_MLP, lsnet.LARGE_MLP)


@pytest.fixture(scope="module")
def result() -> ProofResult:
    return run_proof("lsnet", quick=True, seeds=2)


def test_every_arm_is_a_row_of_the_same_budget(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    costs = [rows[f"cued neighbours, {name}", "squared error"].cost for name in ARMS]
    assert [cost["parameters"] for cost in costs] == [927, 607, 881, 1029, 1029, 3009]
    assert {cost["steps"] for cost in costs} == {lsnet.QUICK.cued.steps}
    assert {(lsnet.SHIFTED, "forward"), (lsnet.UNFOLDED, "forward and backward")} <= set(rows)
    assert len(result.claims) == 7
    assert all(claim.evidence for claim in result.claims)
    assert result.claims[-1].verdict == SHOWS  # memory is counted, not sampled


def test_the_cue_decides_which_neighbour_is_wanted() -> None:
    x, wanted = lsnet.cued_neighbours(3, 14, generator(0))
    assert x.shape == (3, 2, 14, 14)
    assert wanted.shape == (3, 1, 14, 14)
    assert set(x[:, 1].unique().tolist()) == {-1, 0, 1}
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    rights = 0
    for i, j in ((0, 0), (0, 13), (5, 6), (13, 13), (7, 2)):
        around = padded[:, 1, i + 1 : i + 8, j + 1 : j + 8].sum((1, 2))  # 3 pixels either way of (i + 4, j + 4)
        for n in range(3):
            step = 1 if around[n] > 0 else -1
            rights += step == 1
            assert wanted[n, 0, i, j] == padded[n, 0, i + 4, j + 4 + step]
    assert 0 < rights < 15
    many = lsnet.cued_neighbours(200, 14, generator(1))
    assert many[1].var().item() == pytest.approx(0.95, abs=0.05)
    assert (many[0][:, 1] != 0).float().mean().item() == pytest.approx(lsnet.SPARSE, abs=0.01)


def test_unfolding_computes_the_same() -> None:
    x = torch.randn(2, 12, 5, 7, generator=generator(2))
    w = torch.randn(2, 4, 9, 5, 7, generator=generator(3))
    torch.testing.assert_close(lsnet.unfolded_ska(x, w), ska(x, w))


def test_both_networks_for_images_have_the_same_parameters() -> None:
    sizes = {name: lsnet._size(make()) for name, make in lsnet.image_arms(10).items()}
    assert sizes[lsnet.DEPTHWISE] == pytest.approx(sizes[lsnet.LS], rel=0.05)
    assert all(make()(torch.randn(2, 3, 32, 32)).shape == (2, 10) for make in lsnet.image_arms(10).values())


def judged(errors: tuple[float, ...], accuracy: float, speed: float) -> list[str]:
    """Verdicts on planted figures: the arms' errors, LS convolutions' accuracy (70 without), speed of shifted views."""
    cued = {
        name: [Trained(name, seed, value + 0.001 * seed, 9, 1, 1, 1, 1.0) for seed in range(3)]
        for name, value in zip(ARMS, errors, strict=True)
    }
    images = {
        name: [Trained(name, seed, value + 0.05 * seed, 9, 1, 1, 1, 1.0) for seed in range(3)]
        for name, value in ((lsnet.LS, accuracy), (lsnet.DEPTHWISE, 70.0))
    }
    times = {lsnet.SHIFTED: [8 / speed] * 3, lsnet.UNFOLDED: [8.0, 8.1, 8.2]}
    memory = {lsnet.SHIFTED: int(1e6), lsnet.UNFOLDED: int(1e6 * 5 * speed)}
    timed = {"forward": times, "forward and backward": times}, memory
    return [claim.verdict for claim in lsnet._judged(lsnet.FULL, cued, images, timed).claims]


def test_verdicts_follow_the_figures() -> None:
    assert judged((0.04, 0.4, 0.5, 0.3, 0.3, -0.04), 72.0, 2.0) == [SHOWS] * 8
    assert judged((0.5, 0.5, 0.5, 0.5, 0.5, 0.6), 70.0, 0.5) == [NOT_SHOWN] * 8
