"""Measurement: what a meter says of an artifact; Meter: who says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lissom.runtime.artifact import Artifact

__all__ = ["Measurement", "Meter"]


@dataclass(frozen=True)
class Measurement:
    """What one artifact cost on the device. Times are of one batch; None means that it is not available here.

    ``speedup`` is the reference's time over this one's, paired block by block in the same run, with its 95 % interval.
    ``stages_ms``: the time until each stage has decided, the last stage's until the answer.
    ``memory_mb`` is the process's peak (VmHWM), ``memory_above_empty_mb`` the peak above an empty graph's in the same
    runtime, ``steady_mb`` the resident size between runs; MB are 10^6 bytes. ``throughput`` is samples a second.
    """

    latency_ms: float
    p95_ms: float
    throughput: float
    speedup: float | None = None
    speedup_ci: tuple[float, float] | None = None
    memory_mb: float | None = None
    memory_above_empty_mb: float | None = None
    steady_mb: float | None = None
    energy_mj: float | None = None
    energy_source: str = "not available"
    stages_ms: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Meter(Protocol):
    """Measures artifacts on one device. The first artifact is the reference of ``speedup``."""

    def capabilities(self, runtime: str) -> dict[str, Any]:
        """What the device offers, in the form of ``runtime.target.local_capabilities``."""
        ...

    def measure(
        self, artifacts: Sequence[Artifact], *, threads: int, seconds: float = 2.0, memory: bool = True
    ) -> list[Measurement]:
        """Measure the artifacts interleaved, each in a fresh process of its own, about ``seconds`` of running each.

        ``memory=False`` leaves out what needs processes of its own (the empty graph). Raises LissomError where an
        artifact does not run on the device.
        """
        ...
