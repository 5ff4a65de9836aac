"""The LGViT proof: its counting by hand, its verdicts from its figures, and one run for real, in miniature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lissom.errors import LissomError
from lissom.meters.costs import total
from lissom.proofs import lgvit
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, Settings, run_proof
from lissom.proofs.lgvit import Costs, _Curve, _judged, _together, _with_exits, confidences, leave


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_confidence_is_the_largest_share():
    logits = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32) * 100
    shares = torch.from_numpy(logits).softmax(-1).amax(-1).numpy()
    np.testing.assert_allclose(confidences(logits), shares, rtol=1e-5)


# Two exits and the model, four samples of two classes, by their margins: confidence is 1 / (1 + exp(-margin)).
MARGINS = np.array([[3.0, 1.0, -3.0, 0.0], [0.0, 3.0, 1.0, 0.5], [5.0, 5.0, 5.0, 0.1]])
LOGITS = np.stack([MARGINS, np.zeros_like(MARGINS)], -1)


def test_a_sample_leaves_at_the_first_exit_that_is_sure_enough():
    assert leave(LOGITS, 0.9).tolist() == [0, 1, 0, 2]
    assert leave(LOGITS, 0.7).tolist() == [0, 0, 0, 2]
    assert leave(LOGITS, 0.5).tolist() == [0, 0, 0, 1]  # half and half is not above a half
    assert leave(LOGITS, 0.0).tolist() == [0, 0, 0, 0]
    assert leave(LOGITS, 1.01).tolist() == [2, 2, 2, 2]
    assert MARGINS.shape == (3, 4)


def test_operations_count_every_head_on_the_way():
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=4, num_heads=2, num_classes=3).eval()
    model = _with_exits(backbone, (2, 3), "lgvit", 3, 0)
    costs = Costs.of(model, (3, 8, 8), (2, 3))
    plain = total(backbone, (3, 8, 8))[1]
    heads = [total(head, (17, 16))[1] for head in model.exits.heads]
    block = total(backbone.blocks[0], (17, 16))[1]
    patches = 16 * 12 * 16
    assert costs.plain == plain == patches + 4 * block + 16 * 3
    assert costs.heads.tolist() == heads
    assert costs.upto.tolist() == [
        patches + 2 * block + heads[0], patches + 3 * block + sum(heads), plain + sum(heads),
    ]  # fmt: skip
    assert costs.blocks.tolist() == [2, 3, 4]
    assert not hasattr(backbone, "exits")


COSTS = Costs(np.array([40, 70, 120]), 100, np.array([10, 10]), np.array([1, 2, 3]))


def test_a_curve_holds_one_figure_a_threshold():
    labels = np.array([0, 0, 0, 0])
    curve = _Curve.of(LOGITS, labels, COSTS)
    assert (curve.accuracy[0], curve.operations[0], curve.blocks[0]) == (75.0, 0.4, 1.0)  # all leave at once
    assert (curve.accuracy[-1], curve.operations[-1], curve.blocks[-1]) == (100.0, 1.2, 3.0)  # none does
    at = curve.at(0.9)
    assert curve.accuracy[at] == 75.0
    assert curve.operations[at] == pytest.approx((40 + 70 + 40 + 120) / 400)
    assert np.all(np.diff(curve.operations) >= 0)
    assert curve.cheapest(75.0) == 0
    assert curve.cheapest(99.0) == int(np.flatnonzero(curve.accuracy == 100)[0])
    assert curve.cheapest(101.0) == len(lgvit.THRESHOLDS) - 1
    level = replace(curve, accuracy=np.full_like(curve.accuracy, 80.0))
    assert level.height(0.4) == pytest.approx(80)


def figures(shallow: float, deep: float, height: float, faster: float, change: float) -> dict[str, Any]:
    """Of one seed, given by LGViT's advantages."""
    linear, own = np.array([70.0, 90.0, 95.0]), np.array([70 + shallow, 90 + deep, 95.0])
    curve = _Curve.of(LOGITS, np.zeros(4, int), COSTS)
    found: dict[str, Any] = {"low": 0.4}
    for system, exits, gained in (("linear", linear, 0.0), ("plain", linear, 0.0), ("lgvit", own, height)):
        chosen = {"accuracy": 95.0, "change": change, "operations": 0.6, "faster": faster, "threshold": 0.8}
        found |= {f"{system} exits": exits, f"{system} costs": COSTS, f"{system} curve": curve,
                  f"{system} height": 90 + gained, f"{system} chosen": chosen}  # fmt: skip
    return found


