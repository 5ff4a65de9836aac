"""Dual complementary CNNs (arXiv 2412.01039): two small networks in a row for one large one, and a memory before them.

A pool of six small CNNs and a large one are trained on digits that are turned, scaled, shifted and noisy. What each
gets right on images kept out of the training says which two make up for each other; the threshold of their cascade and
the temperatures of both are found there too, and all figures are read on further images. Post-check, the published
threshold and the published formula of complementarity without its penalty stand beside the chosen ones.

Cascade and memory are reported apart, since the paper's energy mixes them: without repeated images a memory saves
nothing. The memory is tried on a stream of every image twice.

The full run takes MNIST where the folder in LISSOM_DATA has it, else scikit-learn's digits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from lissom.data.sources import DataSet
from lissom.data.splits import ArraySplit, Images
from lissom.export.capture import run_eager
from lissom.export.cascades import (
    TOLERANCE,
    Pair,
    Threshold,
    best_pair,
    complementarity,
    find_threshold,
    fit_temperature,
    run_cascade,
)
from lissom.meters.costs import total
from lissom.proofs.arms import better, built, data_set, forward_call, interleaved, no_worse, spread
from lissom.proofs.base import NOT_SHOWN, SHOWS, Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register
from lissom.runtime.decisions import difference
from lissom.runtime.memory import KINDS, Memory, false_hits
from lissom.tasks.task import Task
from lissom.training.loop import fit

__all__ = ["networks"]

MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
BIG = "large"
TURN, SCALE, SHIFT, NOISE = 40.0, 0.2, 0.1, 0.3  # degrees, shares of the side, and of the range of grey values
WAYS = {
    "post-check, temperatures": "cascade",
    "published": "cascade as published",  # most accurate threshold on a grid of 2,000, no temperatures
    "no post-check": "cascade without post-check",
}


@dataclass(frozen=True)
class _Version:
    """Images of ``side`` pixels: ``train`` to train on, ``choose`` to choose on, the rest to judge by; each distorted
    ``copies`` times."""

    side: int
    train: int
    choose: int
    epochs: int
    batch: int = 64
    lr: float = 3e-3
    rounds: int = 20
    copies: int = 1


QUICK = _Version(16, 1000, 400, 3, batch=32, copies=4)
DIGITS = _Version(16, 1000, 400, 12, batch=32, copies=4)
MNIST = _Version(28, 10_000, 4000, 6)


def networks(side: int, classes: int) -> dict[str, Callable[[], nn.Module]]:
    """The pool, (B, 1, side, side) -> (B, classes), and the large network, by name."""

    def small(*first: nn.Module, width: int = 8, stride: int = 2) -> nn.Module:
        body = [*first, nn.ReLU(), nn.Conv2d(width, 16, 3, stride, 1), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*body, nn.LazyLinear(classes))

    def made(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            model = build()
            model(torch.zeros(1, 1, side, side))  # the classifier's width is found by running
            return model

        return make

    pool = {
        "strided": lambda: small(nn.Conv2d(1, 8, 3, 2, 1)),
        "strided, other weights": lambda: small(nn.Conv2d(1, 8, 3, 2, 1)),
        "pooled": lambda: small(nn.AvgPool2d(2), nn.Conv2d(1, 8, 5, 1, 2)),
        "dilated": lambda: small(nn.Conv2d(1, 8, 3, 2, 2, dilation=2)),
        "wide": lambda: small(nn.Conv2d(1, 12, 7, 2, 3), nn.MaxPool2d(2), width=12, stride=1),
        "rows and columns": lambda: small(nn.Conv2d(1, 8, (1, 7), 2, (0, 3)), nn.Conv2d(8, 8, (7, 1), 1, (3, 0))),
        BIG: lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes),
        ),
    }  # fmt: skip
    return {name: made(build) for name, build in pool.items()}


# Data


@dataclass(frozen=True, eq=False)
class _Data:
    """One seed's images, uint8 (N, side, side), and labels by split."""

    pixels: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    classes: tuple[str, ...]

    def task(self) -> Task:
        splits = {name: ArraySplit(name, _inputs(self.pixels[name]), self.labels[name]) for name in self.pixels}
        side = self.pixels["fit"].shape[-1]
        return Task(**splits, shape=(1, side, side), classes=self.classes, name="digits")  # type: ignore[arg-type]


def _inputs(pixels: np.ndarray) -> np.ndarray:
    return (pixels[:, None].astype(np.float32) / 255 - 0.5) / 0.5


