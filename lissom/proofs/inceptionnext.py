"""InceptionNeXt (arXiv 2303.16900): three eighths of the channels mixed by small and thin kernels, beside other mixers.

Networks of MetaNeXt blocks that differ in their depthwise mixer alone are trained: Inception's, a full 7 x 7, a full
3 x 3, and none. On scikit-learn's digits, and on CIFAR-10 where the folder in LISSOM_DATA has it. Then the mixer alone,
a block around it, and the networks themselves are timed beside the same with 7 x 7 kernels.

Layer scales start at 1 and not at the published 1e-6, with which so short a training would learn little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lissom.data.sources import DataSet
from lissom.meters.costs import total
from lissom.models.inceptionnext import ConvThenNorm, MetaNeXtBlock, NormThenConv
from lissom.ops.inception_dwconv import InceptionDWConv2d
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    data_set,
    faster,
    forward_call,
    image_task,
    interleaved,
    no_worse,
    pooled,
    ratios,
    run_arms,
    spread,
    step_call,
    time_rows,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings
from lissom.registry import register

__all__ = ["MIXERS", "network"]

MARGIN = 0.5  # points of accuracy that a full 7 x 7 may have more
INCEPTION, SEVEN, THREE, NONE = "Inception", "7 x 7", "3 x 3", "no mixer"


def _depthwise(dim: int, kernel: int, **more: Any) -> nn.Module:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


def _identity(dim: int, **more: Any) -> nn.Module:
    return nn.Identity()


MIXERS: Mapping[str, Callable[..., nn.Module]] = {
    INCEPTION: InceptionDWConv2d,
    SEVEN: partial(_depthwise, kernel=7),
    THREE: partial(_depthwise, kernel=3),
    NONE: _identity,
}


@dataclass(frozen=True)
class _Images:
    """Networks of ``dims`` and ``depths`` on a data set of ``side`` pixels; the budget of their training."""

    side: int
    channels: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    ratio: float
    train: int | None
    held_out: int | None
    budget: Budget


@dataclass(frozen=True)
class _Scale:
    """Batch and side of the timed maps of 96 channels, rounds of timing; the trainings."""

    batch: int
    side: int
    rounds: int
    digits: _Images
    cifar: _Images | None


DIGITS = _Images(16, 1, (32,), (3,), 2.0, 300, None, Budget(steps=200, batch=64, lr=3e-3))
CIFAR = _Images(32, 3, (32, 64, 128), (2, 2, 2), 4.0, None, None, Budget(steps=1170, batch=128, lr=2e-3))
FULL = _Scale(8, 56, 20, DIGITS, CIFAR)
QUICK = _Scale(
    1, 56, 5, replace(DIGITS, depths=(1,), held_out=300, budget=Budget(steps=10, batch=32, lr=3e-3)), None
)  # fmt: skip


@register("proof", "inceptionnext")
def inceptionnext(settings: Settings) -> ProofResult:
    """The trainings and the times. Quick: one block, few steps, one image; no CIFAR-10."""
    scale = QUICK if settings.quick else FULL
    found = {"digits": _trained(settings, pooled(data_set(quick=True)), scale.digits)}
    data = data_set("cifar10", quick=settings.quick)
    if scale.cifar is not None and data.name == "cifar10":
        found["cifar10"] = _trained(settings, data, scale.cifar)
    return _judged(scale, found, _timed(scale, settings))


def network(mixer: str, images: _Images, classes: int) -> nn.Module:
    """MetaNeXt: a 2 x 2 stem of stride 2, blocks with the mixer (see ``MIXERS``), the mean, and a linear layer."""
    first = nn.Conv2d(images.channels, images.dims[0], 2, 2)
    layers: list[nn.Module] = (
        [first] if len(images.dims) == 1 else [ConvThenNorm(first, nn.BatchNorm2d(images.dims[0]))]
    )
    before = images.dims[0]
    for dim, depth in zip(images.dims, images.depths, strict=True):
        if dim != before:
            layers.append(NormThenConv(nn.BatchNorm2d(before), nn.Conv2d(before, dim, 2, 2)))
        layers += [_block(dim, mixer, images.ratio) for _ in range(depth)]
        before = dim
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def _block(dim: int, mixer: str, ratio: float) -> nn.Module:
    return MetaNeXtBlock(dim, MIXERS[mixer], mlp_ratio=ratio, ls_init_value=1.0)


# The experiments


@dataclass(frozen=True)
class _Set:
    """The arms of one data set, and their times side by side: a training step, and a batch's forward pass."""

    found: Mapping[str, list[Trained]]
    steps: Mapping[str, list[float]]
    forward: Mapping[str, list[float]]
    batch: int


