"""TVConv (arXiv 2203.10489): kernels that differ from place to place, beside depthwise convolutions in one network.

Both arms are one small network of inverted residuals under a mean over all places; the second is made of the first by
``to_tvconv``, and starts with the same weights everywhere else. Three parts:

1. A generated layout. Each of nine cells holds one of two glyphs, with noise over everything; two cells, drawn by the
   seed, decide the class (the first's glyph + 2 times the second's), the other seven are there to confuse. A network
   that cannot tell the cells apart can at best count glyphs, and so answer 38.7 % of images right.
2. Aligned images, and the same images moved at random, where no place means anything. The full run takes the aligned
   faces of 40 people (AT&T) where the folder in LISSOM_DATA has them, else scikit-learn's digits.
3. The stored form: its answers are those of the trained one, and its time that of a depthwise convolution or not.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lissom.data.sources import DataSet, read
from lissom.data.splits import ArraySplit, Images
from lissom.layers.tvconv import TVConv2d, fold_tvconv_, to_tvconv
from lissom.models.tvconv import _InvertedResidual
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    built,
    faster,
    figure_rows,
    forward_call,
    image_task,
    interleaved,
    pooled,
    run_arms,
    spread,
    time_rows,
)
from lissom.proofs.base import Claim, ProofResult, Settings, verdict_by_interval
from lissom.registry import register
from lissom.tasks.task import Split, Task

__all__ = ["counting_ceiling", "layout", "moved"]

SIDE, CELLS, GLYPH = 24, 9, 5
CELL = SIDE // 3
NOISE = 0.3
PLUS = np.zeros((GLYPH, GLYPH), np.float32)
PLUS[GLYPH // 2, :] = PLUS[:, GLYPH // 2] = 1
CROSS = np.maximum(np.eye(GLYPH, dtype=np.float32), np.eye(GLYPH, dtype=np.float32)[::-1])
MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
ROOM = 5.0  # points above what counting can reach, for the luck of a finite set of images
SAME = 1e-4  # largest difference of logits of the two forms
FASTER, TIMED = 0.9, (64, 48)  # share of a depthwise convolution's speed that counts as none lost; channels, side
ROUNDS = 60


@dataclass(frozen=True)
class _Scale:
    """Blocks of ``width`` with TVConv's ``hidden`` and ``layers``; how many images train and judge, and budgets."""

    layout_train: int
    layout_held_out: int
    layout: Budget
    pixels: int
    train: int
    held_out: int | None
    images: Budget
    width: int = 8
    image_width: int = 16
    hidden: int = 16
    layers: int = 1


QUICK = _Scale(800, 400, Budget(80, 16, 3e-3, weight_decay=0.0), 16, 600, 600, Budget(40, 32, 3e-3))
DIGITS = _Scale(4000, 2000, Budget(625, 32, 3e-3, weight_decay=0.0), 16, 1200, None, Budget(300, 32, 3e-3))
FACES = _Scale(4000, 2000, Budget(625, 32, 3e-3, weight_decay=0.0), 28, 280, None, Budget(500, 16, 3e-3))


@register("proof", "tvconv")
def tvconv(settings: Settings) -> ProofResult:
    """All parts. Quick: fewer images and steps, and the digits."""
    data = _natural(settings.quick)
    scale = QUICK if settings.quick else FACES if data.name == "orl_faces" else DIGITS
    cells = run_arms(
        settings, _arms(SIDE, scale.width, 2, 4, scale), lambda seed: _layout_task(scale, seed), scale.layout,
        _folded, "generated layout",
    )  # fmt: skip
    arms = _arms(scale.pixels, scale.image_width, 3, len(data.classes), scale)

    def aligned(seed: int) -> Task:
        return image_task(data, scale.pixels, seed, train=scale.train, held_out=scale.held_out, channels=1)

    still = run_arms(settings, arms, aligned, scale.images, _folded, f"{data.name} aligned")
    loose = run_arms(settings, arms, lambda s: moved(aligned(s), s), scale.images, _folded, f"{data.name} moved")
    times = _times(len(settings.seeds))
    found = {"generated layout": cells, f"{data.name} aligned": still, f"{data.name} moved": loose}
    rows = [row for part, trained in found.items() for row in accuracy_rows(trained, part)]
    rows += [row for part, trained in found.items() for row in figure_rows(trained, "stored form differs by", "", part)]
    notes = (
        "Multiplications are those in training; of them TVConv's generator runs once a step, whatever the batch. "
        "Stored, a TVConv has as many as the depthwise convolution.",
    )
    title = "kernels of their own at every place, beside depthwise convolutions"
    return ProofResult(
        "tvconv", title, (*_layout_claims(cells), *_image_claims(still, loose, data.name), *_stored(found, times)),
        (*rows, *time_rows(times)), notes,
    )  # fmt: skip


