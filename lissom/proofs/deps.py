"""Proof of DepS (ECCV 2024, arXiv 2407.06167): delayed shrinking against Once-for-All and sandwich training.

One small elastic network (kernels 3 and 5, expansions 2 and 4, one to three blocks in each of three stages) is trained
in every way on one budget, counted in multiply-accumulates of training: a forward and backward pass costs three times
its forward pass, a teacher's pass one. So a way whose steps cost more makes fewer of them, and every way has its whole
schedule of learning rates.

Arms: (a) sandwich steps from the first on; (b) Once-for-All: half of the budget for the whole network, the rest for its
progressive shrinking, taught by it; (c) DepS; (d) DepS whose sub-networks count in full at once; (e) DepS whose
sub-networks learn from labels. (b) and (c) also at smaller budgets: the curve of accuracy over cost. Judged are the
whole network, the smallest sub-network, and the mean over random ones, each with BatchNorm statistics of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lissom.layers.elastic import draw_setting, largest, smallest
from lissom.meters.costs import total
from lissom.models.ofa import OFAMobileNetV3
from lissom.proofs.arms import better, built, data_set, image_task, no_worse
from lissom.proofs.base import Claim, KeptFigures, ProofResult, Row, Settings
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.loop import evaluate, fit
from lissom.training.methods.base import Method
from lissom.training.methods.delayed_shrinking import DelayedShrinking, Sandwich
from lissom.training.methods.progressive_shrinking import Stage, published_stages
from lissom.training.methods.supervised import Supervised
from lissom.training.recalibration import recalibrate
from lissom.training.shrinking import fit_progressive

__all__ = ["Costs", "costs_of", "deps", "steps_of"]

MATTERS = 0.5  # points worth having
CHEAPER = 1.5  # how much less than Once-for-All's DepS's budget is, where it is to reach the same
RANDOM = 2  # random sub-networks a step
KEPT = "deps.jsonl"
LR = 3e-2 / 64  # published, for a sample of the batch
RECIPE: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 3e-5, "clip": None, "accelerator": "cpu"}


@dataclass(frozen=True)
class _Scale:
    """Images of ``side`` pixels, ``train`` of them to learn from (None: all), ``held_out`` to judge by; the stride of
    the network's stem and its widths; ``budget`` in passes of the whole network; ``judged`` random sub-networks;
    ``draws`` of settings that costs are the mean of; DepS's and Once-for-All's ``curve`` of other budgets, as
    divisors."""

    side: int
    train: int | None
    held_out: int | None
    stem_stride: int
    widths: tuple[int, ...]
    batch: int
    budget: int
    judged: int
    draws: int
    curve: tuple[float, ...]


QUICK = _Scale(8, 400, 200, 1, (8, 8, 16), 50, 48, 2, 4, (CHEAPER,))
DIGITS = _Scale(16, None, None, 1, (16, 24, 32), 64, 600, 20, 32, (CHEAPER, 2.5))
CIFAR = _Scale(32, 10_000, 2000, 2, (16, 24, 32), 128, 1400, 20, 32, (CHEAPER, 2.5))


@register("proof", "deps")
def deps(settings: Settings) -> ProofResult:
    """All arms, seed by seed; quick: on the digits, a smaller network and a few steps.

    The full run takes CIFAR-10 where the folder in LISSOM_DATA has it, else the digits. Finished arms are kept in the
    proof's folder.
    """
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    found: dict[str, dict[str, list[float]]] = {}
    kept = KeptFigures(settings, KEPT, f"{data.name} {scale}")
    costs = None
    for seed in settings.seeds:
        task = image_task(data, scale.side, seed, train=scale.train, held_out=scale.held_out)
        make = _maker(scale, len(task.classes))
        costs = costs or costs_of(built(make, 0), task.shape, scale.draws)
        for name, train in _arms(scale, costs).items():

            def figures(
                train: Callable[..., None] = train, make: Callable[[], OFAMobileNetV3] = make, task: Task = task,
                seed: int = seed,
            ) -> dict[str, float]:  # fmt: skip
                network: Any = built(make, seed)
                train(network, task, seed)
                return _judged(network, task, scale.judged)

            done = kept.get(name, seed, figures)
            settings.progress(
                f"seed {seed}: {name}: whole {done['whole']:.1f} %, random sub-networks {done['random']:.1f} %"
            )
            for metric, value in done.items():
                found.setdefault(name, {}).setdefault(metric, []).append(value)
    assert costs is not None
    return _result(data.name, scale, costs, found)


# What a step costs


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one image's forward pass: of the whole network, of the smallest sub-network, and the mean
    over random ones; ``stages``: that mean in each stage of progressive shrinking."""

    whole: float
    smallest: float
    random: float
    stages: tuple[tuple[Stage, float], ...]

    @property
    def sandwich(self) -> float:
        """A sandwich step, in passes of the whole network."""
        return 1 + (self.smallest + RANDOM * self.random) / self.whole

    def stage(self, number: int) -> float:
        """A step of a stage of progressive shrinking, in passes of the whole network: sub-networks, and a third of a
        pass for the teacher."""
        stage, macs = self.stages[number]
        return stage.count * macs / self.whole + 1 / 3


