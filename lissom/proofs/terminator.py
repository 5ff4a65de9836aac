"""Terminator (arXiv 2401.17948): what the global hyper-kernel's product sees, what it costs, and a small network.

Three parts, each beside its own baselines in the same run:

1. A generated task: two marks on a noisy map, and whether they share a row. They are too far apart for a 3 x 3 window.
   One layer as in the paper's block, then the mean over the map. The mixers: the global product; the same with an
   elementwise product in the place of the matrix product; and a 3 x 3 depthwise convolution with a feed-forward layer
   of as many parameters as the slow network has.
2. The cost of the global product by the number of pixels, counted and timed; the paper claims linear time and memory.
3. Images: a Terminator of three blocks, trained with Kar3 and the slow neural loss, without that loss, and with AdamW;
   and a residual network of three blocks, of as many parameters and at the same resolution, with AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from lissom.layers.slow_fast import GIBS, RGU, SlowWidths, standardised
from lissom.layers.slow_nets import SlowNetG, pointwise
from lissom.models.terminator import Terminator
from lissom.ops.hyper_zzw import hyper_zzw_global
from lissom.proofs.arms import (
    Budget,
    better,
    built,
    data_set,
    generator,
    image_task,
    interleaved,
    peak_memory,
    spread,
    train_on_stream,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.loop import evaluate, fit
from lissom.training.methods.base import Method
from lissom.training.methods.slow_neural_loss import SlowNeuralLoss
from lissom.training.methods.supervised import Supervised

__all__ = ["RowNet", "rows_of_marks", "small_residual", "small_terminator"]

CHANNELS, SLOW_WIDTH = 12, 32  # of the layer of the first part
MIXERS = {"product": "global product", "elementwise": "elementwise product", "local": "3 x 3 depthwise"}
SOLVED, CHANCE = 95.0, 60.0  # % of the marks' images: at least, at most; half are right by chance
APART = 3  # columns between the marks, at least
JUDGED = 1000  # images of the generated task
LINEAR = 1.1  # power of the number of pixels up to which a cost counts as linear
MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
WIDTHS = SlowWidths(32, 16, 16, 8, 32)  # half the published ones: the network has a tenth of their channels


@dataclass(frozen=True)
class _Scale:
    """``side`` of the generated maps and their ``marks`` budget; the ``sides`` at which the product is timed, and in
    how many rounds; ``pixels`` a side of images, how many train and judge, the blocks' ``widths``, and their
    ``images`` budget, whose rate is that of AdamW; ``kar_lr`` is Kar3's."""

    side: int
    marks: Budget
    sides: tuple[int, ...]
    rounds: int
    pixels: int
    train: int
    held_out: int | None
    widths: tuple[int, ...]
    images: Budget
    kar_lr: float = 1.2e-3


QUICK = _Scale(8, Budget(100, 32, 1e-2, weight_decay=0.0), (32, 128), 5, 8, 320, 200, (12, 24), Budget(20, 32, 3e-3))
FULL = _Scale(
    16, Budget(1000, 64, 5e-3, weight_decay=0.0), (32, 64, 128, 256), 20, 16, 10_000, 2000, (12, 24, 48),
    Budget(5 * 156, 64, 2e-3, augment=True, flip=True),
)  # fmt: skip
DIGITS = _Scale(16, FULL.marks, FULL.sides, 20, 16, 1200, None, (12, 24, 48), Budget(5 * 18, 64, 2e-3, augment=True))


@register("proof", "terminator")
def terminator(settings: Settings) -> ProofResult:
    """All parts. Quick: smaller maps, fewer steps and the digits; full: CIFAR-10 where LISSOM_DATA has it."""
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else FULL if data.name == "cifar10" else DIGITS
    marks = marked(scale, settings)
    cost = _costs(scale, len(settings.seeds))
    curves: dict[str, list[_Curve]] = {}
    for seed in settings.seeds:
        task = image_task(data, scale.pixels, seed, train=scale.train, held_out=scale.held_out)
        for name, curve in _curves(task, scale, seed).items():
            curves.setdefault(name, []).append(curve)
            settings.progress(f"seed {seed}: {name} answers {curve.last:.1f} % right")
    claims = (*_rows_claims(marks), *_cost_claims(scale, cost), *_image_claims(data.name, curves))
    rows = (*_rows_rows(scale, marks), *_cost_rows(scale, cost), *_image_rows(data.name, curves))
    notes = (
        "All networks of a part see the same images in the same order. Kar3 has no weight decay and the norms' penalty "
        "in its place; AdamW has the decay.",
        "The residual network keeps the full resolution, as the Terminator does; its convolutions are 3 x 3.",
    )
    title = "marks that share a row, the cost of the global product, and small networks on images"
    return ProofResult("terminator", title, claims, rows, notes)


