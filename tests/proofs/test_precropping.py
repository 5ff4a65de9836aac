"""The PreCrop proof: arms of equal parameters, densities and masks as named, and verdicts that follow the figures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lissom.layers.channels import find_channels
from lissom.proofs import precropping
from lissom.proofs.arms import Budget, Trained, built
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof

SHAPE = (3, 8, 8)
TINY = replace(precropping.QUICK, budget=Budget(steps=2, batch=16, lr=1e-3), iterations=3, rounds=1, images=64,
               held_out=50)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precropping, "QUICK", TINY)
        return run_proof("precropping", quick=True, seeds=2)


def test_every_arm_is_a_row_and_keeps_as_much(result):
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    kept = {arm: rows[f"plain at 10%, {arm}", precropping.KEPT].mean for arm in precropping.ARMS}
    assert kept[precropping.SHUFFLED] == kept[precropping.MASK] == kept[precropping.MAGNITUDE]
    assert kept[precropping.FILTERS] == pytest.approx(kept[precropping.MASK], rel=0.1)
    for arm in (precropping.CROP, precropping.CLOSED, precropping.UNIFORM):
        assert 0.95 * kept[precropping.MASK] < kept[arm] <= kept[precropping.MASK] * (1 + 1e-9)
    macs = {arm: rows[f"plain at 10%, {arm}", "accuracy"].cost["10^6 MACs"] for arm in precropping.ARMS}
    assert macs[precropping.CLOSED] < 0.5 * macs[precropping.MASK]
    assert ("plain at 10%, 0", "density, closed form") in rows
    assert len(result.claims) == 8


def test_arms_start_from_the_weights_that_are_masked():
    arms = precropping.network_arms(partial(precropping.SMALL, 10), SHAPE, 0.1, 3)
    masked, shuffled = (built(arms[name], 5) for name in (precropping.MASK, precropping.SHUFFLED))
    for one, other in zip(masked.modules(), shuffled.modules(), strict=True):
        if hasattr(one, "parametrizations"):
            assert torch.equal(one.parametrizations.weight.original, other.parametrizations.weight.original)
            masks = [m.parametrizations.weight[0].mask for m in (one, other)]
            assert float(masks[0].mean()) == float(masks[1].mean())
    crop, again = built(arms[precropping.CROP], 5), built(arms[precropping.CROP], 5)
    assert all(torch.equal(a, b) for a, b in zip(crop.parameters(), again.parameters(), strict=True))


def test_uniform_widths_have_one_factor():
    arms = precropping.network_arms(partial(precropping.plain_network, 10), (3, 16, 16), 0.2, 1)
    whole = find_channels(precropping.plain_network(10), (3, 16, 16))
    less = find_channels(built(arms[precropping.UNIFORM], 0), (3, 16, 16))
    shares = [less.groups[name].size / group.size for name, group in whole.groups.items()]
    assert max(shares) - min(shares) < 0.06


def test_the_table_is_of_convolutions_alone():
    table = precropping.density_table(partial(precropping.SMALL, 10), SHAPE, 0.1, (0, 1), 5)
    assert [len(values) for values in table.values()] == [2, 2]
    weights = precropping._convolutions(precropping.SMALL(10))
    for values in table.values():
        assert set(values[0]) == set(weights)
        kept = sum(weights[path] * density for path, density in values[0].items())
        assert kept == pytest.approx(0.1 * sum(weights.values()), rel=0.01)
    same = {"SynFlow": [{"a": 0.2, "b": 0.4}], "closed form": [{"a": 0.1, "b": 0.2}]}
    assert precropping._apart(same) == pytest.approx([2.0])


def test_a_residual_network_can_be_cropped():
    arms = precropping.network_arms(partial(precropping.residual_network, 10), (3, 16, 16), 0.1, 2)
    model = built(arms[precropping.CLOSED], 0)
    assert model.eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def judged(crop: float, uniform: float, apart: float, **accuracy: float) -> list[str]:
    figures = dict.fromkeys(precropping.ARMS, 97.0)
    figures |= {precropping.CROP: crop, precropping.CLOSED: crop, precropping.UNIFORM: uniform}
    figures |= {getattr(precropping, name): value for name, value in accuracy.items()}
    arms = {
        name: [Trained(name, seed, value + 0.02 * seed, 9, 1, 1, 1, 1.0, {precropping.KEPT: 1.0}) for seed in range(3)]
        for name, value in figures.items()
    }
    table = {"SynFlow": [{"0": 0.1 * apart}] * 3, "closed form": [{"0": 0.1}] * 3}
    times = {precropping.FULL_NET: [9.0] * 3, precropping.MASK: [9.0, 9.1, 9.2], precropping.CLOSED: [3.0] * 3}
    where = ("plain", 0.1)
    found = precropping._judged("digits", precropping.QUICK, {where: table}, {}, {where: arms}, times)
    return [claim.verdict for claim in found.claims]


def test_verdicts_follow_the_figures():
    assert judged(97.0, 95.0, 1.1, MAGNITUDE=90.0) == [SHOWS] * 8
    worse = judged(94.0, 97.0, 3.0, SHUFFLED=94.0, FILTERS=94.0)
    assert worse == [NOT_SHOWN, NOT_SHOWN, NOT_SHOWN, NOT_SHOWN, SHOWS, NOT_SHOWN, NOT_SHOWN, SHOWS]
    assert INCONCLUSIVE not in worse
