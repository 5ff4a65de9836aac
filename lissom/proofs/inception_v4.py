"""Inception-v4 and Inception-ResNet (arXiv 1602.07261): what the addition, its scale and an ensemble bring.

Three parts, each beside its own baselines in the same run:

1. Residual or not. An Inception-ResNet-v1 of an eighth of its width, with residuals of scale 0.17 and of scale 1, and
   without the addition (the same layers and parameters, y = ReLU(expansion of the branches)). Same start, same batches,
   SGD; the loss of every step is kept, and its mean over the last twentieth of the steps is a net's loss at that time.
   How many steps does each need to get where the net without addition ends?
2. The scale. Five residual blocks more than 1,000 channels wide, at high learning rates without warm-up: how many runs
   die, so that the mean activation before the pool is next to nothing? By scale.
3. Ensemble. The mean of the softmax of the three nets and of a fourth with another start, beside the best of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from lissom.meters.costs import total
from lissom.models.ensemble import Ensemble
from lissom.models.inception_resnet import InceptionResNet, ResidualInception
from lissom.proofs.arms import Trained, accuracy_rows, better, built, data_set, generator, image_task, spread
from lissom.proofs.base import Claim, ProofResult, Row, Settings
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.loop import evaluate

__all__ = ["small_network", "smoothed", "steps_to", "wide_network"]

ARMS: Mapping[str, tuple[float, bool]] = {
    "scale 0.17": (0.17, True),
    "scale 1": (1.0, True),
    "no addition": (1.0, False),
}
FOURTH = "scale 0.17, another start"
SCALES = (1.0, 0.3, 0.1)  # of the wide blocks
WIDE = 1152
DEAD = 1e-3  # the mean activation before the pool below which a network is dead
MOMENTUM, RATE, BATCH = 0.9, 0.05, 64
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # learning rates of the wide networks
MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
SOONER = 0.05  # share of all steps below which fewer steps are none to speak of
FEWER = 10.0  # points of runs that die


@dataclass(frozen=True)
class _Scale:
    """Images of ``pixels``, how many train and judge, SGD ``steps``, blocks of the three kinds; of the wide networks
    the steps, the batch and the learning rates."""

    pixels: int
    train: int
    held_out: int | None
    steps: int
    depths: tuple[int, int, int]
    wide_steps: int
    wide_batch: int
    rates: tuple[float, ...]
    batch: int = BATCH


QUICK = _Scale(16, 600, 300, 40, (1, 1, 1), 10, 8, (0.1,), batch=16)
DIGITS = _Scale(32, 1400, None, 200, (2, 3, 2), 60, 16, RATES)
CIFAR = _Scale(32, 20_000, 2000, 625, (2, 3, 2), 60, 16, RATES)


@register("proof", "inception_v4")
def inception_v4(settings: Settings) -> ProofResult:
    """All parts. Quick: the digits, one block of a kind, one learning rate; full: CIFAR-10 where LISSOM_DATA has it."""
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    found: dict[str, list[Trained]] = {name: [] for name in (*ARMS, FOURTH)}
    needed: dict[str, list[float]] = {name: [] for name in ARMS}
    together: list[float] = []
    for seed in settings.seeds:
        task = image_task(data, scale.pixels, seed, train=scale.train, held_out=scale.held_out)
        models, curves = [], {}
        for name, (factor, residual) in {**ARMS, FOURTH: ARMS["scale 0.17"]}.items():
            start = seed + 1000 if name == FOURTH else seed
            model = built(partial(small_network, scale.depths, len(data.classes), factor, residual), start)
            curves[name], seconds = _descent(model, task, scale, start)
            quality = evaluate(model, task, task.report, 250)
            size = total(model, task.shape)
            found[name].append(Trained(name, seed, quality.value, quality.count, *size, scale.steps, seconds))
            models.append(model)
            settings.progress(f"seed {seed}: {name} ends at a loss of {smoothed(curves[name])[-1]:.3f}, "
                              f"{quality.value:.1f} % right")  # fmt: skip
        level = smoothed(curves["no addition"])[-1]
        for name in ARMS:
            needed[name].append(float(steps_to(curves[name], level)))
        together.append(evaluate(Ensemble(models), task, task.report, 250).value)
    rows = accuracy_rows(found, data.name)
    rows += [Row(name, "steps to the last loss without addition", tuple(steps)) for name, steps in needed.items()]
    rows.append(Row(f"{data.name}, all four together", "accuracy", tuple(together), "%"))
    deaths_rows, deaths_claim = _deaths(scale, settings)
    claims = (*_sooner(needed, found, data.name, scale), deaths_claim, _ensemble(found, together, data.name))
    notes = (
        f"A run counts as dead where the mean activation is below {DEAD:g} at its end; a run whose loss is no number "
        "any more is counted apart.",
    )
    title = "the addition, its scale, and an ensemble"
    return ProofResult("inception_v4", title, claims, (*rows, *deaths_rows), notes)


# Residual or not


def small_network(depths: Sequence[int], classes: int, scale: float, residual: bool) -> nn.Module:
    """An Inception-ResNet-v1 of an eighth of its channels for small images: no convolution of the stem has a stride or
    loses the rim, so that the pool in it alone halves the sides."""
    model = InceptionResNet(
        1, classes, drop_rate=0.0, depths=depths, scales=(scale,) * 3, residual=residual, width=1 / 8
    )
    for name in model.layer_names:
        layer = model.get_submodule(name)
        conv = getattr(layer, "conv", None)
        if isinstance(conv, nn.Conv2d):  # of the stem; the blocks hold theirs deeper
            conv.stride, conv.padding = (1, 1), (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
    return model


def _descent(model: nn.Module, task: Task, scale: _Scale, seed: int) -> tuple[list[float], float]:
    """Train in place by SGD at a constant rate: the loss of every step, and the seconds it took."""
    assert task.fit is not None
    assert task.fit.labels is not None
    labels, count = torch.from_numpy(task.fit.labels), len(task.fit)
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
    numbers, order = generator(seed), torch.empty(0, dtype=torch.int64)
    losses = []
    model.train()
    start = time.perf_counter()
    for _ in range(scale.steps):
        if len(order) < scale.batch:
            order = torch.randperm(count, generator=numbers)
        rows, order = order[: scale.batch], order[scale.batch :]
        loss = functional.cross_entropy(model(torch.from_numpy(task.fit.inputs(rows.numpy()))), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses, time.perf_counter() - start


def smoothed(losses: Sequence[float]) -> list[float]:
    """Of every step from the first at which there are enough: the mean of the last twentieth of all steps' losses."""
    window = max(1, len(losses) // 20)
    return [statistics.fmean(losses[end - window : end]) for end in range(window, len(losses) + 1)]


def steps_to(losses: Sequence[float], level: float) -> int:
    """Steps after which the smoothed loss is at or below ``level`` for the first time; all where it never is."""
    curve = smoothed(losses)
    lead = len(losses) - len(curve)
    return next((lead + number + 1 for number, value in enumerate(curve) if value <= level), len(losses))


def _sooner(
    needed: Mapping[str, list[float]], found: Mapping[str, list[Trained]], data: str, scale: _Scale
) -> list[Claim]:
    plain, worth = needed["no addition"], SOONER * scale.steps
    return [
        *(
            better(
                f"Residuals of {name} reach the last loss of the net without addition in fewer steps ({data}).",
                needed[name], plain, matters=worth, unit=f"steps of {scale.steps}", sign=-1,
            )
            for name in ARMS if name != "no addition"
        ),
        better(
            f"The residual net (scale 0.17) ends better than the one without addition ({data}).",
            found["scale 0.17"], found["no addition"], matters=MATTERS,
        ),
    ]  # fmt: skip


# The scale


class _Wide(nn.Module):
    """(B, 3, H, W) to logits: a 3 x 3 convolution of stride 2 to ``WIDE`` channels, five residual blocks of the third
    kind with narrow branches, mean, linear layer. ``before_pool`` gives the maps that the mean is taken of."""

    def __init__(self, scale: float, classes: int, narrow: int = 24) -> None:
        super().__init__()
        branches = ([(narrow, 1)], [(narrow, 1), (narrow, (1, 3)), (narrow, (3, 1))])
        self.stem = nn.Sequential(nn.Conv2d(3, WIDE, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDE, eps=1e-3), nn.ReLU())
        self.blocks = nn.Sequential(*(ResidualInception(WIDE, branches, scale) for _ in range(5)))
        self.head = nn.Linear(WIDE, classes)

    def before_pool(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(x))  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.before_pool(x).mean((2, 3)))  # type: ignore[no-any-return]


