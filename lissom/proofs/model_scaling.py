"""Fast compound scaling (arXiv 2103.06877): equal multiply-adds spent on depth, width or image, in time and accuracy.

A small network of residual blocks is scaled by ``lissom.techniques.scaling`` to several multiples of its multiply-adds,
by depth, width, image, uniform ("dwr") and fast ("dWr") compound scaling. Depths and widths are rounded, so that the
same factor asked of two rules is not the same factor got: here the factor asked is the one at which the counted
multiply-adds come nearest to the multiple wanted, and what was counted stands beside every figure.

Nothing needs training for the first part: all networks are timed beside each other, and times are set against
activations, multiply-adds and parameters. In the second, the networks of one multiple are trained on CIFAR-10 where the
folder in LISSOM_DATA has it, else on scikit-learn's digits, each at the image size that its rule gives it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional

from lissom.data.sources import DataSet
from lissom.meters.activations import FIGURES, Complexity, complexity, correlations, left_out
from lissom.models.stages import Stages
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
    run_arms,
)
from lissom.proofs.base import NOT_SHOWN, SHOWS, Claim, ProofResult, Row, Settings
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.techniques.scaling import exponents, scale_config

__all__ = ["Network", "matched"]

TYPES = ("d", "w", "r", "dwr", "dWr")
TRAINED = ("d", "w", "dwr", "dWr")
MARGIN = 1.0  # points of accuracy that fast scaling may lose against uniform
NEAR = 0.1  # how far an exponent may lie from the paper's count for plain convolutions


@dataclass(frozen=True)
class _Scale:
    """Multiples of the timed networks, their batch and rounds; the trained networks' own settings and budget."""

    timed: Stages
    multiples: tuple[int, ...]
    batch: int
    rounds: int
    trained: Stages
    multiple: int
    budget: Budget
    train: int | None
    held_out: int | None


def _plain(depths: tuple[int, ...], widths: tuple[int, ...], side: int) -> Stages:
    count = len(depths)
    return Stages(
        "resnet", depths, widths, (1.0,) * count, (0,) * count, stem=widths[0], train_size=side, test_size=side
    )


TIMED = _plain((2, 2, 2), (16, 32, 64), 32)
FULL = _Scale(
    TIMED, (1, 2, 4, 8, 16), 8, 11, _plain((2, 2, 2), (16, 32, 64), 16), 4,
    Budget(steps=940, batch=64, lr=2e-3, augment=True, flip=True), 10_000, 5000,
)  # fmt: skip
DIGITS = Budget(steps=300, batch=64, lr=2e-3)
QUICK = _Scale(
    _plain((1, 1), (16, 32), 16), (1, 2), 2, 3, _plain((1, 1), (16, 32), 16), 2, Budget(steps=10, batch=32, lr=2e-3),
    None, None,
)  # fmt: skip


@register("proof", "model_scaling")
def model_scaling(settings: Settings) -> ProofResult:
    """Both parts. Quick: two multiples of a smaller network, and a few steps on the digits."""
    scale = QUICK if settings.quick else FULL
    timed = _timed(scale, settings)
    data = data_set("cifar10", quick=settings.quick)
    budget, train, held_out = scale.budget, scale.train, scale.held_out
    if data.name != "cifar10" and not settings.quick:
        budget, train, held_out = DIGITS, None, None
    stages = {kind: matched(scale.trained, kind, scale.multiple) for kind in TRAINED}
    found: dict[str, list[Trained]] = {}
    for kind, own in stages.items():
        found |= run_arms(
            settings, {kind: partial(Network, own, len(data.classes))},
            partial(_task, data, own.train_size, train, held_out), budget, part=f"{data.name} {own.train_size}",
        )  # fmt: skip
    calls = {
        kind: forward_call(Network(own, 10), torch.randn(32, 3, own.train_size, own.train_size))
        for kind, own in stages.items()
    }
    times = interleaved(calls, len(settings.seeds), scale.rounds)
    costs = {kind: _cost(own) for kind, own in stages.items()}
    return _judged(data.name, scale, timed, found, times, costs)


# The networks


