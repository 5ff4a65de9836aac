"""The MetaMixer proof: its mixers are what they are called, its measure by hand; run very small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lissom.proofs import metamixer
from lissom.proofs.arms import Budget, built
from lissom.proofs.base import VERDICTS, ProofResult, run_proof

TINY = replace(metamixer.QUICK, pixels=8, dims=(8,), depths=(1,), train=40, held_out=60, budget=Budget(2, 8, 1e-3))
ENLARGING = replace(metamixer.QUICK_ENLARGING, train=40, held_out=20, budget=Budget(2, 4, 1e-3), dim=4, depth=1)


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metamixer, "QUICK", TINY)
        patch.setattr(metamixer, "QUICK_ENLARGING", ENLARGING)
        patch.setattr(metamixer, "SIDES", (4, 8))
        patch.setattr(metamixer, "ROUNDS", 1)
        return run_proof("metamixer", quick=True, seeds=2)


def test_every_arm_has_a_figure_a_seed(result: ProofResult) -> None:
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    arms = {row.name: row.cost for row in result.rows if row.metric == "accuracy"}
    assert list(arms) == [f"digits, {name}" for name in metamixer.MIXERS]
    assert {cost["steps"] for cost in arms.values()} == {2}
    linear, whole = arms["digits, FFNified, linear"], arms["digits, FFNified"]
    assert (linear["parameters"], linear["10^6 MACs"]) == (whole["parameters"], whole["10^6 MACs"])
    assert arms["digits, none"]["parameters"] == arms["digits, 3 x 3 pooling"]["parameters"]
    assert sum(row.metric == "time" for row in result.rows) == 4
    assert len(result.claims) == 6 + 2 + 1
    assert all(claim.evidence for claim in result.claims)


def test_the_mixers_are_what_they_are_called() -> None:
    x, y = torch.randn(2, 1, 8, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixers = {name: built(lambda make=make: make(8), 0).double().eval() for name, make in metamixer.MIXERS.items()}
    with torch.no_grad():
        answers = {name: mixer(x) for name, mixer in mixers.items()}
        assert all(answer.shape == x.shape for answer in answers.values())
        assert torch.equal(answers["none"], x)
        middle = x[:, :, 1:4, 2:5].mean((2, 3))
        torch.testing.assert_close(answers["3 x 3 pooling"][:, :, 2, 3], middle)
        still = mixers["FFNified, linear"](torch.zeros_like(x))
        doubled = mixers["FFNified, linear"](2 * x) - still
        torch.testing.assert_close(doubled, 2 * (answers["FFNified, linear"] - still))
        bent = mixers["FFNified"](2 * x) - mixers["FFNified"](torch.zeros_like(x))
        assert not torch.allclose(bent, 2 * (answers["FFNified"] - mixers["FFNified"](torch.zeros_like(x))))
        # Attention without positions: mixed places give mixed answers.
        torch.testing.assert_close(mixers["attention"](x.flip(3)), answers["attention"].flip(3))
        assert not torch.allclose(mixers["attention"](y), answers["attention"])


def test_decibels_and_halves() -> None:
    truth = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert metamixer.psnr(truth.clamp(0.2, 0.8) + 0.1, truth.clamp(0.2, 0.8)) == pytest.approx(20, abs=1e-3)
    assert metamixer.psnr(torch.full_like(truth, 7.0), torch.ones_like(truth) - 0.01) == pytest.approx(40, abs=1e-3)
    assert metamixer._smaller(truth).shape == (2, 3, 4, 4)
    even = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(metamixer._smaller(even), torch.full((1, 1, 4, 4), 0.3))


@pytest.mark.full
def test_the_quick_proof_runs_as_it_is() -> None:
    """What it finds depends on the machine's arithmetic at so few steps; the page says what was seen."""
    result = run_proof("metamixer", quick=True, seeds=3)
    assert all(claim.verdict in VERDICTS and claim.evidence for claim in result.claims)
    assert all(len(row.values) == 3 and np.isfinite(row.values).all() for row in result.rows)