# The arms


class _Net(nn.Module):
    """Images (B, 1, side, side) to logits: a 3 x 3 convolution, inverted residuals on that map or, where there are
    three, on maps of a half and a quarter of its side as well, their mean, a linear layer."""

    def __init__(self, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        strides = (1, 1) if blocks == 2 else (1, 2, 2)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        self.blocks = nn.Sequential(
            *(
                _InvertedResidual(
                    width, width, 2, stride,
                    nn.Conv2d(2 * width, 2 * width, 3, stride, 1, groups=2 * width, bias=False),
                )
                for stride in strides
            )
        )  # fmt: skip
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _arms(side: int, width: int, blocks: int, classes: int, scale: _Scale) -> dict[str, partial[nn.Module]]:
    def variant() -> nn.Module:
        plain = _Net(width, blocks, classes)
        return to_tvconv(plain, torch.zeros(1, 1, side, side), hidden=scale.hidden, layers=scale.layers)

    return {"TVConv": partial(variant), "depthwise": partial(_Net, width, blocks, classes)}


def _folded(name: str, model: nn.Module, task: Task) -> Mapping[str, float]:
    """The largest difference of logits that storing the kernels makes; nothing for the other arm."""
    if name != "TVConv":
        return {}
    x = torch.from_numpy(task.report.inputs(slice(0, 64)))
    with torch.no_grad():
        stored = fold_tvconv_(copy.deepcopy(model))
        return {"stored form differs by": float((stored(x) - model(x)).abs().max())}


# The generated layout


def layout(count: int, deciding: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 (count, 1, 24, 24) of nine cells with a glyph each, 0 a plus and 1 a cross, and noise; their
    classes int64 (count,): the glyph of the first of the ``deciding`` cells + 2 times that of the second."""
    glyphs = rng.integers(0, 2, (count, CELLS))
    images = NOISE * rng.standard_normal((count, 1, SIDE, SIDE)).astype(np.float32)
    rim = (CELL - GLYPH) // 2
    for cell in range(CELLS):
        top, left = CELL * (cell // 3) + rim, CELL * (cell % 3) + rim
        images[:, 0, top : top + GLYPH, left : left + GLYPH] += np.stack([PLUS, CROSS])[glyphs[:, cell]]
    first, second = deciding
    return images, (glyphs[:, first] + 2 * glyphs[:, second]).astype(np.int64)


def counting_ceiling() -> float:
    """The share of images, in %, that whoever knows only how many of the nine glyphs are crosses can get right.

    Of ``n`` crosses, both deciding cells are crosses with n (n - 1) / 72, neither with (9 - n) (8 - n) / 72, and the
    one or the other alone with n (9 - n) / 72 each; the best answer is the likeliest.
    """
    most = [max(n * (n - 1), (CELLS - n) * (CELLS - 1 - n), n * (CELLS - n)) / 72 for n in range(CELLS + 1)]
    return 100 * sum(math.comb(CELLS, n) * share for n, share in enumerate(most)) / 2**CELLS


def _layout_task(scale: _Scale, seed: int) -> Task:
    rng = np.random.default_rng([seed, CELLS])
    first, second = (int(cell) for cell in rng.choice(CELLS, 2, replace=False))
    splits = {
        name: ArraySplit(name, *layout(count, (first, second), rng))
        for name, count in (("fit", scale.layout_train), ("choose", 32), ("report", scale.layout_held_out))
    }
    return Task(
        splits["choose"], splits["report"], splits["fit"], (1, SIDE, SIDE), ("00", "10", "01", "11"), name="layout"
    )


def _layout_claims(found: Mapping[str, list[Trained]]) -> tuple[Claim, ...]:
    reached, ceiling = [arm.accuracy for arm in found["depthwise"]], counting_ceiling()
    return (
        better(
            "Where a place decides what is meant, TVConv is better than depthwise convolutions.",
            found["TVConv"], found["depthwise"], matters=MATTERS,
        ),
        Claim(
            "Depthwise convolutions hardly tell places apart: they stay near what counting glyphs can reach.",
            verdict_by_interval([ceiling + ROOM - value for value in reached]),
            f"{spread(reached)} % right; counting reaches {ceiling:.1f}, and up to {ceiling + ROOM:.1f} is near",
        ),
    )  # fmt: skip


# Aligned images


def _natural(quick: bool) -> DataSet:
    """The aligned faces, or the digits; all in ``train``, of which ``image_task`` takes a part."""
    folder = os.environ.get("LISSOM_DATA")
    if folder and not quick and (Path(folder) / "orl_faces" / "all.parquet").is_file():
        return _faces(Path(folder) / "orl_faces" / "all.parquet")
    return pooled(read("digits"))


def _faces(path: Path) -> DataSet:
    """The table with the columns image and person as a data set."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["image", "person"])
    people = table.column("person").to_numpy().astype(np.int64)
    _, people = np.unique(people, return_inverse=True)
    images = Images.of("train", table.column("image").to_pylist(), people.astype(np.int64))
    return DataSet("orl_faces", tuple(str(number) for number in range(int(people.max()) + 1)), train=images)


def moved(task: Task, seed: int) -> Task:
    """The same task with every image moved by up to a quarter of its side in either direction, its edge repeated."""
    rng = np.random.default_rng([seed, 1])

    def shifted(split: Split) -> ArraySplit:
        images = split.inputs(slice(None))
        most = images.shape[-1] // 4
        padded = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
        side = images.shape[-1]
        places = rng.integers(0, 2 * most + 1, (len(images), 2))
        result = np.stack(
            [
                image[:, down : down + side, right : right + side]
                for image, (down, right) in zip(padded, places, strict=True)
            ]
        )
        return ArraySplit(split.name, result, split.labels)

    assert task.fit is not None
    return task.with_splits(
        fit=shifted(task.fit), choose=shifted(task.choose), report=shifted(task.report), preprocessing=None,
        name=f"{task.name}, moved",
    )  # fmt: skip


def _image_claims(
    still: Mapping[str, list[Trained]], loose: Mapping[str, list[Trained]], data: str
) -> tuple[Claim, ...]:
    def gains(found: Mapping[str, list[Trained]]) -> list[float]:
        pairs = zip(found["TVConv"], found["depthwise"], strict=True)
        return [variant.accuracy - plain.accuracy for variant, plain in pairs]

    return (
        better(
            f"On aligned images ({data}) TVConv is better, at as many multiplications when stored.",
            still["TVConv"], still["depthwise"], matters=MATTERS,
        ),
        better(
            "The advantage is the layout's: it is larger on aligned images than on the same ones moved at random.",
            gains(still), gains(loose), matters=MATTERS,
        ),
    )  # fmt: skip


# The stored form


def _times(repetitions: int) -> dict[str, list[float]]:
    channels, side = TIMED
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    layer = built(partial(TVConv2d, channels, (side, side), hidden=4, layers=0), 0)
    calls = {
        "stored TVConv": forward_call(layer.fold(), x),  # type: ignore[operator]
        "depthwise convolution": forward_call(nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False), x),
    }
    return interleaved(calls, repetitions, ROUNDS)


def _stored(found: Mapping[str, Mapping[str, list[Trained]]], times: Mapping[str, list[float]]) -> tuple[Claim, Claim]:
    differences = [
        max(arms["TVConv"][number].figures["stored form differs by"] for arms in found.values())
        for number in range(len(times["stored TVConv"]))
    ]
    return (
        Claim(
            "The stored form answers as the trained one.",
            verdict_by_interval([SAME - difference for difference in differences]),
            f"logits differ by at most {max(differences):.1e}, with {SAME:g} allowed",
        ),
        faster(
            "Stored, it is as fast as a depthwise convolution.", times, "depthwise convolution", "stored TVConv",
            at_least=FASTER, more=f"{TIMED[0]} channels, {TIMED[1]} x {TIMED[1]}, one thread",
        ),
    )  # fmt: skip
