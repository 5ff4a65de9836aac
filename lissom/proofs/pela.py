"""PELA (arXiv 2310.10700): a trained transformer made low-rank by SVD and mended by a short training, beside controls.

A small vision transformer is trained, and every linear layer in its blocks becomes two thin ones of a rank that divides
its weights by a ratio. From there, for as many further epochs each:

(a) nothing: the SVD alone; (b) the task's loss; (c) and the features of all blocks, drawn to the original's; (d) and
the products of the thin layers, held near the weights they replace; (e) the task's loss on a network of the same shape
with random weights; and, as controls, the original trained on for as long, and (f) a thinner network of ordinary layers
and of as many parameters, from random weights, for all epochs that the original and the low-rank network had together.

The full run ends with transfers, where the paper places the value of (c) and (d): the same on six of the classes, then
every network is fine-tuned on a few images of each of the others; and, where the folder in LISSOM_DATA has MNIST, the
networks of the first ratio above are fine-tuned on a few images of each of its classes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lissom.data.sources import DataSet, read, stratified
from lissom.data.splits import Images
from lissom.export.plan import Plan
from lissom.images import Preprocessing
from lissom.models.factory import create_model, with_head
from lissom.proofs.base import Claim, ProofResult, Row, Settings, mean_interval, verdict_by_interval
from lissom.registry import register
from lissom.tasks.classification import make_task
from lissom.tasks.task import Task
from lissom.techniques.low_rank import LowRank
from lissom.training.loop import evaluate, fit
from lissom.training.methods.base import Method
from lissom.training.methods.recovery import Answers, Recovery
from lissom.training.methods.supervised import Supervised

__all__ = ["thin_width"]

LOSS = 0.6  # points: what the paper says the whole costs at most, about
MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
SEEN_CLASSES = 6  # of ten, before the transfer


FROM_TRAINED = 1e-3  # the learning rate of a network that has trained weights


@dataclass(frozen=True)
class _Scale:
    """The experiment's size: images of ``side`` pixels in patches, a network ``width`` wide of ``depth`` blocks, epochs
    and the learning rate from random weights, further epochs, ratios, and ``few`` images a class for the transfer (0:
    there is none)."""

    side: int
    patch: int
    width: int
    depth: int
    epochs: int
    lr: float
    further: int
    ratios: tuple[float, ...]
    batch: int
    few: int


QUICK = _Scale(side=16, patch=4, width=64, depth=2, epochs=8, lr=4e-3, further=2, ratios=(2.0,), batch=32, few=0)
DIGITS = _Scale(side=16, patch=4, width=64, depth=3, epochs=20, lr=4e-3, further=3, ratios=(2.0, 3.0), batch=32, few=20)
CIFAR = _Scale(side=32, patch=4, width=128, depth=6, epochs=20, lr=1e-3, further=3, ratios=(2.0, 3.0), batch=64, few=50)


@register("proof", "pela")
def pela(settings: Settings) -> ProofResult:
    """All arms at every ratio, seed by seed; quick: ratio 2 on the digits, a shorter training, no transfer.

    The full run takes CIFAR-10 where the folder in LISSOM_DATA has it, else the digits.
    """
    data = _data(settings.quick)
    scale = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    second = None if settings.quick else _second_data()
    accuracy: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for seed in settings.seeds:
        task = _task(data, data.name, scale, seed)
        teacher = _network(scale, len(task.classes), seed)
        _train(teacher, task, Supervised(), scale, scale.epochs, scale.lr, seed)
        found = {"original": _held_out(teacher, task)}
        sizes["original"] = _size(teacher)
        settings.progress(f"seed {seed}: the original answers {found['original']:.1f} % right")
        arms = _arms(teacher, task, scale, seed)
        for name, (network, value) in arms.items():
            found[name], sizes[name] = value, _size(network)
        if scale.few and second is not None:
            networks = {name: network for name, (network, _) in arms.items()}
            found |= _on_second(teacher, networks, second, scale, seed)
        if scale.few:
            found |= _transfer(data, scale, seed)
        for name, value in found.items():
            accuracy.setdefault(name, []).append(value)
        settings.progress(f"seed {seed}: all arms trained")
    return _judged(data.name, scale, accuracy, sizes, len(settings.seeds))


# The experiment


def _data(quick: bool) -> DataSet:
    folder = os.environ.get("LISSOM_DATA")
    if folder and not quick and (Path(folder) / "cifar10").is_dir():
        return read(Path(folder) / "cifar10")
    return read("digits")


def _second_data() -> DataSet | None:
    """Data of another kind than those of the stage."""
    folder = os.environ.get("LISSOM_DATA")
    return read(Path(folder) / "mnist") if folder and (Path(folder) / "mnist").is_dir() else None


def _task(data: DataSet, name: str, scale: _Scale, seed: int, classes: Sequence[int] = (), few: int = 0) -> Task:
    """A task with a part of the training data kept out as ``choose``: nothing is chosen, so it judges as well.

    ``classes`` limits it to some, numbered anew; ``few`` images of each are then all there is to train on.
    """
    judged = data.test if data.test is not None else data.val
    assert isinstance(data.train, Images)
    assert isinstance(judged, Images)
    digits = data.name == "digits"
    train = data.train
    out, rest = stratified(train.labels, len(train), 0.4 if digits else 0.1, seed)
    parts = {"train": train.take(rest), "val": train.take(out), "test": judged}
    names = data.classes
    if classes:
        parts = {key: _only(part, classes) for key, part in parts.items()}
        names = tuple(data.classes[c] for c in classes)
    if few:
        share = few * len(classes) / len(parts["train"])
        chosen, _ = stratified(parts["train"].labels, len(parts["train"]), share, seed)
        parts["train"] = parts["train"].take(chosen)
    preprocessing = Preprocessing(scale.side, scale.side, mean=(0.5,) * 3, std=(0.5,) * 3)
    divided = DataSet(name, names, train=parts["train"], val=parts["val"], test=parts["test"])
    task = make_task(divided, preprocessing=preprocessing, trained_here=False, seed=seed)
    assert task.fit is not None
    if digits:
        return task
    return task.with_splits(
        fit=task.fit.sample(5000, seed), choose=task.choose.sample(1000, seed), report=task.report.sample(2000, 0)
    )


def _only(images: Images, classes: Sequence[int]) -> Images:
    """The images of some classes, which are numbered from 0 in the order given."""
    labels = images.labels
    assert labels is not None
    assert images.targets is not None
    number = np.full(int(images.targets.max()) + 1, -1, dtype=np.int64)
    number[list(classes)] = np.arange(len(classes))
    kept = images.take(np.flatnonzero(np.isin(labels, classes)))
    return replace(kept, targets=number[images.targets])


def _network(scale: _Scale, classes: int, seed: int, width: int | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(
            "digits_vit", img_size=scale.side, patch_size=scale.patch, embed_dim=width or scale.width,
            depth=scale.depth, num_heads=2, num_classes=classes,
        )  # fmt: skip


def _train(model: nn.Module, task: Task, method: Method, scale: _Scale, epochs: int, lr: float, seed: int) -> None:
    images = not task.name.startswith(("digits", "mnist"))  # a mirrored digit is none
    few = task.with_splits(choose=task.choose.sample(32, 0))  # judged every epoch, and nobody reads that here
    fit(model, few, method=method, epochs=epochs, batch=scale.batch, lr=lr, seed=seed, augment=images, flip=images)


def _held_out(model: nn.Module, task: Task) -> float:
    """Accuracy in % over all images that nothing was trained on: both ``choose`` and ``report``."""
    found = [evaluate(model, task, split, 256) for split in (task.choose, task.report)]
    return sum(q.value * q.count for q in found) / sum(q.count for q in found)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _arms(teacher: nn.Module, task: Task, scale: _Scale, seed: int) -> dict[str, tuple[nn.Module, float]]:
    """Every arm's network and its accuracy in %."""
    classes, later = len(task.classes), seed + 1
    trained: dict[str, nn.Module] = {"original, trained on": copy.deepcopy(teacher)}
    _train(trained["original, trained on"], task, Supervised(), scale, scale.further, FROM_TRAINED, later)
    for ratio in scale.ratios:
        for name, network, method in stage(teacher, task, ratio):
            if method is not None:
                _train(network, task, method, scale, scale.further, FROM_TRAINED, later)
            trained[f"{name}, ratio {ratio:g}"] = network
        random = _drawn_anew(LowRank(ratio=ratio).apply(Plan.of(_network(scale, classes, later)), task).model, later)
        _train(random, task, Supervised(), scale, scale.further, scale.lr, later)
        trained[f"(e) random start, ratio {ratio:g}"] = random
        width = thin_width(_size(random), lambda w: _size(_network(scale, classes, 0, w)))
        thin = _network(scale, classes, seed, width)
        _train(thin, task, Supervised(), scale, scale.epochs + scale.further, scale.lr, seed)
        trained[f"(f) thinner, ratio {ratio:g}"] = thin
    return {name: (network, _held_out(network, task)) for name, network in trained.items()}


