"""The Expedit proof: its data and measures by hand, its arms, and verdicts that follow the figures; run very small."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from lissom.layers.token_clustering import token_clusters_of
from lissom.proofs import expedit
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.proofs.expedit import boundaries, mean_iou, textured_shapes
from lissom.tasks.segmentation import SegmentationTask

TINY = expedit._Scale(
    32, 16, 2, steps=2, batch=4, train=24, held_out=4, after=(1,), grids=(4, 5), timed=(4,), rounds=2
)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expedit, "QUICK", TINY)
        return run_proof("expedit", quick=True, seeds=2)


@pytest.mark.full
def test_every_arm_has_a_figure_a_seed(result: ProofResult) -> None:
    assert all(len(row.values) == 2 and np.isfinite(row.values).all() for row in result.rows)
    for metric in ("mIoU", "boundary"):
        rows = [row for row in result.rows if row.metric == metric]
        assert len(rows) == 1 + 2 * len(expedit.ARMS)
    latency = {row.name: row for row in result.rows if row.metric == "latency"}
    assert latency["(b 1 4)"].cost["10^6 MACs"] < latency["(a)"].cost["10^6 MACs"]
    assert len(result.claims) == 6
    assert all(claim.evidence for claim in result.claims)


def test_pictures_and_masks() -> None:
    images, masks = textured_shapes(6, 48, np.random.default_rng(3))
    again, _ = textured_shapes(6, 48, np.random.default_rng(3))
    assert np.array_equal(images, again)
    assert (images.shape, images.dtype, masks.shape, masks.dtype) == ((6, 3, 48, 48), np.float32, (6, 48, 48), np.uint8)
    assert set(np.unique(masks)) == set(range(len(expedit.CLASSES)))
    assert 0.2 < (masks == 0).mean() < 0.9
    assert abs(images).max() < 5


def test_the_measure_is_the_tasks() -> None:
    rng = np.random.default_rng(0)
    masks, answers = (rng.integers(0, 6, (3, 16, 16)).astype(np.uint8) for _ in range(2))
    task = SegmentationTask(choose=None, report=None, shape=(3, 16, 16), classes=expedit.CLASSES)
    assert mean_iou(answers, masks) == pytest.approx(task.quality(answers, masks).value)
    assert mean_iou(masks, masks) == 100
    half = np.zeros(masks.shape, bool)
    half[:, :8] = True
    assert mean_iou(answers, masks, half) == pytest.approx(mean_iou(answers[:, :8], masks[:, :8]))


def test_boundaries_are_four_pixels_on_either_side() -> None:
    masks = np.zeros((1, 20, 20), np.uint8)
    masks[:, :, 10:] = 1
    assert np.array_equal(np.flatnonzero(boundaries(masks)[0, 5]), np.arange(6, 14))
    assert np.array_equal(np.flatnonzero(boundaries(masks, 1)[0, 5]), [9, 10])
    assert not boundaries(np.ones((1, 8, 8), np.uint8)).any()


def test_the_arms_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    model = expedit._network(TINY).eval()
    seen = {}
    for arm in expedit.ARMS:
        clusters = token_clusters_of(expedit._reduced(model, 1, 4, arm, 0.3))
        seen[arm] = (clusters.clustering.iterations, clusters.clustering.temperature, type(clusters.reconstruction))
        x = torch.randn(1, 64, 16)
        weights = clusters.reconstruction(torch.eye(16)[None], x, clusters.clustering(x))
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 64))
        assert arm != "e" or ((weights == 0) | (weights == 1)).all()
    assert [seen[arm][0] for arm in "bcde"] == [5, 0, 0, 5]
    assert (seen["b"][1], seen["auto"][1]) == (0.3, "auto")
    assert seen["c"][2] is expedit._Bilinear
    bilinear = expedit._Bilinear(2, 4)(torch.tensor([[[0.0], [1.0], [0.0], [1.0]]]), x, x)
    assert bilinear.flatten()[:4].tolist() == pytest.approx([0, 0.25, 0.75, 1])


def figures(**arms: Any) -> dict[tuple[Any, ...], list[float]]:
    """Two seeds of all metrics; an arm is a number, or a function of depth and grid."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for metric, extra in (("mIoU", 0.0), ("boundary", -10.0)):
        found[metric, "a"] = [80.0 + extra, 82.0 + extra]
        for arm, after, side in itertools.product(expedit.ARMS, expedit.FULL.after, expedit.FULL.grids):
            value = arms[arm]
            loss = value(metric, after, side) if callable(value) else value
            found[metric, arm, after, side] = [80 + extra - loss, 82.1 + extra - loss]
    return found


def test_verdicts_follow_the_figures() -> None:
    places = list(itertools.product(expedit.FULL.after, expedit.FULL.grids))
    good = figures(
        b=lambda m, after, side: 1.2 - 0.1 * after + 0.05 * (16 - side),
        c=lambda m, after, side: 5 if m == "mIoU" else 9,
        d=3, e=3, auto=1,
    )  # fmt: skip
    assert expedit._close(expedit.FULL, good).verdict == SHOWS
    assert expedit._better(places, good, "mIoU", "c", "more").verdict == SHOWS
    assert expedit._edges(places, good).verdict == SHOWS
    assert expedit._between(places, good).verdict == SHOWS
    assert expedit._cheaper({"a": 3, "b": 2}, {"a": [2.0, 2.1], "b": [1.5, 1.6]}).verdict == SHOWS
    bad = figures(b=6, c=3, d=2, e=1, auto=6)
    for claim in (
        expedit._close(expedit.FULL, bad),
        expedit._better(places, bad, "mIoU", "c", "more"),
        expedit._edges(places, bad),
        expedit._between(places, bad),
        expedit._grows(expedit.FULL, bad),
        expedit._cheaper({"a": 3, "b": 2}, {"a": [2.0, 2.1], "b": [2.5, 2.6]}),
    ):
        assert claim.verdict == NOT_SHOWN
    one = {key: values[:1] for key, values in good.items()}
    assert expedit._close(expedit.FULL, one).verdict == INCONCLUSIVE


@pytest.mark.full
def test_quick_runs_as_it_is() -> None:
    result = run_proof("expedit", quick=True, seeds=2)
    untouched = next(row for row in result.rows if row.name == "(a) untouched")
    assert untouched.mean > 17  # 29 and 22 were seen
