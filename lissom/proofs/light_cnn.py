"""Light CNN (arXiv 2501.15547): two submodels, one of images and one of augmented ones, merged and fine-tuned.

The same network of 14,862 parameters (15,294 for colours) by four ways of training, of as many image passes each. A
pass is one image through both trunks; the first stage of the recipe sends an image through one and its augmented form
through the other, which is as much work.

(a) the merged network from random weights, on the images; (b) the same, one half of every batch augmented; (c) the two
submodels at once, then the merged network of them, all layers together; (d) the paper's whole recipe: the same two
submodels, then from the head backwards, one more group of layers a phase. (c) and (d) go on from the same first stage.

On MNIST, of which the folder in LISSOM_DATA has 10,000 training images, and on CIFAR-10 where it is there; else, and in
quick runs, on scikit-learn's digits. The network is lissom's own of the published size, the published one being
unknown, so the published accuracies are aims and no reproduction.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lissom.data.sources import DataSet, read
from lissom.errors import LissomError
from lissom.meters.costs import total
from lissom.models.light_cnn import LightCNN, dual_light_cnn, light_cnn_groups
from lissom.proofs.arms import Trained, accuracy_rows, better, built, image_task, spread
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.loop import evaluate, fit
from lissom.training.methods.base import Method
from lissom.training.methods.dual_input import DualInput, augmented
from lissom.training.unfreezing import fit_unfreezing

__all__ = ["ARMS", "HalfAugmented", "train_arms"]

ARMS = ("(a) images", "(b) and augmented", "(c) two stages", "(d) unfreezing")
RATES = (1e-3, 3e-4, 1e-4)  # of the phases: the head, what comes next, and all that come then
TOGETHER = 3e-4  # of the second stage where nothing is frozen
PUBLISHED = {"mnist": 99.0, "cifar10": 65.0}  # % right; with all training images
MATTERS = 0.3  # points of accuracy below which an advantage is not worth having


@dataclass(frozen=True)
class _Scale:
    """Images of ``pixels`` and ``channels``; how many train and judge; epochs of the first stage and of each of the
    five phases of the second."""

    pixels: int
    channels: int
    train: int
    held_out: int | None
    first: int
    phase: int
    batch: int = 128
    lr: float = 1e-3

    @property
    def epochs(self) -> int:
        return self.first + self.second

    @property
    def second(self) -> int:
        return len(light_cnn_groups()) * self.phase


QUICK = _Scale(16, 1, 600, 600, first=5, phase=1, batch=32, lr=3e-3)
DIGITS = _Scale(28, 1, 1200, None, first=30, phase=6, batch=32)
MNIST = _Scale(28, 1, 10_000, 5000, first=10, phase=2)
CIFAR = _Scale(32, 3, 10_000, 5000, first=10, phase=2)


@register("proof", "light_cnn")
def light_cnn(settings: Settings) -> ProofResult:
    """All arms on each of the data sets. Quick: the digits at 16 x 16, ten epochs."""
    rows: list[Row] = []
    claims: list[Claim] = []
    for data, scale in _sources(settings.quick):
        found: dict[str, list[Trained]] = {name: [] for name in ARMS}
        for seed in settings.seeds:
            task = image_task(
                data, scale.pixels, seed, train=scale.train, held_out=scale.held_out, channels=scale.channels
            )
            for arm in train_arms(task, scale, seed, settings.folder):
                found[arm.name].append(arm)
                settings.progress(f"{data.name}, seed {seed}: {arm.name} answers {arm.accuracy:.2f} % right")
        rows += accuracy_rows(found, data.name)
        claims += _judged(found, data.name, scale)
    notes = (
        "14,862 parameters are 59 kB in float32; the published 0.17 MB fit them together with Adam's two moments.",
        "The ranges of rotation, zoom, shift and brightness are not published; 10 degrees and a tenth are used.",
    )
    title = "two submodels merged and unfrozen, beside the same network trained at once"
    return ProofResult("light_cnn", title, tuple(claims), tuple(rows), notes)


def _sources(quick: bool) -> list[tuple[DataSet, _Scale]]:
    folder = os.environ.get("LISSOM_DATA")
    found = []
    for name, scale in (("mnist", MNIST), ("cifar10", CIFAR)) if folder and not quick else ():
        if (Path(folder) / name).is_dir():  # type: ignore[arg-type]
            found.append((read(Path(folder) / name), scale))  # type: ignore[arg-type]
    return found or [(read("digits"), QUICK if quick else DIGITS)]


@dataclass(frozen=True)
class HalfAugmented(Method):
    """The task's loss on batches whose first half is augmented, with the ranges of ``DualInput``."""

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        if targets is None:
            raise LissomError("this method learns from labels, and the data have none")
        half = len(inputs) // 2
        return task.loss(model(torch.cat([augmented(inputs[:half]), inputs[half:]])), targets)


