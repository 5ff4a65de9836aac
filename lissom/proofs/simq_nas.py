"""SimQ-NAS (arXiv 2312.13301): a precision for every layer against one precision for all. The policy part alone.

The paper searches the architecture and the precision of each layer together and compares with the uniformly quantised
INT8 network. Here the architecture is fixed: a small vision transformer is trained, and each of its linear layers gets
4, 8 or 32 bits. Weights are rounded symmetrically for each output channel, inputs to 2^bits steps between the smallest
and the largest value seen in calibration; rounding is simulated in float32, so what is measured is accuracy and bytes,
not time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lissom.data.sources import DataSet, read, stratified
from lissom.images import Preprocessing
from lissom.models.factory import create_model
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
from lissom.search.encoding import SearchSpace
from lissom.tasks.classification import make_task
from lissom.tasks.task import Task
from lissom.training.loop import evaluate, fit

__all__ = ["Quantiser", "hypervolume"]

BITS = (4, 8, 32)
MARGIN = 1.0  # points of accuracy: a loss below this counts as none in the second claim


class Quantiser:
    """Simulates precision policies on the linear layers of ``model``; the model itself stays as it is.

    ``samples`` float32 (N, C, H, W) calibrate: the range of every layer's input in the float32 network is kept, as
    static quantisation does. A policy is one of 4, 8 and 32 for each of ``paths``, in the model's own order.
    """

    def __init__(self, model: nn.Module, samples: np.ndarray) -> None:
        self.model = model
        self._layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.paths = tuple(self._layers)
        self._ranges: dict[str, tuple[float, float]] = {}
        self._weights = {
            (path, bits): rounded_weight(layer.weight.detach(), bits)
            for path, layer in self._layers.items()
            for bits in BITS
            if bits < 32
        }
        handles = [layer.register_forward_pre_hook(self._see(path)) for path, layer in self._layers.items()]
        try:
            model.eval()
            with torch.no_grad():
                model(torch.from_numpy(samples))
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, path: str):
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            # The range holds 0, so that 0 stays exact.
            self._ranges[path] = (min(float(inputs[0].min()), 0.0), max(float(inputs[0].max()), 0.0))

        return hook

    @contextmanager
    def applied(self, policy: Sequence[int]) -> Iterator[nn.Module]:
        """The model, computing under ``policy`` inside the block."""
        changed, handles = [], []
        try:
            for path, bits in zip(self.paths, policy, strict=True):
                if bits == 32:
                    continue
                layer = self._layers[path]
                changed.append((layer, layer.weight.data))
                layer.weight.data = self._weights[path, bits]
                handles.append(layer.register_forward_pre_hook(_rounding(bits, *self._ranges[path])))
            yield self.model
        finally:
            for layer, weight in changed:
                layer.weight.data = weight
            for handle in handles:
                handle.remove()

    def bytes(self, policy: Sequence[int]) -> int:
        """Bytes of the model under ``policy``: packed weights, a float32 scale an output channel, scale and zero point
        of the input; everything else in float32."""
        total = 4 * sum(p.numel() for p in self.model.parameters())
        for path, bits in zip(self.paths, policy, strict=True):
            weight = self._layers[path].weight
            if bits < 32:
                total += weight.numel() * bits // 8 + 4 * weight.shape[0] + 8 - 4 * weight.numel()
        return total


def rounded_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """weight (out, in) rounded to integers in +-(2^(bits-1) - 1) times a scale for each output channel."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    return (weight / scale).round().clamp(-largest, largest) * scale