def verdicts(*found: dict[str, Any], tmp_path) -> list[str]:
    settings = Settings(False, tuple(range(len(found))), print, tmp_path)
    version = replace(lgvit.DIGITS, exits=(2, 4))
    return [claim.verdict for claim in _judged("digits", version, found, settings).claims]


def test_verdicts_follow_the_figures(tmp_path):
    good = [figures(9, 1, 2, 1.9, 0.01), figures(9.2, 1, 2.02, 1.88, -0.01)]
    assert verdicts(*good, tmp_path=tmp_path) == [SHOWS] * 4
    bad = [figures(-2, 1, -1, 1.2, -4), figures(-2.01, 1, -1.01, 1.21, -4.01)]
    assert verdicts(*bad, tmp_path=tmp_path) == [NOT_SHOWN] * 4
    # Faster, and worse for it: the claim has two parts.
    assert verdicts(figures(9, 1, 2, 1.9, -3), figures(9, 1, 2, 1.9, -3.01), tmp_path=tmp_path)[3] == NOT_SHOWN
    assert verdicts(figures(9, 1, 2, 1.9, 0), tmp_path=tmp_path) == [INCONCLUSIVE] * 4  # one seed has no interval
    assert _together(SHOWS, INCONCLUSIVE) == INCONCLUSIVE


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LISSOM_PROOF_DATA", raising=False)
        tiny = replace(lgvit.QUICK, exits=(2, 4), epochs=1, head_epochs=1, width=16, batch=128)
        patch.setattr(lgvit, "QUICK", tiny)
        return run_proof("lgvit", quick=True, seeds=2)


def test_rows_hold_one_figure_a_seed(result: ProofResult):
    assert len(result.claims) == 4
    assert all(len(row.values) == 2 for row in result.rows)
    rows = {row.name: row for row in result.rows}
    for name in ("block 2, linear heads on the class token", "block 4, LGViT heads", "confidence 0.8, LGViT heads"):
        assert rows[name].metric == "accuracy"
        assert all(0 <= value <= 100 for value in rows[name].values)
    linear, own = (rows[f"block 2, {lgvit.SYSTEMS[s]}"].cost for s in ("linear", "lgvit"))
    assert 0 < linear["head %"] < own["head %"] < 10
    assert linear["% of operations"] < own["% of operations"] < 50


def test_cifar_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("LISSOM_PROOF_DATA", "cifar")
    with pytest.raises(LissomError, match="knows digits and cifar10"):
        run_proof("lgvit", quick=True, seeds=1)
    monkeypatch.setenv("LISSOM_PROOF_DATA", "cifar10")
    monkeypatch.delenv("LISSOM_DATA", raising=False)
    with pytest.raises(LissomError, match="needs LISSOM_DATA"):
        run_proof("lgvit", quick=True, seeds=1)
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("LISSOM_DATA", str(tmp_path))
    monkeypatch.setattr(lgvit, "WEIGHTS", tmp_path / "absent.safetensors")
    with pytest.raises(LissomError, match="train the reference"):
        run_proof("lgvit", quick=True, seeds=1)


@pytest.mark.full
def test_quick_for_real(monkeypatch):
    monkeypatch.delenv("LISSOM_PROOF_DATA", raising=False)
    result = run_proof("lgvit", quick=True, seeds=2)
    own = next(row for row in result.rows if row.name == "the model itself")
    assert own.mean > 85  # a backbone worth leaving early
