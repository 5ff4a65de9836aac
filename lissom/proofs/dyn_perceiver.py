"""Dyn-Perceiver (arXiv 2306.11248): exits that look at tokens beside a CNN, against exits on the CNN's own maps.

One small CNN of four stages, three ways, with the same data, epochs, batches and seeds: alone; with ordinary exits, a
pooled linear classifier behind stages 2 and 3, trained jointly; and as a Dyn-Perceiver's backbone. The last two have
the same losses: labels at every exit, and the last answer as the others' teacher.

The paper's point is that ordinary exits make low maps linearly separable at the cost of the last answer, and that exits
on latent tokens do not. Then thresholds for a whole range of budgets are searched on images kept out of the training
(``lissom.export.budgeted``), and accuracy is read over multiply-accumulates on others.

The full run takes CIFAR-10 where the folder in LISSOM_DATA has it, else scikit-learn's digits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.resnet import BasicBlock, make_blocks
from torch import nn

from lissom.data.sources import DataSet, read, stratified
from lissom.export.budgeted import exit_distributions, find_thresholds, leave
from lissom.images import Preprocessing
from lissom.layers.exits import Exits, attach_exits
from lissom.meters.costs import layer_costs, total
from lissom.models.dyn_perceiver import DynPerceiver
from lissom.proofs.base import (
    INCONCLUSIVE,
    Claim,
    KeptFigures,
    ProofResult,
    Row,
    Settings,
    mean_interval,
    verdict_by_interval,
)
from lissom.registry import register
from lissom.runtime.decisions import confidence
from lissom.tasks.classification import make_task
from lissom.tasks.task import Split, Task, batches
from lissom.training.loop import fit
from lissom.training.methods.base import Method, answers_of
from lissom.training.methods.multi_exit_kd import MultiExitKD
from lissom.training.methods.supervised import Supervised

__all__ = ["Curve", "SmallCNN"]

MATTERS = 0.5  # points of accuracy below which an advantage is not worth having, and a loss counts as none
KEEP = {2: (0.85, 1.0), 3: (0.85, 1.0, 0.5)}  # the search's factors; the published ones are for three exits
SHOWN = (8, 16, 24)  # of the 33 distributions, in the table
SYSTEMS = {"alone": "the CNN alone", "ordinary": "ordinary exits", "dyn": "Dyn-Perceiver"}


@dataclass(frozen=True)
class _Version:
    """What is trained for how long: images of ``side`` pixels, stages of ``widths`` channels and ``blocks`` blocks,
    ``latents`` that read maps pooled to ``pool`` x ``pool``."""

    side: int
    widths: tuple[int, int, int, int]
    latents: int
    pool: int
    epochs: int
    batch: int
    lr: float
    depths: tuple[int, int, int, int] = (1, 1, 2, 1)
    self_ratio: float = 4.0
    blocks: int = 1


# On the digits' small maps the tokens' branch costs more beside the CNN than on CIFAR's: the CNN is deeper there.
QUICK = _Version(16, (16, 32, 48, 64), 8, 2, 4, 32, 4e-3, depths=(1, 1, 1, 1), self_ratio=2.0, blocks=2)
DIGITS = _Version(16, (16, 32, 48, 64), 16, 4, 20, 32, 3e-3, blocks=2)
CIFAR = _Version(32, (32, 64, 128, 256), 16, 4, 10, 128, 2e-3)


class SmallCNN(nn.Module):
    """A residual network, ``blocks`` a stage: (B, 3, H, W) -> (B, ``classes``); maps H, H / 2, H / 4, H / 8 high."""

    def __init__(self, widths: Sequence[int], classes: int, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        stages, _ = make_blocks(
            (BasicBlock,) * 4, tuple(widths), (blocks,) * 4, widths[0], cardinality=1, base_width=64,
            norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU,
        )  # fmt: skip
        self.stages = nn.ModuleList(stage for _, stage in stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class _Pooled(nn.Module):
    """An ordinary exit: a linear classifier of a map's mean."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3)))


class _Upto(nn.Module):
    """A Dyn-Perceiver that answers at its exits up to one, and stops there."""

    def __init__(self, model: DynPerceiver, exit: int) -> None:
        super().__init__()
        self.model, self.exit = model, exit

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(islice(self.model.answers(x), self.exit))


