"""Trial: one recipe, what was measured of it, its status and the reason of a failure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Metrics", "Trial"]


@dataclass(frozen=True)
class Metrics:
    """What is known of one candidate. Points for quality, ms, MB (10^6 bytes), mJ a batch; None: not available.

    ``quality`` is on ``choose`` in a trial, on ``report`` in a run's result. ``drop`` is the baseline's quality less
    this one's, on the same samples.
    """

    quality: float | None = None
    quality_ci: tuple[float, float] | None = None
    drop: float | None = None
    latency_ms: float | None = None
    p95_ms: float | None = None
    speedup: float | None = None
    speedup_ci: tuple[float, float] | None = None
    throughput: float | None = None
    memory_mb: float | None = None
    memory_above_empty_mb: float | None = None
    steady_mb: float | None = None
    size_mb: float | None = None
    energy_mj: float | None = None
    energy_source: str = "not available"
    params: int | None = None
    macs: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Metrics:
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**known)


@dataclass(frozen=True)
class Trial:
    """One row of ``trials.jsonl``.

    ``role`` says why it was made: ``baseline``, ``plain int8``, ``alone``, ``together``, then the search that proposed
    it, ``tuned`` (one of those with more training), ``given``, ``without NAME`` (a technique taken out of the winner)
    or ``part N`` (the winner's first N techniques). ``recipe`` is what was asked, ``resolved`` the same with undecided
    knobs settled by measuring. ``status`` is ``ok``, ``not applicable`` or ``failed``. ``trainings`` are those its
    weights had, each with its ``steps``, ``passes`` (how often it saw each image) and ``seconds``.
    """

    number: int
    role: str
    recipe: str
    status: str
    reason: str = ""
    resolved: str = ""
    metrics: Metrics = field(default_factory=Metrics)
    artifact: str = ""  # path inside the run's folder; "" where there is none
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    trainings: tuple[dict[str, float], ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Trial:
        values = dict(fields)
        values["metrics"] = Metrics.from_json(values["metrics"])
        for name in ("notes", "trainings"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)
