"""Expedit (arXiv 2210.01035): a trained segmenter's later blocks on centres of its tokens, beside plain pooling.

A vision transformer learns to segment images of textured shapes. Then nothing is trained any more: after some of its
blocks the tokens are reduced to a smaller grid, and behind the last block made again,

(a) not at all: the network as it is; (b) by the two layers of the paper, clustering and reconstruction; (c) by average
pooling and bilinear enlarging of the tokens; (d) by average pooling and the reconstruction layer; (e) by the clustering
layer, every token then taking its nearest centre; and, ours, (b) with temperatures from each image instead of one that
was tuned (``temperature="auto"``). All arms share the trained weights, so differences are the layers' alone.

The temperature of (b), (d) and (e) is tuned once a network, on 20 training images, at the middle depth and the larger
grid: the best of 0.5, 1, 2 and 5 over the median squared distance between tokens and first centres.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lissom.data.splits import ArraySplit
from lissom.layers.token_clustering import (
    AUTO,
    TokenClustering,
    TokenReconstruction,
    attach_token_clusters,
    token_clusters_of,
)
from lissom.meters.costs import layer_costs
from lissom.models.factory import create_model
from lissom.models.vit import ConvStem
from lissom.proofs.base import (
    INCONCLUSIVE,
    NOT_SHOWN,
    SHOWS,
    Claim,
    ProofResult,
    Row,
    Settings,
    mean_interval,
    verdict_by_interval,
)
from lissom.registry import load_part, register
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import open_graph
from lissom.tasks.segmentation import SegmentationTask
from lissom.training.loop import fit

__all__ = ["boundaries", "mean_iou", "textured_shapes"]

CLASSES = ("background", "rows", "columns", "checks", "dots", "diagonals")
ARMS = {
    "b": "clustering + reconstruction",
    "c": "pooling + bilinear",
    "d": "pooling + reconstruction",
    "e": "clustering + nearest centre",
    "auto": "clustering + reconstruction, auto",
}
MARGIN = 2.0  # points of mIoU: what the layers may cost where half the blocks or more came before
MATTERS = 0.5  # points of mIoU below which an advantage is not worth having
EDGE = 4  # pixels on either side of a border that count as boundary
TUNED_ON = 20
THREADS = 1


@dataclass(frozen=True)
class _Scale:
    """The experiment's size: images of ``pixels``, a network ``width`` wide of ``depth`` blocks over patches of 4 x 4,
    ``steps`` of ``batch`` images; after which blocks, and to which grids, the tokens are reduced."""

    pixels: int
    width: int
    depth: int
    steps: int
    batch: int
    train: int
    held_out: int
    after: tuple[int, ...]
    grids: tuple[int, ...]
    timed: tuple[int, ...]  # the grids whose latency is measured
    rounds: int  # of timing, each network once in turn
    lr: float = 1e-3


PATCH = 4
QUICK = _Scale(
    48, 48, 4, steps=100, batch=8, train=160, held_out=32, after=(2, 3), grids=(6, 8), timed=(6,), rounds=40, lr=3e-3
)
FULL = _Scale(
    96, 64, 10, steps=1500, batch=4, train=1500, held_out=200, after=(3, 5, 7), grids=(12, 16), timed=(12, 16),
    rounds=100,
)  # fmt: skip


@register("proof", "expedit")
def expedit(settings: Settings) -> ProofResult:
    """All arms at every depth and grid, seed by seed; quick: 144 tokens and not 576, and a network barely trained."""
    scale = QUICK if settings.quick else FULL
    found: dict[tuple[Any, ...], list[float]] = {}
    for seed in settings.seeds:
        model, task = _trained(scale, seed)
        images, masks = task.report.inputs(slice(None)), np.asarray(task.report.labels)
        edges = boundaries(masks)
        scores: dict[tuple[Any, ...], tuple[float, float]] = {("a",): _score(model, images, masks, edges)}
        settings.progress(f"seed {seed}: the untouched network has an mIoU of {scores[('a',)][0]:.1f}")
        temperature = _tuned(model, task, scale)
        found.setdefault(("temperature",), []).append(temperature)
        for after, side, arm in itertools.product(scale.after, scale.grids, ARMS):
            reduced = _reduced(model, after, side, arm, temperature)
            scores[arm, after, side] = _score(reduced, images, masks, edges)
        for key, (whole, edge) in scores.items():
            found.setdefault(("mIoU", *key), []).append(whole)
            found.setdefault(("boundary", *key), []).append(edge)
        settings.progress(f"seed {seed}: all arms judged")
    return _judged(scale, found, *_costs(scale, model, temperature, settings), settings)


# The data


def textured_shapes(count: int, pixels: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 (count, 3, pixels, pixels) of about -1 to 1; masks of ``CLASSES``, uint8 (count, pixels, pixels).

    Three to six ellipses, boxes and triangles of random place, size and turn lie over each other on a ground of smooth
    waves. A shape's class is its texture; its two colours are random, with normal noise over everything.
    """
    y, x = np.mgrid[:pixels, :pixels].astype(np.float64)
    images = np.empty((count, 3, pixels, pixels), np.float32)
    masks = np.zeros((count, pixels, pixels), np.uint8)
    for image, mask in zip(images, masks, strict=True):
        picture = np.empty((3, pixels, pixels))
        for number in range(1 + int(rng.integers(3, 7))):
            kind = int(rng.integers(1, len(CLASSES))) if number else 0
            inside = _shape(y, x, pixels, rng) if number else np.ones((pixels, pixels), bool)
            colour, contrast = rng.uniform(0, 1, (3, 1)), rng.normal(size=(3, 1))
            contrast *= rng.uniform(0.5, 1) / np.linalg.norm(contrast)
            picture[:, inside] = colour + contrast * (_texture(kind, y, x, rng)[inside] - 0.5)
            mask[inside] = kind
        image[:] = 2 * (picture + 0.1 * rng.normal(size=picture.shape)) - 1
    return images, masks


