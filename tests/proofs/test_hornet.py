"""The HorNet proof: its task by hand, arms of one size, verdicts that follow the errors; run very small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lissom.proofs import hornet
from lissom.proofs.arms import Budget, generator
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof

TINY = replace(
    hornet.QUICK, side=5, product=Budget(2, 4, 5e-3), train=40, held_out=50, images=Budget(2, 8, 1e-3)
)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hornet, "QUICK", TINY)
        return run_proof("hornet", quick=True, seeds=2)


def test_every_arm_has_a_figure_a_seed(result: ProofResult) -> None:
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    errors = {row.name: row.cost for row in result.rows if row.metric == "squared error"}
    assert {name: cost["parameters"] for name, cost in errors.items()} == {
        "order 1": 1713, "order 2": 2257, "order 3": 2497, "7 x 7 and GELU": 3025,
    }  # fmt: skip
    assert {cost["steps"] for cost in errors.values()} == {2}
    images = {row.name: row.cost for row in result.rows if row.metric == "accuracy"}
    gated, plain = images["digits, gnConv"], images["digits, 7 x 7 depthwise"]
    assert gated["steps"] == plain["steps"]
    assert plain["parameters"] == pytest.approx(gated["parameters"], rel=2e-3)
    assert plain["10^6 MACs"] == pytest.approx(gated["10^6 MACs"], rel=0.05)
    assert [claim.verdict for claim in result.claims[:2]] == [NOT_SHOWN, NOT_SHOWN]  # two steps solve nothing


def test_the_task_is_a_product_of_three_places() -> None:
    x, y = hornet.products(64, 6, generator(3))
    assert (x.shape, y.shape) == ((64, 4, 6, 6), (64, 5, 5))
    assert set(x.unique().tolist()) == {-1, 1}
    row, column = 4, 2  # of the map; the first row has no answer
    assert torch.equal(
        y[:, row - 1, column], x[:, 0, row, column] * x[:, 1, row - 1, column] * x[:, 2, row, column + 1]
    )
    again, _ = hornet.products(64, 6, generator(3))
    assert torch.equal(x, again)
    # No product of two of the values tells anything of it: 1,600 values of mean 0 have a mean of 0.025 by chance.
    pairs = x[:, 0, 1:, :-1] * x[:, 1, :-1, :-1], x[:, 0, 1:, :-1] * x[:, 2, 1:, 1:]
    assert all(abs(float((y * pair).mean())) < 0.1 for pair in pairs)


def test_networks_answer_where_the_task_asks() -> None:
    x, y = hornet.products(2, 7, generator(0))
    for name in hornet.MIXERS:
        assert hornet.network(name)(x).shape == y.shape


def test_verdicts_follow_the_errors() -> None:
    learnt, not_learnt = [1e-5, 2e-5, 1e-6], [1.0, 0.999, 1.001]
    good = {"order 1": not_learnt, "order 2": learnt, "order 3": learnt, "7 x 7 and GELU": not_learnt}
    assert [claim.verdict for claim in hornet._orders(good)] == [SHOWS, SHOWS]
    both = {**good, "order 1": learnt, "7 x 7 and GELU": [1.0, 1e-5, 0.5]}
    assert [claim.verdict for claim in hornet._orders(both)] == [NOT_SHOWN, INCONCLUSIVE]
    assert hornet._orders({**good, "order 2": not_learnt})[1].verdict == NOT_SHOWN


@pytest.mark.full
def test_the_quick_proof_shows_the_orders() -> None:
    result = run_proof("hornet", quick=True, seeds=2)
    assert [claim.verdict for claim in result.claims[:2]] == [SHOWS, SHOWS]
