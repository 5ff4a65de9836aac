"""The CBNet proof: distorted images, controls of one size, verdicts from figures, and one run in miniature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lissom.data.sources import read
from lissom.meters.costs import total
from lissom.proofs import cbnet
from lissom.proofs.arms import image_task
from lissom.proofs.base import NOT_SHOWN, SHOWS, VERDICTS, ProofResult, run_proof


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_second_image_is_distorted() -> None:
    task = image_task(read("digits"), 8, 0, train=40, held_out=50, channels=1)
    assert task.fit is not None
    one, again, other = (cbnet.distorted(task, seed) for seed in (0, 0, 1))
    before, after = task.fit.inputs(slice(None)), one.fit.inputs(slice(None))  # type: ignore[union-attr]
    np.testing.assert_allclose(after[::2], before[::2], atol=1e-6)
    assert all(np.abs(a - b).max() > 0.3 for a, b in zip(after[1::2], before[1::2], strict=True))
    assert -1 <= after.min() <= after.max() <= 1
    np.testing.assert_array_equal(after, again.fit.inputs(slice(None)))  # type: ignore[union-attr]
    assert not np.array_equal(after, other.fit.inputs(slice(None)))  # type: ignore[union-attr]
    assert np.array_equal(one.report.labels, task.report.labels)
    assert not np.array_equal(one.report.inputs(slice(None)), task.report.inputs(slice(None)))


@pytest.mark.parametrize(("macs", "side"), [(676_988, 28), (100_000, 16)])
def test_controls_have_the_multiplications_and_no_more(macs: int, side: int) -> None:
    for make in (cbnet.plain_mlp, cbnet.plain_cnn):
        found = total(make(macs, side, 10), (1, side, side))[1]
        assert 0.85 * macs < found <= macs


def figures(easy: float, hard: float, whole: float, plain: float, distorted: float) -> dict[str, list[dict[str, Any]]]:
    """Of three seeds, by CBNet's advantages over the light network, the whole one and the plain ones."""
    tuned, untuned = cbnet._tuned("prototype"), cbnet._untuned("prototype")

    def of(gain: float, noise: float) -> dict[str, Any]:
        own = 95.0 + noise
        accuracy = {tuned: own, cbnet.WHOLE: own - whole, cbnet.MLP: own - plain, cbnet.CNN: own - plain,
                    cbnet.LIGHT: own - gain}  # fmt: skip
        return {"accuracy": accuracy, "hard": {untuned: 90 + hard + noise, cbnet.LIGHT: 90 + noise},
                "easy": {untuned: 50 + easy + noise, cbnet.LIGHT: 50 + noise}}  # fmt: skip

    spread = (0.0, 0.1, -0.1)
    return {"clean": [of(1.0, n) for n in spread], "half distorted": [of(distorted, n) for n in spread]}


def test_verdicts_follow_the_figures() -> None:
    tuned = cbnet._tuned("prototype")
    quick, slow = (1.0, 1.01, 0.99), (1.5, 1.52, 1.49)
    good = cbnet._claims(figures(40, 3, -0.2, 2, 2), {cbnet.WHOLE: slow, tuned: quick})
    assert [claim.verdict for claim in good] == [SHOWS] * 7
    bad = cbnet._claims(figures(-1, -1, -2, -1, -3), {cbnet.WHOLE: quick, tuned: slow})
    assert [claim.verdict for claim in bad] == [NOT_SHOWN] * 7


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        tiny = replace(cbnet.QUICK, train=400, held_out=60, epochs=5, lr=1e-2, rest=(10, 10, 16), hidden=(32,), code=8)
        patch.setattr(cbnet, "QUICK", tiny)
        return run_proof("cbnet", quick=True, seeds=2)


@pytest.mark.full
def test_rows_hold_one_figure_a_seed(result: ProofResult) -> None:
    assert len(result.claims) == 7
    assert all(len(row.values) == 2 and min(row.values) >= 0 for row in result.rows)
    rows = {(row.name, row.metric): row for row in result.rows}
    for condition in cbnet.CONDITIONS:
        for arm in (
            cbnet.WHOLE,
            cbnet.LIGHT,
            cbnet.CASCADE,
            "CBNet, random",
            "CBNet, prototype, fine-tuned",
            cbnet.CNN,
        ):
            row = rows[f"{condition}, {arm}", "accuracy"]
            assert all(value <= 100 for value in row.values)
            assert row.cost["10^6 MACs"] > 0
    own = rows["clean, CBNet, prototype", "accuracy"].cost["10^6 MACs"]
    assert rows[f"clean, {cbnet.MLP}", "accuracy"].cost["10^6 MACs"] <= own
    assert rows[f"clean, {cbnet.LIGHT}", "accuracy"].cost["10^6 MACs"] < own
    assert (cbnet.CASCADE, "time, one image") in rows
    assert "nats" in result.notes[0]


@pytest.mark.full
def test_quick_for_real() -> None:
    result = run_proof("cbnet", quick=True, seeds=2)
    rows = {(row.name, row.metric): row.mean for row in result.rows}
    assert rows[f"clean, {cbnet.WHOLE}", "accuracy"] > 85
    for arm in ("CBNet, prototype", cbnet.LIGHT):  # which of them has more is the proof's to say
        assert 0 < rows[f"clean, {arm}", "images below the threshold"] <= 100
    assert all(claim.verdict in VERDICTS and claim.evidence for claim in result.claims)
