"""ConvFirst, the analysis half: degenerate convolutions are inefficient, and the waterline bounds whole networks.

Lavin, "On the Efficiency of Convolutional Neural Networks" (arXiv 2404.03617). Two claims in small, on this machine's
processor with one thread, in OpenVINO's float32:

1. Efficiency falls with operational intensity: full > pointwise > grouped > depthwise convolution at 56x56, and none is
   above its roofline. Times are those of the convolution's kernel alone, by the runtime's own counters.
2. The waterline is a bound, and a closer one than the roofline of the sums: for whole networks at batch 1,
   waterline <= measured latency. Times are medians of ordinary runs.

A seed is a repetition: everything is measured anew; the best peak and bandwidth of all count. Nothing is left out: an
efficiency above its roofline, or a network faster than its bound (data that stay in the caches), counts against the
claim.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lissom.meters.costs import LayerCost, layer_costs
from lissom.meters.peaks import measure_machine
from lissom.meters.waterline import Machine, Waterline, efficiency, roofline, waterline
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
from lissom.registry import load_part, register
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import layer_times, open_graph

if TYPE_CHECKING:
    from torch import nn

THREADS = 1
CHANNELS, SIDE, GROUP_WIDTH = 64, 56, 8
KINDS = ("full", "pointwise", "grouped", "depthwise")
NETWORKS = ("resnet18", "mobilenetv3_large_100", "convnext_atto")
QUICK, FULL = (2, 128, 0.5), (8, 224, 2.0)  # batch of the layers, pixels of the networks, seconds of each measurement
MATTERS = 0.02  # a difference of efficiencies, or of relative distances, below which there is none worth having


@register("proof", "convfirst")
def convfirst(settings: Settings) -> ProofResult:
    """Both claims. Quick: a smaller batch for the layers, fewer pixels for the networks, shorter runs."""
    batch, pixels, seconds = QUICK if settings.quick else FULL
    machines: list[Machine] = []
    kernels: dict[str, list[float]] = {kind: [] for kind in KINDS}
    measured: dict[str, list[float]] = {name: [] for name in NETWORKS}
    with tempfile.TemporaryDirectory(dir=settings.folder) as temporary:
        folder = Path(temporary)
        layers = {kind: _Exported(_layer(kind), (CHANNELS, SIDE, SIDE), batch, folder / kind) for kind in KINDS}
        networks = {}
        for name in NETWORKS:
            settings.progress(f"exporting {name}")
            networks[name] = _Exported(_network(name), (3, pixels, pixels), 1, folder / name)
        for seed in settings.seeds:
            settings.progress(f"repetition {seed}: peak, bandwidth, {len(KINDS)} layers, {len(NETWORKS)} networks")
            machines.append(measure_machine("openvino", 32, THREADS))
            for kind, layer in layers.items():
                kernels[kind].append(layer.kernel_seconds(seconds))
            for name, network in networks.items():
                measured[name].append(network.run_seconds(seconds))
    # A peak is a maximum: the best of all repetitions is the machine's, for every one of them.
    machine = Machine(max(m.peak for m in machines), max(m.bandwidth for m in machines), threads=THREADS)
    costs = {kind: layer.costs[0] for kind, layer in layers.items()}
    reached = {kind: [efficiency(costs[kind].ops, s, machine) for s in kernels[kind]] for kind in KINDS}
    most = {kind: roofline(costs[kind], machine) for kind in KINDS}
    lines = {name: waterline(networks[name].costs, machine) for name in NETWORKS}
    claims = (_ordered(reached), _below(reached, most), _bounded(measured, lines), _closer(measured, lines))
    rows = [
        Row("machine", "peak", tuple(m.peak / 1e9 for m in machines), "10^9 op/s"),
        Row("machine", "bandwidth of a copy", tuple(m.bandwidth / 1e9 for m in machines), "GB/s"),
    ]
    for kind in KINDS:
        spent = {"op/byte": costs[kind].intensity, "roofline": f"{most[kind]:.1%}"}
        rows.append(Row(f"{kind} convolution", "efficiency", _percent(reached[kind]), "%", spent))
    for name in NETWORKS:
        line = lines[name]
        spent = {"waterline ms": 1000 * line.bound_s, "roofline of sums ms": 1000 * line.roofline_s}
        rows.append(Row(name, "latency", tuple(1000 * s for s in measured[name]), "ms", spent))
    notes = (
        "bytes are the least that must move: inputs, outputs and weights once, all other work fused",
        "where nearly all layers are on one side of the ridge the two bounds nearly coincide, and closer says little",
        "the bandwidth is to memory; data that stay in the last-level cache move faster than the bounds know",
    )
    title = (
        f"efficiency by kind of convolution (batch {batch}), and bounds of whole networks ({pixels} pixels, batch 1)"
    )
    return ProofResult("convfirst", title, claims, tuple(rows), notes)


class _Exported:
    """A module exported in float32, with the costs of its layers that multiply."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], batch: int, path: Path) -> None:
        self.costs: list[LayerCost] = [cost for cost in layer_costs(model, shape, batch) if cost.macs]
        artifact: Artifact = load_part("exporter", "float32")(model, shape, "openvino", batch, path)
        (self.path,), (stage,) = artifact.graphs, artifact.plan["stages"]
        self.options = stage["options"]
        self.graph = open_graph(self.path, "openvino", self.options, THREADS)
        self.x = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)

    def run_seconds(self, seconds: float) -> float:
        """Median of ordinary runs."""
        times: list[float] = []
        for _ in range(3):
            self.graph.run(self.x)
        end = time.perf_counter() + seconds
        while len(times) < 10 or time.perf_counter() < end:
            start = time.perf_counter()
            self.graph.run(self.x)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def kernel_seconds(self, seconds: float) -> float:
        """Mean time of the convolution alone, without the changes of layout around it."""
        runs = min(500, max(10, round(seconds / self.run_seconds(0.0))))
        nodes = layer_times(self.path, self.options, THREADS, runs=runs)
        return sum(node.microseconds for node in nodes if node.kind == "Convolution") / 1e6


