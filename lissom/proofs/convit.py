"""ConViT (arXiv 2103.10697): transformers whose first blocks begin as convolutions, by how few images they learn from.

A small ConViT is trained on parts of a data set, always for as many steps, in four forms: (a) ordinary attention in all
blocks; (b) gated positional attention in the first four of six, which begin as the taps of a convolution; (c) the same
from random weights; (d) as (b), the gates held at positions, so that the four blocks stay convolutions. Of (b) is also
told where its gates and its attention have gone.

The data are CIFAR-10 where the folder in LISSOM_DATA has it, else scikit-learn's digits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lissom.models.convit import ConViT, attention_distances, gates
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    built,
    data_set,
    figure_rows,
    image_task,
    run_arms,
    spread,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register
from lissom.tasks.task import Task

__all__ = ["convit_small_scale"]

PLAIN, LOCAL, RANDOM, FIXED = "(a) plain", "(b) gated, local", "(c) gated, random", "(d) local, gates held"
ARMS = (PLAIN, LOCAL, RANDOM, FIXED)
HEADS, DEPTH, GATED = 9, 6, 4
OPEN = 20.0  # a gate that is held: sigmoid(20) leaves 2e-9 to content
MATTERS = 1.0  # points of accuracy below which an advantage is not worth having
LOOKED_AT = 100  # held-out images over which attention is averaged
START_GATE = 0.731  # sigmoid(1)


@dataclass(frozen=True)
class _Scale:
    """Pixels and patches, channels of a head, numbers of images to learn from, held-out images, the budget."""

    side: int
    patch: int
    head: int
    sizes: tuple[int, ...]
    held_out: int
    budget: Budget


QUICK = _Scale(16, 4, 4, (100, 400), 200, Budget(steps=20, batch=32, lr=2e-3))
DIGITS = _Scale(16, 2, 8, (100, 400, 1400), 359, Budget(steps=1500, batch=64, lr=1e-3))
CIFAR = _Scale(32, 4, 8, (1000, 5000, 20_000), 2000, Budget(steps=1500, batch=64, lr=1e-3))


@register("proof", "convit")
def convit(settings: Settings) -> ProofResult:
    """All arms on every number of images. Quick: the digits, narrow networks, few steps."""
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    makes = {name: partial(convit_small_scale, name, scale, len(data.classes)) for name in ARMS}
    found = {}
    for size in scale.sizes:

        def task_of(seed: int, size: int = size) -> Task:
            return image_task(data, scale.side, seed, train=size, held_out=scale.held_out)

        found[size] = run_arms(settings, makes, task_of, scale.budget, _look, f"{size} images")
    task = image_task(data, scale.side, 0, train=64, held_out=LOOKED_AT)
    before = _before(makes[LOCAL], task, settings)
    return _judged(data.name, scale, found, before)


def convit_small_scale(arm: str, scale: Any, classes: int) -> nn.Module:
    """The network of an arm: 6 blocks of 9 heads, of which the first 4 are gated in all arms but (a)."""
    model = ConViT(
        img_size=scale.side, patch_size=scale.patch, num_classes=classes, embed_dim=scale.head, depth=DEPTH,
        num_heads=HEADS, local_up_to_layer=0 if arm == PLAIN else GATED, local_init=arm != RANDOM,
    )  # fmt: skip
    if arm == FIXED:
        for block in model.blocks[:GATED]:
            del block.attn.gating_param
            block.attn.register_buffer("gating_param", torch.full((HEADS,), OPEN))
    return model


# What is looked at


def _distances(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """How far each gated block's heads look, in tokens, the mean over heads, images and places."""
    found = attention_distances(model, images)
    return {f"distance, block {path.split('.')[1]}": heads.mean().item() for path, heads in found.items()}


def _look(name: str, model: nn.Module, task: Task) -> Mapping[str, float]:
    """Of gated arms: by block the mean gate, the lowest of its heads, and how far its heads look."""
    figures: dict[str, float] = {}
    for path, values in gates(model).items():
        block = path.split(".")[1]
        figures[f"mean gate, block {block}"] = values.mean().item()
        figures[f"lowest gate, block {block}"] = values.min().item()
    if figures:
        figures |= _distances(model, torch.from_numpy(task.report.inputs(slice(LOOKED_AT))))
    return figures


