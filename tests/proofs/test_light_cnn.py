"""The Light CNN proof: arms of one size and as many passes, the augmented half, verdicts; run very small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lissom.data.sources import read
from lissom.data.splits import ArraySplit
from lissom.errors import LissomError
from lissom.proofs import light_cnn
from lissom.proofs.arms import Trained, image_task
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, ProofResult, run_proof

TINY = replace(light_cnn.QUICK, pixels=8, train=40, held_out=50, first=2, phase=1, batch=20)


@pytest.fixture(scope="module")
def result() -> ProofResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(light_cnn, "QUICK", TINY)
        return run_proof("light_cnn", quick=True, seeds=2)


def test_arms_are_equal_in_size_and_passes(result: ProofResult) -> None:
    assert [row.name for row in result.rows] == [f"digits, {name}" for name in light_cnn.ARMS]
    assert all(len(row.values) == 2 and 0 <= min(row.values) <= max(row.values) <= 100 for row in result.rows)
    assert {row.cost["parameters"] for row in result.rows} == {14_862}
    assert {row.cost["steps"] for row in result.rows} == {(2 + 5) * 2}
    assert len(result.claims) == 3
    assert all(claim.evidence.endswith("7 epochs") for claim in result.claims)


class Counting(ArraySplit):
    """How many images were asked for in whole batches; what ``fit`` looks at before it starts is less."""

    asked = 0

    def inputs(self, indices: np.ndarray | slice) -> np.ndarray:
        found = super().inputs(indices)
        self.asked += len(found) if len(found) == TINY.batch else 0
        return found


def test_the_passes_are_really_made(tmp_path: Path) -> None:
    task = image_task(read("digits"), 8, 0, train=40, held_out=50, channels=1)
    assert task.fit is not None
    counted = Counting("fit", task.fit.inputs(slice(None)), task.fit.labels)
    divided = task.with_splits(fit=counted, preprocessing=None)
    arms = light_cnn.train_arms(divided, TINY, 0, tmp_path)
    assert [arm.name for arm in arms] == list(light_cnn.ARMS)
    # (a), (b), then what (c) and (d) share, and their second stages.
    passes = 40 * (2 * TINY.epochs + TINY.first + 2 * TINY.second)
    assert counted.asked == passes
    again = light_cnn.train_arms(divided, TINY, 0, tmp_path)
    assert counted.asked == passes  # all of it was kept
    assert [arm.accuracy for arm in again] == [arm.accuracy for arm in arms]


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs = x
        return self.head(x.flatten(1))


def test_one_half_is_augmented() -> None:
    task = image_task(read("digits"), 8, 0, train=40, held_out=50, channels=1)
    assert task.fit is not None
    x = torch.from_numpy(task.fit.inputs(slice(0, 10)))
    model = Seen()
    torch.manual_seed(0)
    light_cnn.HalfAugmented().loss(model, x, torch.zeros(10, dtype=torch.int64), task)
    assert torch.equal(model.inputs[5:], x[5:])
    assert not any(torch.equal(a, b) for a, b in zip(model.inputs[:5], x[:5], strict=True))
    with pytest.raises(LissomError, match="labels"):
        light_cnn.HalfAugmented().loss(model, x, None, task)


def judged(*accuracies: tuple[float, ...], data: str = "mnist") -> list[str]:
    found = {
        name: [Trained(name, seed, value, 100, 14_862, 1, 1, 1.0) for seed, value in enumerate(values)]
        for name, values in zip(light_cnn.ARMS, accuracies, strict=True)
    }
    return [claim.verdict for claim in light_cnn._judged(found, data, light_cnn.MNIST)]


def test_verdicts_follow_the_accuracies() -> None:
    low, middle, high = (98.0, 98.1, 97.9), (98.5, 98.7, 98.3), (99.2, 99.3, 99.3)
    assert judged(low, middle, middle, high) == [SHOWS] * 4
    assert judged(high, high, high, high) == [NOT_SHOWN] * 3 + [SHOWS]
    assert judged(low, low, (97.0, 99.0, 98.2), low)[2] == INCONCLUSIVE
    assert len(judged(low, low, low, low, data="digits")) == 3
