"""PreCrop (arXiv 2203.02549): layer densities instead of single weights, before training, beside masks and controls.

First, without training: the densities that iterated SynFlow finds for an untrained network, and those of the closed
form, side by side. Then, from the same drawn weights and for the same steps: (a) the whole network; (b) SynFlow's mask;
(c) the same densities with every layer's mask shuffled; (d) the same densities as masks of whole filters; (e) a dense
network cropped to SynFlow's densities; (f) to the closed form's; (g) all widths scaled alike; (h) the largest weights
at initialisation. Dense ones have as many parameters as masks leave. Last, a training step of three kinds is timed.

The full run takes a plain network of six convolutions and a half-width ResNet-20 on 10,000 images of CIFAR-10, at 30,
10 and 5 % of the convolutions' weights; quick, a smaller plain one on the digits at 10 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from lissom.layers.channels import Channels, find_channels
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    built,
    data_set,
    faster,
    figure_rows,
    image_task,
    interleaved,
    no_worse,
    run_arms,
    spread,
    step_call,
    time_rows,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.densities import (
    Masks,
    closed_form,
    filter_masks,
    magnitude_masks,
    masked,
    masks_densities,
    shuffled_masks,
    synflow_masks,
)
from lissom.training.precropping import precrop

__all__ = ["density_table", "plain_network", "residual_network"]

FULL_NET, MASK, SHUFFLED, FILTERS = "(a) whole", "(b) SynFlow mask", "(c) shuffled", "(d) filter masks"
CROP, CLOSED, UNIFORM = "(e) crop, SynFlow", "(f) crop, closed form", "(g) crop, uniform"
MAGNITUDE = "(h) magnitude mask"
ARMS = (MASK, SHUFFLED, FILTERS, CROP, CLOSED, UNIFORM, MAGNITUDE)
KEPT = "parameters kept"
NEAR = 1.5  # a density of the closed form within this factor of SynFlow's reproduces it
MARGIN, MATTERS = 1.0, 0.5  # points of accuracy


@dataclass(frozen=True)
class _Scale:
    """Networks by name, densities, what every arm may use, images, SynFlow's iterations, rounds of the timing."""

    networks: Mapping[str, Callable[[int], nn.Module]]
    densities: tuple[float, ...]
    budget: Budget
    side: int
    images: int | None
    held_out: int | None
    iterations: int
    rounds: int


