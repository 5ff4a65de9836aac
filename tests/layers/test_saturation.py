"""Saturation exits: the published figures, per-sample decisions, padding, frozen states, and what is refused."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lissom.layers.saturation import Similarity, saturation_exit, similarity, threshold_schedule
from lissom.runtime import decisions


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return json.loads((Path(folder) / "mue" / "cases.json").read_text())


def replay(states: torch.Tensor):  # type: ignore[no-untyped-def]
    """Layers that make ``states`` (L + 1, N, C) of each other, whatever they are given."""
    return [lambda x, after=after: after.expand_as(x) for after in states[1:]]


def test_similarities_and_executed_layers_are_the_published_ones(cases):
    for case in cases["similarity_exit"]:
        states = torch.tensor(case["states"], dtype=torch.float64)
        found = [float(similarity(a, b, over="batch")) for a, b in pairwise(states)]
        assert found == pytest.approx(case["similarities"], rel=1e-9)
        # One sample alone is the published batch of one; and the runtime's own NumPy says the same.
        alone = similarity(states[:-1], states[1:])
        assert alone.tolist() == pytest.approx(case["similarities"], rel=1e-9)
        arrays = decisions.similarity(states[:-1].numpy(), states[1:].numpy())
        assert arrays.tolist() == pytest.approx(case["similarities"], rel=1e-9)
        assert {exit["threshold"] for exit in case["exits"]}
        for exit in case["exits"]:
            for over in ("batch", "sample"):
                done = saturation_exit(replay(states), states[:1], exit["threshold"], over=over)
                assert done.executed.flatten().tolist() == [exit["executed_layers"]]
                assert torch.equal(done.output[0], states[exit["executed_layers"]])


def test_the_schedule_is_the_published_one(cases):
    for case in cases["threshold_schedule"]:
        assert threshold_schedule(case["decoder_thres"], case["max_len"]) == pytest.approx(case["values"], rel=1e-12)
    with pytest.raises(ValueError, match="max_len is -1"):
        threshold_schedule(0.9, -1)


class Turning(nn.Module):
    """A residual layer on tokens (B, N, C) that mixes them."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount, self.linear = amount, nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.amount * self.linear(x.mean(1, keepdim=True) + x).tanh()


def stack() -> list[Turning]:
    torch.manual_seed(0)
    return [Turning(amount) for amount in (3.0, 1.0, 0.5, 0.2, 0.1)]


def tokens(count: int = 16) -> torch.Tensor:
    scale = torch.linspace(0.2, 6.0, count).reshape(-1, 1, 1)  # those of long vectors are turned less
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(1)) * scale


@torch.no_grad()
def test_in_a_batch_every_sample_leaves_where_it_leaves_alone():
    layers, x = stack(), tokens()
    done = saturation_exit(layers, x, 0.97)
    assert len(set(done.executed.tolist())) >= 3
    for row, sample in enumerate(x):
        alone = saturation_exit(layers, sample[None], 0.97)
        assert int(alone.executed[0]) == int(done.executed[row])
        torch.testing.assert_close(alone.output[0], done.output[row])
        h = sample[None]
        for layer in layers[: int(done.executed[row])]:
            h = layer(h)
        torch.testing.assert_close(h[0], done.output[row])


@torch.no_grad()
def test_no_layer_runs_when_all_have_left():
    layers, x = stack(), tokens(4)
    assert saturation_exit(layers, x, -1.0).executed.tolist() == [1] * 4
    assert [layer.calls for layer in layers] == [1, 0, 0, 0, 0]


@torch.no_grad()
def test_a_higher_threshold_never_runs_fewer_layers():
    layers, x, before = stack(), tokens(), torch.zeros(16, dtype=torch.int64)
    for tau in (-1.0, 0.5, 0.8, 0.9, 0.97, 0.99, 0.999, 1.0):
        executed = saturation_exit(layers, x, tau).executed
        assert bool((executed >= before).all())
        before = executed
    assert before.tolist() == [5] * 16


def test_layers_that_add_nothing_are_left_after_the_first():
    """Their similarity is exactly 1, and even so nothing leaves from a threshold of 1 on."""
    x = torch.randn(64, 7, 5) * torch.logspace(-6, 6, 64).reshape(-1, 1, 1)
    assert similarity(x, x).tolist() == [1.0] * 64
    assert saturation_exit([nn.Identity()] * 3, x, 0.999999).executed.tolist() == [1] * 64
    assert saturation_exit([nn.Identity()] * 3, x, 1.0).executed.tolist() == [3] * 64


@torch.no_grad()
def test_padding_counts_for_nothing():
    a, b = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    found = similarity(a, b, mask)
    for row, count in enumerate((5, 3, 1)):
        torch.testing.assert_close(found[row], similarity(a[row : row + 1, :count], b[row : row + 1, :count])[0])
    assert float(similarity(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))) == 0.0
    padded = torch.cat([tokens(), 100 * torch.randn(16, 3, 6)], 1)
    mask = torch.tensor([True] * 4 + [False] * 3).expand(16, 7)
    layer = [lambda x: x * torch.tensor([1.0, 1.3, 1, 1, 1, 1]) for _ in range(4)]
    a, b = saturation_exit(layer, padded, 0.98, mask), saturation_exit(layer, tokens(), 0.98)
    assert torch.equal(a.executed, b.executed)
    assert torch.equal(a.output[:, :4], b.output)


@torch.no_grad()
def test_by_token_each_leaves_by_itself_and_stays_to_be_seen():
    layers, x = stack(), tokens()
    taus = torch.tensor([1.0, 0.97, 0.97, -1.0])
    done = saturation_exit(layers, x, taus, over="token")
    assert done.executed.shape == (16, 4)
    assert done.executed[:, 0].tolist() == [5] * 16
    assert done.executed[:, 3].tolist() == [1] * 16
    # By hand: frozen states are part of what the next layer sees.
    h, left = x, torch.zeros(16, 4, dtype=torch.bool)
    for layer in layers:
        y = torch.where(left.unsqueeze(-1), h, layer(h))
        left = left | (torch.cosine_similarity(y, h, dim=-1).clamp(-1, 1) > taus)
        h = y
    torch.testing.assert_close(done.output, h)
    # Padding keeps nobody.
    mask = torch.tensor([False, True, True, True]).expand(16, 4)
    assert int(saturation_exit(layers, x, -1.0, mask, over="token").executed.max()) == 1


def test_numbers_below_float32_are_summed_in_float32():
    x = torch.randn(2, 500, 64) * 50  # half's largest number is 65,504
    found = similarity(x.half(), (x + 1).half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, similarity(x, x + 1), atol=1e-4, rtol=0)


def test_the_module_exports():
    a, b = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    program = torch.export.export(Similarity(), (a, b))
    torch.testing.assert_close(program.module()(a, b), similarity(a, b))


def test_what_is_refused():
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="two tensors of one shape"):
        similarity(x, x[:, :2])
    with pytest.raises(ValueError, match="over is one of sample, token, batch"):
        similarity(x, x, over="image")
    with pytest.raises(ValueError, match="over is one of"):
        saturation_exit([], x, 0.9, over="image")
    with pytest.raises(ValueError, match=r"a mask \(B, N\)"):
        similarity(x, x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"layer 0 makes \(2, 3, 2\) of \(2, 3, 4\)"):
        saturation_exit([nn.Linear(4, 2)], x, 0.9)