def _data(source: DataSet, version: _Version, seed: int) -> _Data:
    """The source's images as this seed distorts them, and divides those that are not its own training images."""
    rng = np.random.default_rng((seed, 5))
    found = {name: _grey(split, version.side) for name, split in source.splits.items()}
    train, rest = found["train"], found.get("test") or found["val"]
    order = rng.permutation(len(rest[1]))
    if len(rest[1]) < 2 * version.choose:  # too few: all images are divided
        rest = tuple(np.concatenate(both) for both in zip(train, rest, strict=True))  # type: ignore[assignment]
        order = rng.permutation(len(rest[1]))
        train, order = tuple(part[order[: version.train]] for part in rest), order[version.train :]  # type: ignore[assignment]
    parts = {
        "fit": tuple(part[: version.train] for part in train),
        "choose": tuple(part[order[: version.choose]] for part in rest),
        "report": tuple(part[order[version.choose :]] for part in rest),
    }
    pixels = {
        name: np.stack([_distorted(image, rng) for _ in range(version.copies) for image in images])
        for name, (images, _) in parts.items()
    }
    return _Data(pixels, {name: np.tile(labels, version.copies) for name, (_, labels) in parts.items()}, source.classes)


def _grey(split: Any, side: int) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    assert isinstance(split, Images)
    images = []
    for i in range(len(split)):
        image: Any = split.open(i)
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        images.append(np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR)))
    labels = split.labels
    assert labels is not None
    return np.stack(images), labels


def _distorted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turned, scaled and shifted by random amounts, with noise: uint8 (side, side)."""
    from PIL import Image

    side = len(image)
    angle, scale = np.deg2rad(rng.uniform(-TURN, TURN)), 1 + rng.uniform(-SCALE, SCALE)
    shift = side * rng.uniform(-SHIFT, SHIFT, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    middle = np.full(2, side / 2)
    offset = middle - turn @ (middle + shift)
    rows = (*turn[0], offset[0], *turn[1], offset[1])
    moved = Image.fromarray(image).transform((side, side), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)
    noisy = np.asarray(moved, np.float64) + 255 * NOISE * rng.standard_normal((side, side))
    return np.rint(noisy).clip(0, 255).astype(np.uint8)


# One seed


@dataclass(frozen=True, eq=False)
class _Answers:
    """What one network says: logits (N, classes) by split, right answers bool (N,), its temperature, its cost."""

    logits: Mapping[str, np.ndarray]
    right: Mapping[str, np.ndarray]
    temperature: float
    macs: int

    def score(self, split: str, calibrated: bool = True) -> np.ndarray:
        return difference(self.logits[split] / (self.temperature if calibrated else 1.0))

    @property
    def accuracy(self) -> float:
        return 100 * float(self.right["report"].mean())


def _trained(make: Callable[[], nn.Module], task: Task, version: _Version, seed: int) -> nn.Module:
    model = built(make, seed)
    fit(
        model, task, epochs=version.epochs, batch=version.batch, lr=version.lr, seed=seed, augment=False,
        accelerator="cpu",
    )  # fmt: skip
    return model.eval()


def _answers(model: nn.Module, data: _Data) -> _Answers:
    logits = {
        name: run_eager(model, torch.from_numpy(_inputs(data.pixels[name])), 250).numpy()
        for name in ("choose", "report")
    }
    right = {name: values.argmax(1) == data.labels[name] for name, values in logits.items()}
    temperature = fit_temperature(logits["choose"], data.labels["choose"])
    side = data.pixels["choose"].shape[-1]
    return _Answers(logits, right, temperature, total(model, (1, side, side))[1])


@dataclass(frozen=True)
class _Cascade:
    """A cascade of two networks on ``report``: accuracy in points, second calls as a share, mean operations."""

    accuracy: float
    calls: float
    macs: float
    threshold: float


def _cascade(first: _Answers, second: _Answers, way: str) -> _Cascade:
    """Threshold on ``choose``, figures on ``report``."""
    postcheck, calibrated = way != "no post-check", way != "published"
    grid = np.linspace(0, 1, 2000) if way == "published" else None
    a, b = (member.score("choose", calibrated) for member in (first, second))
    found: Threshold = find_threshold(
        a, b, first.right["choose"], second.right["choose"], postcheck=postcheck, grid=grid,
        tolerance=0.0 if way == "published" else TOLERANCE,
    )  # fmt: skip
    a, b = (member.score("report", calibrated) for member in (first, second))
    takes, called = run_cascade(a, b, found.value, postcheck)
    right = np.where(takes, second.right["report"], first.right["report"])
    calls = float(called.mean())
    return _Cascade(100 * float(right.mean()), calls, first.macs + calls * second.macs, found.value)


def _ordered(pool: Sequence[_Answers], one: int, other: int) -> tuple[_Answers, _Answers]:
    """The cheaper first, of equals the more accurate where it was chosen."""
    two = sorted((pool[one], pool[other]), key=lambda a: (a.macs, -int(a.right["choose"].sum())))
    return two[0], two[1]


def _compare(answers: Mapping[str, _Answers]) -> dict[str, Any]:
    """All figures of one seed but the memory's."""
    names = [name for name in answers if name != BIG]
    pool = [answers[name] for name in names]
    right = np.array([member.right["choose"] for member in pool])
    pair: Pair = best_pair(right, [member.macs for member in pool], budget=answers[BIG].macs)
    first, second = pool[pair.first], pool[pair.second]
    gains, paper, code = [], [], []
    for one, other in itertools.combinations(range(len(pool)), 2):
        found = _cascade(*_ordered(pool, one, other), "post-check, temperatures")
        gains.append(found.accuracy - max(pool[one].accuracy, pool[other].accuracy))
        paper.append(complementarity(right[one], right[other]))
        code.append(complementarity(right[one], right[other], penalty=False))
    return {
        "pair": (names[pair.first], names[pair.second]),
        "complementarity": pair.complementarity,
        "better member": max(first.accuracy, second.accuracy),
        "large": answers[BIG].accuracy,
        "large macs": answers[BIG].macs,
        "gain of any pair": float(np.mean(gains)),
        **{way: _cascade(first, second, way) for way in WAYS},
        "rank, paper's formula": _rank(paper, gains),
        "rank, code's formula": _rank(code, gains),
        "accuracies": {name: member.accuracy for name, member in answers.items()},
        "macs": {name: member.macs for name, member in answers.items()},
        "temperatures": {name: member.temperature for name, member in answers.items()},
    }