def costs_of(network: Any, shape: tuple[int, ...], draws: int = 32) -> Costs:
    """The costs of a super-network on inputs of ``shape``; means are over ``draws`` settings, always the same."""

    def mean(opened: Mapping[str, Sequence[Any]] | None) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            settings = [draw_setting(network, opened) for _ in range(draws)]
        return sum(macs(setting) for setting in settings) / draws

    def macs(setting: Mapping[str, Any]) -> float:
        return float(total(network.extract(setting).eval(), shape)[1])

    stages = tuple((stage, mean(dict(stage.opened))) for stage in published_stages(network))
    return Costs(macs(largest(network)), macs(smallest(network)), mean(None), stages)


def steps_of(method: Method, budget: float, costs: Costs) -> int:
    """How many steps of ``method`` a budget, in passes of the whole network, pays for."""
    if isinstance(method, DelayedShrinking):
        return max(2, int(budget / (method.start + (1 - method.start) * costs.sandwich)))
    return max(2, int(budget))


# Arms


def _maker(scale: _Scale, classes: int) -> Callable[[], OFAMobileNetV3]:
    def make() -> OFAMobileNetV3:
        return OFAMobileNetV3(
            num_classes=classes, widths=scale.widths, first=scale.widths[0], neck=4 * scale.widths[-1],
            features=4 * scale.widths[-1], kernels=(3, 5), expands=(2, 4), depths=(1, 2, 3),
            stem_stride=scale.stem_stride,
        )  # fmt: skip

    return make


def _arms(scale: _Scale, costs: Costs) -> dict[str, Callable[[Any, Task, int], None]]:
    """Name -> what trains a network in place, in the order of the table."""

    def by(method: Method, divisor: float = 1.0) -> Callable[[Any, Task, int], None]:
        def train(network: Any, task: Task, seed: int) -> None:
            _fit(network, task, replace(method), steps_of(method, scale.budget / divisor, costs), scale, seed)

        return train

    def progressive(divisor: float = 1.0) -> Callable[[Any, Task, int], None]:
        def train(network: Any, task: Task, seed: int) -> None:
            half = scale.budget / divisor / 2
            _fit(network, task, Supervised(), steps_of(Supervised(), half, costs), scale, seed)
            parts = _stage_steps(half, costs)
            more = {"batch": _batch(task, scale), **_moves(task), **RECIPE}
            fit_progressive(network, _few(task), steps=parts, lr=LR * _batch(task, scale), seed=seed + 1, **more)

        return train

    later = DelayedShrinking(random=RANDOM)
    arms = {
        "(a) sandwich": by(Sandwich(random=RANDOM)),
        "(b) once-for-all": progressive(),
        "(c) DepS": by(later),
        "(d) DepS, eps 1 at once": by(replace(later, eps0=1.0)),
        "(e) DepS, labels alone": by(replace(later, distil=False)),
    }
    for divisor in scale.curve:
        arms[f"(b) at 1/{divisor:g} of the cost"] = progressive(divisor)
        arms[f"(c) at 1/{divisor:g} of the cost"] = by(later, divisor)
    return arms


def _stage_steps(budget: float, costs: Costs) -> list[int]:
    """Steps of each stage: the budget is shared as the published stages share the cost of their epochs."""
    weights = [stage.epochs * costs.stage(number) for number, (stage, _) in enumerate(costs.stages)]
    shares = [budget * weight / sum(weights) for weight in weights]
    return [max(1, int(share / costs.stage(number))) for number, share in enumerate(shares)]


def _batch(task: Task, scale: _Scale) -> int:
    assert task.fit is not None
    return min(scale.batch, len(task.fit))


def _moves(task: Task) -> dict[str, Any]:
    natural = not task.name.startswith("digits")
    return {"augment": natural, "flip": natural}


