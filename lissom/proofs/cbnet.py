"""CBNet (arXiv 2403.07036): converted images and a network's beginning beside the whole network and plain ones.

A small network for digits with an exit behind its first stage is trained, exit and end together. Beside each other, on
the same test images: the whole network; its beginning with the exit alone (the light network); BranchyNet's cascade of
the two, where an image leaves at the exit if its entropy is low enough; and CBNet, an autoencoder in front of the light
network, with two rules for what it learns to make of an image (one easy image for the whole class, or a random easy one
each time), before and after the light network is fine-tuned on converted images. All of it twice: on the images as they
are, and with half of them, in training and in test, turned by up to 40 degrees and noisy.

The control says what the autoencoder is good for: plain networks of CBNet's multiplications, one fully connected and
one convolutional, trained on the labels for as many epochs as the network, autoencoder and fine-tuning have together.

Times are of one image at a time on one thread, in turn; a cascade's is composed of the two ways that its images
take. The data are MNIST where the folder LISSOM_DATA has it, else, and in quick runs, scikit-learn's digits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.export.capture import run_eager
from lissom.export.plan import Plan
from lissom.layers.exits import attach_own_exits
from lissom.meters.costs import total
from lissom.models.branchy_lenet import BranchyLeNet, LightLeNet
from lissom.proofs.arms import (
    better,
    built,
    data_set,
    faster,
    forward_call,
    generator,
    image_task,
    interleaved,
    no_worse,
    time_rows,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings
from lissom.registry import register
from lissom.tasks.task import Split, Task
from lissom.techniques.converting import Converting
from lissom.training.loop import fit
from lissom.training.methods.cbnet import Conversion, exit_entropy
from lissom.training.methods.dual_input import augmented
from lissom.training.methods.multi_exit_kd import MultiExitKD
from lissom.training.phases import fit_phases

__all__ = ["distorted", "plain_cnn", "plain_mlp"]

CONDITIONS = ("clean", "half distorted")
RULES = ("random", "prototype")
WHOLE, LIGHT, CASCADE = "the whole network", "its beginning (light)", "BranchyNet's cascade"
MLP, CNN = "plain fully connected", "plain convolutional"
DEGREES, NOISE = 40.0, 0.25  # of a distorted image: turned at most, standard deviation of what is added to its pixels
MARGIN = 0.5  # points of accuracy: a loss below it counts as none
MATTERS = 1.0  # points below which an advantage is not worth having
WEIGHTS = (1.0, 0.3)  # of the losses of exit and end, as BranchyNet has them
ROUNDS = 200


@dataclass(frozen=True)
class _Scale:
    """Images of ``side`` pixels, how many train and judge, and how the parts are trained: ``epochs`` of the network;
    three times as many of the autoencoder, and a fifth of fine-tuning."""

    side: int
    train: int | None
    held_out: int | None
    epochs: int
    batch: int
    lr: float
    rest: tuple[int, ...] = (20, 50, 200)
    hidden: tuple[int, ...] = (384, 384)
    code: int = 32
    conditions: tuple[str, ...] = CONDITIONS

    @property
    def plain_epochs(self) -> int:
        """Of a network that learns from labels alone: those of all parts of CBNet."""
        return self.epochs + 3 * self.epochs + max(1, round(self.epochs / 5))


QUICK = _Scale(16, 600, 360, 5, 32, 3e-3, (20, 20, 64), (128,), 16)
DIGITS = _Scale(16, None, None, 10, 32, 2e-3, (20, 20, 64), (128,), 16)
MNIST = _Scale(28, 10_000, 10_000, 5, 128, 1e-3)


@register("proof", "cbnet")
def cbnet(settings: Settings) -> ProofResult:
    """All arms, seed by seed. Quick: 600 of the digits at 16 x 16, five epochs."""
    data = data_set("mnist", quick=settings.quick)
    scale = QUICK if settings.quick else MNIST if data.name == "mnist" else DIGITS
    found: dict[str, list[dict[str, Any]]] = {condition: [] for condition in scale.conditions}
    models: dict[str, nn.Module] = {}
    for seed in settings.seeds:
        clean = image_task(data, scale.side, seed, train=scale.train, held_out=scale.held_out, channels=1)
        for condition in scale.conditions:
            task = clean if condition == "clean" else distorted(clean, seed)
            models, figures = _compare(task, scale, seed, condition, settings)
            found[condition].append(figures)
            shown = ", ".join(f"{name} {figures['accuracy'][name]:.2f}" for name in (WHOLE, LIGHT, _tuned("prototype")))
            settings.progress(f"seed {seed}, {condition}: {shown} % right")
    calls = {name: forward_call(model, torch.zeros(1, 1, scale.side, scale.side)) for name, model in models.items()}
    times = interleaved(calls, len(settings.seeds), 20 if settings.quick else ROUNDS)
    return ProofResult(
        "cbnet", f"images converted to easy ones, beside early exits and plain networks, on {data.name}",
        _claims(found, times), _rows(found, times), _notes(found),
    )  # fmt: skip


def distorted(task: Task, seed: int) -> Task:
    """The task with every second image of its splits turned and noisy, the same for the same seed."""
    assert task.fit is not None
    assert task.preprocessing is not None
    mean, std = task.preprocessing.mean[0], task.preprocessing.std[0]

    def changed(split: Split, number: int) -> ArraySplit:
        pixels = torch.from_numpy(split.inputs(slice(None))) * std + mean
        numbers = generator(seed, number)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=numbers)))
            moved = augmented(pixels[1::2], DEGREES, 0.0, 0.0, 0.0)
        noisy = moved + NOISE * torch.randn(moved.shape, generator=numbers)
        pixels[1::2] = noisy.clamp(0, 1)
        return ArraySplit(split.name, ((pixels - mean) / std).numpy(), split.labels)

    fit_split, report = changed(task.fit, 0), changed(task.report, 1)
    choose = fit_split.take(np.arange(min(32, len(fit_split))), "choose")  # looked at after an epoch; nothing is chosen
    return task.with_splits(fit=fit_split, choose=choose, report=report, name=f"{task.name}, half distorted")


def plain_mlp(macs: int, side: int, classes: int) -> nn.Module:
    """Two hidden layers of one width, the widest of at most ``macs`` multiply-accumulates."""
    size = side * side
    width = max(1, int((((size + classes) ** 2 + 4 * macs) ** 0.5 - size - classes) / 2))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


def plain_cnn(macs: int, side: int, classes: int) -> nn.Module:
    """The light network's layers, widened: the widest of at most ``macs`` multiply-accumulates, as many channels in the
    branch as twice the stem's, or somewhat more where that leaves some of ``macs`` over."""

    def fits(stem: int, branch: int) -> bool:
        return total(LightLeNet(classes, 1, side, stem, branch), (1, side, side))[1] <= macs

    stem = 1
    while fits(stem + 1, 2 * stem + 2):
        stem += 1
    branch = 2 * stem
    while fits(stem, branch + 1):
        branch += 1
    return LightLeNet(classes, 1, side, stem, branch)