def _rank(values: Sequence[float], gains: Sequence[float]) -> float:
    """Spearman's correlation; 0 where one of the two is the same for all pairs."""
    if len(set(values)) < 2 or len(set(gains)) < 2:
        return 0.0
    return float(spearmanr(values, gains).statistic)


def _remembered(data: _Data, answers: np.ndarray) -> dict[str, float]:
    """A stream of every image twice, the second copies in an order of their own, past an exact memory: the share of
    images for which networks run, and of those answered as without it; and false hits of every kind, in percent."""
    images, labels = data.pixels["report"], data.labels["report"]
    stream = np.concatenate([np.arange(len(images)), np.random.default_rng(42).permutation(len(images))])
    ran = same = 0
    with Memory("exact", len(images)) as memory:
        for i in stream:
            key = memory.key(images[i])
            found = memory.get(key)
            if found is None:
                ran += 1
                memory.put(key, answers[i], 0)
            same += found is None or bool((found.answer == answers[i]).all())
    rates = {kind: 100 * false_hits(zip(images, labels, strict=True), kind).false_rate for kind in KINDS}
    return {
        "ran": ran / len(stream),
        "same": same / len(stream),
        **{f"{kind} false": rate for kind, rate in rates.items()},
    }


def _times(data: _Data, models: Mapping[str, nn.Module], pair: tuple[str, str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds for one image: each network of the pair, and fingerprint and look-up of every kind of memory."""
    image = data.pixels["report"][0]
    x = torch.from_numpy(_inputs(image[None]))
    calls: dict[str, Callable[[], Any]] = {"first network": forward_call(models[pair[0]], x)}
    calls["second network"] = forward_call(models[pair[1]], x)
    memories = [Memory(kind) for kind in KINDS]
    for memory in memories:
        memory.put(memory.key(image), np.zeros(len(data.classes), np.float32), 0)

        def look(memory: Memory = memory) -> Any:
            return memory.get(memory.key(image))

        calls[f"memory, {memory.kind}"] = look
    times = interleaved(calls, 1, rounds)
    for memory in memories:
        memory.close()
    return times


@register("proof", "dual_cnn")
def dual_cnn(settings: Settings) -> ProofResult:
    """Pool, pair, cascade and memory, seed by seed. Quick: the digits, three epochs."""
    source = data_set("mnist", quick=settings.quick)
    version = QUICK if settings.quick else MNIST if source.name == "mnist" else DIGITS
    found = []
    for seed in settings.seeds:
        data = _data(source, version, seed)
        task = data.task()
        models: dict[str, nn.Module] = {}
        answers: dict[str, _Answers] = {}
        for number, (name, make) in enumerate(networks(version.side, len(source.classes)).items()):
            models[name] = _trained(make, task, version, 100 * seed + number)
            answers[name] = _answers(models[name], data)
        figures = _compare(answers)
        pair = figures["pair"]
        figures |= {"memory": _remembered(data, answers[pair[0]].logits["report"]), "count": len(data.labels["report"])}
        figures["times"] = _times(data, models, pair, version.rounds)
        found.append(figures)
        both = figures["post-check, temperatures"]
        settings.progress(
            f"seed {seed}: {pair[0]} and {pair[1]}, {both.accuracy:.1f} % with {100 * both.calls:.0f} % second calls; "
            f"the better alone {figures['better member']:.1f} %, the large network {figures['large']:.1f} %"
        )
    return _judged(source.name, found)


# The verdicts


def _judged(data: str, found: Sequence[Mapping[str, Any]]) -> ProofResult:
    ours = [f["post-check, temperatures"] for f in found]
    shares = [100 * o.macs / f["large macs"] for o, f in zip(ours, found, strict=True)]
    accuracy = [o.accuracy for o in ours]
    ranks, code = ([f[f"rank, {name} formula"] for f in found] for name in ("paper's", "code's"))
    halves = all(f["memory"]["ran"] == 0.5 and f["memory"]["same"] == 1 for f in found)
    large = no_worse(
        "The cascade of two small networks loses nothing against the large network.",
        accuracy, [f["large"] for f in found], margin=MATTERS,
    )  # fmt: skip
    claims = (
        better(
            "The cascade of the most complementary pair is more accurate than the better of its two networks.",
            accuracy, [f["better member"] for f in found], matters=MATTERS,
        ),
        Claim(
            large.text, large.verdict, f"{large.evidence}; it takes {spread(shares, 1)} % of the large one's operations"
        ),
        Claim(
            "The more complementary two networks are, by the paper's formula, the more their cascade gains.",
            verdict_by_interval(ranks, matters=0.1),
            f"rank correlation over all pairs {spread(ranks)}; without the penalty, as in the published code, "
            f"{spread(code)}",
        ),
        no_worse(
            "Post-check, which leaves the first answer where it is the surer, costs no accuracy.",
            accuracy, [f["no post-check"].accuracy for f in found], margin=MATTERS,
        ),
        Claim(
            "On a stream of every image twice an exact memory halves the images for which a network runs, and changes "
            "no answer.",
            SHOWS if halves else NOT_SHOWN,
            f"networks ran for {spread([100 * f['memory']['ran'] for f in found])} % of the images, and "
            f"{spread([100 * f['memory']['same'] for f in found])} % of the answers are those without a memory; "
            "without repeated images nothing is saved",
        ),
    )  # fmt: skip
    return ProofResult(
        "dual_cnn", f"two complementary networks in a row, and a memory, on {data}", claims, _rows(found), _notes(found)
    )


def _rows(found: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    rows = []
    for name in found[0]["accuracies"]:
        cost = {
            "10^6 MACs": found[0]["macs"][name] / 1e6,
            "temperature": float(np.mean([f["temperatures"][name] for f in found])),
        }
        rows.append(Row(name, "accuracy", tuple(f["accuracies"][name] for f in found), "%", cost))
    for way, name in WAYS.items():
        runs = [f[way] for f in found]
        cost = {
            "10^6 MACs": float(np.mean([run.macs for run in runs])) / 1e6,
            "second calls %": 100 * float(np.mean([run.calls for run in runs])),
            "threshold": float(np.mean([run.threshold for run in runs])),
        }
        rows.append(Row(name, "accuracy", tuple(run.accuracy for run in runs), "%", cost))
    rows.append(Row("any pair", "gain over the better of two", tuple(f["gain of any pair"] for f in found), "points"))
    rows += [
        Row(name, "rank correlation with the gain", tuple(f[f"rank, {name}"] for f in found))
        for name in ("paper's formula", "code's formula")
    ]
    for kind in KINDS:
        rows.append(Row(f"memory, {kind}", "false hits", tuple(f["memory"][f"{kind} false"] for f in found), "%"))
    for name in found[0]["times"]:
        rows.append(Row(name, "time of one image", tuple(f["times"][name][0] for f in found), "ms"))
    return tuple(rows)


def _notes(found: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    pairs = ", ".join(dict.fromkeys(" then ".join(f["pair"]) for f in found))
    return (
        f"Chosen pairs: {pairs}, of {len(found[0]['accuracies']) - 1} networks that all cost less than the large one.",
        "Pair, threshold (the smallest within 0.1 point of the best) and temperatures are found on images that nothing "
        "was trained on, and figures are read on others. Operations are those of the networks alone.",
        "False hits are counted on distinct images: they are keys that collide. Turned copies are hits of the "
        "invariants by design, right or wrong.",
        "Times are of torch, one image and one thread; with hits at a rate h a memory pays where fingerprint and "
        "look-up take less than h of the networks' time.",
    )