def _built(system: str, version: _Version, classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cnn = SmallCNN(version.widths, classes, version.blocks)
        if system == "alone":
            return cnn
        if system == "ordinary":
            heads = [_Pooled(version.widths[n], classes) for n in (1, 2)]
            return attach_exits(cnn, Exits(["stages.1", "stages.2"], heads, detached=False))
        return DynPerceiver(
            (cnn.stem, list(cnn.stages)), num_classes=classes, latents=version.latents, depths=version.depths,
            pool=version.pool, self_ratio=version.self_ratio,
        )  # fmt: skip


def costs_of(model: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """Multiply-accumulates when each exit has answered, exits on the way included, and when the model has."""
    if isinstance(model, DynPerceiver):
        return np.array([total(_Upto(model, exit), shape)[1] for exit in (1, 2, 3, 4)])
    stages, heads, rest = np.zeros(4, np.int64), np.zeros(2, np.int64), 0
    for cost in layer_costs(model, shape):
        part = cost.path.split(".")
        if part[0] == "stages":
            stages[int(part[1])] += cost.macs
        elif part[0] == "exits":
            heads[int(part[2])] += cost.macs
        else:
            rest += cost.macs
    if not heads.any():
        return np.array([rest + stages.sum()])
    last = next(cost.macs for cost in layer_costs(model, shape) if cost.path == "head")
    upto = rest - last + stages.cumsum()
    return np.array([upto[1] + heads[0], upto[2] + heads.sum(), upto[3] + heads.sum() + last])


@dataclass(frozen=True)
class Curve:
    """Accuracy in points over multiply-accumulates, one figure each a wanted distribution."""

    accuracy: np.ndarray
    macs: np.ndarray

    @classmethod
    def of(cls, choose: np.ndarray, report: np.ndarray, labels: np.ndarray, costs: np.ndarray) -> Curve:
        """Thresholds are found on the logits ``choose`` and judged on ``report``, (exits + 1, N, classes) each."""
        rows = []
        for distribution in exit_distributions(KEEP[len(costs) - 1]):
            thresholds = find_thresholds(confidence(choose[:-1]).T, distribution)
            place = leave(confidence(report[:-1]).T, thresholds)
            right = report.argmax(-1) == labels
            rows.append((100 * right[place, np.arange(len(labels))].mean(), costs[place].mean()))
        return cls(*np.array(rows).T)

    def height(self, low: float, high: float) -> float:
        """Mean accuracy over all budgets from ``low`` to ``high``: of each, what the best distribution within it
        reaches, or, between two, what a mixture of them does."""
        order = np.argsort(self.macs)
        best = np.maximum.accumulate(self.accuracy[order])
        return float(np.interp(np.linspace(low, high, 200), self.macs[order], best).mean())


@register("proof", "dyn_perceiver")
def dyn_perceiver(settings: Settings) -> ProofResult:
    """The last answers of three systems, and two curves, seed by seed. Quick: the digits, a narrow CNN, four epochs."""
    data = _data(settings.quick)
    version = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    found = []
    for seed in settings.seeds:
        task = _task(data, version, seed)
        found.append(_compare(task, version, seed, settings))
    return _judged(data.name, found)


def _data(quick: bool) -> DataSet:
    folder = os.environ.get("LISSOM_DATA")
    if folder and not quick and (Path(folder) / "cifar10").is_dir():
        return read(Path(folder) / "cifar10")
    return read("digits")


def _task(data: DataSet, version: _Version, seed: int) -> Task:
    """A task with a part of the training data kept out, on which thresholds are chosen."""
    assert data.train is not None
    judged = data.test if data.test is not None else data.val
    cifar = data.name == "cifar10"
    out, rest = stratified(data.train.labels, len(data.train), 0.05 if cifar else 0.25, seed)
    divided = DataSet(data.name, data.classes, train=data.train.take(rest), val=data.train.take(out), test=judged)
    preprocessing = Preprocessing(version.side, version.side, mean=(0.5,) * 3, std=(0.5,) * 3)
    task = make_task(divided, preprocessing=preprocessing, trained_here=False, seed=seed)
    assert task.fit is not None
    return task.with_splits(fit=task.fit.sample(10_000, seed)) if cifar else task


def _compare(task: Task, version: _Version, seed: int, settings: Settings) -> dict[str, Any]:
    """All figures of one seed; systems that the proof's folder has are not trained again."""
    kept = KeptFigures(settings, "systems.jsonl", f"{task.name} {version}")
    figures: dict[str, Any] = {}
    for system in SYSTEMS:

        def trained(system: str = system) -> dict[str, list[Any]]:
            return _trained(system, task, version, seed)

        found = kept.get(system, seed, trained)
        figures |= {f"{system} {name}": np.array(found[name]) for name in ("exits", "costs")}
        if "accuracy" in found:
            figures[f"{system} curve"] = Curve(np.array(found["accuracy"]), np.array(found["macs"]))
        settings.progress(f"seed {seed}: {SYSTEMS[system]}: {found['exits'][-1]:.1f} % at the end")
    curves = [figures[f"{system} curve"] for system in ("ordinary", "dyn")]
    # The budgets that both can be run at, and both can spend.
    low, high = max(c.macs.min() for c in curves), min(c.macs.max() for c in curves)
    figures["range"] = (low, high)
    figures["ordinary height"], figures["dyn height"] = (c.height(low, high) if low < high else np.nan for c in curves)
    return figures


def _trained(system: str, task: Task, version: _Version, seed: int) -> dict[str, list[Any]]:
    """Of one system the accuracy and the multiply-accumulates of each exit, and its curve where it has several."""
    methods: dict[str, Method] = {
        "alone": Supervised(), "ordinary": MultiExitKD(weights=(0.5, 0.5, 1.0)), "dyn": MultiExitKD(),
    }  # fmt: skip
    moved = task.name == "cifar10"
    model = _built(system, version, len(task.classes), seed)
    fit(model, task, method=methods[system], epochs=version.epochs, batch=version.batch, lr=version.lr, seed=seed,
        augment=moved, flip=moved)  # fmt: skip
    labels, costs = task.report.labels, costs_of(model, task.shape)
    assert labels is not None
    report = _answers(model, task.report)
    found = {"exits": (100 * (report.argmax(-1) == labels).mean(1)).tolist(), "costs": costs.tolist()}
    if len(costs) > 1:
        curve = Curve.of(_answers(model, task.choose), report, labels, costs)
        found |= {"accuracy": curve.accuracy.tolist(), "macs": curve.macs.tolist()}
    return found


@torch.no_grad()
def _answers(model: nn.Module, split: Split) -> np.ndarray:
    """Logits of every exit in order and of the model: (exits + 1, N, classes)."""
    parts = []
    model.eval()
    for x in batches(split, 256):
        given = torch.from_numpy(x)
        found = tuple(model.answers(given)) if isinstance(model, DynPerceiver) else answers_of(model(given))
        parts.append(torch.stack(found).numpy())
    return np.concatenate(parts, 1)


def _judged(data: str, found: Sequence[Mapping[str, Any]]) -> ProofResult:
    def last(system: str) -> list[float]:
        return [float(f[f"{system} exits"][-1]) for f in found]

    def less(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=True)]

    text = f"{data}, {len(found)} seeds"
    cost, kept = less(last("alone"), last("ordinary")), less(last("dyn"), last("alone"))
    ahead = less(last("dyn"), last("ordinary"))
    heights = [f["dyn height"] - f["ordinary height"] for f in found]
    plain = found[0]["alone costs"][-1]
    low, high = (100 * float(np.mean([f["range"][side] for f in found])) / plain for side in (0, 1))
    apart = not all(np.isfinite(heights))  # in one seed at least, no budget fits both
    claims = (
        Claim(
            "Ordinary exits cost the last answer accuracy: it is below the CNN's that was trained alone.",
            verdict_by_interval(cost, matters=MATTERS),
            f"the CNN alone is {_interval(cost)} points above ({text})",
        ),
        Claim(
            "A Dyn-Perceiver's exits do not: its last answer is at or above the CNN's alone.",
            verdict_by_interval([difference + MATTERS for difference in kept]),
            f"{_interval(kept)} points above; a loss below {MATTERS} points counts as none ({text})",
        ),
        Claim(
            "A Dyn-Perceiver's last answer is more accurate than that of the CNN with ordinary exits.",
            verdict_by_interval(ahead, matters=MATTERS),
            f"{_interval(ahead)} points above ({text})",
        ),
        Claim(
            "At equal operations a Dyn-Perceiver is more accurate than the CNN with ordinary exits.",
            INCONCLUSIVE if apart else verdict_by_interval(heights, matters=MATTERS),
            "no budget fits both: the cheapest of one costs more than the dearest of the other"
            if apart
            else f"{_interval(heights)} points, mean over budgets from {low:.0f} to {high:.0f} % of the CNN's "
            f"operations ({text})",
        ),
    )
    notes = (
        "Operations are multiply-accumulates of one input, exits on the way included, against the CNN alone.",
        "Thresholds are chosen on images kept out of the training, and judged on others.",
        "All three are trained for the same epochs; the Dyn-Perceiver has more parameters than the CNN.",
    )
    title = f"exits on latent tokens against exits on a CNN's maps, on {data}"
    return ProofResult("dyn_perceiver", title, claims, tuple(_rows(found)), notes)


def _rows(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    plain = found[0]["alone costs"][-1]
    rows = []
    for system, words in SYSTEMS.items():
        costs = found[0][f"{system} costs"]
        for number, macs in enumerate(costs):
            place = "last" if number == len(costs) - 1 else f"exit {number + 1}"
            values = tuple(float(f[f"{system} exits"][number]) for f in found)
            rows.append(Row(f"{words}, {place}", "accuracy", values, "%", {"% of operations": 100 * macs / plain}))
    for number in SHOWN:
        for system in ("ordinary", "dyn"):
            curves = [f[f"{system} curve"] for f in found]
            spent = {"% of operations": 100 * float(np.mean([c.macs[number] for c in curves])) / plain}
            values = tuple(float(c.accuracy[number]) for c in curves)
            rows.append(Row(f"distribution {number}, {SYSTEMS[system]}", "accuracy", values, "%", spent))
    return rows


def _interval(values: Sequence[float]) -> str:
    mean, interval = mean_interval(values)
    return f"{mean:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