def _rounding(bits: int, low: float, high: float):
    """A hook that rounds a layer's input to 2^bits steps of [low, high], 0 being one of them."""
    steps = 2**bits - 1
    scale = max(high - low, 1e-12) / steps
    zero = round(-low / scale)

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (((inputs[0] / scale).round() + zero).clamp(0, steps).sub(zero) * scale, *inputs[1:])

    return hook


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area that ``points`` (both coordinates to be small) dominate within [0, reference], as a share of that box."""
    area, lowest = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return area / (reference[0] * reference[1])


@dataclass(frozen=True)
class _Measured:
    """One policy: error on ``choose`` in [0, 1], bytes."""

    policy: tuple[int, ...]
    error: float
    bytes: int


def front(found: Sequence[_Measured]) -> list[_Measured]:
    """Those that no other beats in error and in bytes, smallest first."""
    kept: list[_Measured] = []
    for candidate in sorted(found, key=lambda m: (m.bytes, m.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return kept


def mixed_policy(space: SearchSpace, generator: np.random.Generator) -> np.ndarray:
    """A vector of ``space`` whose layers share random odds of 4, 8 and 32 bits.

    With even odds for every layer the sizes of all candidates lie close together, near the average of 4, 8 and 32;
    odds drawn anew for each candidate reach from the smallest model to the largest.
    """
    odds = generator.dirichlet(np.full(len(BITS), 0.5))
    return generator.choice(len(BITS), size=len(space), p=odds)


@register("proof", "simq_nas")
def simq_nas(settings: Settings) -> ProofResult:
    """Random policies over {4, 8, 32} bits beside uniform 4, 8 and 32 on the same trained network, seed by seed."""
    data = _data(settings.quick)
    count = 24 if settings.quick else 60
    figures: dict[str, list[float]] = {}
    for seed in settings.seeds:
        task, model = _trained(data, seed, settings)
        for name, value in _compare(task, model, count, seed, settings).items():
            figures.setdefault(name, []).append(value)
    return _judged(data, figures, count, settings)


def _data(quick: bool) -> DataSet:
    folder = os.environ.get("LISSOM_DATA")
    if folder and not quick and (Path(folder) / "cifar10").is_dir():
        return read(Path(folder) / "cifar10")
    return read("digits")


def _trained(data: DataSet, seed: int, settings: Settings) -> tuple[Task, nn.Module]:
    """A task with enough held-out rows to choose on, and the network trained for it."""
    digits = data.name == "digits"
    assert data.train is not None
    labels = data.train.labels
    chosen, rest = stratified(labels, len(data.train), 300 / len(data.train) if digits else 0.1, seed)
    judged = data.test if data.test is not None else data.val
    divided = DataSet(data.name, data.classes, train=data.train.take(rest), val=data.train.take(chosen), test=judged)
    preprocessing = Preprocessing(32, 32, mean=(0.5,) * 3, std=(0.5,) * 3)
    task = make_task(divided, preprocessing=preprocessing, trained_here=False, seed=seed)
    assert task.fit is not None
    if not digits:
        task = task.with_splits(
            fit=task.fit.sample(5000, seed), choose=task.choose.sample(1000, seed), report=task.report.sample(2000, 0)
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patch = 8 if settings.quick else 4  # 16 or 64 tokens
        model = create_model("digits_vit", embed_dim=96, patch_size=patch, num_classes=len(data.classes))
    fit(
        model,
        task,
        epochs=12 if settings.quick else 10,
        batch=32,
        lr=1e-3,
        seed=seed,
        augment=not digits,
        flip=not digits,
    )
    settings.progress(f"seed {seed}: trained, {evaluate(model, task, task.choose).value:.1f} % on choose")
    return task, model


def _compare(task: Task, model: nn.Module, count: int, seed: int, settings: Settings) -> Mapping[str, float]:
    """All figures of one seed. Policies are chosen on ``choose``, and what is said of them is read on ``report``."""
    assert task.fit is not None
    quantiser = Quantiser(model, task.fit.sample(128, seed).inputs(slice(None)))
    space = SearchSpace({"q_bits": (len(quantiser.paths), BITS)})

    def measured(policy: tuple[int, ...]) -> _Measured:
        with quantiser.applied(policy) as candidate:
            quality = evaluate(candidate, task, task.choose, 256)
        return _Measured(policy, 1 - quality.value / 100, quantiser.bytes(policy))

    reported: dict[tuple[int, ...], float] = {}

    def error(policy: tuple[int, ...]) -> float:
        if policy not in reported:
            with quantiser.applied(policy) as candidate:
                reported[policy] = 1 - evaluate(candidate, task, task.report, 256).value / 100
        return reported[policy]

    uniform = {bits: measured((bits,) * len(quantiser.paths)) for bits in BITS}
    generator = np.random.default_rng(seed)
    known = {m.policy for m in uniform.values()}
    policies: list[tuple[int, ...]] = []
    while len(policies) < count:
        policy = tuple(space.decode(mixed_policy(space, generator))["q_bits"])
        if policy not in known:  # a policy is measured once, and a uniform one is not a mixed one
            known.add(policy)
            policies.append(policy)
    mixed = [measured(policy) for policy in policies]
    settings.progress(f"seed {seed}: {len(mixed)} mixed and {len(uniform)} uniform policies measured")

    box = (1 - 1 / len(task.classes), float(uniform[32].bytes))  # chance, and float32

    def area(found: Sequence[_Measured]) -> float:
        return hypervolume([(error(m.policy), float(m.bytes)) for m in front(found)], box)

    # The smallest that loses nothing against int8 on `choose`; int8 itself where no mixed policy does.
    int8 = uniform[8]
    keep = [m for m in mixed if m.error <= int8.error and m.bytes < int8.bytes]
    best = min(keep, key=lambda m: m.bytes, default=int8)
    return {
        "area mixed": area(mixed),
        "area uniform": area(list(uniform.values())),
        **{f"accuracy {bits}": 100 * (1 - error(uniform[bits].policy)) for bits in BITS},
        **{f"bytes {bits}": uniform[bits].bytes / 1e3 for bits in BITS},
        "accuracy best": 100 * (1 - error(best.policy)),
        "bytes best": best.bytes / 1e3,
        "high layers": float(sum(b > 4 for b in best.policy)),
        "layers": float(len(best.policy)),
    }


def _judged(data: DataSet, figures: Mapping[str, list[float]], count: int, settings: Settings) -> ProofResult:
    def row(name: str, metric: str, key: str, unit: str, measured: int) -> Row:
        return Row(name, metric, tuple(figures[key]), unit, {"policies measured": measured})

    def gain(better: str, worse: str) -> list[float]:
        return [a - b for a, b in zip(figures[better], figures[worse], strict=True)]

    rows = [
        row(f"mixed, {count} random policies", "hypervolume (error, bytes)", "area mixed", "", count),
        row("uniform 4, 8 and 32", "hypervolume (error, bytes)", "area uniform", "", len(BITS)),
    ]
    for name, key, measured in (
        *((f"uniform {bits}", str(bits), 1) for bits in BITS),
        ("smallest mixed as good as int8", "best", count),
    ):
        rows.append(row(name, "accuracy on held-out images", f"accuracy {key}", "%", measured))
        rows.append(row(name, "model size", f"bytes {key}", "kB", measured))

    area = gain("area mixed", "area uniform")
    smaller = [1 - b / a for a, b in zip(figures["bytes 8"], figures["bytes best"], strict=True)]
    change = gain("accuracy best", "accuracy 8")
    text = f"{data.name}, {len(settings.seeds)} seeds"
    layers = f"{np.mean(figures['high layers']):.1f} of {figures['layers'][0]:.0f} layers"
    claims = (
        Claim(
            "The front of mixed precision policies dominates more of the (error, bytes) plane than the uniform "
            "policies 4, 8 and 32 bits do.",
            verdict_by_interval(area, matters=0.005),
            f"hypervolume gained: {_interval(area)}, of the box between float32's bytes and chance ({text})",
        ),
        Claim(
            "Against the uniform int8 network, a mixed policy is smaller without loss of accuracy (the policy's part "
            "of the paper's 3.44x, most of which is the architecture's).",
            smaller_without_loss(smaller, change),
            f"bytes saved against int8: {_interval([100 * s for s in smaller])} %; change of accuracy: "
            f"{_interval(change)} points on held-out images, chosen on others; "
            f"{layers} keep more than 4 bits ({text})",
        ),
    )
    notes = (
        "Precision policy alone on a fixed network: no super-network, no predictor, no NSGA-II.",
        "The uniform front needs 3 measurements and cannot use more; the mixed front had "
        f"{count} random policies and does not contain the uniform ones.",
        "Bytes are counted from the policy (packed weights, scales, float32 rest); arithmetic is simulated in float32, "
        "so nothing is said of latency.",
    )
    return ProofResult("simq_nas", "a precision for every layer against one for all", claims, tuple(rows), notes)


def smaller_without_loss(saved: Sequence[float], change: Sequence[float]) -> str:
    """Verdict on "smaller at no loss": ``saved`` is a share of bytes, ``change`` the accuracy's, in points, by seed.

    Shown where the saving's interval lies above 0 and the change's above -MARGIN. Not shown where the saving is not,
    or the change's interval lies below -MARGIN. Inconclusive otherwise.
    """
    saving = verdict_by_interval(saved, matters=0.02)
    kept = verdict_by_interval([c + MARGIN for c in change])
    if saving == kept == SHOWS:
        return SHOWS
    return NOT_SHOWN if NOT_SHOWN in (saving, kept) else INCONCLUSIVE


def _interval(values: Sequence[float]) -> str:
    mean, interval = mean_interval(values)
    return f"{mean:.3g} ({interval[0]:.3g} to {interval[1]:.3g})" if interval else f"{mean:.3g} (one seed)"