def train_arms(task: Task, scale: _Scale, seed: int, folder: Path) -> list[Trained]:
    """The four arms of one seed, in the order of ``ARMS``. All make ``scale.epochs`` passes over ``task.fit``.

    ``folder`` keeps a checkpoint of every training, from which a run that was killed goes on.
    """
    assert task.fit is not None
    classes, channels = len(task.classes), scale.channels
    steps = scale.epochs * (len(task.fit) // min(scale.batch, len(task.fit)))

    def settings(name: str, later: int = 0) -> dict[str, Any]:
        return {
            "batch": scale.batch, "weight_decay": 0.0, "augment": False, "accelerator": "cpu", "seed": seed + later,
            "folder": folder / f"{task.name}-{seed}-{name}", "resume": True,
        }  # fmt: skip

    found: dict[str, tuple[nn.Module, float]] = {}
    for name, short, method in ((ARMS[0], "images", "supervised"), (ARMS[1], "augmented", HalfAugmented())):
        model = built(partial(LightCNN, classes, channels), seed)
        done = fit(model, task, method=method, epochs=scale.epochs, lr=scale.lr, **settings(short))
        found[name] = model, done.seconds
    dual = built(partial(dual_light_cnn, classes, channels), seed)
    first = fit(dual, task, method=DualInput(), epochs=scale.first, lr=scale.lr, **settings("first"))
    merged = dual.merge()  # type: ignore[operator]
    at_once, unfrozen = merged, copy.deepcopy(merged)
    second = fit(at_once, task, epochs=scale.second, lr=TOGETHER, **settings("together", 1))
    found[ARMS[2]] = at_once, first.seconds + second.seconds
    phases = fit_unfreezing(
        unfrozen, task, light_cnn_groups(), epochs=scale.phase, lrs=RATES, **settings("unfreezing", 1)
    )
    found[ARMS[3]] = unfrozen, first.seconds + sum(phase.seconds for phase in phases)
    return [_seen(name, model, task, seed, steps, seconds) for name, (model, seconds) in found.items()]


def _seen(name: str, model: nn.Module, task: Task, seed: int, steps: int, seconds: float) -> Trained:
    quality = evaluate(model, task, task.report, 250)
    parameters, macs = total(model, task.shape)
    return Trained(name, seed, quality.value, quality.count, parameters, macs, steps, seconds)


def _judged(found: Mapping[str, Sequence[Trained]], data: str, scale: _Scale) -> list[Claim]:
    images, both, stages, recipe = (found[name] for name in ARMS)
    claims = [
        better(
            f"The recipe is better than training the same network on the images, at as many passes ({data}).",
            recipe, images, matters=MATTERS,
        ),
        better(
            f"It is better than training the same network on images and augmented ones ({data}).",
            recipe, both, matters=MATTERS,
        ),
        better(
            f"Unfreezing from the head backwards is better than training all layers of the merged network ({data}).",
            recipe, stages, matters=MATTERS,
        ),
    ]  # fmt: skip
    if data in PUBLISHED:
        aim, reached = PUBLISHED[data], [arm.accuracy for arm in recipe]
        text = f"A network of {recipe[0].parameters:,} parameters answers {aim:g} % of {data} right."
        evidence = f"{spread(reached)} % with {scale.train:,} training images"
        claims.append(Claim(text, verdict_by_interval([value - aim for value in reached]), evidence))
    return [replace(claim, evidence=f"{claim.evidence}; {scale.epochs} epochs") for claim in claims]
