"""Poincaré ResNet (arXiv 2303.14027): norms through depth, midpoint batch norm, graphs by hand, training, in small.

1. Norms. Random tangent vectors pass 50 Poincaré linear layers of one width, started by half identity matrices and by
   the normal distribution that came before, each with the conformal factor of the mathematics and of the published
   code.
2. Batch norm by the midpoint, a closed form, beside that by the Fréchet mean in ten iterations: time of a training step
   of the layer, and how far their outputs are from each other.
3. The memory of a training step of a whole network, with backward passes derived by hand and by autograd's own.
4. Training: a hyperbolic network beside its Euclidean twin. The full run adds the published forms, a Poincaré
   classifier on the Euclidean network, and 20 layers from both starts.

Quick: the digits at 8 x 8. The full run has 10,000 images of CIFAR-10 at 16 x 16 where LISSOM_DATA has them, else the
digits at 16 x 16. The paper's robustness to attacks and to data of another distribution is not tried: networks that are
barely trained say nothing of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lissom.layers.poincare import PoincareBatchNorm2d, PoincareLinear
from lissom.models.poincare_resnet import PoincareResNet
from lissom.ops import poincare
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    data_set,
    faster,
    generator,
    image_task,
    interleaved,
    no_worse,
    peak_memory,
    ratios,
    run_arms,
    spread,
    step_call,
    time_rows,
)
from lissom.proofs.base import NOT_SHOWN, SHOWS, Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register
from lissom.tasks.task import Task

__all__ = ["memory_of_a_step", "norms_apart", "norms_through_depth"]

WIDTH, VECTORS, C = 16, 256, 0.1
DEPTHS = (1, 5, 10, 20, 50)
JUDGED = 20  # the depth at which norms are compared
STARTS = {
    "identity, correct": ("identity", "correct"),
    "identity, published": ("identity", "published"),
    "normal, correct": ("normal", "correct"),
    "normal, published": ("normal", "published"),
}
ITERATIONS = 10  # of the Fréchet mean
MIDPOINT, FRECHET = "batch norm by the midpoint", "batch norm by the Fréchet mean"
FASTER = 2.0  # what "much faster" is at least
NEAR = 1e-2  # how far outputs may be apart, where the root mean square distance from the centre is 1
SMALLER = 1.05  # times the memory, below which there is no saving worth having
MARGIN = 5.0  # points of accuracy that a hyperbolic network may be behind its twin
MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
HYPERBOLIC, EUCLIDEAN = "hyperbolic", "Euclidean twin"
IDENTITY, NORMAL = "20 layers, identity", "20 layers, normal"


@dataclass(frozen=True)
class _Scale:
    """The experiment's size: images of ``side`` pixels, ``train`` of them (None: all) and ``held_out`` others, networks
    of ``depth`` layers; ``deep`` is the budget of those of 20 (None: there are none); ``timed`` is the map (B, C,
    side, side) that batch norm is timed on, in ``rounds``."""

    side: int
    train: int | None
    held_out: int | None
    budget: Budget
    deep: Budget | None
    timed: tuple[int, int, int]
    rounds: int
    widths: tuple[int, int, int] = (4, 8, 16)
    depth: int = 8


QUICK = _Scale(8, None, None, Budget(60, 32, 5e-3, 1e-4), None, (16, 8, 8), 8)
DIGITS = _Scale(16, None, None, Budget(220, 64, 4e-3, 1e-4), Budget(110, 64, 4e-3, 1e-4), (64, 16, 16), 30)
CIFAR = _Scale(
    16, 10_000, 2_000, Budget(780, 64, 4e-3, 1e-4, augment=True, flip=True),
    Budget(300, 64, 4e-3, 1e-4, augment=True, flip=True), (64, 16, 16), 30,
)  # fmt: skip


@register("proof", "poincare_resnet")
def poincare_resnet(settings: Settings) -> ProofResult:
    """All four parts. Quick: a smaller map for batch norm, few steps, no networks of 20 layers."""
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    norms = [norms_through_depth(seed) for seed in settings.seeds]
    settings.progress("norms measured")
    times, apart = _timed_norms(scale, len(settings.seeds)), [norms_apart(scale.timed, seed) for seed in settings.seeds]
    settings.progress("batch norm timed")
    bytes_ = memory_of_a_step(scale.widths, scale.depth, scale.side, scale.budget.batch)
    steps = _timed_steps(scale, len(settings.seeds))
    settings.progress("training steps measured")
    make = partial(PoincareResNet, scale.widths, scale.depth, num_classes=len(data.classes))
    published = {"lambda_form": "published", "skip_dim": "width", "running": False}
    arms = {HYPERBOLIC: make, EUCLIDEAN: partial(make, geometry="euclidean")}
    if not settings.quick:
        arms["hyperbolic, published forms"] = partial(make, **published)
        arms["Euclidean, Poincaré classifier"] = partial(make, geometry="euclideanwhypclass")

    def task(seed: int) -> Task:
        return image_task(data, scale.side, seed, train=scale.train, held_out=scale.held_out)

    found = run_arms(settings, arms, task, scale.budget)
    if scale.deep is not None:
        deep = partial(PoincareResNet, scale.widths, 20, num_classes=len(data.classes))
        starts = {IDENTITY: deep, NORMAL: partial(deep, init="normal")}
        found |= run_arms(settings, starts, task, scale.deep)
    return _judged(data.name, scale, norms, times, apart, bytes_, steps, found)


# What needs no training


def norms_through_depth(seed: int) -> dict[str, dict[int, float]]:
    """The mean norm of tangent vectors, by start, at the input (0) and behind the layers numbered in ``DEPTHS``."""
    found: dict[str, dict[int, float]] = {}
    for name, (init, form) in STARTS.items():
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            v = torch.randn(VECTORS, WIDTH, dtype=torch.float64) / 2
            found[name] = {0: v.norm(dim=1).mean().item()}
            for layer in range(1, max(DEPTHS) + 1):
                v = PoincareLinear(WIDTH, WIDTH, ball=C, init=init, lambda_form=form).double()(v)
                if layer in DEPTHS:
                    found[name][layer] = v.norm(dim=1).mean().item()
    return found


def _norms(channels: int) -> dict[str, PoincareBatchNorm2d]:
    return {
        MIDPOINT: PoincareBatchNorm2d(channels, ball=C),
        FRECHET: PoincareBatchNorm2d(channels, ball=C, centre="frechet", iterations=ITERATIONS),
    }


def _maps(timed: tuple[int, int, int], seed: int) -> torch.Tensor:
    count, channels, side = timed
    return 0.3 + 0.5 * torch.randn(count, channels, side, side, generator=generator(seed))


def _timed_norms(scale: _Scale, repetitions: int) -> dict[str, list[float]]:
    x = _maps(scale.timed, 0)
    calls = {name: step_call(norm, x) for name, norm in _norms(scale.timed[1]).items()}
    return interleaved(calls, repetitions, scale.rounds)


def norms_apart(timed: tuple[int, int, int], seed: int) -> float:
    """The mean distance of what batch norm by the midpoint and by the Fréchet mean give for maps (B, C, side, side)."""
    x = _maps(timed, seed)
    with torch.no_grad():
        first, second = (poincare.expmap0(norm(x), C, 1) for norm in _norms(timed[1]).values())
    return poincare.distance(first, second, C, 1).mean().item()


def memory_of_a_step(widths: tuple[int, int, int], depth: int, side: int, batch: int) -> dict[str, int]:
    """The most bytes at one time in a training step: of the hyperbolic network with backward passes by hand ("manual")
    and by autograd's own ("naive"), and of the Euclidean twin."""
    x = torch.randn(batch, 3, side, side, generator=generator(0))
    found = {}
    for name, form, geometry in (
        ("manual", "manual", "hyperbolic"), ("naive", "naive", "hyperbolic"), (EUCLIDEAN, "manual", "euclidean"),
    ):  # fmt: skip
        step = step_call(PoincareResNet(widths, depth, geometry), x)
        with _ops(form):
            found[name] = peak_memory(step)
    return found


