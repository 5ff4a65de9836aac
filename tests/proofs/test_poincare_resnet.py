"""The Poincaré proof: norms are the sheet's, a tiny run gives every row and claim, verdicts follow their figures."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from lissom.proofs import poincare_resnet as proof
from lissom.proofs.arms import Budget
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof

BUDGET = Budget(2, 16, 1e-3)
TINY = replace(proof.QUICK, held_out=20, budget=BUDGET, deep=replace(BUDGET, steps=1), timed=(2, 4, 4), rounds=1)


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "DIGITS", TINY)
        patch.delenv("LISSOM_DATA", raising=False)
        patch.delenv("LISSOM_OPS", raising=False)
        found = run_proof("poincare_resnet", quick=False, seeds=1)
        assert "LISSOM_OPS" not in os.environ
        return found


def test_every_part_has_its_rows(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row.mean for row in result.rows}
    assert rows["identity, correct", "norm behind 50 layers"] == pytest.approx(rows["identity, correct", "norm"])
    accuracies = {name: value for (name, metric), value in rows.items() if metric == "accuracy"}
    assert list(accuracies) == [
        "hyperbolic", "Euclidean twin", "hyperbolic, published forms", "Euclidean, Poincaré classifier",
        "20 layers, identity", "20 layers, normal",
    ]  # fmt: skip
    assert all(0 <= value <= 100 for value in accuracies.values())
    assert rows[proof.FRECHET, "training step on 2 x 4 x 4 x 4"] > 0


def test_one_seed_decides_nothing_but_what_is_counted(result: ProofResult) -> None:
    assert [claim.verdict for claim in result.claims] == [INCONCLUSIVE] * 4 + [SHOWS] + [INCONCLUSIVE] * 2
    assert all("one seed" in claim.evidence for claim in result.claims if claim.verdict == INCONCLUSIVE)


def test_norms_are_those_of_the_sheet() -> None:
    norms = proof.norms_through_depth(3)
    first = norms["identity, correct"][0]
    assert first == pytest.approx(2, abs=0.1)
    assert list(norms["identity, correct"].values()) == pytest.approx([first] * 6, rel=1e-12)
    assert list(norms["identity, published"].values())[1:] == pytest.approx([1.09, 0.63, 0.47, 0.34, 0.22], rel=0.03)
    for form in ("correct", "published"):
        norm = norms[f"normal, {form}"]
        assert 0.3 < norm[1] < 1
        assert 1e-3 < norm[5] < 0.03
        assert 1e-11 < norm[20] < 1e-7
        assert norm[50] < 1e-18
    assert proof.norms_through_depth(3) == norms
    assert proof.norms_through_depth(4) != norms


def test_backward_passes_by_hand_need_less_memory() -> None:
    found = proof.memory_of_a_step((4, 8, 16), 8, 8, 4)
    assert found["Euclidean twin"] < found["manual"] < 0.9 * found["naive"]
    assert found == proof.memory_of_a_step((4, 8, 16), 8, 8, 4)


def test_midpoint_and_frechet_mean_give_nearly_the_same() -> None:
    assert 0 < proof.norms_apart((8, 4, 6), 0) < 0.05


def planted(**changes: Any) -> list[str]:
    """Verdicts in order, on planted figures for three seeds."""
    norms = {
        "identity, correct": dict.fromkeys((0, *proof.DEPTHS), 2.0),
        "identity, published": {0: 2.0, **dict.fromkeys(proof.DEPTHS, 0.4)},
        "normal, correct": {0: 2.0, **dict.fromkeys(proof.DEPTHS, 1e-5)},
        "normal, published": {0: 2.0, **dict.fromkeys(proof.DEPTHS, 1e-5)},
    }
    accuracy = {
        proof.HYPERBOLIC: (90.0, 91.0, 90.5), proof.EUCLIDEAN: (91.0, 91.5, 91.2),
        proof.IDENTITY: (50.0, 52.0, 51.0), proof.NORMAL: (10.0, 11.0, 10.0),
    }  # fmt: skip
    figures: dict[str, Any] = {
        "norms": [{**norms, **changes.pop("norms", {})}] * 3,
        "times": {proof.MIDPOINT: [1.0, 1.1, 1.0], proof.FRECHET: [8.0, 9.0, 8.5]},
        "apart": [2e-3, 3e-3, 2e-3],
        "bytes_": {"manual": 100, "naive": 200, proof.EUCLIDEAN: 30},
        "steps": {proof.HYPERBOLIC: [9.0] * 3, proof.EUCLIDEAN: [1.0] * 3},
    }
    accuracy |= changes.pop("accuracy", {})
    found = {
        name: [proof.Trained(name, seed, value, 100, 1, 1, 1, 1.0) for seed, value in enumerate(values)]
        for name, values in accuracy.items()
    }
    return [claim.verdict for claim in proof._judged("digits", TINY, **{**figures, **changes}, found=found).claims]


def test_verdicts_follow_the_figures() -> None:
    def same(norm: float) -> dict[int, float]:
        return {0: 2.0, **dict.fromkeys(proof.DEPTHS, norm)}

    assert planted() == [SHOWS] * 7
    assert planted(norms={"normal, published": same(1.9)})[0] == NOT_SHOWN
    assert planted(norms={"identity, correct": same(2.1)})[1] == NOT_SHOWN
    assert planted(norms={"identity, published": same(2.0)})[1] == NOT_SHOWN
    assert planted(times={proof.MIDPOINT: [1.0, 1.1, 1.0], proof.FRECHET: [1.2, 1.3, 1.2]})[2] == NOT_SHOWN
    assert planted(apart=[0.2, 0.3, 0.2])[3] == NOT_SHOWN
    assert planted(bytes_={"manual": 100, "naive": 101, proof.EUCLIDEAN: 30})[4] == NOT_SHOWN
    assert planted(accuracy={proof.HYPERBOLIC: (70.0, 71.0, 70.5)})[5] == NOT_SHOWN
    assert planted(accuracy={proof.HYPERBOLIC: (70.0, 99.0, 88.0)})[5] == INCONCLUSIVE
    assert planted(accuracy={proof.NORMAL: (50.0, 52.1, 51.0)})[6] == NOT_SHOWN


@pytest.mark.full
def test_quick_runs_as_it_is() -> None:
    result = run_proof("poincare_resnet", quick=True, seeds=2)
    accuracy = next(row.mean for row in result.rows if (row.name, row.metric) == ("hyperbolic", "accuracy"))
    assert accuracy > 40
    assert result.claims[0].verdict == result.claims[1].verdict == SHOWS
