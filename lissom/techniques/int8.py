"""int8: post-training quantisation of weights and activations to 8 bits, following a policy by module path.

Weights are int8 per output channel, activations uint8 per tensor, ranges from calibration images, by NNCF on the
converted graph (Jacob et al. 2018, arXiv 1712.05877). The policy (which layers stay in float) is what SimQ-NAS
(arXiv 2312.13301) searches; leaving none out is one point of it, the plain int8 that other tools give.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from lissom.errors import NotApplicable
from lissom.export.plan import Plan, Precision
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Subset, Technique

__all__ = ["Int8"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "model_type": ("plain", "transformer"),
    "linear": ("matmul", "conv"),
    "products": (8, 32),
}


@register("technique", "int8")
@dataclass(frozen=True)
class Int8(Technique):
    """Quantise to 8 bits.

    ``keep``: module paths that stay in float. ``model_type``: NNCF's "plain" or "transformer" scheme (the latter adds
    SmoothQuant and spares what is fragile in attention). ``linear``: linear layers of tokens as "matmul" or as 1x1
    "conv" (OpenVINO only; see export/linear_as_conv.py). ``products``: bits of the products of two activations in
    attention, 8 or 32. A knob left out is undecided: the sensible settings are all measured, the fastest that keeps
    the quality stays.
    """

    name: ClassVar[str] = "int8"
    stage: ClassVar[str] = "precision"

    keep: tuple[str, ...] = ()
    model_type: str | None = None
    linear: str | None = None
    products: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            raise ValueError("keep is a tuple of module paths, as in keep=('head',)")
        for knob, values in _CHOICES.items():
            if getattr(self, knob) is not None and getattr(self, knob) not in values:
                raise ValueError(f"{knob} is {' or '.join(map(repr, values))}, not {getattr(self, knob)!r}")

    @classmethod
    def plain(cls) -> Self:
        """What a user gets elsewhere: everything quantised, layers in their own form; NNCF's scheme undecided."""
        return cls(linear="matmul", products=8)

    def check(self, plan: Plan, target: Target) -> None:
        if target.runtime == "torch":
            raise NotApplicable("int8 needs a runtime with int8 kernels: --runtime openvino or onnxruntime")
        if self.linear == "conv" and target.runtime != "openvino":
            raise NotApplicable("linear='conv' is a form for OpenVINO; leave it out for this runtime")
        paths = {path for stage in plan.stages for path, _ in stage.named_modules()}
        missing = [path for path in self.keep if path not in paths]
        if missing:
            raise NotApplicable(f"int8 is to keep {missing[0]!r} in float, but the model has no module of that name")
        if not _layers(plan):
            raise NotApplicable("the model has no convolution and no linear layer to quantise")

    def apply(self, plan: Plan, task: Task) -> Plan:
        rest = 16 if plan.precision.options.get("float_bits") == 16 else 32
        options = {
            **plan.precision.options,
            "model_type": "transformer" if self.model_type == "transformer" else None,
            "linear": self.linear or "matmul",
            "products": self.products or 8,
        }
        # What earlier techniques ask to stay in float (token_clustering's own arithmetic) stays so.
        asked = {path: bits for path, bits in plan.precision.bits.items() if path}
        return plan.with_precision(Precision({"": 8, **asked, **dict.fromkeys(self.keep, rest)}, options))

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset]:
        choices = {knob: values for knob, values in _CHOICES.items() if _matters(knob, plan, target)}
        return {"keep": Subset(tuple(_layers(plan))), **choices}

    def variants(self, plan: Plan, target: Target) -> tuple[Self, ...]:
        decided = [
            replace(self, model_type=model_type, linear=linear, products=products)
            for (linear, products), model_type in itertools.product(
                (("matmul", 8), ("conv", 32)) if _matters("linear", plan, target) else
                (("matmul", 8), ("matmul", 32)) if _matters("products", plan, target) else (("matmul", 8),),
                _CHOICES["model_type"],
            )
        ]  # fmt: skip
        settled = [
            replace(variant, **{knob: getattr(self, knob) for knob in _CHOICES if getattr(self, knob) is not None})
            for variant in decided
        ]
        return tuple(dict.fromkeys(settled))


def _layers(plan: Plan) -> list[str]:
    """Paths of the layers with weights to quantise."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return [path for stage in plan.stages for path, m in stage.named_modules() if isinstance(m, kinds)]


def _matters(knob: str, plan: Plan, target: Target) -> bool:
    """Whether a knob can change anything on this plan: the last linear layer alone is a head on a pooled vector."""
    linears = sum(isinstance(m, nn.Linear) for stage in plan.stages for m in stage.modules())
    return knob == "model_type" or (linears > 2 and (knob != "linear" or target.runtime == "openvino"))