def _trained(settings: Settings, data: DataSet, images: _Images) -> _Set:
    makes = {name: partial(network, name, images, len(data.classes)) for name in MIXERS}
    found = run_arms(
        settings, makes,
        lambda seed: image_task(
            data, images.side, seed, train=images.train, held_out=images.held_out, channels=images.channels
        ),
        images.budget, part=data.name,
    )  # fmt: skip
    x = torch.randn(images.budget.batch, images.channels, images.side, images.side)
    repetitions = len(settings.seeds)
    steps = interleaved({name: step_call(make(), x) for name, make in makes.items()}, repetitions, 5)
    forward = interleaved({name: forward_call(make(), x) for name, make in makes.items()}, repetitions, 5)
    return _Set(found, steps, forward, images.budget.batch)


ALONE, BLOCK, STEP = "mixer alone", "block", "block, training step"


def _timed(scale: _Scale, settings: Settings) -> dict[str, tuple[dict[str, list[float]], dict[str, int]]]:
    """Times of Inception and 7 x 7 on 96 channels, and multiplications: the mixer, a block, a training step of it."""
    x = torch.randn(scale.batch, 96, scale.side, scale.side)
    shape = tuple(x.shape[1:])
    found = {}
    for what in (ALONE, BLOCK, STEP):
        modules = {
            name: MIXERS[name](96) if what == ALONE else _block(96, name, 4.0) for name in (INCEPTION, SEVEN, THREE)
        }
        call = step_call if what == STEP else forward_call
        times = interleaved(
            {name: call(module, x) for name, module in modules.items()}, len(settings.seeds), scale.rounds
        )
        found[what] = times, {name: total(module, shape)[1] for name, module in modules.items()}
        settings.progress(f"timed: {what}")
    return found


# The verdicts


def _judged(
    scale: _Scale,
    found: Mapping[str, _Set],
    timed: Mapping[str, tuple[dict[str, list[float]], dict[str, int]]],
) -> ProofResult:
    claims: list[Claim] = []
    rows: list[Row] = []
    for name, part in found.items():
        claims += [
            no_worse(
                f"On {name}, three eighths of the channels mixed lose less than {MARGIN:g} points against 7 x 7.",
                part.found[INCEPTION], part.found[SEVEN], margin=MARGIN,
            ),
            better(
                f"On {name}, mixing gains accuracy over no mixer.", part.found[INCEPTION], part.found[NONE],
                matters=MARGIN,
            ),
            faster(f"On {name}, a training step takes less time than with 7 x 7.", part.steps, SEVEN, INCEPTION),
        ]  # fmt: skip
        rows += accuracy_rows(part.found, name)
        for metric, times in (("training step", part.steps), ("batch, forward", part.forward)):
            for mixer, values in times.items():
                rate = 1000 * part.batch * len(values) / sum(values)
                rows.append(Row(f"{name}, {mixer}", metric, tuple(values), "ms", {"images/s": rate}))
    where = f"96 channels, {scale.side} x {scale.side}, batch {scale.batch}"
    alone, macs = timed[ALONE]
    saved = f"{macs[SEVEN] / macs[INCEPTION]:.1f} times fewer multiplications; 3 x 3 on all channels is "
    claims += [
        faster(
            f"The mixer alone is at least five times as fast as a full 7 x 7 ({where}).", alone, SEVEN, INCEPTION,
            at_least=5.0, more=f"{saved}{spread(ratios(alone, SEVEN, THREE))} times as fast",
        ),
        faster(f"A block is at least 1.2 times as fast ({where}).", timed[BLOCK][0], SEVEN, INCEPTION, at_least=1.2),
        faster(
            f"A training step of a block is at least 1.2 times as fast ({where}).", timed[STEP][0], SEVEN, INCEPTION,
            at_least=1.2,
        ),
    ]  # fmt: skip
    for what, (times, counts) in timed.items():
        rows += time_rows(times, what, {name: {"10^6 MACs": counts[name] / 1e6} for name in times})
    notes = (
        "layer scales start at 1, not at 1e-6",
        "the paper's gain in accuracy (0.2 points on ImageNet) is far below what these intervals can tell",
    )
    return ProofResult(
        "inceptionnext", f"mixers of MetaNeXt on {' and '.join(found)}", tuple(claims), tuple(rows), notes
    )
