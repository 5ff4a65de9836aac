"""LGViT (arXiv 2308.00255): its exit heads and their distillation beside linear exits on the same frozen transformer.

A small vision transformer is trained, then frozen. Behind some of its blocks stand exits, of which only the heads are
trained: linear ones on the class token, by labels and the model's own answer (as earlier systems do it), and LGViT's,
by labels, that answer and features (stage 2 of the paper). Places, epochs and batches are the same; linear heads have
five times the learning rate, with which they do better. Heads of LGViT's form trained without the features say which
of the two parts a difference comes from.

An input leaves at the first exit whose confidence, the largest share of its softmax, is above a threshold. What that
saves is counted in multiply-accumulates, every head on the way included, and in executed blocks, as the paper counts.

The data are scikit-learn's digits. ``LISSOM_PROOF_DATA=cifar10`` takes CIFAR-10 (in the folder ``LISSOM_DATA``) and the
reference transformer instead, whose weights lie in ``benchmarks/weights`` of the repository.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lissom.data.sources import DataSet, read, stratified
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.layers.exit_heads import build_head, head_kinds
from lissom.layers.exits import Exits, attach_exits
from lissom.meters.costs import layer_costs
from lissom.models.factory import create_model, load_model
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
from lissom.registry import register
from lissom.tasks.classification import make_task
from lissom.tasks.task import Split, Task, batches
from lissom.training.loop import evaluate, fit
from lissom.training.methods.lgvit import ExitDistillation
from lissom.training.methods.recovery import Recovery

__all__ = ["Costs", "confidences", "leave"]

LOSS = 0.5  # points of accuracy that exits may cost where their threshold is chosen
MARGIN = 1.0  # points on held-out images: a loss below this counts as none
FASTER = 1.5  # fewer blocks, what the paper's 1.8 was expected to become at this scale
THRESHOLDS = (*np.linspace(0, 0.9, 46), *np.linspace(0.905, 1.0, 20), 1.01)  # above 1 nothing leaves
SHOWN = (0.6, 0.8, 0.95)  # thresholds in the table; the paper's scripts have 0.8
WEIGHTS = Path(__file__).parents[2] / "benchmarks" / "weights" / "cifar_vit.safetensors"
LINEAR_RATE = 5.0  # learning rate of linear heads, in units of the others'
SYSTEMS = {
    "linear": "linear heads on the class token",
    "plain": "LGViT heads without feature losses",
    "lgvit": "LGViT heads",
}


@dataclass(frozen=True)
class _Version:
    """What is trained for how long. ``exits`` are numbers of blocks, from 1."""

    exits: tuple[int, ...]
    epochs: int  # of the backbone
    head_epochs: int
    batch: int
    lr: float
    patch: int = 2
    width: int = 64
    systems: tuple[str, ...] = tuple(SYSTEMS)


QUICK = _Version((2, 3, 4, 5), 12, 3, 32, 3e-3, patch=4, width=48, systems=("linear", "lgvit"))
DIGITS = _Version((2, 3, 4, 5), 24, 12, 32, 2e-3)
CIFAR = _Version((4, 5, 6, 7, 8, 9, 10, 11), 0, 6, 128, 1e-3)


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates: ``upto[i]`` when exit i has answered, the heads on the way and its own included, the last
    when the model has; ``plain`` those of the model without exits, ``heads[i]`` one head's. ``blocks[i]``: blocks
    executed by then."""

    upto: np.ndarray
    plain: int
    heads: np.ndarray
    blocks: np.ndarray

    @classmethod
    def of(cls, model: nn.Module, shape: tuple[int, ...], exits: Sequence[int]) -> Costs:
        """Counted on one input of ``shape`` (C, H, W); ``model`` has exits behind the blocks ``exits`` (from 1)."""
        depth = len(model.blocks)  # type: ignore[arg-type]
        blocks, heads = np.zeros(depth, np.int64), np.zeros(len(exits), np.int64)
        stem = tail = 0
        for cost in layer_costs(model, shape):
            part = cost.path.split(".")
            if part[0] == "blocks":
                blocks[int(part[1])] += cost.macs
            elif part[0] == "exits":
                heads[int(part[2])] += cost.macs
            elif part[0] in ("norm", "fc_norm", "head"):
                tail += cost.macs
            else:
                stem += cost.macs
        numbers = np.array([*exits, depth])
        upto = stem + blocks.cumsum()[numbers - 1] + np.append(heads.cumsum(), heads.sum() + tail)
        return cls(upto, int(stem + blocks.sum() + tail), heads, numbers)


