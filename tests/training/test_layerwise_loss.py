"""The layer-wise task loss: the published figures, its relation to torch's, and training with it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError
from lissom.layers.own_end import attach_own_ends, block_stacks
from lissom.tasks.task import Task
from lissom.training.loop import fit
from lissom.training.methods.layerwise_loss import (
    LayerwiseAnswers,
    LayerwiseTaskLoss,
    layerwise_losses,
    smoothed_cross_entropy,
)
from lissom.training.methods.recovery import Recovery, Seen


def test_losses_are_the_published_ones() -> None:
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    cases = json.loads((Path(folder) / "mue" / "cases.json").read_text())["layerwise_loss"]
    assert {case["label_smoothing"] > 0 for case in cases} == {False, True}
    for case in cases:
        logits = [torch.tensor(layer, dtype=torch.float64) for layer in case["logits"]]
        found = layerwise_losses(logits, torch.tensor(case["targets"]), case["label_smoothing"])
        assert found.tolist() == pytest.approx(case["per_layer"], rel=1e-9)
        assert float(found.sum()) == pytest.approx(case["total_sum"], rel=1e-9)


def test_smoothing_is_shared_by_the_other_classes_and_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 6), torch.randint(6, (3, 4))
    targets[1, 2:] = -100
    plain = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets), plain)
    # torch gives the target a share of the smoothing too: e / V of all against e / (V - 1) of the others.
    theirs = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1 * 6 / 5)
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, 0.1), theirs)
    torch.testing.assert_close(layerwise_losses([logits], targets).sum(), plain)


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=4, num_classes=4
    ).eval()
    (stack,) = block_stacks(model, torch.zeros(1, 3, 32, 32))
    return attach_own_ends(model, stack, stack.paths[:-1])


def task(labels: bool = True) -> Task:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 64)
    x = (rng.standard_normal((64, 3, 32, 32)) * 0.3 + y[:, None, None, None]).astype(np.float32)
    split = ArraySplit("made", x, y.astype(np.int64) if labels else None)
    return Task(choose=split, report=split, fit=split, shape=(3, 32, 32), classes=tuple("abcd"), name="made")


def test_the_method_sums_over_all_answers_and_trains() -> None:
    model, of = vit(), task()
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 3])
    method = LayerwiseTaskLoss(label_smoothing=0.0)
    answers = model(x)
    assert len(answers) == 4
    want = sum(functional.cross_entropy(answer, y) for answer in answers)
    torch.testing.assert_close(method.loss(model, x, y, of), want)
    before = float(method.loss(model, x, y, of).detach())
    fit(model, of, method="layerwise_loss", epochs=3, batch=16, lr=1e-3, augment=False)
    inputs, labels = torch.from_numpy(of.fit.inputs(slice(0, 64))), torch.from_numpy(of.fit.labels)  # type: ignore[union-attr]
    assert float(method.loss(model, inputs, labels, of).detach()) < min(before, 4 * math.log(4))


def test_the_term_learns_labels_or_the_originals_classes() -> None:
    of, answers = task(), tuple(torch.randn(3, 4) for _ in range(3))
    teacher = Seen((torch.eye(4)[:3],), {})
    term, model = LayerwiseAnswers(label_smoothing=0.0), torch.nn.Linear(1, 1)
    for targets, labels in ((torch.tensor([3, 3, 3]), torch.tensor([3, 3, 3])), (None, torch.arange(3))):
        want = sum(functional.cross_entropy(answer, labels) for answer in answers)
        torch.testing.assert_close(term.loss(model, Seen(answers, {}), teacher, targets, of), want)
    assert {id(p) for p in term.parameters(model)} == {id(p) for p in model.parameters()}
    with pytest.raises(LissomError, match="this one answers once"):
        term.loss(model, Seen(answers[:1], {}), teacher, None, of)


def test_what_is_refused() -> None:
    for kind in (LayerwiseTaskLoss, LayerwiseAnswers):
        with pytest.raises(LissomError, match="label_smoothing is 1"):
            kind(label_smoothing=1.0)
    with pytest.raises(LissomError, match="the data have none"):
        LayerwiseTaskLoss().prepare(vit(), task(labels=False))
    with pytest.raises(LissomError, match="the data have none"):
        LayerwiseTaskLoss().loss(vit(), torch.zeros(1, 3, 32, 32), None, task())
    segmenting = replace(task(), kind="segmentation")
    for refused in (lambda: LayerwiseTaskLoss().prepare(vit(), segmenting),
                    lambda: Recovery(vit(), (LayerwiseAnswers(),)).prepare(vit(), segmenting)):  # fmt: skip
        with pytest.raises(LissomError, match="a task of segmentation has none"):
            refused()
