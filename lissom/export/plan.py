"""Plan: a candidate in torch, and Precision: which modules run in how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

__all__ = ["Plan", "Precision"]


@dataclass(frozen=True)
class Precision:
    """Bits (8, 16 or 32) by module path; the longest path that is the module itself or holds it decides.

    ``{"": 8, "head": 32, "blocks.0.attn": 32}`` quantises all but two modules. A path that names a module with
    computation of its own beside its children (attention's products) decides on that computation too.
    ``options`` are the precision technique's own settings, for the exporter.
    """

    bits: Mapping[str, int] = field(default_factory=lambda: {"": 32})
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, path: str) -> int:
        """The bits of the module at ``path``."""
        while path and path not in self.bits:
            path = path.rpartition(".")[0]
        return self.bits.get(path, 32)

    @property
    def float32(self) -> bool:
        return set(self.bits.values()) <= {32}


@dataclass(frozen=True)
class Plan:
    """``stages`` (modules), the ``decisions`` between them, ``precision``. Techniques return a new one.

    One stage and no decision is an ordinary model; with exits or a cascade, stage i + 1 runs only where decision i
    says so. ``notes`` collects what techniques want the report to say.
    """

    stages: tuple[nn.Module, ...]
    decisions: tuple[Any, ...] = ()
    precision: Precision = field(default_factory=Precision)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Plan:
        """The plan that changes nothing: the model as it is, in float32."""
        return cls((model,))

    @property
    def model(self) -> nn.Module:
        """The only stage. Raises ValueError where there are several."""
        (stage,) = self.stages
        return stage

    def with_model(self, model: nn.Module, *notes: str) -> Plan:
        return replace(self, stages=(model,), notes=(*self.notes, *notes))

    def with_precision(self, precision: Precision, *notes: str) -> Plan:
        return replace(self, precision=precision, notes=(*self.notes, *notes))
