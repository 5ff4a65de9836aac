"""Exits on the transformers package's own ViT, DeiT and Swin, of small sizes; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.export.exporting import export_plan, run_stages
from lissom.export.joint import joint_of
from lissom.export.plan import Plan
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.early_exit import EarlyExit, positions
from lissom.techniques.mue import SimilarityExit

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = (3, 32, 32)
COMMON = {"image_size": 32, "patch_size": 8, "num_labels": 5}
PLAIN = {**COMMON, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
SWIN = {**COMMON, "patch_size": 4, "embed_dim": 8, "depths": (1, 3, 2), "num_heads": (1, 2, 4), "window_size": 2}


class Wrapped(nn.Module):
    """As a user wraps such a model: logits are its answer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).logits


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config: Any = getattr(transformers, f"{kind}Config")(**(SWIN if kind == "Swin" else PLAIN))
    return Wrapped(getattr(transformers, f"{kind}ForImageClassification")(config)).eval()


def task() -> Task:
    rng = np.random.default_rng(0)
    splits = [
        ArraySplit("noise", rng.standard_normal((16, *SHAPE)).astype(np.float32), rng.integers(0, 5, 16))
        for _ in range(3)
    ]
    return Task(splits[0], splits[1], splits[2], SHAPE, tuple("abcde"), name="noise")


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Swin"])
def test_exits_stand_behind_blocks_and_the_answer_stays(kind: str, tmp_path: Path) -> None:
    plan = Plan.of(model(kind), SHAPE)
    places = positions(plan.model, SHAPE)
    assert len(places) >= 3, places
    changed = EarlyExit(at=("*",)).apply(plan, task())
    x = torch.from_numpy(task().choose.inputs(slice(0, 4)))
    with torch.no_grad():
        found, want = joint_of(changed)(x), plan.model(x)
    torch.testing.assert_close(found[len(places)], want, rtol=1e-5, atol=1e-6)
    artifact = export_plan(changed, Target("torch", threads=1), tmp_path / "a", shape=SHAPE)
    answers, scores = run_stages(artifact, x.numpy(), 1)
    for place, answer in enumerate(answers):
        np.testing.assert_allclose(answer, found[place].numpy(), rtol=1e-4, atol=1e-5)
    assert scores.shape == (4, len(places))


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Swin"])
def test_similarity_exits_answer_by_the_models_own_end(kind: str) -> None:
    plan = Plan.of(model(kind), SHAPE)
    changed = SimilarityExit(at=("*",)).apply(plan, task())
    x = torch.from_numpy(task().choose.inputs(slice(0, 4)))
    with torch.no_grad():
        found, want = joint_of(changed)(x), plan.model(x)
    assert changed.decisions
    torch.testing.assert_close(found[len(changed.decisions)], want, rtol=1e-5, atol=1e-6)
