"""Budget: what the user can afford, as text: ``latency<=0.7x, drop<=2.0``.

Limits are separated by commas. Quantities: ``latency``, ``p95`` (ms, us, s), ``throughput`` (/s), ``memory``, ``size``
(KB, MB, GB of 10^3, 10^6, 10^9 bytes), ``energy`` (mJ, J, a batch), ``macs``, ``params`` (K, M, G), ``drop`` (points of
the metric below the baseline's) and ``quality`` (points). A value with ``x`` is relative to the baseline; relative
memory is the peak above an empty graph in the same runtime.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lissom.errors import LissomError
from lissom.search.trials import Metrics

__all__ = ["Budget", "Limit"]

_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {"kb": 1e-3, "mb": 1.0, "gb": 1e3}
_COUNT = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
# quantity -> (field of Metrics, unit -> factor, the unit values are shown in)
_QUANTITIES: dict[str, tuple[str, dict[str, float], str]] = {
    "latency": ("latency_ms", _TIME, "ms"),
    "p95": ("p95_ms", _TIME, "ms"),
    "throughput": ("throughput", {"": 1.0, "/s": 1.0}, "/s"),
    "memory": ("memory_mb", _BYTES, "MB"),
    "size": ("size_mb", _BYTES, "MB"),
    "energy": ("energy_mj", {"mj": 1.0, "j": 1e3}, "mJ"),
    "macs": ("macs", _COUNT, ""),
    "params": ("params", _COUNT, ""),
    "drop": ("drop", {"": 1.0, "%": 1.0, "points": 1.0, "point": 1.0}, "points"),
    "quality": ("quality", {"": 1.0, "%": 1.0, "points": 1.0}, "points"),
}
_ALIASES = {"accuracy": "quality", "top1": "quality", "agreement": "quality"}
_LIMIT = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([0-9]*\.?[0-9]+(?:e[+-]?\d+)?)\s*([a-zA-Z/%]*)\s*", re.I)
_UPWARD = ("throughput", "quality")  # more is better


@dataclass(frozen=True)
class Limit:
    """One bound: ``quantity`` ``sign`` ``bound``, in Metrics' unit or (``relative``) as a share of the baseline."""

    quantity: str
    sign: str
    bound: float
    relative: bool
    text: str

    @property
    def unit(self) -> str:
        return "x" if self.relative else _QUANTITIES[self.quantity][2]

    def reached(self, metrics: Metrics, baseline: Metrics) -> float | None:
        """The quantity as the limit counts it; None where it is not available."""
        if not self.relative:
            return getattr(metrics, _QUANTITIES[self.quantity][0])
        return relative(self.quantity, metrics, baseline)

    def holds(self, metrics: Metrics, baseline: Metrics) -> bool:
        """Whether the condition is true. Raises LissomError where the quantity was not available to measure."""
        value = self.reached(metrics, baseline)
        if value is None:
            raise LissomError(f"{self.text!r} cannot be judged: {self.quantity} is not available on this device")
        return {"<=": value <= self.bound, "<": value < self.bound, ">=": value >= self.bound, ">": value > self.bound}[
            self.sign
        ]

    def excess(self, metrics: Metrics, baseline: Metrics) -> float:
        """By how much the limit is missed, as a share of the bound (a point of quality: a tenth); 0 where it holds."""
        if self.holds(metrics, baseline):
            return 0.0
        value = self.reached(metrics, baseline)
        assert value is not None
        scale = 10.0 if self.quantity in ("drop", "quality") else max(abs(self.bound), 1e-9)
        return abs(value - self.bound) / scale


def relative(quantity: str, metrics: Metrics, baseline: Metrics) -> float | None:
    """The quantity as a multiple of the baseline's: paired for latency, above an empty graph for memory."""
    if quantity == "latency" and metrics.speedup is not None:
        return 1 / metrics.speedup
    field = "memory_above_empty_mb" if quantity == "memory" else _QUANTITIES[quantity][0]
    own, base = getattr(metrics, field), getattr(baseline, field)
    return None if own is None or not base else own / base


@dataclass(frozen=True)
class Budget:
    """All limits. ``Budget.parse`` reads them; an empty text gives none."""

    limits: tuple[Limit, ...]
    text: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Raises LissomError that quotes the part which cannot be read and says what would do."""
        parts = [part for part in text.split(",") if part.strip()]
        return cls(tuple(_limit(part) for part in parts), ", ".join(part.strip() for part in parts))

    @property
    def cost(self) -> str:
        """The quantity to make small: the first limited one that is a cost, else latency."""
        return next((limit.quantity for limit in self.limits if limit.quantity not in ("drop", "quality")), "latency")

    def met(self, metrics: Metrics, baseline: Metrics) -> bool:
        return all(limit.holds(metrics, baseline) for limit in self.limits)

    def excess(self, metrics: Metrics, baseline: Metrics) -> float:
        return sum(limit.excess(metrics, baseline) for limit in self.limits)

    def keeps_quality(self, metrics: Metrics, baseline: Metrics) -> bool:
        """Whether the limits on quality hold (those on costs aside)."""
        return all(li.holds(metrics, baseline) for li in self.limits if li.quantity in ("drop", "quality"))

    def to_json(self, metrics: Metrics, baseline: Metrics) -> dict[str, object]:
        rows = [
            {
                "text": limit.text,
                "quantity": limit.quantity,
                "reached": limit.reached(metrics, baseline),
                "bound": limit.bound,
                "unit": limit.unit,
                "met": limit.holds(metrics, baseline),
            }
            for limit in self.limits
        ]
        return {"text": self.text, "limits": rows}


def _limit(text: str) -> Limit:
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise LissomError(
            f"the limit {text.strip()!r} is not of the form quantity<=value, as in latency<=0.7x or drop<=1.0"
        )
    name, sign, number, unit = match[1].lower(), match[2], float(match[3]), match[4]
    quantity = _ALIASES.get(name, name)
    if quantity not in _QUANTITIES:
        close = difflib.get_close_matches(name, [*_QUANTITIES, *_ALIASES], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise LissomError(f"{name!r} is no quantity of a budget{hint} (known: {', '.join(_QUANTITIES)})")
    units = _QUANTITIES[quantity][1]
    if unit.lower() == "x":
        if quantity in ("drop", "quality"):
            raise LissomError(f"{text.strip()!r}: {quantity} is in points, not relative to the baseline")
        return Limit(quantity, sign, number, True, text.strip())
    if unit.lower() not in units:
        needed = " or ".join(f"{number:g}{u}" for u in units if u) or f"{number:g}"
        raise LissomError(
            f"{text.strip()!r} needs a unit {quantity} is measured in: {needed}, or {number:g}x of the baseline"
        )
    return Limit(quantity, sign, number * units[unit.lower()], False, text.strip())


def check_direction(budget: Budget) -> None:
    """Raise LissomError where a limit bounds a quantity on its good side, as ``latency>=5ms`` would."""
    for limit in budget.limits:
        if limit.sign.startswith(">") != (limit.quantity in _UPWARD):
            wanted = ">=" if limit.quantity in _UPWARD else "<="
            raise LissomError(
                f"{limit.text!r} bounds {limit.quantity} on its good side; write {limit.quantity}{wanted}..."
            )