def wide_network(scale: float, classes: int) -> _Wide:
    """Residual blocks ``WIDE`` channels wide whose branches are added with ``scale``."""
    return _Wide(scale, classes)


def _end(scale: float, rate: float, size: _Scale, seed: int) -> float:
    """Mean activation before the pool when training is over; not finite where the loss was not, at any step."""
    task = image_task(data_set(quick=True), 8, seed, train=600, held_out=200)
    assert task.fit is not None
    assert task.fit.labels is not None
    images, labels = torch.from_numpy(task.fit.inputs(slice(None))), torch.from_numpy(task.fit.labels)
    model = built(partial(wide_network, scale, len(task.classes)), seed)
    optimizer = torch.optim.SGD(model.parameters(), rate, MOMENTUM)
    numbers = generator(seed)
    for _ in range(size.wide_steps):
        rows = torch.randint(len(images), (size.wide_batch,), generator=numbers)
        loss = functional.cross_entropy(model(images[rows]), labels[rows])
        if not math.isfinite(float(loss.detach())):
            return math.nan
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # as in training: the running statistics lag behind at such rates
        return float(model.before_pool(images[:64]).mean())  # type: ignore[operator]


def _deaths(scale: _Scale, settings: Settings) -> tuple[list[Row], Claim]:
    dead: dict[float, list[float]] = {factor: [] for factor in SCALES}
    lost: dict[float, list[float]] = {factor: [] for factor in SCALES}
    for seed in settings.seeds:
        for factor in SCALES:
            ends = [_end(factor, rate, scale, seed) for rate in scale.rates]
            lost[factor].append(100 * sum(not math.isfinite(end) for end in ends) / len(ends))
            dead[factor].append(100 * sum(end < DEAD for end in ends) / len(ends))
            seen = ", ".join(f"{end:.3g}" for end in ends)
            settings.progress(f"seed {seed}: scale {factor:g} ends with a mean activation of {seen}")
    cost = {"runs a seed": len(scale.rates), "steps": scale.wide_steps, "channels": WIDE}
    rows = []
    for factor in SCALES:
        rows.append(Row(f"wide, scale {factor:g}", "dead", tuple(dead[factor]), "% of runs", cost))
        rows.append(Row(f"wide, scale {factor:g}", "loss not finite", tuple(lost[factor]), "% of runs", cost))
    failed = {factor: [a + b for a, b in zip(dead[factor], lost[factor], strict=True)] for factor in SCALES}
    claim = better(
        f"Blocks of {WIDE:,} channels die or diverge less often where their residuals are scaled by 0.1 than unscaled.",
        failed[0.1], failed[1.0], matters=FEWER, unit="points of runs", sign=-1,
    )  # fmt: skip
    told = "; ".join(f"scale {f:g}: dead {spread(dead[f], 0)}, not finite {spread(lost[f], 0)} %" for f in SCALES)
    rates = ", ".join(f"{rate:g}" for rate in scale.rates)
    return rows, Claim(claim.text, claim.verdict, f"{claim.evidence}; {told}; learning rates {rates}")


# Ensemble


def _ensemble(found: Mapping[str, list[Trained]], together: Sequence[float], data: str) -> Claim:
    best = [max(arm.accuracy for arm in arms) for arms in zip(*found.values(), strict=True)]
    return better(
        f"The mean of four nets' softmax has fewer errors than the best of them ({data}).", list(together), best,
        matters=MATTERS,
    )  # fmt: skip
