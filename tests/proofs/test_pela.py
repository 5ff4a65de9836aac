"""The PELA proof: its arms start from one network, ties stay ties, and a tiny run gives every row and claim."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lissom.data.sources import read
from lissom.layers.low_rank import LowRankLayer
from lissom.proofs import pela
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.training.loop import fit
from lissom.training.methods.pela import FeatureMSE, Perturbation
from lissom.training.methods.recovery import Answers, Recovery
from lissom.training.methods.supervised import Supervised

TINY = replace(pela.QUICK, side=8, width=16, epochs=1, further=1, batch=128, few=4)


@pytest.fixture(scope="module")
def result() -> ProofResult:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pela, "QUICK", TINY)
        patch.setattr(pela, "fit", partial(fit, max_steps=1))
        found = run_proof("pela", quick=True, seeds=1, progress=said.append)
    assert len(said) == 2
    return found


def test_every_arm_is_a_row_with_its_cost(result):
    rows = {row.name: row for row in result.rows}
    arms = ["(a) SVD alone", "(b) task loss", "(c) and features", "(d) and perturbation", "(e) random start"]
    sizes = {rows[f"{arm}, ratio 2"].cost["parameters"] for arm in arms}
    assert len(sizes) == 1
    thin = rows["(f) thinner, ratio 2"]
    assert thin.cost["parameters"] == pytest.approx(sizes.pop(), rel=0.15)  # a width has to be even
    assert thin.cost["epochs"] == 2
    assert rows["(a) SVD alone, ratio 2"].cost["further epochs"] == 0
    assert sum(name.endswith("then fine-tuned") for name in rows) == 5
    assert all(len(row.values) == 1 and 0 <= row.values[0] <= 100 for row in result.rows)


def test_one_seed_decides_nothing(result):
    assert len(result.claims) == 8
    assert {claim.verdict for claim in result.claims} == {INCONCLUSIVE}
    assert all("one seed" in claim.evidence for claim in result.claims)


def test_arms_start_from_the_same_network_and_differ_in_their_loss():
    data = read("digits")
    task = pela._task(data, "digits", TINY, 0)
    teacher = pela._network(TINY, 10, 0)
    (_, a, none), (_, b, plain), (_, c, features), (_, d, perturbed) = pela.stage(teacher, task, 2.0)
    for other in (b, c, d):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters(), strict=True))
    assert sum(isinstance(m, LowRankLayer) for m in a.modules()) == 4 * TINY.depth
    assert none is None
    assert plain == Supervised()
    assert isinstance(features, Recovery)
    assert isinstance(perturbed, Recovery)
    assert features.terms == (Answers(alpha=0.0), FeatureMSE(("blocks.0", "blocks.1")))
    assert [type(term) for term in perturbed.terms] == [Answers, FeatureMSE, Perturbation]
    assert features.original is teacher


def test_nothing_that_is_trained_on_judges():
    data = read("digits")
    seen, new = [0, 1, 2, 3, 4, 5], [9, 7]
    source = pela._task(data, "digits, seen", TINY, 3, seen)
    target = pela._task(data, "digits, new", TINY, 3, new, few=5)
    assert source.classes == tuple("012345")
    assert target.classes == ("9", "7")
    assert len(target.fit) == 10
    assert np.bincount(target.fit.labels).tolist() == [5, 5]
    # The same pictures, under their own numbers in the whole task.
    whole = pela._task(data, "digits", TINY, 3)
    rows = np.flatnonzero(whole.report.labels == 9)
    assert np.array_equal(target.report.inputs(np.flatnonzero(target.report.labels == 0)), whole.report.inputs(rows))
    kept_out = {x.tobytes() for x in whole.choose.inputs(slice(None))}
    trained = {x.tobytes() for x in whole.fit.inputs(slice(None))}
    assert len(kept_out & trained) <= 2  # the digits hold a few pictures twice


def test_the_arms_go_on_to_a_second_data_set(monkeypatch: pytest.MonkeyPatch):
    """Copies are tuned: the arms stay as they were for what follows."""
    monkeypatch.setattr(pela, "fit", partial(fit, max_steps=1))
    data = read("digits")
    task = pela._task(data, "digits", TINY, 0)
    teacher = pela._network(TINY, 10, 0)
    arms = {f"{name}, ratio 2": network for name, network, _ in pela.stage(teacher, task, 2.0)}
    before = {name: [p.clone() for p in network.parameters()] for name, network in arms.items()}
    found = pela._on_second(teacher, arms, data, TINY, 0)
    assert list(found) == [f"{name}, then fine-tuned on digits" for name in ("original", *pela.STAGES)]
    assert all(0 <= value <= 100 for value in found.values())
    for name, network in arms.items():
        assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before[name], strict=True))

    figures = {name: [90.0, 90.1, 90.2] for name in found}
    figures["(c) and features, then fine-tuned on digits"] = [92.0, 92.1, 92.2]
    everything = {name: [95.0, 95.1, 95.2] for name in ("original", "original, trained on", *arms)}
    everything |= {f"{name}, ratio 2": [90.0, 90.1, 90.2] for name in ("(e) random start", "(f) thinner")}
    scale = replace(TINY, ratios=(2.0,), few=0)
    claims = pela._judged("cifar10", scale, everything | figures, dict.fromkeys(everything, 1), 3).claims
    assert [claim.verdict for claim in claims[-3:]] == [SHOWS, SHOWS, NOT_SHOWN]
    assert all("second data set" in claim.text or "(digits)" in claim.text for claim in claims[-3:])


def test_the_nearest_width():
    assert pela.thin_width(100, lambda w: w * w) == 10
    assert pela.thin_width(120, lambda w: w * w) == 10
    assert pela.thin_width(130, lambda w: w * w) == 12
    assert pela.thin_width(1, lambda w: w * w) == 2


def judged(**changes: tuple[float, ...]) -> dict[str, str]:
    """Verdicts by the arms compared, on planted figures for three seeds."""
    scale = replace(TINY, ratios=(2.0,), few=0)
    figures = {
        "original": (97.0, 97.1, 96.9),
        "original, trained on": (97.5, 97.6, 97.4),
        "(a) SVD alone": (90.0, 90.1, 89.9),
        "(b) task loss": (97.4, 97.6, 97.4),
        "(c) and features": (97.5, 97.6, 97.4),
        "(d) and perturbation": (97.4, 97.7, 97.4),
        "(e) random start": (15.0, 16.0, 14.0),
        "(f) thinner": (93.0, 96.0, 98.0),
    } | changes
    named = {name if name.startswith("original") else f"{name}, ratio 2": list(v) for name, v in figures.items()}
    found = pela._judged("digits", scale, named, dict.fromkeys(named, 1), 3)
    return dict(zip(("start", "restores", "loss", "features", "perturbation", "thinner"),
                    (claim.verdict for claim in found.claims), strict=True))  # fmt: skip


def test_ties_are_reported_as_ties():
    assert judged() == {
        "start": SHOWS,
        "restores": SHOWS,
        "loss": SHOWS,
        "features": NOT_SHOWN,
        "perturbation": NOT_SHOWN,
        "thinner": INCONCLUSIVE,
    }
    worse = judged(**{"(c) and features": (95.0, 95.1, 94.9), "(a) SVD alone": (96.9, 97.0, 97.1)})
    assert worse["loss"] == worse["features"] == NOT_SHOWN
    assert worse["restores"] == NOT_SHOWN  # nothing was lost that matters: nothing can be restored


@pytest.mark.full
def test_the_quick_proof_shows_the_start(tmp_path):
    result = run_proof("pela", quick=True, seeds=2, folder=tmp_path)
    assert result.claims[0].verdict == SHOWS
