"""``measure``: what artifacts and models cost beside each other on one device, interleaved in the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lissom.errors import LissomError
from lissom.meters.devices import meter_for
from lissom.meters.measurement import Measurement
from lissom.registry import load_part
from lissom.runtime.artifact import PLAN, Artifact
from lissom.runtime.target import RUNTIMES

__all__ = ["Comparison", "measure"]


@dataclass(frozen=True)
class Comparison:
    """Names and measurements, in the order asked for; the first is the reference of every speed-up."""

    rows: tuple[tuple[str, Measurement], ...]
    device: str
    threads: int
    batch: int

    def to_json(self) -> dict[str, Any]:
        """``{"device", "threads", "batch", "rows": [{"name", and the fields of Measurement}]}``."""
        rows = [{"name": name, **measurement.to_json()} for name, measurement in self.rows]
        return {"device": self.device, "threads": self.threads, "batch": self.batch, "rows": rows}

    def __str__(self) -> str:
        titles = ("", "ms", "p95 ms", "samples/s", "speed-up", "MB", "MB above empty", "mJ")
        table = [titles, *(_cells(name, measurement) for name, measurement in self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
        lines = []
        for name, *figures in table:
            cells = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
            lines.append("  ".join((name.ljust(widths[0]), *cells)).rstrip())
        sources = sorted({m.energy_source for _, m in self.rows})
        lines.append(
            f"{self.device}, threads {self.threads}, batch {self.batch}; times are medians of one batch, "
            f"speed-ups paired with their 95 % interval; energy: {', '.join(sources)}"
        )
        return "\n".join(lines)


def measure(
    *things: Any,
    threads: int | None = None,
    batch: int | None = None,
    seconds: float = 2.0,
    device: str = "cpu",
    shape: Sequence[int] | None = None,
    runtime: str = "openvino",
    arch: str | None = None,
) -> Comparison:
    """Measure ``things`` beside each other, each in a fresh process, about ``seconds`` of running each.

    A thing is an artifact or its folder, an ``nn.Module``, a network's name, a weight file (of the network ``arch``)
    or ``file.py:function``. Models are exported in float32 to ``runtime`` for the purpose, for inputs of ``shape``
    (C, H, W): by default the model's own, or that of the artifacts beside it. ``batch`` is by default that of the
    artifacts, or 1. ``threads`` is by default all that the device has. Raises LissomError where a thing cannot be
    measured, or batches differ.
    """
    if not things:
        raise LissomError("name at least one artifact or model to measure")
    if runtime not in RUNTIMES:
        raise LissomError(f"no runtime is called {runtime!r}; known: {', '.join(RUNTIMES)}")
    if not seconds > 0 or (threads is not None and threads < 1) or (batch is not None and batch < 1):
        raise LissomError("threads, batch and seconds are positive numbers")
    meter = meter_for(device)
    opened = [_artifact(thing) for thing in things]
    known = [artifact for artifact in opened if artifact is not None]
    batch = batch or (known[0].input_shape[0] if known else 1)
    for one in known:
        if one.input_shape[0] != batch:
            raise LissomError(
                f"{one.path} was exported for batch {one.input_shape[0]}, not {batch}; "
                "things are measured at one batch size"
            )
    shapes = {artifact.input_shape[1:] for artifact in known}
    beside = shapes.pop() if len(shapes) == 1 else None
    with tempfile.TemporaryDirectory(prefix="lissom-") as folder:
        named: list[tuple[str, Artifact]] = []
        for i, (thing, artifact) in enumerate(zip(things, opened, strict=True)):
            if artifact is not None:
                named.append((str(artifact.path), artifact))
            else:
                named.append(_exported(thing, arch, shape, beside, runtime, batch, Path(folder) / str(i)))
        if threads is None:
            threads = int(meter.capabilities(named[0][1].runtime)["processors"])
        measured = meter.measure([artifact for _, artifact in named], threads=threads, seconds=seconds)
    rows = tuple((name, measurement) for (name, _), measurement in zip(named, measured, strict=True))
    return Comparison(rows, device, threads, batch)


def _artifact(thing: Any) -> Artifact | None:
    """The artifact that ``thing`` is or names; None for a model."""
    if isinstance(thing, Artifact):
        return thing
    if isinstance(thing, str | Path) and (Path(thing).is_dir() or Path(thing).name == PLAN):
        path = Path(thing)
        return Artifact.open(path.parent if path.name == PLAN else path)
    return None


def _exported(
    thing: Any,
    arch: str | None,
    shape: Sequence[int] | None,
    beside: Sequence[int] | None,
    runtime: str,
    batch: int,
    path: Path,
) -> tuple[str, Artifact]:
    """The model that ``thing`` is or names, by name and exported to ``path``."""
    from torch import nn

    from lissom.models.factory import load_model

    if not isinstance(thing, str | Path | nn.Module):
        raise LissomError(f"measure takes artifacts, models and their names, not {type(thing).__name__}")
    loaded = load_model(thing, arch=arch)
    size = shape or loaded.input_size or beside
    if size is None:
        raise LissomError(f"the input size of {loaded.name} is not known; give the shape, as in 3,224,224")
    name = str(thing) if isinstance(thing, str | Path) else loaded.name
    return name, load_part("exporter", "float32")(loaded.model, tuple(size), runtime, batch, path)


def _cells(name: str, m: Measurement) -> tuple[str, ...]:
    faster = _figure(m.speedup, 2) + "x" if m.speedup is not None else "-"
    if m.speedup_ci is not None and m.speedup_ci != (1.0, 1.0):  # the reference has no interval
        faster += f" [{m.speedup_ci[0]:.2f}, {m.speedup_ci[1]:.2f}]"
    memory = (_figure(m.memory_mb, 1), _figure(m.memory_above_empty_mb, 1))
    return (
        name, _figure(m.latency_ms, 3), _figure(m.p95_ms, 3), _figure(m.throughput, 1), faster, *memory,
        _figure(m.energy_mj, 2),
    )  # fmt: skip


def _figure(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"
