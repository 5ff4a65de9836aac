"""fit on masks: a segmenter learns, masks move with images, a resumed run repeats the other, lissom fit works."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lissom.cli import main
from lissom.data.splits import ArraySplit
from lissom.errors import LissomError
from lissom.models.factory import create_model
from lissom.tasks.segmentation import SegmentationTask
from lissom.training.loop import evaluate, fit
from lissom.training.methods.base import Method

SIZE = (16, 24)


def shapes(name: str, count: int, seed: int) -> ArraySplit:
    """A bright rectangle (class 1) or a striped one (class 2) on grey noise (0); the mask's rim is ignored (3)."""
    random = np.random.default_rng(seed)
    x = random.normal(0, 0.2, (count, 3, *SIZE)).astype(np.float32)
    masks = np.zeros((count, *SIZE), np.uint8)
    for image, mask in zip(x, masks, strict=True):
        top, left, kind = random.integers(1, 7), random.integers(1, 11), random.integers(1, 3)
        place = slice(top, top + 8), slice(left, left + 12)
        image[:, *place] += 1.5 if kind == 1 else np.where(np.arange(12) % 2, 1.5, -1.5)
        mask[place] = kind
        mask[top, place[1]] = 3
    return ArraySplit(name, x, masks)


@pytest.fixture
def task() -> SegmentationTask:
    splits = (
        shapes(name, count, seed) for seed, (name, count) in enumerate((("choose", 12), ("report", 12), ("fit", 20)))
    )
    return SegmentationTask(*splits, shape=(3, *SIZE), classes=("ground", "plain", "striped"), ignore=3)


def segmenter(seed: int = 0, name: str = "vit_segmenter", classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": SIZE, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return create_model(name, **sizes, num_classes=classes, pos_drop_rate=0.1)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.detach().flatten().double() for v in model.state_dict().values()])


class Stop(Exception):
    """Stands for a kill: raised between two epochs."""


def test_a_resumed_run_repeats_the_other(task, tmp_path):
    settings = {"epochs": 2, "batch": 8, "lr": 3e-3, "flip": True}
    whole = fit(segmenter(), task, folder=tmp_path / "whole", **settings)

    def stop(event) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(segmenter(), task, folder=tmp_path / "killed", progress=stop, **settings)
    resumed = fit(segmenter(5), task, folder=tmp_path / "killed", resume=True, **settings)
    assert [(h["loss"], h["quality"]) for h in resumed.history] == [(h["loss"], h["quality"]) for h in whole.history]
    assert torch.equal(weights(resumed.model), weights(whole.model))
    other = task.with_splits(fit=ArraySplit("fit", task.fit._array, np.flip(task.fit.labels, 1).copy()))
    with pytest.raises(LissomError, match="was trained with data "):
        fit(segmenter(), other, folder=tmp_path / "whole", resume=True, **settings)


@pytest.mark.parametrize("name", ["vit_segmenter", "vit_segmenter_mask"])
def test_it_learns(task, name):
    model = segmenter(name=name)
    before = evaluate(model, task, task.report).value
    result = fit(model, task, epochs=15, batch=5, lr=5e-3)
    after = evaluate(model, task, task.report, batch=5)
    assert before < 40 < 60 < after.value
    assert after.low < after.value < after.high
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.history[-1]["quality"] == evaluate(model, task, task.choose).value


@dataclass(frozen=True)
class Watching(Method):
    """Holds each mask against its image: the mask is where the image is above zero."""

    def loss(self, model, inputs, targets, task):
        assert torch.equal(targets, (inputs[:, 0] > 0).to(torch.uint8))
        return task.loss(model(inputs), targets)


def test_masks_move_with_their_images(task):
    x = np.random.default_rng(0).normal(size=(20, 3, *SIZE)).astype(np.float32)
    same = ArraySplit("fit", x, (x[:, 0] > 0).astype(np.uint8))
    assert fit(segmenter(), task.with_splits(fit=same), method=Watching(), epochs=2, batch=10, flip=True).history


def test_answers_of_another_size_train_without_moving(task):
    x = task.fit._array
    small = ArraySplit("fit", x, np.ascontiguousarray(task.fit.labels[:, ::2, ::2]))
    model = nn.Conv2d(3, 3, 4, stride=4)
    assert fit(model, task.with_splits(fit=small), epochs=1).history  # augment=None leaves it out
    with pytest.raises(LissomError, match="augment=False"):
        fit(model, task.with_splits(fit=small), epochs=1, augment=True)


def test_agreement_without_labels(task):
    bare = task.with_splits(report=ArraySplit("report", task.report._array))
    a, b = segmenter(0), segmenter(1)
    assert evaluate(a, bare, bare.report, original=a).value == 100
    assert evaluate(a, bare, bare.report, original=b).value < 100


def test_models_that_do_not_fit_are_told(task):
    with pytest.raises(LissomError, match="answers with 5 maps and the data have 3 classes"):
        fit(segmenter(classes=5), task)
    with pytest.raises(LissomError, match=r"answers with shape \(1, 3\); for segmentation"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 24, 3)), task)
    with pytest.raises(LissomError, match="needs labels"):
        fit(segmenter(), replace(task, fit=ArraySplit("fit", task.fit._array)))


MODEL = """
import torch
from lissom.models.factory import create_model


def small():
    torch.manual_seed(0)
    return create_model("vit_segmenter", img_size=(16, 24), patch_size=8, embed_dim=12, depth=1, num_classes=2)
"""


def test_lissom_fit_trains_on_masks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 10), ("test", 4)):
        for part in ("images", "masks"):
            (tmp_path / "data" / split / part).mkdir(parents=True)
        for i in range(count):
            index = np.zeros((32, 48), np.uint8)
            index[:, 4 * i :] = 1
            Image.fromarray(index * 150 + i).convert("RGB").save(tmp_path / "data" / split / "images" / f"{i}.png")
            Image.fromarray(index).save(tmp_path / "data" / split / "masks" / f"{i}.png")
    (tmp_path / "models.py").write_text(MODEL)
    arguments = ["fit", "models.py:small", "--data", "data", "--epochs", "2", "--batch", "3", "--lr", "0.01"]
    assert main([*arguments, "--out", "made"]) == 0
    said = capsys.readouterr()
    assert "mean IoU" in said.err
    assert "mean IoU: " in said.out
    assert "new" not in said.err
    history = json.loads((tmp_path / "made" / "history.json").read_text())
    low, high = history["report"]["quality_ci"]
    assert low <= history["report"]["quality"] <= high
    assert history["metric"] == "mean IoU"
