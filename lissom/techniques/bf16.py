"""bf16: float layers computed in bfloat16, where the processor has the arithmetic.

bfloat16 keeps float32's range with 8 bits of mantissa (Kalamkar et al. 2019, arXiv 1905.12322). It needs no
calibration. On a processor without bf16 instructions a runtime would emulate it, slower than float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lissom.errors import NotApplicable
from lissom.export.plan import Plan
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Technique

__all__ = ["Bf16"]


@register("technique", "bf16")
@dataclass(frozen=True)
class Bf16(Technique):
    """Compute in bfloat16 whatever no other technique puts in fewer bits."""

    name: ClassVar[str] = "bf16"
    stage: ClassVar[str] = "precision"

    def check(self, plan: Plan, target: Target) -> None:
        if target.runtime == "onnxruntime":
            raise NotApplicable(
                "ONNX Runtime computes no bf16 on a CPU; --runtime openvino does where the processor can"
            )
        if not target.can("bf16"):
            raise NotApplicable("this processor has no bf16 arithmetic (avx512_bf16, amx_bf16 or Arm's bf16)")

    def apply(self, plan: Plan, task: Task) -> Plan:
        bits = {path: 16 if n == 32 else n for path, n in plan.precision.bits.items()}
        options = {**plan.precision.options, "float_bits": 16}
        return plan.with_precision(replace(plan.precision, bits=bits, options=options))