def _few(task: Task) -> Task:
    return task.with_splits(choose=task.choose.sample(8, 0))  # judged every epoch, and nobody reads that


def _fit(network: Any, task: Task, method: Method, steps: int, scale: _Scale, seed: int) -> None:
    assert task.fit is not None
    batch = _batch(task, scale)
    fit(
        network, _few(task), method=method, epochs=math.ceil(steps / (len(task.fit) // batch)), max_steps=steps,
        batch=batch, lr=LR * batch, warmup=0.05, seed=seed, **_moves(task), **RECIPE,
    )  # fmt: skip


def _judged(network: Any, task: Task, count: int) -> dict[str, float]:
    """Accuracy in % of the whole network, the smallest sub-network, and ``count`` random ones, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings = [draw_setting(network) for _ in range(count)]

    def accuracy(setting: Mapping[str, Any]) -> float:
        assert task.fit is not None
        plain = recalibrate(network.extract(setting), task.fit)
        return evaluate(plain, task, task.report, 250).value

    random = [accuracy(setting) for setting in settings]
    return {
        "whole": accuracy(largest(network)),
        "smallest": accuracy(smallest(network)),
        "random": sum(random) / len(random),
    }


# What came of it


def _result(data: str, scale: _Scale, costs: Costs, found: Mapping[str, Mapping[str, list[float]]]) -> ProofResult:
    words = {"whole": "the whole network", "smallest": "the smallest", "random": f"mean of {scale.judged} random"}
    rows = []
    for name, metrics in found.items():
        divisor = float(name.split("1/")[1].split()[0]) if "1/" in name else 1.0
        budget = scale.budget / divisor
        cost: dict[str, Any] = {"GMACs of training": 3e-9 * costs.whole * budget * scale.batch}
        if name.startswith("(b)"):
            cost["steps"] = steps_of(Supervised(), budget / 2, costs) + sum(_stage_steps(budget / 2, costs))
        else:
            method = Sandwich() if name.startswith("(a)") else DelayedShrinking()
            cost["steps"] = steps_of(method, budget, costs)
        rows += [Row(name, words[metric], tuple(values), "%", cost) for metric, values in metrics.items()]

    def of(name: str, metric: str) -> list[float]:
        return found[name][metric]

    deps_, ofa, cheap = "(c) DepS", "(b) once-for-all", f"(c) at 1/{CHEAPER:g} of the cost"
    claims: tuple[Claim, ...] = (
        no_worse(
            f"DepS reaches the accuracy of Once-for-All's sub-networks at 1/{CHEAPER:g} of the training cost.",
            of(cheap, "random"), of(ofa, "random"), margin=MATTERS,
        ),
        no_worse(
            f"So it does for the whole network, at 1/{CHEAPER:g} of the cost.",
            of(cheap, "whole"), of(ofa, "whole"), margin=MATTERS,
        ),
        better(
            "At the same cost DepS's sub-networks are better than Once-for-All's.",
            of(deps_, "random"), of(ofa, "random"), matters=MATTERS,
        ),
        better(
            "At the same cost DepS's whole network is better than that of sandwich training from the start.",
            of(deps_, "whole"), of("(a) sandwich", "whole"), matters=MATTERS,
        ),
        better(
            "So are its sub-networks.", of(deps_, "random"), of("(a) sandwich", "random"), matters=MATTERS
        ),
        better(
            "Sub-networks whose weight rises from almost nothing leave a better whole network than those that count in "
            "full at once.",
            of(deps_, "whole"), of("(d) DepS, eps 1 at once", "whole"), matters=MATTERS,
        ),
        better(
            "Sub-networks learn more from the whole network's answers than from labels.",
            of(deps_, "random"), of("(e) DepS, labels alone", "random"), matters=MATTERS,
        ),
    )  # fmt: skip
    share = (0.5 + 0.5 * costs.sandwich) / costs.sandwich
    notes = (
        f"Of one number of steps, DepS's cost {share:.0%} of sandwich training's: a sandwich step is "
        f"{costs.sandwich:.2f} passes of the whole network.",
        "The paper's ramp and snapshots are not known here: eps rises linearly over a tenth of the training, and the "
        "whole network of the same step is the teacher.",
        "All arms have one recipe (SGD, published rates and weight decay by the batch); nothing was chosen by the "
        "judged images.",
    )
    return ProofResult("deps", "sub-networks that come late to a training", claims, tuple(rows), notes)