def stage(teacher: nn.Module, task: Task, ratio: float) -> list[tuple[str, nn.Module, Method | None]]:
    """The arms (a) to (d) before training: name, low-rank network, and the method that it is to be trained with."""
    arms: list[tuple[str, nn.Module, Method | None]] = []
    for name, features, perturbation in (
        ("(a) SVD alone", "none", 0.0),
        ("(b) task loss", "none", 0.0),
        ("(c) and features", "all", 0.0),
        ("(d) and perturbation", "all", 1.0),
    ):
        technique = LowRank(ratio=ratio, features=features, perturbation_weight=perturbation)
        plan = technique.apply(Plan.of(teacher), task)
        method: Method | None = None if name.startswith("(a)") else Supervised()
        if features != "none":
            method = Recovery(teacher, (Answers(alpha=0.0), *plan.recovery))  # alpha 0: the task's loss
        arms.append((name, plan.model, method))
    return arms


def _drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    """Linear layers with the initial weights that a vision transformer gives its own (normal, deviation 0.02): an SVD
    of random weights would be a start of another kind."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    module.bias.zero_()
    return model


def thin_width(parameters: int, size: Callable[[int], int], step: int = 2) -> int:
    """The width, a multiple of ``step``, at which ``size(width)`` comes nearest to ``parameters``."""
    width = step
    while size(width + step) < parameters:
        width += step
    return min(width, width + step, key=lambda w: abs(size(w) - parameters))


def _transfer(data: DataSet, scale: _Scale, seed: int) -> dict[str, float]:
    """Accuracy in % on the classes that were kept back, after fine-tuning on a few images of each."""
    order = [int(c) for c in np.random.default_rng(seed).permutation(len(data.classes))]
    source = _task(data, f"{data.name}, seen", scale, seed, order[:SEEN_CLASSES])
    target = _task(data, f"{data.name}, new", scale, seed, order[SEEN_CLASSES:], scale.few)
    teacher = _network(scale, SEEN_CLASSES, seed)
    _train(teacher, source, Supervised(), scale, scale.epochs, scale.lr, seed)
    ratio = scale.ratios[0]
    networks: list[tuple[str, nn.Module]] = [("original", copy.deepcopy(teacher))]
    for name, network, method in stage(teacher, source, ratio):
        if method is not None:
            _train(network, source, method, scale, scale.further, FROM_TRAINED, seed + 1)
        networks.append((name, network))
    found = {}
    for name, network in networks:
        tuned = with_head(network, len(target.classes), seed)
        _train(tuned, target, Supervised(), scale, scale.epochs, FROM_TRAINED, seed + 2)
        found[f"{name}, then fine-tuned"] = _held_out(tuned, target)
    return found


STAGES = ("(a) SVD alone", "(b) task loss", "(c) and features", "(d) and perturbation")


def _on_second(
    teacher: nn.Module, arms: Mapping[str, nn.Module], data: DataSet, scale: _Scale, seed: int
) -> dict[str, float]:
    """Accuracy in % on a second data set, after fine-tuning copies of the original and of the arms (a) to (d) of the
    first ratio on a few images a class; every weight is trained, the head is new."""
    target = _task(data, data.name, scale, seed, range(len(data.classes)), scale.few)
    starts = {"original": teacher} | {name: arms[f"{name}, ratio {scale.ratios[0]:g}"] for name in STAGES}
    found = {}
    for name, network in starts.items():
        tuned = with_head(copy.deepcopy(network), len(target.classes), seed)
        _train(tuned, target, Supervised(), scale, scale.epochs, FROM_TRAINED, seed + 2)
        found[f"{name}, then fine-tuned on {data.name}"] = _held_out(tuned, target)
    return found


# What came of it


def _judged(
    data: str, scale: _Scale, accuracy: Mapping[str, list[float]], sizes: Mapping[str, int], seeds: int
) -> ProofResult:
    further, total = scale.further, scale.epochs + scale.further
    rows = []
    for name, values in accuracy.items():
        epochs = scale.epochs if name == "original" else 0 if name.startswith("(a)") else further
        cost: dict[str, object] = {"parameters": sizes.get(name, 0), "further epochs": epochs}
        if name == "original" or name.startswith("(f)"):
            cost = {"parameters": sizes[name], "epochs": epochs if name == "original" else total}
        if "then fine-tuned" in name:
            cost = {"images a class": scale.few, "epochs": scale.epochs}
        rows.append(Row(name, "accuracy on held-out images", tuple(values), "%", cost))

    def gain(better: str, worse: str) -> list[float]:
        """The difference in points, one a seed: the mean over the ratios."""
        pairs = [(accuracy[_at(better, r, accuracy)], accuracy[_at(worse, r, accuracy)]) for r in scale.ratios]
        each = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
        return [sum(values) / len(values) for values in zip(*each, strict=True)]

    where = f"{data}, ratio {' and '.join(f'{r:g}' for r in scale.ratios)}, {further} further epochs, {seeds} seeds"

    def claim(text: str, better: str, worse: str, margin: float = 0.0) -> Claim:
        differences = gain(better, worse)
        least = f", of which {margin:g} may be lost" if margin else ""
        verdict = verdict_by_interval([d + margin for d in differences], matters=0.0 if margin else MATTERS)
        return Claim(text, verdict, f"{better} less {worse}: {_interval(differences)} points{least} ({where})")

    lost, left = gain("original", "(a) SVD alone"), gain("original, trained on", "(b) task loss")
    restored = [before - after for before, after in zip(lost, left, strict=True)]
    claims = [
        claim(
            "Low-rank layers that start from the SVD of trained weights beat the same layers with a random start, at "
            "the same number of further epochs.",
            "(b) task loss", "(e) random start",
        ),
        Claim(
            "A short training restores what the SVD lost.",
            verdict_by_interval(restored, matters=MATTERS),
            f"behind the original by {_interval(lost)} points as the SVD left it, by {_interval(left)} when both were "
            f"trained on: restored {_interval(restored)} ({where})",
        ),
        claim(
            f"The low-rank network loses about {LOSS:g} points at most against the original trained on for as long, "
            f"with {' and '.join(f'1/{r:g}' for r in scale.ratios)} of the weights in its blocks.",
            "(c) and features", "original, trained on", LOSS,
        ),
        claim(
            "Features of all blocks, drawn to the original's, gain accuracy over the task's loss alone.",
            "(c) and features", "(b) task loss",
        ),
        claim(
            "The perturbation loss gains accuracy over task loss and features.",
            "(d) and perturbation", "(c) and features",
        ),
        claim(
            "The low-rank network beats a thinner one of as many parameters that was trained from the start for all "
            "epochs together.",
            "(c) and features", "(f) thinner",
        ),
    ]  # fmt: skip
    if scale.few:
        tuned = "{}, then fine-tuned".format
        claims += [
            claim(
                "Features make the low-rank network transfer better to classes it has not seen.",
                tuned("(c) and features"), tuned("(b) task loss"),
            ),
            claim(
                "The perturbation loss makes it transfer better still.",
                tuned("(d) and perturbation"), tuned("(c) and features"),
            ),
        ]  # fmt: skip
    if others := {name.rpartition(" on ")[2] for name in accuracy if "fine-tuned on" in name}:
        (other,) = others
        on = f"{{}}, then fine-tuned on {other}".format
        claims += [
            claim(
                f"Low-rank layers lose about {LOSS:g} points at most on a second data set ({other}).",
                on("(c) and features"), on("original"), LOSS,
            ),
            claim(
                f"Features make the low-rank network transfer better to a second data set ({other}).",
                on("(c) and features"), on("(b) task loss"),
            ),
            claim(
                f"The perturbation loss makes it transfer better still ({other}).",
                on("(d) and perturbation"), on("(c) and features"),
            ),
        ]  # fmt: skip
    notes = (
        "The original had its own epochs before; (e) had none, as the paper's comparison at equal further budget has "
        "it, and (f) had all of them.",
        "Trained on what the original was trained on, as in the paper; the test images and the part kept out of the "
        "training data judge, and nothing was chosen on them.",
    )
    title = "a trained transformer in two thin layers for one, and what mends it"
    return ProofResult("pela", title, tuple(claims), tuple(rows), notes)


def _at(name: str, ratio: float, accuracy: Mapping[str, list[float]]) -> str:
    """The arm's key at a ratio; arms that have no ratio are themselves at every one."""
    return name if name in accuracy else f"{name}, ratio {ratio:g}"


def _interval(values: Sequence[float]) -> str:
    mean, interval = mean_interval(values)
    return f"{mean:.2f} ({interval[0]:.2f} to {interval[1]:.2f})" if interval else f"{mean:.2f} (one seed)"
