"""The parts of the SimQ-NAS proof by hand and against the sheet's checks; the proof itself, quick and full."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from lissom.models.factory import create_model
from lissom.proofs import simq_nas
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, run_proof
from lissom.proofs.simq_nas import (
    BITS,
    BLOCKS,
    DEPTHS,
    HEADS,
    LINEARS,
    Bench,
    Candidate,
    Elastic,
    Quantiser,
    Sandwich,
    Shape,
    _needed,
    features_of,
    rounded_weight,
    smaller_without_loss,
    spaces,
    subnetwork,
)
from lissom.search.linas import Record
from lissom.tasks.task import Task


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


WIDTH = 16


@pytest.fixture
def elastic() -> Elastic:
    torch.manual_seed(1)
    network = create_model("digits_vit", embed_dim=WIDTH, depth=BLOCKS, num_heads=max(HEADS), patch_size=16)
    for parameter in network.parameters():  # biases and norms start as zeros and ones: a wrong slice would not show
        nn.init.normal_(parameter, std=0.3)
    return Elastic(network).eval().requires_grad_(False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_largest_is_the_whole_network(elastic, images):
    assert elastic.largest == Shape((4,) * 4, (4 * WIDTH,) * 4)
    expected = elastic.network(images)
    assert torch.allclose(elastic(images), expected, atol=1e-5)
    assert torch.allclose(subnetwork(elastic.network, elastic.largest)(images), expected, atol=1e-5)


def test_a_cut_network_computes_the_same_and_leaves_the_whole_one_alone(elastic, images):
    before = {name: value.clone() for name, value in elastic.network.state_dict().items()}
    whole = elastic.network(images)
    shape = Shape((2, 4, 3), (WIDTH, 4 * WIDTH, 2 * WIDTH))
    own = subnetwork(elastic.network, shape)
    assert torch.allclose(own(images), elastic(images, shape), atol=1e-5)
    assert not torch.allclose(own(images), whole, atol=1e-2)
    assert len(own.blocks) == 3
    assert tuple(own.blocks[0].attn.qkv.weight.shape) == (3 * 2 * 4, WIDTH)
    assert tuple(own.blocks[0].mlp.fc2.weight.shape) == (WIDTH, WIDTH)
    paths = [path for path, layer in elastic.network.named_modules() if isinstance(layer, nn.Linear)]
    kept = [path for path, layer in own.named_modules() if isinstance(layer, nn.Linear)]
    assert kept == [path for path in paths if not path.startswith("blocks.3")]
    after = elastic.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(elastic.network(images), whole)


def test_leaving_out_heads_and_units_is_to_silence_them(elastic, images):
    """The whole network with the columns that read them set to zero."""
    expected = elastic(images, Shape((3, 4, 4, 4), (4 * WIDTH, WIDTH, 4 * WIDTH, 4 * WIDTH)))
    elastic.network.blocks[0].attn.proj.weight[:, 3 * 4 :] = 0
    elastic.network.blocks[1].mlp.fc2.weight[:, WIDTH:] = 0
    assert torch.allclose(elastic.network(images), expected, atol=1e-5)


def test_the_sandwich_trains_every_slice_and_draws_within_its_choices(elastic, images):
    elastic.requires_grad_(True)
    method = Sandwich(DEPTHS, HEADS, (WIDTH, 2 * WIDTH, 4 * WIDTH), 1)
    loss = method.loss(elastic, images, torch.tensor([0, 1, 2]), Task(None, None))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in elastic.parameters() if p.requires_grad)
    drawn = [method.drawn() for _ in range(200)]
    assert {len(shape.heads) for shape in drawn} == set(DEPTHS)
    assert {heads for shape in drawn for heads in shape.heads} == set(HEADS)
    assert {hidden for shape in drawn for hidden in shape.hidden} == {WIDTH, 2 * WIDTH, 4 * WIDTH}


def test_candidates_are_the_live_choices(elastic, samples):
    bench = Bench(Task(None, None), elastic, samples)
    space = spaces(WIDTH)["joint"]
    assert len(space) == 1 + 4 + 4 + 17
    vector = space.sample(np.random.default_rng(0))
    vector[0] = 0  # two blocks
    config = space.decode(vector)
    found = bench.candidate(config)
    bits = config["q_bits"]
    assert found == Candidate(
        Shape(config["num_attention_heads"][:2], config["intermediate_size"][:2]), (*bits[:8], bits[16])
    )
    dead = vector.copy()
    dead[[3, 4, 7, 8, *range(9 + 8, 9 + 16)]] = 0
    other = vector.copy()
    other[[3, 4, 7, 8, *range(9 + 8, 9 + 16)]] = 2
    assert bench.candidate(space.decode(dead)) == bench.candidate(space.decode(other)) == found
    features = features_of(space)
    assert (features(dead[None]) == features(other[None])).all()
    other[9 + 16] = (vector[9 + 16] + 1) % 3  # the head's bits are live
    assert bench.candidate(space.decode(other)) != found
    assert (features(dead[None]) != features(other[None])).any()
    largest = Shape((4,) * 4, (4 * WIDTH,) * 4)
    assert bench.candidate({"q_bits": (4,) * 17}) == bench.uniform(4) == Candidate(largest, (4,) * 17)
    architecture = spaces(WIDTH)["architecture"]
    smallest = bench.candidate(architecture.decode(np.zeros(9)))
    assert smallest == Candidate(Shape((2, 2), (WIDTH, WIDTH)), (8,) * (2 * LINEARS + 1))


def test_what_is_needed_to_reach_an_aim():
    records = [Record((i,), {"error": 0.0, "bytes": float(i)}) for i in range(4)]
    assert _needed(records, len, 3) == 0.75
    assert _needed(records, len, 9) == 1


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


@pytest.mark.full
def test_the_quick_proof_runs(tmp_path):
    said: list[str] = []
    result = run_proof("simq_nas", quick=True, seeds=1, folder=tmp_path, progress=said.append)
    assert len(said) == 6
    figures = {(row.name, row.metric): row for row in result.rows}
    sizes = [figures[f"largest network, {bits} bits", "model size"].mean for bits in BITS]
    assert sizes[0] < sizes[1] < sizes[2]
    # Trained well above chance, and int8 keeps it: else nothing could be compared.
    assert figures["largest network, 32 bits", "accuracy, held-out images"].mean > 70
    assert figures["largest network, 8 bits", "accuracy, held-out images"].mean > 70
    assert figures["smallest found as good as its int8", "model size"].mean <= sizes[1]
    volumes = [row.mean for row in result.rows if row.metric.startswith("hypervolume")]
    assert len(volumes) == 7
    assert all(0 < volume < 1 for volume in volumes)
    assert len(result.claims) == 7
    assert {claim.verdict for claim in result.claims} == {INCONCLUSIVE}  # one seed decides nothing


@pytest.mark.full
def test_the_full_form_runs_on_a_small_scale(tmp_path, monkeypatch):
    """The branches that --quick does not take: the paper's grid, CIFAR-10 where it is at hand, more than one seed."""
    small = dataclasses.replace(
        simq_nas.FULL, width=32, patch=8, epochs=1, learners=2, budget=12, population=4, inner=200
    )
    monkeypatch.setattr(simq_nas, "FULL", small)
    result = run_proof("simq_nas", quick=False, seeds=2, folder=tmp_path)
    assert all(len(row.values) == 2 for row in result.rows)
    assert {claim.verdict for claim in result.claims} <= {SHOWS, NOT_SHOWN, INCONCLUSIVE}