def plain_network(classes: int, widths: Sequence[int] = (32, 32, 64, 64, 128, 128), stride: int = 2) -> nn.Sequential:
    """3 x 3 convolutions with norms, on maps that halve at the third and the fifth (and first, with ``stride`` 2)."""
    layers: list[nn.Module] = []
    before = 3
    for i, width in enumerate(widths):
        step = stride if i == 0 else 2 if i in (2, 4) else 1
        layers += [nn.Conv2d(before, width, 3, step, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class _Block(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Identity() if before == width else nn.Conv2d(before, width, 1, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


def residual_network(classes: int, width: int = 8, depth: int = 3) -> nn.Sequential:
    """A ResNet for small images: three stages of ``depth`` basic blocks; ResNet-20 at half its width by default."""
    blocks = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(3):
        for _ in range(depth):
            blocks.append(_Block(before, width << stage))
            before = width << stage
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


SMALL = partial(plain_network, widths=(16, 16, 32, 32, 64, 64), stride=1)
QUICK = _Scale(
    {"plain": SMALL}, (0.1,), Budget(steps=60, batch=32, lr=4e-3), side=8, images=600, held_out=400, iterations=20,
    rounds=5,
)  # fmt: skip
DIGITS = _Scale(
    {"plain": SMALL}, (0.1, 0.03), Budget(steps=250, batch=32, lr=4e-3), side=8, images=None, held_out=None,
    iterations=50, rounds=20,
)  # fmt: skip
CIFAR = _Scale(
    {"plain": plain_network, "ResNet-20 x0.5": residual_network}, (0.3, 0.1, 0.05),
    Budget(steps=625, batch=128, lr=2e-3, augment=True, flip=True), side=32, images=10_000, held_out=5000,
    iterations=100, rounds=20,
)  # fmt: skip

Found = dict[tuple[str, float], dict[str, list[Trained]]]


@register("proof", "precropping")
def precropping(settings: Settings) -> ProofResult:
    """The table of densities, the arms at every density, and times; quick: one small network, one density, digits."""
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    classes, shape = len(data.classes), (3, scale.side, scale.side)
    tables = {
        (name, density): density_table(partial(make, classes), shape, density, settings.seeds, scale.iterations)
        for name, make in scale.networks.items()
        for density in scale.densities
    }
    settings.progress("densities of SynFlow and of the closed form compared")
    found: Found = {}
    whole: dict[str, list[Trained]] = {}
    for name, make in scale.networks.items():

        def task(seed: int) -> Task:
            return image_task(data, scale.side, seed, train=scale.images, held_out=scale.held_out)

        run = partial(run_arms, settings, task_of=task, budget=scale.budget, look=_looked)
        whole |= {name: run({FULL_NET: partial(make, classes)}, part=name)[FULL_NET]}
        for density in scale.densities:
            arms = network_arms(partial(make, classes), shape, density, scale.iterations)
            found[name, density] = run(arms, part=f"{name} at {density:.0%}")
    return _judged(data.name, scale, tables, whole, found, _timed(scale, settings, classes, shape))


# Densities without training


def density_table(
    make: Callable[[], nn.Module], shape: tuple[int, ...], density: float, seeds: Sequence[int], iterations: int
) -> dict[str, list[dict[str, float]]]:
    """SynFlow's and the closed form's densities of the convolutions, one dictionary (path -> density) a seed."""
    table: dict[str, list[dict[str, float]]] = {"SynFlow": [], "closed form": []}
    for seed in seeds:
        model = built(make, seed)
        convolutions = _convolutions(model)
        masks = synflow_masks(model, shape, density, steps=iterations, layers=list(convolutions))
        table["SynFlow"].append(masks_densities(masks))
        table["closed form"].append(_closed(convolutions, density))
    return table


def _convolutions(model: nn.Module) -> dict[str, int]:
    """Path -> number of weights of what is pruned: the classifier stays."""
    return {path: m.weight.numel() for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def _closed(weights: Mapping[str, int], density: float) -> dict[str, float]:
    sizes = [float(n) for n in weights.values()]
    return dict(zip(weights, closed_form(sizes, density * sum(sizes)).tolist(), strict=True))


def _apart(table: Mapping[str, Sequence[Mapping[str, float]]]) -> list[float]:
    """The typical factor between both densities of a layer, one number a seed: exp of the root mean square of logs."""
    factors = []
    for one, other in zip(table["SynFlow"], table["closed form"], strict=True):
        logs = [math.log(max(one[path], 1e-9) / other[path]) for path in other]
        factors.append(math.exp(math.sqrt(float(np.mean(np.square(logs))))))
    return factors


# Arms


def network_arms(
    make: Callable[[], nn.Module], shape: tuple[int, ...], density: float, iterations: int
) -> dict[str, Callable[[], nn.Module]]:
    """Every arm's function, which builds its network from the weights that torch's random numbers give it."""
    known: dict[int, Masks] = {}
    template = built(make, 0)
    channels, convolutions = find_channels(template, shape), _convolutions(template)
    everything = sum(p.numel() for p in template.parameters())
    share = 1 - (1 - density) * sum(convolutions.values()) / everything  # of the parameters, what the masks leave

    def start() -> tuple[nn.Module, int]:
        model = make()
        return model, torch.initial_seed() % 2**31

    def masks(model: nn.Module, seed: int) -> Masks:
        if seed not in known:
            known[seed] = synflow_masks(model, shape, density, steps=iterations, layers=list(convolutions))
        return known[seed]

    def with_mask(change: Callable[[nn.Module, int], Masks]) -> nn.Module:
        model, seed = start()
        return masked(model, change(model, seed))

    def cropped(densities: Callable[[nn.Module, int], Mapping[str, float]]) -> nn.Module:
        model, seed = start()
        return precrop(model, shape, densities(model, seed), parameters=share, channels=channels, seed=seed)

    return {
        MASK: lambda: with_mask(masks),
        SHUFFLED: lambda: with_mask(lambda model, seed: shuffled_masks(masks(model, seed), seed)),
        FILTERS: lambda: with_mask(lambda model, seed: filter_masks(masks(model, seed), seed)),
        CROP: lambda: cropped(lambda model, seed: _not_dead(masks_densities(masks(model, seed)), channels)),
        CLOSED: lambda: cropped(lambda model, seed: _closed(convolutions, density)),
        UNIFORM: lambda: cropped(lambda model, seed: {}),
        MAGNITUDE: lambda: with_mask(lambda model, seed: magnitude_masks(model, density, list(convolutions))),
    }


def _not_dead(densities: Mapping[str, float], channels: Channels) -> dict[str, float]:
    return {path: max(p, 1 / channels.layers[path].weights) for path, p in densities.items()}


def _looked(name: str, model: nn.Module, task: Task) -> dict[str, float]:
    return {KEPT: float(_kept(model))}


def _kept(model: nn.Module) -> int:
    """Parameters, less those that masks hold at zero."""
    out = sum(int((b == 0).sum()) for n, b in model.named_buffers() if n.endswith(".mask"))
    return sum(p.numel() for p in model.parameters()) - out


# Time


def _timed(scale: _Scale, settings: Settings, classes: int, shape: tuple[int, ...]) -> dict[str, list[float]]:
    """Milliseconds of a training step on a batch: the whole network, masked, cropped; the first network's."""
    make: Callable[[], nn.Module] = partial(next(iter(scale.networks.values())), classes)
    arms: dict[str, Callable[[], nn.Module]] = {FULL_NET: make, **network_arms(make, shape, scale.densities[0], 1)}
    x = torch.randn(32, *shape)
    calls = {name: step_call(built(arms[name], 0), x) for name in (FULL_NET, MASK, CLOSED)}
    times = interleaved(calls, len(settings.seeds), scale.rounds)
    settings.progress("training steps timed")
    return times


# The verdicts


def _mean(found: Found, arm: str) -> list[float]:
    """Accuracy of an arm, one number a seed: the mean over networks and densities."""
    each = [[run.accuracy for run in arms[arm]] for arms in found.values()]
    return [float(np.mean(values)) for values in zip(*each, strict=True)]


def _judged(
    data: str,
    scale: _Scale,
    tables: Mapping[tuple[str, float], dict[str, list[dict[str, float]]]],
    whole: Mapping[str, list[Trained]],
    found: Found,
    times: Mapping[str, list[float]],
) -> ProofResult:
    each = {where: _apart(table) for where, table in tables.items()}
    apart = [float(np.mean(values)) for values in zip(*each.values(), strict=True)]
    lines = "; ".join(f"{name} at {density:.0%}: {spread(values)}" for (name, density), values in each.items())
    arm = {name: _mean(found, name) for name in ARMS}
    claims = (
        Claim(
            f"The closed form reproduces the densities that iterated SynFlow finds, within a factor of {NEAR:g} a "
            "layer, without any weight.",
            verdict_by_interval([NEAR - factor for factor in apart]),
            f"a layer's two densities are typically a factor of {spread(apart)} apart ({lines})",
        ),
        no_worse(
            "Which weights of a layer a mask keeps does not matter: shuffled masks lose nothing on SynFlow's.",
            arm[SHUFFLED], arm[MASK], margin=MARGIN,
        ),
        no_worse(
            "Nor does their granularity: masks of whole filters of the same densities lose nothing.",
            arm[FILTERS], arm[MASK], margin=MARGIN,
        ),
        no_worse(
            "A dense network cropped to SynFlow's densities is as good as SynFlow's mask at equal parameters.",
            arm[CROP], arm[MASK], margin=MARGIN,
        ),
        no_worse(
            "The closed form's densities are as good for cropping as SynFlow's.",
            arm[CLOSED], arm[CROP], margin=MARGIN,
        ),
        better(
            "Cropping by densities beats scaling all widths alike, at equal parameters.",
            [(a + b) / 2 for a, b in zip(arm[CROP], arm[CLOSED], strict=True)], arm[UNIFORM], matters=MATTERS,
        ),
        better(
            "Densities matter: SynFlow's mask beats that of the largest weights.",
            arm[MASK], arm[MAGNITUDE], matters=MATTERS,
        ),
        faster(
            "A cropped network takes less time for a training step than a masked one of as many parameters.",
            times, MASK, CLOSED, more="batch of 32, one thread",
        ),
    )  # fmt: skip
    rows: list[Row] = []
    for (name, density), table in tables.items():
        for source, values in table.items():
            for path in values[0]:
                figures = tuple(densities[path] for densities in values)
                rows.append(Row(f"{name} at {density:.0%}, {path}", f"density, {source}", figures))
    for name, runs in whole.items():
        rows += accuracy_rows({FULL_NET: runs}, name)
    for (name, density), arms in found.items():
        part = f"{name} at {density:.0%}"
        rows += accuracy_rows(arms, part) + figure_rows(arms, KEPT, "", part)
    rows += time_rows(times, "training step")
    notes = (
        f"Claims on accuracy compare means over {len(found)} pairs of network and density, paired by seed ({data}).",
        "Masks leave the parameters of the table's cost column in place, most of them zero; what they keep, and what "
        f"cropped networks have, is the row {KEPT!r}. Multiplications of masked networks are those of the whole one.",
        "Narrow networks end with few channels a layer; the paper's networks are wider.",
    )
    return ProofResult(
        "precropping", "densities, masks and dense crops of untrained networks", claims, tuple(rows), notes
    )
