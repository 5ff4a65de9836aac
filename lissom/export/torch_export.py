"""Exporter to torch.export: a ``.pt2`` file that PyTorch runs, as it is or compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lissom.errors import LissomError
from lissom.export.capture import capture, clone, module_paths
from lissom.export.exporting import Exported
from lissom.export.plan import Plan
from lissom.registry import register
from lissom.runtime.target import Target

__all__: list[str] = []


@register("exporter", "torch")
def export_torch(
    plan: Plan, target: Target, shape: tuple[int, ...], calibration: np.ndarray | None, folder: Path
) -> Exported:
    """``plan`` as an exported program. In bf16, the graph itself converts images and answers."""
    if 8 in plan.precision.bits.values():
        raise LissomError("the torch runtime runs no int8 graph; --runtime openvino or onnxruntime does")
    model = plan.model
    if plan.precision.options.get("float_bits") == 16:
        model = _Bf16(clone(model).bfloat16())
    program = capture(model, shape, target.batch)
    torch.export.save(program, folder / "stage0.pt2")
    return Exported([{"graph": "stage0.pt2", "options": {"compile": False}}], module_paths(program))


class _Bf16(torch.nn.Module):
    """float32 in and out around a model in bfloat16: an artifact's contract does not depend on its precision."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.bfloat16()).float()