def confidences(logits: np.ndarray) -> np.ndarray:
    """The largest share of the softmax: logits (..., classes) -> (...)."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return 1 / shifted.sum(-1)


def leave(logits: np.ndarray, threshold: float) -> np.ndarray:
    """Where each sample leaves: logits (exits + 1, N, classes) -> int (N,), the first exit more confident than the
    threshold, or the model's own answer, the last."""
    sure = confidences(logits) > threshold
    sure[-1] = True
    return sure.argmax(0)


@dataclass(frozen=True)
class _Curve:
    """One figure a threshold: accuracy in points, operations as a share of the plain model's, blocks executed."""

    accuracy: np.ndarray
    operations: np.ndarray
    blocks: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, costs: Costs) -> _Curve:
        right = logits.argmax(-1) == labels  # (exits + 1, N)
        rows = []
        for threshold in THRESHOLDS:
            place = leave(logits, threshold)
            rows.append((100 * right[place, np.arange(len(labels))].mean(),
                         costs.upto[place].mean() / costs.plain, costs.blocks[place].mean()))  # fmt: skip
        return cls(*np.array(rows).T)

    def height(self, low: float, high: float = 1.0) -> float:
        """Mean accuracy over all shares of operations between ``low`` and ``high``, thresholds between those tried
        being interpolated."""
        shares = np.linspace(low, high, 200)
        return float(np.interp(shares, self.operations, self.accuracy).mean())

    def at(self, threshold: float) -> int:
        """The place of the threshold next to this one."""
        return int(np.abs(np.array(THRESHOLDS) - threshold).argmin())

    def cheapest(self, accuracy: float) -> int:
        """The place of the cheapest threshold that reaches an accuracy; never leaving does where nothing else does."""
        enough = np.flatnonzero(self.accuracy >= accuracy)
        return int(enough[self.operations[enough].argmin()]) if len(enough) else len(THRESHOLDS) - 1


@register("proof", "lgvit")
def lgvit(settings: Settings) -> ProofResult:
    """Accuracy of every exit, and accuracy over cost by threshold, seed by seed. Quick: a smaller transformer, trained
    once for all seeds, and no heads without feature losses."""
    data = os.environ.get("LISSOM_PROOF_DATA") or "digits"
    if data not in ("digits", "cifar10"):
        raise LissomError(f"LISSOM_PROOF_DATA is {data!r}; this proof knows digits and cifar10")
    cifar = data == "cifar10"
    version = CIFAR if cifar else QUICK if settings.quick else DIGITS
    found: list[Mapping[str, Any]] = []
    shared: tuple[Task, nn.Module] | None = None
    for seed in settings.seeds:
        if cifar:
            task, backbone = _reference(seed, settings)
        elif shared is None or not settings.quick:
            task, backbone = shared = _trained(seed, version, settings)
        else:
            task, backbone = shared
        found.append(_compare(task, backbone, seed, version, settings))
    return _judged(data, version, found, settings)