def _texture(kind: int, y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values from 0 to 1; the period of a texture is 4 to 7 pixels."""
    period, *phases = rng.uniform(4, 7), *rng.uniform(0, 2 * np.pi, 2)
    down, across = 2 * np.pi * y / period + phases[0], 2 * np.pi * x / period + phases[1]
    if kind == 0:
        slow = 0.08 * rng.normal(size=(2, 2))
        waves = np.sin(slow[0, 0] * y + slow[0, 1] * x + phases[0]), np.sin(slow[1, 0] * y + slow[1, 1] * x + phases[1])
        return 0.5 + 0.25 * (waves[0] + waves[1])
    wave = (
        np.sin(down),
        np.sin(across),
        np.sin(down) * np.sin(across),
        np.cos(down) + np.cos(across) - 0.6,
        np.sin(down + rng.choice((-1, 1)) * across),
    )[kind - 1]
    return (wave > 0).astype(np.float64)


def _shape(y: np.ndarray, x: np.ndarray, pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Where an ellipse, a box or a triangle lies: bool, like ``y`` and ``x``."""
    row, column = rng.uniform(0.1 * pixels, 0.9 * pixels, 2)
    angle, (high, wide) = rng.uniform(0, np.pi), rng.uniform(pixels / 8, pixels / 3, 2)
    v = ((y - row) * np.cos(angle) + (x - column) * np.sin(angle)) / high
    u = ((x - column) * np.cos(angle) - (y - row) * np.sin(angle)) / wide
    kind = rng.integers(3)
    if kind == 0:
        return v**2 + u**2 < 1
    return np.maximum(abs(v), abs(u)) < 0.85 if kind == 1 else (v > -1) & (v + 2 * abs(u) < 1)


def mean_iou(answers: np.ndarray, masks: np.ndarray, where: np.ndarray | None = None) -> float:
    """mIoU in points of classes ``answers`` against ``masks``, arrays of one shape, over the pixels ``where`` (all).

    The sums run over all images; classes that no mask has are left out of the mean.
    """
    if where is not None:
        answers, masks = answers[where], masks[where]
    count = len(CLASSES)
    pairs = np.bincount(masks.ravel().astype(np.int64) * count + answers.ravel(), minlength=count * count)
    table = pairs.reshape(count, count).astype(np.float64)  # (mask, answer)
    present = table.sum(1) > 0
    both = table.diagonal()
    return float(100 * (both / np.maximum(table.sum(0) + table.sum(1) - both, 1))[present].mean())


def boundaries(masks: np.ndarray, width: int = EDGE) -> np.ndarray:
    """bool (N, H, W): pixels at most ``width`` pixels (in rows and columns) from one of another class."""
    border = np.zeros(masks.shape, bool)
    for before, behind in (((..., slice(1, None)), (..., slice(-1))),
                           ((slice(None), slice(1, None)), (slice(None), slice(-1)))):  # fmt: skip
        differs = masks[before] != masks[behind]
        border[before] |= differs
        border[behind] |= differs
    # A pixel beside the border is one pixel from the other class already.
    wide = functional.max_pool2d(torch.from_numpy(border).float()[:, None], 2 * width - 1, 1, width - 1)
    return wide[:, 0].numpy() > 0


# The network and its arms


def _trained(scale: _Scale, seed: int) -> tuple[nn.Module, SegmentationTask]:
    rng = np.random.default_rng(seed)
    parts = {
        name: ArraySplit(name, *textured_shapes(count, scale.pixels, rng))
        for name, count in (("fit", scale.train), ("choose", TUNED_ON), ("report", scale.held_out))
    }
    task = SegmentationTask(
        choose=parts["choose"], report=parts["report"], fit=parts["fit"], shape=(3, scale.pixels, scale.pixels),
        classes=CLASSES, name="textured shapes",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network(scale)
    epochs = math.ceil(scale.steps * scale.batch / scale.train)
    fit(model, task, epochs=epochs, max_steps=scale.steps, batch=scale.batch, lr=scale.lr, seed=seed, augment=False)
    return model.cpu().eval(), task


def _network(scale: _Scale) -> nn.Module:
    # A convolutional stem: of so few images a linear embedding of patches learns textures too slowly.
    return create_model(
        "vit_segmenter", img_size=scale.pixels, patch_size=PATCH, embed_dim=scale.width, depth=scale.depth,
        num_heads=scale.width // 16, num_classes=len(CLASSES), embed_layer=ConvStem,
    )  # fmt: skip


class _Bilinear(nn.Module):
    """Refined centres (B, M, K), enlarged bilinearly as a map: what the reconstruction is compared with."""

    def __init__(self, small: int, large: int) -> None:
        super().__init__()
        maps = torch.eye(small * small).view(1, small * small, small, small)
        enlarged = functional.interpolate(maps, size=(large, large), mode="bilinear", align_corners=False)
        self.register_buffer("matrix", enlarged.flatten(2)[0].T.contiguous(), persistent=False)  # (N, M)

    def forward(self, refined: torch.Tensor, tokens: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        return self.matrix @ refined


def _reduced(model: nn.Module, after: int, side: int, arm: str, temperature: float) -> nn.Module:
    """A copy of the model with the tokens of ``arm`` reduced to side x side after ``after`` blocks, and made again."""
    reduced = attach_token_clusters(
        copy.deepcopy(model), after, (side, side), iterations=0 if arm in "cd" else 5,
        temperature=AUTO if arm == "auto" else temperature, reconstruct=True,
    )  # fmt: skip
    clusters = token_clusters_of(reduced)
    assert clusters is not None
    if arm == "c":
        clusters.reconstruction = _Bilinear(side, clusters.grid_in[0])
    elif arm == "e":
        clusters.reconstruction = TokenReconstruction(1, temperature, "l1")
    return reduced.eval()


@torch.no_grad()
def _answers(model: nn.Module, images: np.ndarray, batch: int = 20) -> np.ndarray:
    return np.concatenate([model(part).argmax(1).numpy() for part in torch.from_numpy(images).split(batch)])


def _score(model: nn.Module, images: np.ndarray, masks: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """mIoU over all pixels, and over those near a boundary."""
    answers = _answers(model, images)
    return mean_iou(answers, masks), mean_iou(answers, masks, edges)


def _tuned(model: nn.Module, task: SegmentationTask, scale: _Scale) -> float:
    """The temperature with the best mIoU of (b) on training images."""
    assert task.fit is not None
    images, masks = task.fit.inputs(slice(TUNED_ON)), np.asarray(task.fit.labels)[:TUNED_ON]
    after, side = scale.after[len(scale.after) // 2], scale.grids[-1]
    tokens = _tokens(model, images, after)
    pooling = TokenClustering((scale.pixels // PATCH,) * 2, (side, side), iterations=0)
    median = float(torch.cdist(tokens, pooling(tokens)).square().median())
    tried = {
        factor / median: mean_iou(_answers(_reduced(model, after, side, "b", factor / median), images), masks)
        for factor in (0.5, 1.0, 2.0, 5.0)
    }
    return max(tried, key=lambda temperature: tried[temperature])


@torch.no_grad()
def _tokens(model: nn.Module, images: np.ndarray, after: int) -> torch.Tensor:
    """The tokens (B, N, C) before block ``after``."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(f"blocks.{after}").register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    try:
        model(torch.from_numpy(images))
    finally:
        handle.remove()
    return seen[0]


# What it costs


def _costs(
    scale: _Scale, model: nn.Module, temperature: float, settings: Settings
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Multiply-accumulates of an image, and the median latency in each of as many rounds as there are seeds, in ms:
    of the untouched network, and of (b) at the middle depth and the grids to be timed. OpenVINO, float32, one thread.
    """
    shape = (3, scale.pixels, scale.pixels)
    after = scale.after[len(scale.after) // 2]
    models = {"a": model} | {
        f"b {after} {side}": _reduced(model, after, side, "b", temperature) for side in scale.timed
    }
    macs = {name: sum(cost.macs for cost in layer_costs(m, shape)) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        graphs = {}
        for name, network in models.items():
            artifact: Artifact = load_part("exporter", "float32")(network, shape, "openvino", 1, Path(folder) / name)
            (path,), (stage,) = artifact.graphs, artifact.plan["stages"]
            graphs[name] = open_graph(path, "openvino", stage["options"], THREADS)
        x = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
        for _ in settings.seeds:
            runs: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(scale.rounds):
                for name, graph in graphs.items():
                    start = time.perf_counter()
                    graph.run(x)
                    runs[name].append(1000 * (time.perf_counter() - start))
            for name, values in runs.items():
                times[name].append(statistics.median(values))
    return macs, times


# The verdicts


Found = Mapping[tuple[Any, ...], Sequence[float]]


def _judged(
    scale: _Scale, found: Found, macs: Mapping[str, int], times: Mapping[str, Sequence[float]], settings: Settings
) -> ProofResult:
    tokens = (scale.pixels // PATCH) ** 2
    places = list(itertools.product(scale.after, scale.grids))
    rows = []
    for metric, unit in (("mIoU", "points"), ("boundary", "points")):
        rows.append(Row("(a) untouched", metric, tuple(found[metric, "a"]), unit, {"tokens": tokens}))
        for (after, side), arm in itertools.product(places, ARMS):
            name = f"({arm}) {ARMS[arm]}" if arm != "auto" else f"(b) {ARMS[arm]}"
            cost = {"after": after, "tokens": side * side}
            rows.append(Row(name, metric, tuple(found[metric, arm, after, side]), unit, cost))
    rows.append(Row("(b), (d), (e)", "temperature", tuple(found["temperature",])))
    for name, values in times.items():
        rows.append(Row(f"({name})", "latency", tuple(values), "ms", {"10^6 MACs": macs[name] / 1e6}))
    claims = (
        _close(scale, found),
        _better(places, found, "mIoU", "c", "Clustering and reconstruction keep more than pooling and enlarging"),
        _edges(places, found),
        _between(places, found),
        _grows(scale, found),
        _cheaper(macs, times),
    )
    notes = (
        "Nothing is trained after the network: all arms are the same weights, on the same images.",
        f"One temperature a network serves every depth and grid; it was tuned on {TUNED_ON} training images, and (c) "
        "has none.",
        "Reconstruction makes tokens behind the last block, with weights that sum to 1 (the published Segmenter: its "
        "decoder's logits, with weights of L2 norm 1).",
        f"{scale.steps} steps of {scale.batch} images: the network is small and not trained to its end.",
    )
    title = f"{tokens} tokens reduced after some of {scale.depth} blocks, without training"
    return ProofResult("expedit", title, claims, tuple(rows), notes)


def _gain(found: Found, metric: str, better: Sequence[Any], worse: Sequence[Any]) -> list[float]:
    return [a - b for a, b in zip(found[metric, *better], found[metric, *worse], strict=True)]


def _mean_gain(places: Sequence[tuple[int, int]], found: Found, metric: str, better: str, worse: str) -> list[float]:
    """By seed: the mean over all depths and grids of what ``better`` has more than ``worse``."""
    gains = [_gain(found, metric, (better, *place), (worse, *place)) for place in places]
    return [statistics.fmean(values) for values in zip(*gains, strict=True)]


def _close(scale: _Scale, found: Found) -> Claim:
    verdicts, evidence = [], []
    for after, side in itertools.product([n for n in scale.after if 2 * n >= scale.depth], scale.grids):
        loss = _gain(found, "mIoU", ("a",), ("b", after, side))
        verdicts.append(verdict_by_interval([MARGIN - value for value in loss]))
        evidence.append(f"after {after}, {side} x {side}: {_interval(loss)} points lost, {verdicts[-1]}")
    return Claim(
        f"With half the blocks or more before it, reducing the tokens to a quarter to a half costs less than "
        f"{MARGIN:g} points of mIoU.",
        _together(verdicts),
        "; ".join(evidence),
    )


def _better(places: Sequence[tuple[int, int]], found: Found, metric: str, worse: str, text: str) -> Claim:
    gains = _mean_gain(places, found, metric, "b", worse)
    return Claim(
        f"{text}, at the same depths and grids.",
        verdict_by_interval(gains, matters=MATTERS),
        f"gained: {_interval(gains)} points of {metric}, mean over depths and grids",
    )


def _edges(places: Sequence[tuple[int, int]], found: Found) -> Claim:
    edge, whole = (_mean_gain(places, found, metric, "b", "c") for metric in ("boundary", "mIoU"))
    more = [a - b for a, b in zip(edge, whole, strict=True)]
    verdicts = [verdict_by_interval(values, matters=MATTERS) for values in (edge, more)]
    return Claim(
        f"They gain most within {EDGE} pixels of a boundary.",
        _together(verdicts),
        f"gained there: {_interval(edge)} points, {verdicts[0]}; more than over all pixels: {_interval(more)}, "
        f"{verdicts[1]}",
    )


def _between(places: Sequence[tuple[int, int]], found: Found) -> Claim:
    verdicts, evidence = [], []
    for better, worse in (("b", "d"), ("b", "e"), ("d", "c"), ("e", "c")):
        gains = _mean_gain(places, found, "mIoU", better, worse)
        verdicts.append(verdict_by_interval(gains, matters=MATTERS))
        evidence.append(f"({better}) - ({worse}): {_interval(gains)} points, {verdicts[-1]}")
    return Claim(
        "Each of the two layers has its share: one of them alone, (d) or (e), lies between (b) and (c).",
        _together(verdicts),
        "; ".join(evidence),
    )


def _grows(scale: _Scale, found: Found) -> Claim:
    def loss(after: Iterable[int], grids: Iterable[int]) -> list[float]:
        losses = [_gain(found, "mIoU", ("a",), ("b", n, side)) for n, side in itertools.product(after, grids)]
        return [statistics.fmean(values) for values in zip(*losses, strict=True)]

    def more(worse: list[float], better: list[float]) -> list[float]:
        return [a - b for a, b in zip(worse, better, strict=True)]

    earlier = more(loss(scale.after[:1], scale.grids), loss(scale.after[-1:], scale.grids))
    fewer = more(loss(scale.after, scale.grids[:1]), loss(scale.after, scale.grids[-1:]))
    verdicts = [verdict_by_interval(values, matters=MATTERS) for values in (earlier, fewer)]
    return Claim(
        "The loss grows the earlier the tokens are reduced, and the fewer centres there are.",
        _together(verdicts),
        f"after {scale.after[0]} instead of {scale.after[-1]} blocks: {_interval(earlier)} points, {verdicts[0]}; "
        f"{scale.grids[0]} x {scale.grids[0]} instead of {scale.grids[-1]} x {scale.grids[-1]}: {_interval(fewer)} "
        f"points, {verdicts[1]}",
    )


def _cheaper(macs: Mapping[str, int], times: Mapping[str, Sequence[float]]) -> Claim:
    verdicts, evidence = [], []
    for name in times:
        if name != "a":
            ratios = [a / b for a, b in zip(times["a"], times[name], strict=True)]
            fewer = f"{macs['a'] / macs[name]:.2f} times fewer multiplications"
            verdicts.append(verdict_by_interval([ratio - 1 for ratio in ratios], matters=0.02))
            evidence.append(f"({name}): {fewer}, {_interval(ratios)} times as fast, {verdicts[-1]}")
    return Claim(
        "The network with both layers, which cost time themselves, is faster than untouched.",
        _together(verdicts),
        "; ".join(evidence),
    )


def _together(verdicts: Iterable[str]) -> str:
    """A claim about all of them shows where each does, and does not where one does not."""
    found = set(verdicts)
    return next((verdict for verdict in (NOT_SHOWN, INCONCLUSIVE) if verdict in found), SHOWS)


def _interval(values: Sequence[float]) -> str:
    mean, interval = mean_interval(values)
    return f"{mean:.2f} ({interval[0]:.2f} to {interval[1]:.2f})" if interval else f"{mean:.2f} (one seed)"
