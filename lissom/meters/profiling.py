"""``profile``: where a model's time goes, layer by layer, against what this machine could do.

Operations and bytes come from the model (``costs``), times from the runtime's own counters, peak and bandwidth from
this machine (``peaks``), bounds from Lavin's roofline and waterline (arXiv 2404.03617, ``waterline``).

The waterline runs over the layers that multiply, at the precision each ran in. All other work counts as fused into
them, so that the bound stays a lower one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lissom.errors import LissomError
from lissom.meters.costs import LayerCost, layer_costs
from lissom.meters.peaks import kernel_bits, measure_machine
from lissom.meters.waterline import Machine, Waterline, efficiency, roofline, waterline
from lissom.registry import load_part
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import LayerTime, Stages, open_graph
from lissom.runtime.target import default_threads

if TYPE_CHECKING:
    from torch import nn

__all__ = ["UNATTRIBUTED", "LayerProfile", "Profile", "profile"]

UNATTRIBUTED = "(unattributed)"
NAMED = 3  # rows that a warning names
# OpenVINO's kinds of nodes that multiply: their kernels tell the precision of a layer.
MULTIPLYING = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention", "RNNCell",
               "RNNSeq"}  # fmt: skip
BITS = (4, 8, 16, 32)  # an element may have
SECONDS = 1.0  # of running, once for the latency and once for the layers' times


@dataclass(frozen=True)
class LayerProfile:
    """One layer's cost and time. ``bytes`` and ``intensity`` (operations a byte) are at ``bits``, those it ran in.

    ``ms`` is None where the runtime ran no node of its own for the layer (0: below its clock); ``inside`` then names
    the layer whose kernel did its work. ``efficiency`` is measured, ``roofline`` the most it could be, ``bound`` what
    limits it ("memory" or "compute"): None for layers without multiplications. ``share`` is of the sum of all nodes'
    times.
    """

    path: str
    kind: str
    macs: int
    bytes: int
    intensity: float
    bits: int
    ms: float | None
    share: float
    efficiency: float | None = None
    roofline: float | None = None
    bound: str | None = None
    inside: str | None = None
    warning: str | None = None


@dataclass(frozen=True)
class Profile:
    """A model's layers and totals. ``measured_ms``: median of ordinary runs; ``nodes_ms``: sum of the nodes' times.

    ``machines`` holds this machine's peak and bandwidth by bits. ``unattributed`` gives milliseconds by node type of
    what belongs to no layer (changes of layout and precision, mostly). ``fused``: layers without multiplications that
    ran as part of others, and have no row.
    """

    name: str
    runtime: str
    shape: tuple[int, ...]
    threads: int
    rows: tuple[LayerProfile, ...]
    line: Waterline
    ops: int
    measured_ms: float
    nodes_ms: float
    machines: Mapping[int, Machine]
    unattributed: Mapping[str, float] = field(default_factory=dict)
    fused: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def bound_ms(self) -> float:
        """The waterline: no run of these layers one after another is faster."""
        return 1000 * self.line.bound_s

    @property
    def efficiency(self) -> float:
        """Ideal over measured latency, of the whole model."""
        return 1000 * self.line.ideal_s / self.measured_ms

    def to_json(self) -> dict[str, Any]:
        main = self.machines[max(self.machines)]
        return {
            "name": self.name,
            "runtime": self.runtime,
            "shape": list(self.shape),
            "threads": self.threads,
            "measured_ms": self.measured_ms,
            "nodes_ms": self.nodes_ms,
            "ideal_ms": 1000 * self.line.ideal_s,
            "roofline_ms": 1000 * self.line.roofline_s,
            "bound_ms": self.bound_ms,
            "efficiency": self.efficiency,
            "max_efficiency": self.line.max_efficiency,
            "macs": self.ops // 2,
            "machine": main.to_json(),
            "machines": [machine.to_json() for _, machine in sorted(self.machines.items())],
            "unattributed": dict(self.unattributed),
            "fused": self.fused,
            "warnings": list(self.warnings),
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        """An aligned table of the layers in order of execution, then totals, machine and warnings."""
        header = ("layer", "kind", "bits", "MACs", "bytes", "op/byte", "ms", "share", "efficiency", "roofline", "bound")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        words = {0, 1, len(header) - 1}
        lines = [
            "  ".join(line[i].ljust(w) if i in words else line[i].rjust(w) for i, w in enumerate(widths))
            for line in table
        ]
        lines.insert(1, "-" * sum((*widths, 2 * len(widths) - 2)))
        shape = "x".join(map(str, self.shape))
        lines += [
            "",
            f"{self.name} in {self.runtime}, input {shape}, {self.threads} threads: {self.measured_ms:.3f} ms a run "
            f"({self.nodes_ms:.3f} ms in its nodes), {_big(self.ops / 2)} MACs",
            f"waterline bound {self.bound_ms:.3f} ms, roofline of the sums {1000 * self.line.roofline_s:.3f} ms, "
            f"all at the peak {1000 * self.line.ideal_s:.3f} ms",
            f"efficiency {self.efficiency:.1%} of the peak; the waterline allows {self.line.max_efficiency:.1%}",
        ]
        for bits, machine in sorted(self.machines.items()):
            lines.append(
                f"machine at {bits} bits: {machine.peak / 1e9:.1f} * 10^9 op/s, {machine.bandwidth / 1e9:.2f} GB/s, "
                f"ridge {machine.ridge:.1f} op/byte"
            )
        if self.fused:
            lines.append(f"{self.fused} layers without multiplications ran as part of others and have no row")
        if self.unattributed:
            parts = ", ".join(f"{kind} {ms:.3f} ms" for kind, ms in self.unattributed.items())
            lines.append(f"{UNATTRIBUTED}: {parts}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(line.rstrip() for line in lines)

    def save_plot(self, path: str | Path) -> None:
        """Draw the waterline to a file, .png or .svg."""
        from lissom.meters.plots import draw_waterline

        draw_waterline(self, Path(path))


def profile(
    model: nn.Module | Artifact | str | Path,
    shape: tuple[int, ...] | None = None,
    *,
    threads: int | None = None,
    batch: int = 1,
    runtime: str = "openvino",
    machine: Machine | Mapping[int, Machine] | None = None,
    name: str = "",
) -> Profile:
    """Profile a model (exported in float32 to ``runtime`` first) or an artifact, on this machine.

    ``model`` is a module, an artifact or its folder, or what ``load_model`` takes: a network's name, a weight file,
    ``file.py:function``. ``shape`` is one input's (C, H, W), needed where a model does not say it; an artifact has its
    own shape and batch. ``machine`` saves measuring peak and bandwidth again: one for all precisions, or by bits, as
    ``Profile.machines`` holds them.

    Raises LissomError where the model cannot be loaded or exported, and for a runtime that does not time its layers.
    """
    artifact = _as_artifact(model)
    if artifact is not None:
        if shape is not None or batch != 1:
            raise LissomError(f"{artifact.path} has a shape and a batch of its own; leave them out")
        costs = _costs(artifact)
        if not costs or not artifact.plan.get("nodes"):
            raise LissomError(f"{artifact.path} does not say what its layers cost; profile the model it came from")
        return _profile(artifact, costs, threads, machine, name or artifact.path.name)
    _check_runtime(runtime)
    module, known, default = _as_module(model)
    shape = shape or known
    if shape is None:
        raise LissomError("the model does not say its input's size; give the shape of one input, such as 3,224,224")
    costs = layer_costs(module, shape, batch)
    with tempfile.TemporaryDirectory(prefix="lissom-profile-") as folder:
        export = load_part("exporter", "float32")
        artifact = export(module, shape, runtime, batch, Path(folder) / "artifact")
        return _profile(artifact, costs, threads, machine, name or default)


def _as_artifact(model: Any) -> Artifact | None:
    if isinstance(model, Artifact):
        return model
    if isinstance(model, str | Path) and Path(model).is_dir():
        artifact = Artifact.open(model)
        artifact.verify()
        return artifact
    return None


def _costs(artifact: Artifact) -> list[LayerCost]:
    """What the plan says that the layers cost. Raises LissomError where that is no list of layers."""
    costs = []
    for fields in artifact.plan.get("layers") or []:
        try:
            cost = LayerCost.from_json(fields)
        except TypeError as error:
            raise LissomError(f"the layers in {artifact.path}/plan.json are damaged ({error})") from error
        amounts = (cost.macs, cost.params, cost.read_bytes, cost.write_bytes, cost.weight_bytes)
        counted = all(type(n) is int and n >= 0 for n in amounts) and type(cost.batch) is int and cost.batch > 0
        if not counted or cost.bits not in BITS or not all(isinstance(t, str) for t in (cost.path, cost.kind)):
            raise LissomError(f"the layers in {artifact.path}/plan.json are damaged ({cost})")
        costs.append(cost)
    return costs


def _as_module(model: Any) -> tuple[nn.Module, tuple[int, ...] | None, str]:
    """The module, its input's shape where it says one, and its name."""
    from lissom.models.factory import load_model

    loaded = load_model(model)
    return loaded.model, loaded.input_size, loaded.name


