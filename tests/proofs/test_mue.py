"""The MuE proof: its network and generation by hand, its verdicts from its figures, and a run in miniature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lissom.layers.saturation import saturation_exit, threshold_schedule
from lissom.proofs import mue
from lissom.proofs.arms import generator
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof
from lissom.proofs.mue import APART, EACH, JOINT, LAST, Reader, _Curve, _judged, _sample, confident_exit

TINY = replace(mue.QUICK, steps=2, batch=4, judged=6, dim=16, arms=mue.FULL.arms)


@pytest.fixture(scope="module")
def result() -> ProofResult:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mue, "QUICK", TINY)
        found = run_proof("mue", quick=True, seeds=1, progress=said.append)
    assert len(said) == 4
    return found


def test_every_arm_is_a_row_at_every_threshold_with_its_layers(result):
    rows = {row.name: row for row in result.rows}
    assert len(rows) == len(result.rows) == 4 * 11
    for arm in (LAST, EACH, JOINT, APART):
        full = rows[f"{arm}, full depth"].cost
        assert (full["encoder layers"], full["decoder layers"]) == (2, 4)
        ran = [rows[f"{arm}, decoder threshold {tau:g}"].cost["decoder layers"] for tau in mue.SHOWN]
        assert ran == sorted(ran, reverse=True)
        assert all(1 <= layers <= 4 for layers in ran)
    assert all(0 <= row.values[0] <= 100 for row in result.rows)


def test_one_seed_decides_nothing(result):
    assert len(result.claims) == 7
    assert {claim.verdict for claim in result.claims} == {INCONCLUSIVE}


def test_images_hold_the_digits_that_are_named():
    source, held_out = mue._digits()
    assert (len(source[1]), len(held_out[1])) == (1400, 397)
    images, names, asked, turned = _sample(source, 5, 4, generator(0))
    assert images.shape == (5, 16, 16)
    for image, name, first, others in zip(images, names, asked, turned, strict=True):
        tiles = [image[:8, :8], image[:8, 8:], image[8:, :8], image[8:, 8:]]
        for place, tile in enumerate(tiles):
            known = np.flatnonzero((source[0] == tile.numpy()).all((1, 2)))
            assert int(name[place]) in source[1][known]
        assert others.tolist() == [int(name[(int(first) + i) % 4]) for i in range(4)]
    assert len(_sample(source, 3, 2, generator(0))[0][0]) == 8


def reader(**other: Any) -> Reader:
    torch.manual_seed(0)
    return Reader(4, 3, 5, 16, **other).eval()


@torch.no_grad()
def test_a_decoder_sees_no_later_digit_and_streams_no_other():
    source, _ = mue._digits()
    images, names, asked, _ = _sample(source, 3, 4, generator(1))
    model = reader(question=True)
    other = names.clone()
    other[:, 2] = (other[:, 2] + 1) % 10
    for a, b in zip(model(images, asked, names), model(images, asked, other), strict=True):
        torch.testing.assert_close(a[:, :3], b[:, :3])
        assert not torch.allclose(a[:, 3], b[:, 3])
    asked_for = torch.zeros_like(asked)
    for apart in (True, False):
        model = reader(question=True, apart=apart)
        (one, ran), (two, _) = model.encode(images, asked_for), model.encode(images, asked_for + 1)
        assert one.shape == (3, 17, 16)
        assert set(ran) == ({"image", "word"} if apart else {"image"})
        assert torch.equal(one[:, :16], two[:, :16]) == apart


@torch.no_grad()
def test_generation_leaves_where_a_run_of_the_whole_sentence_leaves():
    """Greedy steps, each of which runs the sentence so far, against one pass over what they named; and no exits."""
    source, _ = mue._digits()
    images, _, asked, _ = _sample(source, 8, 4, generator(2))
    model = reader()
    for parameter in model.decoder.parameters():
        parameter.mul_(1.5)  # or no layer of an untrained decoder would turn anything
    memory, _ = model.encode(images, asked)
    for tau in (1.0, 0.9, threshold_schedule(0.9, 3)):
        named, executed = model.generate(images, asked, tau)
        taus = torch.as_tensor(tau, dtype=torch.float32).expand(4)
        done = saturation_exit(model.layers(memory), model.begin(named[:, :-1]), taus, over="token")
        assert torch.equal(done.executed, executed)
        assert torch.equal(model.answer(done.output).argmax(-1), named)
        if tau == 1.0:
            assert executed.tolist() == [[5] * 4] * 8
            last = model(images, asked, named)[-1]
            torch.testing.assert_close(model.answer(done.output), last)
        else:
            assert len(set(executed.flatten().tolist())) > 1
    assert executed[:, :2].tolist() == [[5, 5]] * 8  # the schedule's first third


@torch.no_grad()
def test_confidence_leaves_at_the_first_sure_layer():
    source, _ = mue._digits()
    images, names, asked, _ = _sample(source, 6, 4, generator(3))
    model = reader()
    memory, _ = model.encode(images, asked)
    start = model.begin(names[:, :-1])
    shares = torch.stack([a.softmax(-1).amax(-1) for a in model(images, asked, names)])
    threshold = float(shares[0].median())
    h, executed = confident_exit(model.layers(memory), start, model.answer, threshold)
    assert torch.equal(executed == 1, shares[0] > threshold)
    assert confident_exit(model.layers(memory), start, model.answer, 1.0)[1].tolist() == [[5] * 4] * 6
    torch.testing.assert_close(model.answer(h).softmax(-1).amax(-1)[executed == 1], shares[0][executed == 1])


def test_curves_are_read_at_layers_between_thresholds():
    found = _Curve(np.array([0.5, 0.8, 1.0]), np.array([40.0, 60.0, 90.0]), np.array([1.0, 2.0, 4.0]))
    assert found.at(0.79) == (60.0, 2.0)
    assert found.when(3.0) == pytest.approx(75.0)
    assert found.when(0.5) == 40.0
    assert found.when(5.0) == 90.0


def figures(at_equal: float, full: float, confident: float = 90.0, encoder: float = 80.0) -> dict[str, Any]:
    line = lambda low, high: _Curve(np.array([0.0, 1.0]), np.array([low, high]), np.array([3.0, 6.0]))  # noqa: E731
    return {
        "decoder": line(at_equal, full), "confidence": line(confident, full), "encoder": line(encoder, full),
        "both": (50.0, 2.0, 2.0), "full": full, "generated": (full, 6.0), "scheduled": (full, 4.0),
    }  # fmt: skip


def verdicts(plain: list[dict[str, Any]], each: list[dict[str, Any]]) -> list[str]:
    found = {LAST: plain, EACH: each, JOINT: each, APART: each}
    return [claim.verdict for claim in _judged(mue.FULL, found, dict.fromkeys(found, 1)).claims]


def test_verdicts_follow_the_figures():
    wobble = (-0.1, 0.0, 0.1)
    plain = [figures(70 + d, 95 + d) for d in wobble]
    each = [figures(93.8 + d, 94 + d) for d in wobble]
    assert verdicts(plain, each) == [SHOWS, SHOWS, SHOWS, NOT_SHOWN, SHOWS, SHOWS, SHOWS]
    assert len(_judged(mue.QUICK, {LAST: plain, EACH: each}, {LAST: 1, EACH: 1}).claims) == 6
    worse = [figures(75 + d, 90 + d) for d in wobble]
    assert verdicts(plain, worse)[:3] == [NOT_SHOWN] * 3
    mixed = [figures(70 + d, 94) for d in (0, 20, 40)]
    assert verdicts(plain, mixed)[0] == INCONCLUSIVE