@contextlib.contextmanager
def _ops(form: str) -> Iterator[None]:
    before = os.environ.get("LISSOM_OPS")
    os.environ["LISSOM_OPS"] = form
    try:
        yield
    finally:
        if before is None:
            del os.environ["LISSOM_OPS"]
        else:
            os.environ["LISSOM_OPS"] = before


def _timed_steps(scale: _Scale, repetitions: int) -> dict[str, list[float]]:
    x = torch.randn(scale.budget.batch, 3, scale.side, scale.side, generator=generator(0))
    geometries = {HYPERBOLIC: "hyperbolic", EUCLIDEAN: "euclidean"}
    networks = {name: PoincareResNet(scale.widths, scale.depth, geometry) for name, geometry in geometries.items()}
    return interleaved({name: step_call(network, x) for name, network in networks.items()}, repetitions, 5)


# What came of it

Norms = Sequence[Mapping[str, Mapping[int, float]]]


def _judged(
    data: str,
    scale: _Scale,
    norms: Norms,
    times: Mapping[str, Sequence[float]],
    apart: Sequence[float],
    bytes_: Mapping[str, int],
    steps: Mapping[str, Sequence[float]],
    found: Mapping[str, Sequence[Trained]],
) -> ProofResult:
    rows = [
        Row(start, f"norm behind {depth} layers" if depth else "norm", tuple(one[start][depth] for one in norms))
        for start in STARTS
        for depth in (0, *DEPTHS)
    ]
    count, channels, side = scale.timed
    rows += time_rows(times, f"training step on {count} x {channels} x {side} x {side}")
    rows.append(Row("batch norm, one less the other", "distance of outputs", tuple(apart)))
    rows += [Row(f"{name} of depth {scale.depth}", "memory of a step", (n / 1e6,), "MB") for name, n in bytes_.items()]
    rows += time_rows(steps, f"training step of depth {scale.depth}, batch {scale.budget.batch}")
    rows += accuracy_rows(found)
    slower = spread(ratios(steps, HYPERBOLIC, EUCLIDEAN), 1)
    claims = [
        _keeps(norms),
        _exact(norms),
        faster("Batch norm by the midpoint is much faster than by the Fréchet mean.", times, FRECHET, MIDPOINT,
               at_least=FASTER, more=f"{ITERATIONS} iterations, forward and backward"),
        Claim(
            "It is as good: what comes out is nearly the same.",
            verdict_by_interval([NEAR - distance for distance in apart]),
            f"{spread(apart, 4)} apart in the mean, at a root mean square distance of 1 from the centre; {NEAR:g} "
            "was allowed",
        ),
        _smaller(bytes_),
        no_worse(f"A hyperbolic network learns as its Euclidean twin does (a step takes {slower} times as long).",
                 found[HYPERBOLIC], found[EUCLIDEAN], margin=MARGIN),
    ]  # fmt: skip
    if NORMAL in found:
        text = "Twenty layers learn from the identity start better than from the normal one."
        claims.append(better(text, found[IDENTITY], found[NORMAL], matters=MATTERS))
    notes = (
        "training is far shorter than the paper's: it tells whether the networks learn, not how well",
        "forms are the correct ones unless published ones are named; see lissom.layers.poincare",
    )
    title = f"features in the Poincaré ball; trained on {data} at {scale.side} pixels"
    return ProofResult("poincare_resnet", title, tuple(claims), tuple(rows), notes)