def _check_runtime(runtime: str) -> None:
    if runtime != "openvino":
        raise LissomError(f"{runtime} does not tell the time of each layer; profile with the runtime openvino")


def _profile(
    artifact: Artifact,
    costs: Sequence[LayerCost],
    threads: int | None,
    machine: Machine | Mapping[int, Machine] | None,
    name: str,
) -> Profile:
    _check_runtime(artifact.runtime)
    threads = threads or default_threads()
    costs = [cost.at(batch=artifact.input_shape[0]) for cost in costs]
    latency = _latency(Stages(artifact, threads), artifact.input_shape)
    times: list[LayerTime] = []
    nodes: dict[str, str] = {}
    for graph, stage in zip(artifact.graphs, artifact.plan["stages"], strict=True):
        options = {**(stage.get("options") or {}), "count": True}
        counted: Any = open_graph(graph, artifact.runtime, options, threads)
        times += counted.layer_times(min(200, max(10, round(SECONDS / latency))))
        nodes |= _with_adopted(counted, artifact.plan["nodes"])
    work = _attribute(times, nodes, costs)
    costs = [cost.at(bits=work.bits.get(cost.path)) for cost in costs]
    machines = _machines(machine, artifact.runtime, {cost.bits for cost in costs if cost.macs}, threads)
    rows = _rows(costs, work, machines)
    computing = [cost for cost in costs if cost.macs]
    line = waterline(computing, [machines[cost.bits] for cost in computing])
    warnings = _warnings(rows)
    if len(artifact.graphs) > 1:
        warnings.append("the times are those of an input that takes no exit and runs through every stage")
    if latency < line.bound_s:
        warnings.append(
            f"the model runs in {1000 * latency:.3f} ms, faster than its bound of {1000 * line.bound_s:.3f} ms: its "
            "data stay in the caches, which the bound does not know, or the peak was measured on a busy machine"
        )
    return Profile(
        name,
        artifact.runtime,
        artifact.input_shape,
        threads,
        tuple(rows),
        line,
        sum(cost.ops for cost in costs),
        1000 * latency,
        work.total,
        machines,
        dict(sorted(work.unattributed.items(), key=lambda item: -item[1])),
        sum(1 for cost in costs if not cost.macs and not work.ms.get(cost.path)),
        tuple(warnings),
    )


