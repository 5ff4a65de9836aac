"""The parts of the SimQ-NAS proof by hand and against the sheet's checks; the proof itself, quick."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, run_proof
from lissom.proofs.simq_nas import (
    BITS,
    Quantiser,
    _Measured,
    front,
    hypervolume,
    mixed_policy,
    rounded_weight,
    smaller_without_loss,
)
from lissom.search.encoding import SearchSpace


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
    return network.eval().requires_grad_(False)


@pytest.fixture
def samples() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 3, 2, 2)).astype(np.float32)


def test_all_32_is_the_float_network_and_the_model_is_put_back(model, samples):
    quantiser = Quantiser(model, samples)
    x = torch.from_numpy(samples)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    expected = model(x)
    assert quantiser.paths == ("1", "3")
    with quantiser.applied((32, 32)) as candidate:
        assert torch.equal(candidate(x), expected)
    with quantiser.applied((4, 8)) as candidate:
        assert not torch.equal(candidate(x), expected)
    with pytest.raises(RuntimeError), quantiser.applied((4, 8)) as candidate:
        candidate(x[:, :, :1])
    assert torch.equal(model(x), expected)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_policy_is_static_rounding_of_weights_and_inputs(model, samples):
    quantiser = Quantiser(model, samples)
    x = torch.from_numpy(samples)

    def rounded(values: torch.Tensor, seen: torch.Tensor, bits: int) -> torch.Tensor:
        low, high = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale)
        return ((values / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale

    flat = x.flatten(1)
    hidden = nn.functional.gelu(model[1](flat))
    first = rounded(flat, flat, 8) @ rounded_weight(model[1].weight, 8).T + model[1].bias
    second = rounded(nn.functional.gelu(first), hidden, 4) @ rounded_weight(model[3].weight, 4).T
    with quantiser.applied((8, 4)) as candidate:
        assert torch.allclose(candidate(x), second, atol=1e-6)


def test_fewer_bits_are_further_from_the_float_network(model, samples):
    quantiser = Quantiser(model, samples)
    x = torch.from_numpy(samples)
    expected = model(x)
    errors = []
    for bits in (4, 8):
        with quantiser.applied((bits, bits)) as candidate:
            errors.append(float((candidate(x) - expected).abs().mean()))
    assert 0 < errors[1] < 0.2 * errors[0]


def test_weights_round_to_the_grid_of_each_output_channel():
    weight = torch.tensor([[0.7, -0.1, 0.0, 0.35], [14.0, -1.0, 5.1, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(
        rounded_weight(weight, 4),
        torch.tensor([[0.7, -0.1, 0.0, 0.4], [14.0, 0.0, 6.0, 4.0], [0.0, 0.0, 0.0, 0.0]]),
        atol=1e-6,
    )


def test_bytes_by_hand(model, samples):
    quantiser = Quantiser(model, samples)
    floats = 4 * (12 * 8 + 8 + 8 * 4)
    assert quantiser.bytes((32, 32)) == floats
    assert quantiser.bytes((8, 32)) == floats - 4 * 96 + 96 + 4 * 8 + 8
    assert quantiser.bytes((8, 4)) == floats - 4 * 96 + 96 + 4 * 8 + 8 - 4 * 32 + 16 + 4 * 4 + 8


def test_hypervolume_by_hand():
    assert hypervolume([], (1, 10)) == 0
    assert hypervolume([(0.5, 5)], (1, 10)) == pytest.approx(0.25)
    assert hypervolume([(0.5, 5), (0.2, 8), (0.6, 6), (0.5, 5)], (1, 10)) == pytest.approx((0.8 * 2 + 0.5 * 3) / 10)
    assert hypervolume([(0.1, 11), (1.5, 1)], (1, 10)) == 0
    random = np.random.default_rng(0).random((40, 2))
    areas = [hypervolume([tuple(p) for p in random[:n]], (1, 1)) for n in range(41)]
    assert all(a <= b for a, b in itertools.pairwise(areas))


def test_the_front_holds_what_nothing_beats():
    found = [_Measured((i,), e, b) for i, (e, b) in enumerate([(0.3, 5), (0.2, 8), (0.3, 6), (0.5, 2), (0.2, 8)])]
    kept = front(found)
    assert [(m.error, m.bytes) for m in kept] == [(0.5, 2), (0.3, 5), (0.2, 8)]


def test_mixed_policies_reach_from_small_to_large():
    space = SearchSpace({"q_bits": (17, BITS)})
    generator = np.random.default_rng(0)
    drawn = np.array([space.decode(mixed_policy(space, generator))["q_bits"] for _ in range(200)])
    means = drawn.mean(1)
    assert means.min() < 6
    assert means.max() > 25
    again = np.random.default_rng(0)
    assert (space.encode({"q_bits": drawn[0]}) == mixed_policy(space, again)).all()


@pytest.mark.parametrize(
    ("saved", "change", "verdict"),
    [
        ((0.2, 0.21, 0.19), (0.1, -0.1, 0.0), SHOWS),
        ((0.2, 0.21, 0.19), (-3.0, -3.1, -2.9), NOT_SHOWN),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), NOT_SHOWN),
        ((0.2, 0.21, 0.19), (-3.0, 3.0, 1.0), INCONCLUSIVE),
        ((0.9, -0.5, 0.3), (0.0, 0.0, 0.0), INCONCLUSIVE),
    ],
)
def test_smaller_without_loss(saved, change, verdict):
    assert smaller_without_loss(saved, change) == verdict


@pytest.mark.last
def test_the_quick_proof_runs(tmp_path):
    said: list[str] = []
    result = run_proof("simq_nas", quick=True, seeds=1, folder=tmp_path, progress=said.append)
    assert len(said) == 2
    figures = {(row.name, row.metric): row for row in result.rows}
    sizes = [figures[f"uniform {bits}", "model size"].mean for bits in BITS]
    assert sizes[0] < sizes[1] < sizes[2]
    # Trained well above chance, and int8 keeps it: else nothing could be compared.
    assert figures["uniform 32", "accuracy on held-out images"].mean > 70
    assert figures["uniform 8", "accuracy on held-out images"].mean > 70
    best = figures["smallest mixed as good as int8", "model size"].mean
    assert sizes[0] < best <= sizes[1]
    assert all(0 < row.mean < 1 for row in result.rows if row.metric.startswith("hypervolume"))
    assert {claim.verdict for claim in result.claims} == {INCONCLUSIVE}  # one seed decides nothing