# The generated task


def rows_of_marks(count: int, side: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (count, 1, side, side) of weak noise with two marks, and whether these share a row, int64 (count,).

    The marks are at least ``APART`` columns apart in either case, so that no window of three columns holds both; rows
    and columns by themselves tell nothing.
    """
    noise = 0.1 * torch.randn(count, 1, side, side, generator=numbers)
    labels = torch.randint(2, (count,), generator=numbers)
    row = torch.randint(side, (count,), generator=numbers)
    other = (row + torch.randint(1, side, (count,), generator=numbers)) % side
    pairs = torch.combinations(torch.arange(side))
    pairs = pairs[pairs[:, 1] - pairs[:, 0] >= APART]
    first, second = pairs[torch.randint(len(pairs), (count,), generator=numbers)].T
    index = torch.arange(count)
    noise[index, 0, row, first] += 1
    noise[index, 0, torch.where(labels == 1, row, other), second] += 1
    return noise, labels


class RowNet(nn.Module):
    """(B, 1, side, side) -> logits (B, 2): one layer with a mixer of ``MIXERS``, standardised, and its mean.

    The layer is the paper's without its other branches: fast = standardised(RGU(x K) + RGU(x)), out = (x K) fast, and
    a 1 x 1 convolution over out, its gate sigmoid(out) out, and fast. Where the mixer is local there is no K.
    """

    def __init__(self, mixer: str, side: int) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer {mixer!r} is none of {', '.join(MIXERS)}")
        self.mixer = mixer
        self.stem = nn.Conv2d(1, CHANNELS, 1)
        self.inner, self.outer = RGU(CHANNELS, side), RGU(CHANNELS, side)
        slow = SlowNetG(CHANNELS, side, SLOW_WIDTH)
        if mixer == "local":
            self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
            spent = _size(self.depthwise) + CHANNELS
            hidden = round((_size(slow) - spent) / (2 * CHANNELS + 1))
            self.feed = nn.Sequential(
                nn.Conv2d(CHANNELS, hidden, 1), nn.GELU(), nn.Conv2d(hidden, CHANNELS, 1)
            )  # fmt: skip
        else:
            self.slow_net_g = slow
        self.narrow = pointwise(2, 3 * CHANNELS, CHANNELS, 0.0)
        self.norm = GIBS(CHANNELS)
        self.head = nn.Linear(CHANNELS, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        kernel = torch.ones_like(x[:1]) if self.mixer == "local" else self.slow_net_g()
        context = x * kernel
        fast = standardised(self.inner(context) + self.outer(x))
        if self.mixer == "product":
            out = hyper_zzw_global(x, kernel, fast)
        elif self.mixer == "elementwise":
            out = context * fast
        else:
            out = self.feed(self.depthwise(context * fast))
        maps = self.norm(self.narrow(torch.cat([out, out.sigmoid() * out, fast], 1)))
        return self.head(functional.gelu(maps).mean((2, 3)))


def marked(scale: _Scale, settings: Settings) -> dict[str, list[float]]:
    """The first part: accuracy of every mixer on maps that were not trained on, in %, one a seed."""
    found: dict[str, list[float]] = {mixer: [] for mixer in MIXERS}
    for seed in settings.seeds:
        images, labels = rows_of_marks(JUDGED, scale.side, generator(seed, 1))
        for mixer in MIXERS:
            model = built(partial(RowNet, mixer, scale.side), seed)
            train_on_stream(
                model, lambda count, numbers: rows_of_marks(count, scale.side, numbers), functional.cross_entropy,
                scale.marks, seed,
            )  # fmt: skip
            with torch.no_grad():
                right = (model(images).argmax(1) == labels).float().mean()
            found[mixer].append(100 * float(right))
            settings.progress(f"seed {seed}: {MIXERS[mixer]} tells {found[mixer][-1]:.1f} % of the marks")
    return found


def _rows_claims(found: Mapping[str, Sequence[float]]) -> tuple[Claim, ...]:
    solved = Claim(
        f"The global product tells whether two distant marks share a row: at least {SOLVED:g} % right.",
        verdict_by_interval([value - SOLVED for value in found["product"]]),
        f"{spread(found['product'], 1)} %",
    )
    local = Claim(
        f"A 3 x 3 depthwise convolution of as many parameters stays near chance: at most {CHANCE:g} % right.",
        verdict_by_interval([CHANCE - value for value in found["local"]]),
        f"{spread(found['local'], 1)} %",
    )
    matrix = better(
        "It is the matrix product that does it: with an elementwise product in its place the layer is worse.",
        found["product"], found["elementwise"], matters=MATTERS,
    )  # fmt: skip
    return solved, local, matrix


def _rows_rows(scale: _Scale, found: Mapping[str, Sequence[float]]) -> list[Row]:
    rows = []
    for mixer, values in found.items():
        cost = {"parameters": _size(RowNet(mixer, scale.side)), "steps": scale.marks.steps}
        rows.append(Row(f"marks, {MIXERS[mixer]}", "accuracy", tuple(values), "%", cost))
    return rows


# What the product costs


def _costs(scale: _Scale, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of one product of 8 channels by side, and its peak memory in MB ("memory 64")."""
    calls: dict[str, Callable[[], object]] = {}
    memory: dict[str, list[float]] = {}
    for side in scale.sides:
        x, kernel, y = (torch.randn(1, 8, side, side, generator=generator(0)) for _ in range(3))
        calls[str(side)] = partial(hyper_zzw_global, x, kernel, y)
        memory[f"memory {side}"] = [peak_memory(calls[str(side)]) / 1e6] * repetitions
    return {**interleaved(calls, repetitions, scale.rounds), **memory}


def _powers(scale: _Scale, cost: Mapping[str, Sequence[float]], what: str = "") -> list[float]:
    """The power of the number of pixels with which ``what`` grows, from the two largest sides; one a repetition."""
    small, large = scale.sides[-2:]
    growth = zip(cost[f"{what}{small}"], cost[f"{what}{large}"], strict=True)
    return [math.log(after / before) / math.log((large / small) ** 2) for before, after in growth]


def _cost_claims(scale: _Scale, cost: Mapping[str, Sequence[float]]) -> tuple[Claim, Claim]:
    small, large = scale.sides[-2:]
    times, bytes_ = _powers(scale, cost), _powers(scale, cost, "memory ")
    time = Claim(
        f"The time of the global product is linear in the number of pixels (a power of at most {LINEAR:g}).",
        verdict_by_interval([LINEAR - power for power in times]),
        f"from {small} to {large} pixels a side: the power {spread(times)}; multiplications are C H^3, the power 1.50",
    )
    memory = Claim(
        f"Its memory is linear in the number of pixels (a power of at most {LINEAR:g}).",
        verdict_by_interval([LINEAR - power for power in bytes_]),
        f"from {small} to {large} pixels a side: the power {spread(bytes_)}; counted in tensors, not measured in pages",
    )
    return time, memory


def _cost_rows(scale: _Scale, cost: Mapping[str, Sequence[float]]) -> list[Row]:
    return [
        Row(
            f"global product, {side} x {side}", "time", tuple(cost[str(side)]), "ms",
            {"10^6 MACs": 8 * side**3 / 1e6, "MB": cost[f"memory {side}"][0]},
        )
        for side in scale.sides
    ]  # fmt: skip


# Images


@dataclass(frozen=True)
class _Curve:
    """Accuracy in % after the first epoch and after the last, with the number of parameters and seconds of training."""

    first: float
    last: float
    parameters: int
    seconds: float


def small_terminator(pixels: int, classes: int, widths: Sequence[int]) -> Terminator:
    """A Terminator of as many blocks as there are ``widths``, with slow networks half as wide as published."""
    return Terminator(
        num_classes=classes, img_size=pixels, widths=widths, global_layers=(2,) * len(widths),
        local_kernels=(3, 7, 5, 5), slow_widths=WIDTHS,
    )  # fmt: skip


class _Residual(nn.Module):
    """x + two 3 x 3 convolutions with BatchNorms and a ReLU between; ReLU behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.branch(x))


def small_residual(parameters: int, classes: int, blocks: int = 3) -> nn.Module:
    """A residual network at full resolution, of the width with which it has nearest to ``parameters``."""

    def made(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            *(_Residual(width) for _ in range(blocks)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
        )  # fmt: skip

    # 18 w^2 a block, 27 w in the first layer, 4 w and 2 w of norms, and the classifier's (w + 1) classes.
    linear = 29 + 4 * blocks + classes
    width = (math.sqrt(linear**2 + 72 * blocks * (parameters - classes)) - linear) / (36 * blocks)
    return made(max(1, round(width)))


def _curves(task: Task, scale: _Scale, seed: int) -> dict[str, _Curve]:
    """Every arm trained on the task: its accuracies."""
    classes = len(task.classes)
    make = partial(small_terminator, scale.pixels, classes, scale.widths)
    parameters = _size(built(make, seed))
    whole, bare = SlowNeuralLoss(), SlowNeuralLoss(weight=0.0)
    # No penalty besides AdamW's decay; the other terms of the loss as with Kar3.
    arms: dict[str, tuple[Callable[[], nn.Module], Method, str]] = {
        "Terminator": (make, whole, "kar3"),
        "without slow loss": (make, bare, "kar3"),
        "AdamW": (make, SlowNeuralLoss(penalty=0.0), "adamw"),
        "residual": (partial(small_residual, parameters, classes), Supervised(), "adamw"),
    }
    return {name: _trained(*arm, task, scale, seed) for name, arm in arms.items()}


def _trained(
    make: Callable[[], nn.Module], method: Method, optimizer: str, task: Task, scale: _Scale, seed: int
) -> _Curve:
    assert task.fit is not None
    budget, kar = scale.images, optimizer == "kar3"
    model = built(make, seed)
    batch = min(budget.batch, len(task.fit))
    # ``choose`` is looked at after every epoch, and nothing is chosen: it may be what judges.
    done = fit(
        model, task.with_splits(choose=task.report), method=method, optimizer=optimizer, batch=batch,
        epochs=math.ceil(budget.steps / (len(task.fit) // batch)), max_steps=budget.steps,
        lr=scale.kar_lr if kar else budget.lr, weight_decay=0.0 if kar else budget.weight_decay, warmup=budget.warmup,
        augment=budget.augment, flip=budget.flip, seed=seed, accelerator="cpu",
    )  # fmt: skip
    last = evaluate(model, task, task.report, 250).value
    return _Curve(float(done.history[0]["quality"]), last, _size(model), done.seconds)


def _image_claims(data: str, curves: Mapping[str, Sequence[_Curve]]) -> tuple[Claim, ...]:
    first = {name: [curve.first for curve in found] for name, found in curves.items()}
    last = {name: [curve.last for curve in found] for name, found in curves.items()}
    return (
        better(
            f"On images ({data}) it converges faster: after the first epoch it is ahead of a residual network of as "
            "many parameters.",
            first["Terminator"], first["residual"], matters=MATTERS,
        ),
        better(
            "It is still ahead after the last epoch, at equal steps.",
            last["Terminator"], last["residual"], matters=MATTERS,
        ),
        better(
            "The slow neural loss improves it.", last["Terminator"], last["without slow loss"], matters=MATTERS
        ),
        better("Kar3 is better than AdamW.", last["Terminator"], last["AdamW"], matters=MATTERS),
    )  # fmt: skip


def _image_rows(data: str, curves: Mapping[str, Sequence[_Curve]]) -> list[Row]:
    rows = []
    for name, found in curves.items():
        cost = {"parameters": found[0].parameters, "seconds": sum(c.seconds for c in found) / len(found)}
        rows.append(Row(f"{data}, {name}", "first epoch", tuple(c.first for c in found), "%"))
        rows.append(Row(f"{data}, {name}", "accuracy", tuple(c.last for c in found), "%", cost))
    return rows


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
