"""Plan: a candidate in torch, and Precision: which modules run in how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

__all__ = ["Exit", "Plan", "Precision"]


@dataclass(frozen=True)
class Precision:
    """Bits (8, 16 or 32) by module path; the longest path that is the module itself or holds it decides.

    ``{"": 8, "head": 32, "blocks.0.attn": 32}`` quantises all but two modules. A path that names a module with
    computation of its own beside its children (attention's products) decides on that computation too.
    ``options`` are the precision technique's own settings, for the exporter; but ``options["root"]``, where a technique
    has put the network inside another module, is the path at which it now stands: paths in ``bits`` are then those
    that its modules had before.
    """

    bits: Mapping[str, int] = field(default_factory=lambda: {"": 32})
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, path: str) -> int:
        """The bits of the module at ``path``."""
        path = path.removeprefix(f"{self.options['root']}.") if self.options.get("root") else path
        while path and path not in self.bits:
            path = path.rpartition(".")[0]
        return self.bits.get(path, 32)

    @property
    def float32(self) -> bool:
        return set(self.bits.values()) <= {32}


@dataclass(frozen=True)
class Exit:
    """An early exit: behind the module ``at`` (its path) the model may answer already.

    ``rule``: "confidence" (the largest softmax share is above a threshold), "entropy" (the softmax's entropy in nats is
    below one), "similarity" (the cosine of what ``at`` takes and what it gives is above one, whatever the answer),
    "patience" (so many exits in a row, this one the last, say the same class), "patient_and_confident" (of ``patience``
    exits in a row, this one the last, each has an entropy below a threshold), or another of
    ``lissom.runtime.decisions.RULES``. ``risk``: points of quality that all the exits of a plan together may cost, a
    promise that holds with a probability of 1 - ``delta`` (``lissom.export.calibration`` finds the thresholds).
    ``cost``: operations done when this exit has answered, as a share of those of the model without exits; ``heads`` is
    the part of them that this exit's head and those before it did; the last exit's say what running to the end costs
    more than the model without exits (less, below 0: a cascade's members may together be cheaper). ``carries``: paths
    of the modules whose outputs are all that what lies behind the exit needs, one tensor each; () is the output of
    ``at`` itself.
    """

    at: str
    rule: str = "confidence"
    risk: float = 0.5
    delta: float = 0.05
    cost: float = 0.0
    heads: float = 0.0
    carries: tuple[str, ...] = ()
    patience: int = 2

    @property
    def boundary(self) -> tuple[str, ...]:
        """The paths of the modules behind which the model is cut for this exit."""
        return self.carries or (self.at,)


@dataclass(frozen=True)
class Plan:
    """``stages`` (modules), the ``decisions`` between them, ``precision``. Techniques return a new one.

    One stage and no decision is an ordinary model. With early exits there is still one module, the joint model that
    answers at every exit (``lissom.layers.exits``), and one decision an exit; export cuts it. ``recovery`` holds what
    techniques want of the training that follows (terms of ``lissom.training.methods.recovery``), ``notes`` what they
    want the report to say. ``shape`` is one input's (C, H, W), () where nobody said. ``members`` are the paths at which
    the model holds whole networks, where it holds several: what a policy says of a network's module holds in each.
    """

    stages: tuple[nn.Module, ...]
    decisions: tuple[Exit, ...] = ()
    precision: Precision = field(default_factory=Precision)
    recovery: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    members: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, shape: tuple[int, ...] = ()) -> Plan:
        """The plan that changes nothing: the model as it is, in float32."""
        return cls((model,), shape=tuple(shape))

    @property
    def model(self) -> nn.Module:
        """The only stage. Raises ValueError where there are several."""
        (stage,) = self.stages
        return stage

    def with_model(self, model: nn.Module, *notes: str) -> Plan:
        return replace(self, stages=(model,), notes=(*self.notes, *notes))

    def with_recovery(self, *terms: Any) -> Plan:
        return replace(self, recovery=(*self.recovery, *terms))

    def with_precision(self, precision: Precision, *notes: str) -> Plan:
        if self.members:
            bits: dict[str, int] = {}
            for path, number in precision.bits.items():
                known = not path or path in self.precision.bits
                bits |= dict.fromkeys([path] if known else [f"{member}.{path}" for member in self.members], number)
            precision = replace(precision, bits=bits)
        return replace(self, precision=precision, notes=(*self.notes, *notes))
