"""The Terminator proof: its task by hand, arms of one size, verdicts that follow the figures; run very small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lissom.proofs import terminator
from lissom.proofs.arms import Budget, generator
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.proofs.terminator import _Curve

TINY = replace(
    terminator.QUICK, side=6, marks=Budget(2, 8, 5e-3), sides=(16, 64), rounds=2, train=40, held_out=40,
    widths=(12, 12), images=Budget(3, 20, 1e-3),
)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminator, "QUICK", TINY)
        return run_proof("terminator", quick=True, seeds=2)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_every_arm_has_a_figure_a_seed(result: ProofResult) -> None:
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    rows = {(row.name, row.metric): row for row in result.rows}
    assert {f"marks, {name}" for name in terminator.MIXERS.values()} <= {name for name, _ in rows}
    whole, plain = rows["digits, Terminator", "accuracy"], rows["digits, residual", "accuracy"]
    assert plain.cost["parameters"] == pytest.approx(whole.cost["parameters"], rel=0.05)
    assert rows["global product, 16 x 16", "time"].cost["10^6 MACs"] == pytest.approx(8 * 16**3 / 1e6)
    # The result and the context, both as large as the map: 8 channels of float32 each.
    assert rows["global product, 64 x 64", "time"].cost["MB"] == pytest.approx(2 * 8 * 64 * 64 * 4 / 1e6, rel=0.01)
    assert len(result.claims) == 9
    assert all(claim.evidence for claim in result.claims)
    assert result.claims[4].verdict == SHOWS  # memory is counted, and does not depend on the machine


def test_marks() -> None:
    x, y = terminator.rows_of_marks(500, 9, generator(2))
    again, _ = terminator.rows_of_marks(500, 9, generator(2))
    assert torch.equal(x, again)
    assert 0.4 < float(y.float().mean()) < 0.6
    places = (x[:, 0] > 0.55).nonzero()
    assert len(places) == 1000
    first, second = places[0::2], places[1::2]
    assert torch.equal(first[:, 0], second[:, 0])
    assert ((first[:, 2] - second[:, 2]).abs() >= terminator.APART).all()
    assert torch.equal((first[:, 1] == second[:, 1]).long(), y)


def test_the_layers_are_of_one_size() -> None:
    sizes = {mixer: size(terminator.RowNet(mixer, 16)) for mixer in terminator.MIXERS}
    assert sizes["product"] == sizes["elementwise"]
    assert sizes["local"] == pytest.approx(sizes["product"], rel=0.01)
    x, _ = terminator.rows_of_marks(3, 8, generator(0))
    assert all(terminator.RowNet(mixer, 8)(x).shape == (3, 2) for mixer in terminator.MIXERS)
    with pytest.raises(ValueError, match="none of product"):
        terminator.RowNet("pooling", 8)


def test_the_residual_network_has_as_many_parameters() -> None:
    for parameters in (20_000, 100_000, 1_336_855):
        assert size(terminator.small_residual(parameters, 10)) == pytest.approx(parameters, rel=0.03)


def test_verdicts_follow_the_figures() -> None:
    good = {"product": [99.0, 98.0, 99.5], "elementwise": [60.0, 61.0, 59.0], "local": [51.0, 53.0, 52.0]}
    assert [claim.verdict for claim in terminator._rows_claims(good)] == [SHOWS] * 3
    bad = {"product": [90.0, 89.0, 90.5], "elementwise": [90.0, 89.1, 90.5], "local": [99.0, 98.0, 99.0]}
    assert [claim.verdict for claim in terminator._rows_claims(bad)] == [NOT_SHOWN] * 3
    scale = replace(terminator.FULL, sides=(64, 128))
    line = {"64": [1.0, 1.1], "128": [4.0, 4.3], "memory 64": [1.0] * 2, "memory 128": [4.0] * 2}
    assert [claim.verdict for claim in terminator._cost_claims(scale, line)] == [SHOWS] * 2
    cube = {"64": [1.0, 1.1], "128": [8.0, 8.9], "memory 64": [1.0] * 2, "memory 128": [8.0] * 2}
    assert terminator._powers(scale, cube)[0] == pytest.approx(1.5)
    assert [claim.verdict for claim in terminator._cost_claims(scale, cube)] == [NOT_SHOWN] * 2

    def curves(**ahead: float) -> dict[str, list[_Curve]]:
        names = {"residual": "residual", "bare": "without slow loss", "adamw": "AdamW"}
        found = {"Terminator": [_Curve(50, 70, 1, 1.0), _Curve(52, 71, 1, 1.0)]}
        for short, name in names.items():
            found[name] = [
                replace(c, first=c.first - ahead[short], last=c.last - ahead[short]) for c in found["Terminator"]
            ]
        return found

    above = terminator._image_claims("x", curves(residual=5, bare=2, adamw=1))
    assert [claim.verdict for claim in above] == [SHOWS] * 4
    below = terminator._image_claims("x", curves(residual=-5, bare=0, adamw=-1))
    assert [claim.verdict for claim in below] == [NOT_SHOWN] * 4
    one = {name: found[:1] for name, found in curves(residual=5, bare=2, adamw=1).items()}
    assert {claim.verdict for claim in terminator._image_claims("x", one)} == {INCONCLUSIVE}


@pytest.mark.full
def test_the_quick_proof_runs_as_it_is() -> None:
    result = run_proof("terminator", quick=True, seeds=2)
    product = next(row for row in result.rows if row.name == "marks, global product")
    local = next(row for row in result.rows if row.name == "marks, 3 x 3 depthwise")
    assert product.mean > local.mean