def _left(norms: Norms, start: str, depth: int) -> list[float]:
    """The share of the input's norm that is left behind ``depth`` layers, one a seed."""
    return [of_seed[start][depth] / of_seed[start][0] for of_seed in norms]


def _keeps(norms: Norms) -> Claim:
    kept = {start: _left(norms, start, JUDGED) for start in STARTS}
    gains = [
        min(a - b for a in (kept["identity, correct"][i], kept["identity, published"][i])
            for b in (kept["normal, correct"][i], kept["normal, published"][i]))
        for i in range(len(norms))
    ]  # fmt: skip
    said = ", ".join(f"{start} {spread(kept[start], 3)}" for start in STARTS if start.startswith("identity"))
    gone = max(max(kept[start]) for start in STARTS if start.startswith("normal"))
    return Claim(
        "The identity start keeps norms over many layers where the normal start before it collapses to the origin.",
        verdict_by_interval(gains, matters=0.01),
        f"share of the norm left behind {JUDGED} layers: {said}, normal {gone:.0e} at most",
    )


def _exact(norms: Norms) -> Claim:
    last = max(DEPTHS)
    off = [abs(share - 1) for share in _left(norms, "identity, correct", last)]
    published = _left(norms, "identity, published", last)
    return Claim(
        "Ours: it keeps them exactly with the conformal factor of the mathematics, and in part with the published one.",
        verdict_by_interval([min(1e-9 - a, 1 - b) for a, b in zip(off, published, strict=True)]),
        f"behind {last} layers the norm is off by {max(off):.0e} of itself at most; with the published factor "
        f"{spread(published, 3)} of it is left",
    )


def _smaller(bytes_: Mapping[str, int]) -> Claim:
    ratio, twin = bytes_["naive"] / bytes_["manual"], bytes_["manual"] / bytes_[EUCLIDEAN]
    return Claim(
        "Backward passes derived by hand make a training step need less memory.",
        SHOWS if ratio > SMALLER else NOT_SHOWN,
        f"{bytes_['manual'] / 1e6:.2f} MB by hand, {ratio:.2f} times as much by autograd's own; the Euclidean twin "
        f"needs 1/{twin:.1f} (counted, not sampled)",
    )