class _Block(nn.Module):
    """Two 3 x 3 convolutions with norms, added to what came in; a 1 x 1 convolution where shapes change."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        changed = into != width or stride != 1
        self.short = nn.Sequential(nn.Conv2d(into, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        if not changed:
            self.short = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.first(x)))
        return functional.relu(self.norm2(self.second(y)) + self.short(x))


class Network(nn.Module):
    """Residual blocks in stages as ``stages`` says, each stage after the first at half the side of the one before.

    (B, 3, H, W) -> (B, classes). The stem keeps the image's side and, as in the paper, its own width.
    """

    def __init__(self, stages: Stages, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stages.stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stages.stem), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        before = stages.stem
        for number, (depth, width) in enumerate(zip(stages.depths, stages.widths, strict=True)):
            for i in range(depth):
                blocks.append(_Block(before, width, 2 if i == 0 and number else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@cache
def _cost(stages: Stages) -> Complexity:
    with torch.device("meta"):
        network = Network(stages, 10)
    return complexity(network, (3, stages.train_size, stages.train_size))


def matched(stages: Stages, scale_type: str, multiple: float) -> Stages:
    """``stages`` scaled by the factor whose counted multiply-adds come nearest to ``multiple`` times those of
    ``stages``, the smallest such factor; a multiple of 1 is ``stages`` itself."""
    if multiple == 1:
        return stages
    wanted = multiple * _cost(stages).macs
    candidates: dict[Stages, float] = {}
    for step in range(-30, 31):
        scaled = scale_config(stages, scale_type, multiple * 1.03**step)
        if scaled not in candidates:
            candidates[scaled] = abs(math.log(_cost(scaled).macs / wanted))
    return min(candidates, key=lambda scaled: candidates[scaled])


def _task(data: DataSet, side: int, train: int | None, held_out: int | None, seed: int) -> Task:
    return image_task(data, side, seed, train=train, held_out=held_out)


# The experiments


@dataclass(frozen=True)
class _Timed:
    """By (type, multiple): what a network costs, and its times in ms, one a repetition."""

    costs: Mapping[tuple[str, int], Complexity]
    times: Mapping[tuple[str, int], Sequence[float]]


def _timed(scale: _Scale, settings: Settings) -> _Timed:
    """Each network once, though several names may stand for it: a multiple of 1 is the same by every rule."""
    costs: dict[tuple[str, int], Complexity] = {}
    calls = {}
    for kind in TYPES:
        for multiple in scale.multiples:
            if multiple == 1 and kind != TYPES[0]:
                continue
            own = matched(scale.timed, kind, multiple)
            costs[kind, multiple] = _cost(own)
            x = torch.randn(scale.batch, 3, own.train_size, own.train_size)
            calls[f"{kind} {multiple}"] = forward_call(Network(own, 10), x)
    times = interleaved(calls, len(settings.seeds), scale.rounds)
    settings.progress(f"{len(calls)} networks timed")
    return _Timed(costs, {key: times[f"{key[0]} {key[1]}"] for key in costs})


# The verdicts


def _judged(
    data: str,
    scale: _Scale,
    timed: _Timed,
    found: Mapping[str, Sequence[Trained]],
    times: Mapping[str, Sequence[float]],
    costs: Mapping[str, Complexity],
) -> ProofResult:
    keys = list(timed.costs)
    every = [timed.costs[key] for key in keys]
    repetitions = len(next(iter(timed.times.values())))
    runs = [[timed.times[key][i] for key in keys] for i in range(repetitions)]
    goes_with = {figure: [correlations(every, run, figure) for run in runs] for figure in FIGURES}
    wrong = {figure: [_error(every, run, figure) for run in runs] for figure in FIGURES}
    top = scale.multiples[-1]
    # Multiply-adds were matched as nearly as rounding lets them; what is left of the difference is divided out.
    spent = {kind: [ms / timed.costs[kind, top].macs for ms in timed.times[kind, top]] for kind in TYPES}
    measured = _exponents(scale, timed)
    off = {kind: abs(measured[kind] - exponents(kind)["activations"]) for kind in TYPES}
    per_network = {kind: [ms / costs[kind].macs for ms in times[kind]] for kind in TRAINED}
    claims = [
        Claim(
            f"Activations grow with multiply-adds by the exponents of the paper's count: {_said(TYPES)}.",
            SHOWS if max(off.values()) <= NEAR else NOT_SHOWN,
            f"counted from 1 to {top} times: " + ", ".join(f"{kind} {measured[kind]:.2f}" for kind in TYPES)
            + f"; at most {NEAR:g} off is near (stem, shortcuts and rounding are counted here and not there)",
        ),
        better(
            "Activations correlate with time better than multiply-adds do.",
            [c["pearson"] for c in goes_with["activations"]], [c["pearson"] for c in goes_with["macs"]],
            matters=0.02, unit="of Pearson's r",
        ),
        better(
            "A time predicted from activations is nearer to the measured one than one from multiply-adds.",
            wrong["activations"], wrong["macs"], matters=1.0, unit="points of error", sign=-1,
        ),
        *(
            faster(
                f"At {top} times the multiply-adds, dWr takes less time than {kind}, for each multiply-add.",
                spent, kind, "dWr", more=_counted(timed, kind, "dWr", top),
            )
            for kind in ("dwr", "d", "r")
        ),
        no_worse(
            f"At {scale.multiple} times the multiply-adds, dWr is within {MARGIN:g} point of dwr's accuracy ({data}).",
            found["dWr"], found["dwr"], margin=MARGIN,
        ),
        faster(
            f"Of the trained networks, dWr answers in less time than dwr, for each multiply-add ({data}).",
            per_network, "dwr", "dWr",
        ),
    ]  # fmt: skip
    rows = []
    for (kind, multiple), values in timed.times.items():
        cost = timed.costs[kind, multiple]
        rows.append(
            Row(
                "the network itself" if multiple == 1 else f"{kind}, {multiple} times",
                "time of a batch, forward", tuple(values), "ms",
                {"10^6 MACs": cost.macs / 1e6, "10^6 activations": cost.activations / 1e6, "parameters": cost.params},
            )
        )  # fmt: skip
    for figure in FIGURES:
        for name, metric in (("pearson", "Pearson's r"), ("log", "r of logarithms"), ("rank", "rank correlation")):
            rows.append(Row(f"time and {figure}", metric, tuple(c[name] for c in goes_with[figure])))
        rows.append(Row(f"time from {figure}", "mean relative error", tuple(wrong[figure]), "%"))
    rows += accuracy_rows(found, data)
    rows += [
        Row(
            f"{data}, {kind}", "time of 32 images, forward", tuple(values), "ms",
            {"10^6 activations": costs[kind].activations / 1e6},
        )
        for kind, values in times.items()
    ]  # fmt: skip
    notes = (
        f"timed in PyTorch on one thread, batch {scale.batch}, {len(keys)} networks, in turns",
        "the error of a predicted time: each network's from a line through the others, "
        "|predicted / measured - 1|, mean over the networks",
        "the paper's claim is of hardware that waits for memory (GPUs, TPUs); a processor's caches soften it",
    )
    title = f"{', '.join(TYPES)} at equal multiply-adds: activations, time, and accuracy on {data}"
    return ProofResult("model_scaling", title, tuple(claims), tuple(rows), notes)


def _error(costs: Sequence[Complexity], ms: Sequence[float], figure: str) -> float:
    """Mean relative error, in %, of the times that the other networks predict."""
    predicted = left_out(costs, ms, figure)
    return 100 * statistics.fmean(abs(p / m - 1) for p, m in zip(predicted, ms, strict=True))


def _exponents(scale: _Scale, timed: _Timed) -> dict[str, float]:
    """log(activations) over log(multiply-adds), from the network itself to the largest multiple."""
    base = _cost(scale.timed)
    found = {}
    for kind in TYPES:
        ratios = timed.costs[kind, scale.multiples[-1]].over(base)
        found[kind] = math.log(ratios["activations"]) / math.log(ratios["macs"])
    return found


def _said(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kind} {exponents(kind)['activations']:.2f}" for kind in kinds)


def _counted(timed: _Timed, slow: str, fast: str, multiple: int) -> str:
    figures = [f"{kind} {timed.costs[kind, multiple].macs / 1e6:.1f}" for kind in (fast, slow)]
    return f"10^6 multiply-adds: {', '.join(figures)}"