def _trained(seed: int, version: _Version, settings: Settings) -> tuple[Task, nn.Module]:
    """The digits, 300 of them held out to choose on, and a transformer trained for them."""
    data = read("digits")
    assert data.train is not None
    chosen, rest = stratified(data.train.labels, len(data.train), 300 / len(data.train), seed)
    divided = DataSet(data.name, data.classes, train=data.train.take(rest), val=data.train.take(chosen), test=data.test)
    preprocessing = Preprocessing(16, 16, mean=(0.5,) * 3, std=(0.5,) * 3)
    task = make_task(divided, preprocessing=preprocessing, trained_here=False, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(
            "digits_vit", img_size=16, patch_size=version.patch, embed_dim=version.width, depth=6, num_heads=4,
            class_token=True, global_pool="token", num_classes=len(data.classes),
        )  # fmt: skip
    fit(model, task, epochs=version.epochs, batch=version.batch, lr=version.lr, seed=seed, augment=False)
    settings.progress(f"seed {seed}: trained, {evaluate(model, task, task.choose).value:.1f} % on choose")
    return task, model


def _reference(seed: int, settings: Settings) -> tuple[Task, nn.Module]:
    """CIFAR-10, a part of it drawn by the seed, and the reference transformer."""
    folder = os.environ.get("LISSOM_DATA")
    if not folder or not (Path(folder) / "cifar10").is_dir():
        raise LissomError("LISSOM_PROOF_DATA=cifar10 needs LISSOM_DATA, the folder that holds cifar10")
    if not WEIGHTS.is_file():
        raise LissomError(f"there is no {WEIGHTS}; train the reference with benchmarks/train_reference.py")
    loaded = load_model("cifar_vit", weights=WEIGHTS)
    data = read(Path(folder) / "cifar10")
    task = make_task(data, preprocessing=loaded.preprocessing(data.image_size), trained_here=False)
    if task.fit is None:
        raise LissomError("cifar10 has no training split, from which the heads could learn")
    count = 1000 if settings.quick else 10_000
    task = task.with_splits(
        fit=task.fit.sample(count, seed), choose=task.choose.sample(count // 5, 0), report=task.report.sample(4000, 0)
    )
    return task, loaded.model


def _compare(task: Task, backbone: nn.Module, seed: int, version: _Version, settings: Settings) -> dict[str, Any]:
    """All figures of one seed. Thresholds are chosen on ``choose``, and what is said of them is read on ``report``."""
    labels = {"choose": task.choose.labels, "report": task.report.labels}
    figures: dict[str, Any] = {}
    curves: dict[str, dict[str, _Curve]] = {}
    for system in version.systems:
        model = _with_exits(backbone, version.exits, system, len(task.classes), seed)
        term = ExitDistillation() if system == "lgvit" else ExitDistillation(beta_het=0.0, beta_hom=0.0)
        fit(
            model, task, method=Recovery(terms=(term,)), epochs=version.head_epochs, batch=version.batch,
            lr=version.lr * (LINEAR_RATE if system == "linear" else 1.0), seed=seed, augment=False,
        )  # fmt: skip
        costs = Costs.of(model, task.shape, version.exits)
        logits = {name: _answers(model, getattr(task, name)) for name in labels}
        curves[system] = {name: _Curve.of(logits[name], labels[name], costs) for name in labels}  # type: ignore[arg-type]
        figures[f"{system} exits"] = 100 * (logits["report"].argmax(-1) == labels["report"]).mean(1)
        figures[f"{system} costs"] = costs
        shallow = figures[f"{system} exits"][0]
        settings.progress(f"seed {seed}: {SYSTEMS[system]} trained, {shallow:.1f} % behind block {version.exits[0]}")
    # The shares of operations that all systems can be run at.
    low = max(curve["report"].operations[0] for curve in curves.values())
    for system, curve in curves.items():
        judged = curve["report"]
        figures[f"{system} curve"] = judged
        figures[f"{system} height"] = judged.height(low)
        place = curve["choose"].cheapest(curve["choose"].accuracy[-1] - LOSS)
        figures[f"{system} chosen"] = {
            "accuracy": judged.accuracy[place],
            "change": judged.accuracy[place] - judged.accuracy[-1],
            "operations": judged.operations[place],
            "faster": judged.blocks[-1] / judged.blocks[place],
            "threshold": THRESHOLDS[place],
        }
    figures["low"] = low
    return figures


def _with_exits(backbone: nn.Module, exits: Sequence[int], system: str, classes: int, seed: int) -> nn.Module:
    """A copy of the transformer with untrained exits behind the blocks ``exits`` (from 1)."""
    model: Any = copy.deepcopy(backbone)
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    sample = torch.empty(1, prefix + grid[0] * grid[1], model.embed_dim)
    kinds = ["linear"] * len(exits) if system == "linear" else head_kinds(len(exits))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = [build_head(sample, classes, kind, prefix=prefix, grid=grid) for kind in kinds]
    return attach_exits(model, Exits([f"blocks.{n - 1}" for n in exits], heads))


def _answers(model: nn.Module, split: Split) -> np.ndarray:
    """Logits of every exit and of the model: (exits + 1, N, classes)."""
    parts = []
    with torch.no_grad():
        for x in batches(split, 256):
            parts.append(torch.stack(model.eval()(torch.from_numpy(x))).numpy())
    return np.concatenate(parts, 1)


def _judged(data: str, version: _Version, found: Sequence[Mapping[str, Any]], settings: Settings) -> ProofResult:
    def gain(at: int) -> list[float]:
        return [float(f["lgvit exits"][at] - f["linear exits"][at]) for f in found]

    shallow, deep = gain(0), gain(len(version.exits) - 1)
    heights = [f["lgvit height"] - f["linear height"] for f in found]
    chosen = [f["lgvit chosen"] for f in found]
    text = f"{data}, {len(settings.seeds)} seeds"
    claims = (
        Claim(
            "The shallowest exit is more accurate with a local perception head than with a linear one on the class "
            "token.",
            verdict_by_interval(shallow, matters=1.0),
            f"behind block {version.exits[0]}: {_interval(shallow)} points ({text})",
        ),
        Claim(
            "The gain is larger at the shallowest exit than at the deepest.",
            verdict_by_interval([a - b for a, b in zip(shallow, deep, strict=True)], matters=1.0),
            f"behind block {version.exits[0]}: {_interval(shallow)}, behind block {version.exits[-1]}: "
            f"{_interval(deep)} points ({text})",
        ),
        Claim(
            "At equal operations, heads included, exits with LGViT heads are more accurate than linear exits.",
            verdict_by_interval(heights, matters=0.5),
            f"mean over {100 * min(f['low'] for f in found):.0f} to 100 % of the plain model's operations: "
            f"{_interval(heights)} points ({text})",
        ),
        Claim(
            f"LGViT exits execute at least {FASTER} times fewer blocks without loss (the paper: about 1.8 times).",
            _together(
                verdict_by_interval([c["faster"] - FASTER for c in chosen], matters=0.0),
                verdict_by_interval([c["change"] + MARGIN for c in chosen]),
            ),
            f"{_interval([c['faster'] for c in chosen])} times fewer blocks, "
            f"{_interval([100 * c['operations'] for c in chosen])} % of the operations with heads, change of accuracy "
            f"{_interval([c['change'] for c in chosen])} points, where the threshold was chosen on other images for a "
            f"loss of at most {LOSS} points; below {MARGIN} point counts as none ({text})",
        ),
    )
    return ProofResult(
        "lgvit", f"early exits of a frozen transformer on {data}", claims, _rows(version, found), _notes(data)
    )


def _rows(version: _Version, found: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    rows = [Row("the model itself", "accuracy", tuple(float(f["linear exits"][-1]) for f in found), "%")]
    for i, number in enumerate(version.exits):
        for system in version.systems:
            costs = found[0][f"{system} costs"]
            own = {
                "% of operations": 100 * float(costs.upto[i]) / costs.plain,
                "head %": 100 * float(costs.heads[i]) / costs.plain,
            }
            values = tuple(float(f[f"{system} exits"][i]) for f in found)
            rows.append(Row(f"block {number}, {SYSTEMS[system]}", "accuracy", values, "%", own))
    for threshold in SHOWN:
        for system in version.systems:
            curves = [f[f"{system} curve"] for f in found]
            at = curves[0].at(threshold)
            spent = {
                "% of operations": 100 * float(np.mean([c.operations[at] for c in curves])),
                "blocks": float(np.mean([c.blocks[at] for c in curves])),
            }
            values = tuple(float(c.accuracy[at]) for c in curves)
            rows.append(Row(f"confidence {threshold}, {SYSTEMS[system]}", "accuracy", values, "%", spent))
    for system in version.systems:
        chosen = [f[f"{system} chosen"] for f in found]
        spent = {name: float(np.mean([c[name] for c in chosen])) for name in ("threshold", "faster")}
        values = tuple(100 * float(c["operations"]) for c in chosen)
        rows.append(Row(f"at most {LOSS} points lost, {SYSTEMS[system]}", "operations", values, "%", spent))
    return tuple(rows)


def _notes(data: str) -> tuple[str, ...]:
    backbone = "the reference network's" if data == "cifar10" else "trained here from scratch"
    return (
        f"The backbone is frozen and {backbone}; stage 1 of the paper, which trains everything, is left out.",
        "Operations are multiply-accumulates of one input, all heads up to the exit included, against the model "
        "without exits; blocks are counted as the paper counts them, without heads.",
        "Heads learn from the model's real answer; the published code leaves out the norm before its classifier.",
    )


def _together(*verdicts: str) -> str:
    """A claim of several parts shows where each does, and does not where one does not."""
    return next((verdict for verdict in (NOT_SHOWN, INCONCLUSIVE) if verdict in verdicts), SHOWS)


def _interval(values: Sequence[float]) -> str:
    mean, interval = mean_interval(values)
    return f"{mean:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