def _layer(kind: str) -> nn.Module:
    """One convolution of 64 channels without bias; pointwise: 64 to 256, as in an inverted bottleneck."""
    from torch import nn

    if kind == "pointwise":
        return nn.Conv2d(CHANNELS, 4 * CHANNELS, 1, bias=False)
    groups = {"full": 1, "grouped": CHANNELS // GROUP_WIDTH, "depthwise": CHANNELS}[kind]
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=False)


def _network(name: str) -> nn.Module:
    from lissom.models.factory import load_model

    return load_model(name).model


def _ordered(reached: Mapping[str, Sequence[float]]) -> Claim:
    text = "computational efficiency orders full > pointwise > grouped > depthwise convolution"
    verdicts, evidence = [], []
    for higher, lower in itertools.pairwise(KINDS):
        differences = [a - b for a, b in zip(reached[higher], reached[lower], strict=True)]
        verdicts.append(verdict_by_interval(differences, matters=MATTERS))
        evidence.append(f"{higher} - {lower}: {_spread(differences)} points, {verdicts[-1]}")
    return Claim(text, _together(verdicts), "; ".join(evidence))


def _below(reached: Mapping[str, Sequence[float]], most: Mapping[str, float]) -> Claim:
    text = "each kind of convolution stays below its roofline"
    verdicts, evidence = [], []
    for kind in KINDS:
        room = [most[kind] - value for value in reached[kind]]
        verdicts.append(verdict_by_interval(room))
        evidence.append(f"{kind}: {_spread(room)} points below, {verdicts[-1]}")
    return Claim(text, _together(verdicts), "; ".join(evidence))


def _bounded(measured: Mapping[str, Sequence[float]], lines: Mapping[str, Waterline]) -> Claim:
    text = "no network runs faster than its waterline bound"
    verdicts, evidence = [], []
    for name in NETWORKS:
        room = [1 - lines[name].bound_s / s for s in measured[name]]
        verdicts.append(verdict_by_interval(room))
        evidence.append(f"{name}: bound {_spread(room)} % below the measured latency, {verdicts[-1]}")
    return Claim(text, _together(verdicts), "; ".join(evidence))


def _closer(measured: Mapping[str, Sequence[float]], lines: Mapping[str, Waterline]) -> Claim:
    text = "the waterline is closer to the measured latency than the roofline of the sums"
    verdicts, evidence = [], []
    for name in NETWORKS:
        roof, bound = lines[name].roofline_s, lines[name].bound_s
        gains = [(abs(s - roof) - abs(s - bound)) / s for s in measured[name]]
        verdicts.append(verdict_by_interval(gains, matters=MATTERS))
        evidence.append(f"{name}: closer by {_spread(gains)} % of the latency, {verdicts[-1]}")
    return Claim(text, _together(verdicts), "; ".join(evidence))


def _together(verdicts: Iterable[str]) -> str:
    """A claim about all of them shows where each does, and does not where one does not."""
    found = set(verdicts)
    return next((verdict for verdict in (NOT_SHOWN, INCONCLUSIVE) if verdict in found), SHOWS)


def _percent(shares: Iterable[float]) -> tuple[float, ...]:
    return tuple(100 * share for share in shares)


def _spread(shares: Sequence[float]) -> str:
    mean, interval = mean_interval(_percent(shares))
    return f"{mean:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
