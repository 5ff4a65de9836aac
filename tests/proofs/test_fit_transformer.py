"""The FIT proof: its task, its counts and the windowed baseline by hand; run very small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lissom.meters.costs import layer_costs
from lissom.models.fit_transformer import FIT
from lissom.proofs import fit_transformer as proof
from lissom.proofs.arms import Budget, generator
from lissom.proofs.base import NOT_SHOWN, SHOWS, ProofResult, run_proof

TINY = replace(
    proof.QUICK, lengths=(64, 128), further=(256,), counted=(64,), rounds=1, groups=3, size=4, reach=Budget(2, 4, 1e-3),
    train=40, held_out=30, pixel_by_pixel=Budget(2, 4, 1e-3), width=8, narrow=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "QUICK", TINY)
        return run_proof("fit", quick=True, seeds=2)


def test_every_arm_has_a_figure_a_seed(result: ProofResult) -> None:
    rows = {(row.name, row.metric): row for row in result.rows}
    assert all(np.isfinite(row.values).all() for row in result.rows)
    assert all(len(row.values) == (1 if row.metric == "peak of a step" else 2) for row in result.rows)
    assert {name for name, metric in rows if metric == "forward pass"} == {
        "FIT, 64 tokens", "FIT, 128 tokens", "FIT, 256 tokens", "full attention, 64 tokens",
        "full attention, 128 tokens",
    }  # fmt: skip
    told = {name: row.cost for (name, metric), row in rows.items() if metric == "accuracy"}
    assert set(told) == {f"12 tokens, {name}" for name in proof.REACH}
    assert {cost["steps"] for cost in told.values()} == {2}
    bits = [row for row in result.rows if row.metric == "bits a byte"]
    assert [row.name for row in bits] == ["FITAR, digits", "windowed, digits"]
    assert all(7 < value < 9 for row in bits for value in row.values)  # untrained: about 8
    assert bits[1].cost["parameters"] == pytest.approx(bits[0].cost["parameters"], rel=0.15)  # a width has to be even
    assert len(result.claims) == 5
    assert result.claims[2].verdict == NOT_SHOWN  # two steps solve nothing


def test_equal_parameters_at_the_real_width() -> None:
    for side in (proof.DIGITS_SIDE, proof.FULL.pixels):
        wanted = proof._size(proof._rows_as_groups(side, proof.FULL.narrow))
        width = proof.thin_width(wanted, lambda dim, side=side: proof._size(proof._windowed(side, dim)))
        assert proof._size(proof._windowed(side, width)) == pytest.approx(wanted, rel=0.05)


def test_the_key_is_in_another_group_than_the_queries() -> None:
    x, targets = proof.recall(50, 4, 6, generator(1))
    assert (x.shape, targets.shape) == ((50, 24, 16), (50, 24))
    keys, queries = x[..., 8] == 1, x[..., 9] == 1
    assert (keys.sum(1) == 1).all()
    by_group = queries.unflatten(1, (4, 6)).sum(2)
    key_group = keys.float().argmax(1) // 6
    assert torch.equal(by_group, 1 - torch.nn.functional.one_hot(key_group, 4))
    assert torch.equal(targets != proof.NOTHING, queries)
    assert (x[queries][:, :8] == 0).all()
    symbols = x[keys][:, :8].argmax(1)
    assert torch.equal(targets[queries].reshape(50, 3), symbols[:, None].expand(-1, 3))
    assert len(set(symbols.tolist())) > 4
    answers = torch.nn.functional.one_hot(targets.clamp(min=0), 8).float()
    assert proof._told(answers, targets) == 100
    assert proof._told(answers.roll(1, 2), targets) == 0
    assert float(proof._asked_loss(1000 * answers, targets)) == 0


def test_counted_attention_is_what_runs() -> None:
    for layers, groups, size, latents, dim, latent_dim in (("(1)2(1)", 4, 5, 1, 8, 8), ("(2)1(1)2(1)", 3, 4, 2, 8, 12)):
        model = FIT(layers, groups, size, latents, dim, latent_dim, 4, 4, 6)
        counted = sum(cost.macs for cost in layer_costs(model, (groups, size, 6)) if cost.kind == "attention")
        assert proof.attention_macs(layers, groups, size, latents, dim, latent_dim) == counted
    lengths = [8**3, 8**4, 8**5, 8**6]
    counts = [proof.attention_macs("(1)2(1)", n // round(n ** (1 / 3)), round(n ** (1 / 3)), 1, 8, 8) for n in lengths]
    assert proof.exponent(lengths, counts) == pytest.approx(4 / 3, abs=0.05)


def test_sizes_and_slopes() -> None:
    assert [proof.group_size(n) for n in (512, 1024, 4096, 8192, 16384)] == [8, 8, 16, 16, 32]
    assert proof.exponent([10, 100, 1000], [3, 300, 30000]) == pytest.approx(2)


def test_the_window_is_a_window() -> None:
    torch.manual_seed(0)
    model = proof._windowed(5, 8).eval()
    pixels = torch.randint(256, (1, 1, 25))
    other = pixels.clone()
    other[0, 0, 4] = (other[0, 0, 4] + 1) % 256
    with torch.no_grad():
        changed = (model(pixels) != model(other)).any(-1)[0, 0]
    # Four layers, each of which looks back four places: from 4 the change gets to 20 and no further.
    assert changed.nonzero().flatten().tolist() == list(range(4, 21))


def test_nothing_of_a_pixel_is_seen_before_it_is_told() -> None:
    pixels = torch.arange(6).reshape(1, 6)
    assert proof._shifted(pixels).tolist() == [[0, 0, 1, 2, 3, 4]]
    logits = torch.zeros(1, 2, 3, 256)
    assert float(proof._bits(logits, pixels)) == pytest.approx(8)


@pytest.mark.full
def test_the_quick_proof_shows_the_cost() -> None:
    result = run_proof("fit", quick=True, seeds=3)
    assert result.claims[1].verdict == SHOWS