def _compare(
    task: Task, scale: _Scale, seed: int, condition: str, settings: Settings
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The networks, and all figures of one seed: ``accuracy``, ``hard`` (of the images that the exit keeps) and
    ``easy`` (share of images below the threshold), each by arm, in points; and ``cost`` by arm."""
    classes, shape = len(task.classes), task.shape
    labels = torch.from_numpy(np.asarray(task.report.labels))
    x = torch.from_numpy(task.report.inputs(slice(None)))

    def training(name: str) -> dict[str, Any]:
        return {
            "batch": scale.batch, "lr": scale.lr, "weight_decay": 0.0, "augment": False, "accelerator": "cpu",
            "seed": seed, "folder": settings.folder / f"{task.name}-{seed}-{name}",
        }  # fmt: skip

    teacher = built(lambda: BranchyLeNet(classes, 1, scale.side, rest=scale.rest), seed)
    method = MultiExitKD(weights=WEIGHTS, alpha=0.0)
    fit(teacher, task, method=method, epochs=scale.epochs, resume=True, **training("network"))
    both = attach_own_exits(copy.deepcopy(teacher).eval())
    early, late = run_eager(both, x)
    models: dict[str, nn.Module] = {WHOLE: teacher, "with its exit": both}
    answers: dict[str, torch.Tensor] = {WHOLE: late, LIGHT: early}
    entropies: dict[str, torch.Tensor] = {LIGHT: exit_entropy(early)}
    threshold = share = 0.0
    macs = 0
    for rule in RULES:
        technique = Converting(hidden=scale.hidden, code=scale.code, target=rule, force=True)
        plan = technique.apply(Plan.of(teacher, shape), task)
        converted: Any = plan.model
        models[LIGHT] = copy.deepcopy(converted.light)
        macs = total(converted, shape)[1]
        first, second = plan.recovery
        for phase, name in ((first, _untuned(rule)), (second, _tuned(rule))):
            fit_phases(converted, task, (phase,), original=teacher, epochs=scale.epochs, **training(name))
            answers[name] = run_eager(converted, x)
            models[name] = converted
        entropies[_untuned(rule)] = exit_entropy(answers[_untuned(rule)])
        (conversion,) = first.terms
        assert isinstance(conversion, Conversion)
        threshold, share = conversion.easy
    makers: dict[str, Callable[[int, int, int], nn.Module]] = {MLP: plain_mlp, CNN: plain_cnn}
    for name, make in makers.items():
        models[name] = built(lambda make=make: make(macs, scale.side, classes), seed)  # type: ignore[misc]
        fit(models[name], task, epochs=scale.plain_epochs, resume=True, **training(name))
        answers[name] = run_eager(models[name], x)
    leaves = entropies[LIGHT] < threshold
    answers[CASCADE] = torch.where(leaves[:, None], early, late)
    right = {name: (logits.argmax(1) == labels).double() for name, logits in answers.items()}
    exits = float(leaves.double().mean())
    costs = {name: total(model, shape) for name, model in models.items() if name != "with its exit"}
    cost = {name: {"parameters": p, "10^6 MACs": m / 1e6} for name, (p, m) in costs.items()}
    several = total(both, shape)
    cascade = exits * costs[LIGHT][1] + (1 - exits) * several[1]
    cost[CASCADE] = {"parameters": several[0], "10^6 MACs": cascade / 1e6}
    return models, {
        "accuracy": {name: 100 * float(values.mean()) for name, values in right.items()},
        "hard": {name: 100 * float(values[~leaves].mean()) for name, values in right.items() if bool((~leaves).any())},
        "easy": {name: 100 * float((values < threshold).double().mean()) for name, values in entropies.items()},
        "threshold": threshold,
        "trained on": 100 * share,
        "cost": {**{_untuned(rule): cost[_tuned(rule)] for rule in RULES}, **cost},
    }


def _untuned(rule: str) -> str:
    return f"CBNet, {rule}"


def _tuned(rule: str) -> str:
    return f"CBNet, {rule}, fine-tuned"


def _claims(
    found: Mapping[str, Sequence[Mapping[str, Any]]], times: Mapping[str, Sequence[float]]
) -> tuple[Claim, ...]:
    def values(figure: str, arm: str, condition: str = "clean") -> list[float]:
        return [each[figure][arm] for each in found[condition] if arm in each[figure]]

    prototype, tuned = _untuned("prototype"), _tuned("prototype")
    claims = [
        better(
            "More converted images pass the exit's test than images as they are.",
            values("easy", prototype), values("easy", LIGHT), matters=5.0,
        ),
        better(
            "On images that the exit finds hard, CBNet is more accurate than the light network alone.",
            values("hard", prototype), values("hard", LIGHT), matters=MATTERS,
        ),
        no_worse("CBNet is as accurate as the whole network.", values("accuracy", tuned), values("accuracy", WHOLE),
                 margin=MARGIN),
        faster("CBNet answers one image in less time than the whole network.", times, WHOLE, tuned),
        *(
            better(
                f"CBNet is more accurate than a {name} network of as many multiplications that learnt from the labels.",
                values("accuracy", tuned), values("accuracy", name), matters=MATTERS,
            )
            for name in (MLP, CNN)
        ),
    ]  # fmt: skip
    if "half distorted" in found:
        claims.append(
            better(
                "Where half of the images are turned and noisy, CBNet is more accurate than the light network alone.",
                values("accuracy", tuned, "half distorted"), values("accuracy", LIGHT, "half distorted"),
                matters=MATTERS,
            )
        )  # fmt: skip
    return tuple(claims)


def _rows(found: Mapping[str, Sequence[Mapping[str, Any]]], times: Mapping[str, Sequence[float]]) -> tuple[Row, ...]:
    rows: list[Row] = []
    arms = (WHOLE, LIGHT, CASCADE, *(name(rule) for rule in RULES for name in (_untuned, _tuned)), MLP, CNN)
    metrics = {"accuracy": "accuracy", "hard": "accuracy on hard images", "easy": "images below the threshold"}
    for condition, figures in found.items():
        for figure, metric in metrics.items():
            for arm in arms:
                if all(arm in each[figure] for each in figures):
                    cost = {
                        k: float(np.mean([each["cost"][arm][k] for each in figures])) for k in figures[0]["cost"][arm]
                    }
                    values = tuple(each[figure][arm] for each in figures)
                    rows.append(Row(f"{condition}, {arm}", metric, values, "%", cost if figure == "accuracy" else {}))
    shares = [each["easy"][LIGHT] / 100 for each in found["clean"]]
    composed = [
        share * light + (1 - share) * both
        for share, light, both in zip(shares, times[LIGHT], times["with its exit"], strict=True)
    ]
    shown = {name: times[name] for name in (WHOLE, LIGHT, _tuned("prototype"), MLP, CNN)}
    return (*rows, *time_rows({**shown, CASCADE: composed}, "time, one image"))


def _notes(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, ...]:
    chosen = []
    for condition, figures in found.items():
        nats = ", ".join(format(each["threshold"], ".3g") for each in figures)
        shares = ", ".join(format(each["trained on"], ".0f") for each in figures)
        chosen.append(f"{condition} {nats} nats ({shares} % of the training images are below)")
    return (
        f"Thresholds, chosen on training images: {'; '.join(chosen)}.",
        "Hard images are the test images that the exit keeps at that threshold.",
        "The paper's layers could not be read; network and autoencoder are lissom's own. Its 4.8 times and 79 % are "
        "claims about systems and devices that are not compared here.",
        "With one target a class, the autoencoder is a classifier whose classes are drawn as images.",
    )