def _latency(opened: Stages, shape: tuple[int, ...]) -> float:
    """Median seconds of a run through every stage, without counters."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    times: list[float] = []
    last = len(opened.graphs) - 1
    for _ in range(3):
        opened.run_to(x, last)
    end = time.perf_counter() + SECONDS
    while len(times) < 10 or time.perf_counter() < end:
        start = time.perf_counter()
        opened.run_to(x, last)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _machines(
    given: Machine | Mapping[int, Machine] | None, runtime: str, precisions: set[int], threads: int
) -> dict[int, Machine]:
    """A machine for each precision in use: what was given, and measurements for the rest."""
    precisions = precisions or {32}
    if isinstance(given, Machine):
        return dict.fromkeys(precisions, given)
    known = dict(given or {})
    return {bits: known.get(bits) or measure_machine(runtime, bits, threads) for bits in sorted(precisions)}


@dataclass
class _Work:
    """The nodes' times by layer. ``joined``: layers whose products ran in another layer's kernel, by that layer."""

    ms: dict[str, float]
    bits: dict[str, int]
    joined: dict[str, set[str]]
    unattributed: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.ms.values()) + sum(self.unattributed.values())


def _with_adopted(counted: Any, nodes: Mapping[str, str]) -> dict[str, str]:
    """``nodes``, and the nodes that OpenVINO made of others under new names (attention in 8 bits, taken apart).

    The new names differ from one compilation to the next, so they are read from the graph that is timed. Such a node
    belongs to the layer that all its consumers belong to. A node without any original name, inserted by the runtime,
    is handed through and belongs to no layer.
    """
    known = dict(nodes)
    consumers: dict[str, list[Any]] = defaultdict(list)
    order = counted.compiled.get_runtime_model().get_ordered_ops()
    for node in order:
        for value in node.input_values():
            consumers[value.get_node().get_friendly_name()].append(node)
    paths: dict[str, set[str]] = {}  # runtime node -> layers that it, or what consumes it, belongs to
    for node in reversed(order):
        name = node.get_friendly_name()
        originals = [n.partition("/")[0] for n in node.get_rt_info()["originalLayersNames"].astype(str).split(",") if n]
        own = {known[n] for n in originals if n in known}
        paths[name] = own or set().union(*(paths[c.get_friendly_name()] for c in consumers[name]))
        if originals and not own and len(paths[name]) == 1:
            known.update(dict.fromkeys(originals, *paths[name]))
    return known


def _attribute(times: Sequence[LayerTime], nodes: Mapping[str, str], costs: Sequence[LayerCost]) -> _Work:
    """Give each node's time to the layer it stems from; of several fused into one, to the one that multiplies most.

    A node's original names begin with the name of the exported graph's node, which ``nodes`` maps to a module path.
    """
    weight = {cost.path: (cost.macs, cost.bytes) for cost in costs}
    ms: dict[str, float] = defaultdict(float)
    slowest: dict[str, tuple[float, int]] = {}
    joined: dict[str, set[str]] = defaultdict(set)
    unattributed: dict[str, float] = defaultdict(float)
    for node in times:
        spent = node.microseconds / 1000
        paths = {nodes[start] for name in node.names if (start := name.partition("/")[0]) in nodes}
        if not paths:
            if spent:
                unattributed[node.kind] += spent
            continue
        main = max(paths, key=lambda path: (weight.get(path, (0, 0)), path))
        ms[main] += spent
        bits = kernel_bits(node.implementation) if node.kind in MULTIPLYING else None
        if bits is not None and spent > slowest.get(main, (0.0, 0))[0]:
            slowest[main] = spent, bits
        joined[main] |= {path for path in paths - {main} if weight.get(path, (0, 0))[0]}
    # A layer with time of its own (a MatMul apart from its bias, say) is a layer of its own.
    joined = {main: {path for path in others if not ms.get(path)} for main, others in joined.items()}
    bits_of = {path: bits for path, (_, bits) in slowest.items()}
    for main, others in joined.items():
        bits_of.update((path, bits_of[main]) for path in others if main in bits_of)
    return _Work(dict(ms), bits_of, joined, unattributed)


def _rows(costs: Sequence[LayerCost], work: _Work, machines: Mapping[int, Machine]) -> list[LayerProfile]:
    known = {cost.path: cost for cost in costs}
    inside = {path: main for main, others in work.joined.items() for path in others}
    rows = []
    for cost in [*costs, *(LayerCost(path, "other", 0, 0, 0, 0, 0) for path in work.ms if path not in known)]:
        ms = work.ms.get(cost.path)
        if not cost.macs and not ms:
            continue
        fields: dict[str, Any] = {}
        if cost.macs:
            machine = machines[cost.bits]
            fields["roofline"] = roofline(cost, machine)
            fields["bound"] = "memory" if machine.memory_bound(cost) else "compute"
            if ms:
                ops = cost.ops + sum(known[path].ops for path in work.joined.get(cost.path, ()))
                fields["efficiency"] = reached = efficiency(ops, ms / 1000, machine)
                fields["warning"] = _doubt(reached, fields["roofline"])
        share = (ms or 0.0) / work.total if work.total else 0.0
        rows.append(
            LayerProfile(
                cost.path or "(model)", cost.kind, cost.macs, cost.bytes, cost.intensity, cost.bits, ms, share,
                inside=inside.get(cost.path), **fields,
            )
        )  # fmt: skip
    rest = sum(work.unattributed.values())
    rows.append(LayerProfile(UNATTRIBUTED, "other", 0, 0, 0.0, 32, rest, rest / work.total if work.total else 0.0))
    return rows


ABOVE_PEAK = "above 1: its kernel beats the graphs that the peak was measured with"
ABOVE_ROOFLINE = "above its roofline: its data stay in the caches"


def _doubt(reached: float, most: float) -> str | None:
    """What to think of an efficiency above what theory allows."""
    if reached > 1:
        return ABOVE_PEAK
    return ABOVE_ROOFLINE if reached > 1.05 * most else None


def _warnings(rows: Sequence[LayerProfile]) -> list[str]:
    """One sentence a kind of doubt, with the rows that it is about."""
    sentences = []
    for doubt in (ABOVE_PEAK, ABOVE_ROOFLINE):
        found = sorted((row for row in rows if row.warning == doubt), key=lambda row: -(row.efficiency or 0))
        if found:
            named = ", ".join(f"{row.path} {row.efficiency:.1%}" for row in found[:NAMED])
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            sentences.append(f"efficiency {doubt} ({named}{more})")
    return sentences


def _cells(row: LayerProfile) -> tuple[str, ...]:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    time_spent = f"{row.ms:.3f}" if row.ms is not None else "-"
    bound = f"inside {row.inside}" if row.inside else row.bound or "-"
    return (
        row.path, row.kind, str(row.bits) if row.macs else "-", _big(row.macs) if row.macs else "-",
        _big(row.bytes) if row.bytes else "-", f"{row.intensity:.1f}" if row.macs else "-", time_spent,
        shown(row.share), shown(row.efficiency) + ("!" if row.warning else ""), shown(row.roofline), bound,
    )  # fmt: skip


def _big(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"
