"""ConvFirst, the analysis half: degenerate convolutions are inefficient, and the waterline bounds whole networks.

Lavin, "On the Efficiency of Convolutional Neural Networks" (arXiv 2404.03617). Two claims in small, on this machine's
processor with one thread, in OpenVINO's float32:

1. Efficiency falls with operational intensity: full > pointwise > grouped > depthwise convolution at 56x56, and none is
   above its roofline. Every figure is a median of ordinary runs of a graph of that layer alone.
2. The waterline is a bound, and a closer one than the roofline of the sums: for whole networks,
   roofline of the sums <= waterline <= measured latency.

A seed is a repetition: peak, bandwidth and times are measured anew. Nothing is left out of the rows: an efficiency above
its roofline (data that stay in the caches) counts against the claim.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lissom.meters.costs import layer_costs
from lissom.meters.peaks import measure_machine
from lissom.meters.waterline import Machine, Waterline, efficiency, roofline, waterline
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import load_part, register
from lissom.runtime.backends import open_graph

THREADS = 1
CHANNELS, SIDE = 64, 56
KINDS = ("full", "pointwise", "grouped", "depthwise")
GROUP_WIDTH = 8
NETWORKS = ("resnet18", "mobilenetv3_large_100", "convnext_atto")


@register("proof", "convfirst")
def convfirst(settings: Settings) -> ProofResult:
    """Both claims. Quick: batch 2 instead of 8, networks at 128 pixels instead of 224."""
    batch, pixels, seconds = (2, 128, 0.5) if settings.quick else (8, 224, 2.0)
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        layers = {kind: _Exported(_layer(kind), (CHANNELS, SIDE, SIDE), batch, Path(folder) / kind) for kind in KINDS}
        networks = {}
        for name in NETWORKS:
            settings.progress(f"exporting {name}")
            networks[name] = _Exported(_network(name), (3, pixels, pixels), 1, Path(folder) / name)
        efficiencies: dict[str, list[float]] = {kind: [] for kind in KINDS}
        ceilings: dict[str, list[float]] = {kind: [] for kind in KINDS}
        latencies: dict[str, list[float]] = {name: [] for name in NETWORKS}
        lines: dict[str, list[Waterline]] = {name: [] for name in NETWORKS}
        machines = []
        for seed in settings.seeds:
            settings.progress(f"repetition {seed}: the machine's peak and bandwidth")
            machine = measure_machine("openvino", 32, THREADS)
            machines.append(machine)
            times = _medians({**layers, **networks}, seconds, settings.progress)
            for kind in KINDS:
                (cost,) = layers[kind].costs
                efficiencies[kind].append(efficiency(cost.ops, times[kind], machine))
                ceilings[kind].append(roofline(cost, machine))
            for name in NETWORKS:
                latencies[name].append(times[name])
                lines[name].append(waterline(networks[name].costs, machine))
    rows = _layer_rows(layers, efficiencies, ceilings, batch) + _network_rows(latencies, lines, pixels) + _machine(machines)
    claims = (_order(efficiencies), _below(efficiencies, ceilings), _bound(latencies, lines), _closer(latencies, lines))
    notes = (
        "bytes are the least: inputs, outputs and weights once, work without multiplications fused; "
        "bandwidth is a copy's, read and written bytes both counted",
        "at batch 1 a network's activations fit the last-level cache, which bandwidth to memory does not limit",
    )
    title = "efficiency of convolution kinds, and the waterline as a bound"
    return ProofResult("convfirst", title, claims, tuple(rows), notes)


class _Exported:
    """A module exported in float32 and opened, with the costs of its layers that multiply."""

    def __init__(self, model: Any, shape: tuple[int, ...], batch: int, path: Path) -> None:
        self.costs = [cost for cost in layer_costs(model, shape, batch) if cost.macs]
        artifact = load_part("exporter", "float32")(model, shape, "openvino", batch, path)
        (graph,), (stage,) = artifact.graphs, artifact.plan["stages"]
        self.graph = open_graph(graph, "openvino", stage["options"], THREADS)
        self.x = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)


def _layer(kind: str) -> Any:
    """One convolution of 64 channels, without bias; pointwise: 64 to 256, as in an inverted bottleneck."""
    from torch import nn

    c = CHANNELS
    return {
        "full": lambda: nn.Conv2d(c, c, 3, padding=1, bias=False),
        "pointwise": lambda: nn.Conv2d(c, 4 * c, 1, bias=False),
        "grouped": lambda: nn.Conv2d(c, c, 3, padding=1, groups=c // GROUP_WIDTH, bias=False),
        "depthwise": lambda: nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False),
    }[kind]()


def _network(name: str) -> Any:
    from lissom.models.factory import load_model

    return load_model(name).model


def _medians(
    things: Mapping[str, _Exported], seconds: float, progress: Callable[[str], None]
) -> dict[str, float]:  # fmt: skip
    """Median seconds of a run of each thing, measured one after another."""
    medians = {}
    for name, thing in things.items():
        for _ in range(3):
            thing.graph.run(thing.x)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 10 or time.perf_counter() < end:
            start = time.perf_counter()
            thing.graph.run(thing.x)
            times.append(time.perf_counter() - start)
        medians[name] = statistics.median(times)
        progress(f"{name}: {1000 * medians[name]:.3f} ms")
    return medians