def _before(make: Callable[[], nn.Module], task: Task, settings: Settings) -> list[float]:
    """How far the heads of (b) look before training, the mean over its blocks, one figure a seed."""
    images = torch.from_numpy(task.report.inputs(slice(LOOKED_AT)))
    return [statistics.fmean(_distances(built(make, seed), images).values()) for seed in settings.seeds]


# The verdicts


def _judged(
    data: str, scale: _Scale, found: Mapping[int, Mapping[str, Sequence[Trained]]], before: Sequence[float]
) -> ProofResult:
    few, many = scale.sizes[0], scale.sizes[-1]
    claims: list[Claim] = []
    for size in scale.sizes[:-1]:
        claims.append(
            better(
                f"From {size} images a network whose first blocks begin as convolutions learns more than a plain one.",
                found[size][LOCAL], found[size][PLAIN], matters=MATTERS,
            )
        )  # fmt: skip
    gaps = {
        size: [a.accuracy - b.accuracy for a, b in zip(arms[LOCAL], arms[PLAIN], strict=True)]
        for size, arms in found.items()
    }
    closes = better("", gaps[few], gaps[many], matters=MATTERS)
    claims += [
        Claim(
            f"The gap shrinks with the images: it is larger from {few} than from {many}.",
            closes.verdict,
            "; ".join(f"{size} images: (b) - (a) {spread(gap)} points" for size, gap in gaps.items()),
        ),
        better(
            f"From {few} images the local start gains over the same layers from random weights.",
            found[few][LOCAL], found[few][RANDOM], matters=MATTERS,
        ),
        better(
            f"From {few} images the gated layers gain over plain ones even from random weights.",
            found[few][RANDOM], found[few][PLAIN], matters=MATTERS,
        ),
        better(
            f"From {many} images free gates gain over gates held at positions.",
            found[many][LOCAL], found[many][FIXED], matters=MATTERS,
        ),
        _escape(found[many][LOCAL], many),
        _further(found[many][LOCAL], before, many),
    ]  # fmt: skip
    rows: list[Row] = []
    for size, arms in found.items():
        rows += accuracy_rows(arms, f"{size} images")
    for kind in ("mean gate", "lowest gate", "distance"):
        for block in range(GATED):
            arms = {name: found[many][name] for name in (LOCAL, RANDOM)}
            rows += figure_rows(arms, f"{kind}, block {block}", part=f"{many} images")
    rows.append(Row(f"{LOCAL}, before training", "distance, all blocks", tuple(before)))
    notes = (
        f"{scale.budget.steps} steps of {scale.budget.batch} images for every arm and number of images: of few images, "
        "many passes",
        "distances are in tokens; a gate starts at 0.73 and is the share of positions",
    )
    title = f"{data} from {few} to {many} images, {(scale.side // scale.patch) ** 2} tokens"
    return ProofResult("convit", title, tuple(claims), tuple(rows), notes)


def _escape(arms: Sequence[Trained], images: int) -> Claim:
    """Whether in some block some head's gate has fallen to less than half of where it started."""
    lowest = [min(arm.figures[f"lowest gate, block {block}"] for block in range(GATED)) for arm in arms]
    means = [
        f"block {block} {spread([arm.figures[f'mean gate, block {block}'] for arm in arms])}" for block in range(GATED)
    ]
    return Claim(
        "Some heads leave locality: the lowest gate falls below half of where all started.",
        verdict_by_interval([START_GATE / 2 - gate for gate in lowest], matters=0.02),
        f"lowest gate {spread(lowest)}, from {images} images; mean gates: {', '.join(means)}",
    )


def _further(arms: Sequence[Trained], before: Sequence[float], images: int) -> Claim:
    after = [statistics.fmean(arm.figures[f"distance, block {block}"] for block in range(GATED)) for arm in arms]
    grown = better("", after, before, matters=0.1, unit="tokens")
    return Claim(
        "Attention looks further after training than before.",
        grown.verdict,
        f"from {spread(before)} to {spread(after)} tokens, {images} images",
    )
