"""Exporter to torch.export: a ``.pt2`` file a stage that PyTorch runs, as it is or compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.export.capture import capture, clone, module_paths
from lissom.export.exporting import Exported
from lissom.export.joint import JointOutputs, joint_of
from lissom.export.plan import Plan
from lissom.export.torch_cut import cut_program, save_stages
from lissom.registry import register
from lissom.runtime.target import Target

__all__ = ["joint_program"]


@register("exporter", "torch")
def export_torch(
    plan: Plan, target: Target, shape: tuple[int, ...], calibration: np.ndarray | None, folder: Path
) -> Exported:
    """``plan`` as an exported program, or one for each stage. In bf16, the graph itself converts images and answers."""
    program, nodes = joint_program(plan, target, shape)
    if not plan.decisions:
        torch.export.save(program, folder / "stage0.pt2")
        return Exported([{"graph": "stage0.pt2", "options": {"compile": False}}], nodes)
    stages = cut_program(program, JointOutputs.of(plan.decisions), nodes)
    return Exported(save_stages(*stages, folder), nodes)


def joint_program(
    plan: Plan, target: Target, shape: tuple[int, ...]
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The plan as one program in its precision, not yet cut, and graph node name -> module path.

    With exits its outputs are those of ``lissom.export.joint.Joint``, and its operators write into nothing, so that it
    can be cut.
    """
    if 8 in plan.precision.bits.values():
        raise LissomError("the torch runtime runs no int8 graph; --runtime openvino or onnxruntime does")
    if plan.precision.options.get("float_bits") == 16:
        plan = plan.with_model(_bf16(plan.model))
    program = capture(joint_of(plan), shape, target.batch)
    if not plan.decisions:
        return program, module_paths(program)
    # An empty table: operators stay as they are, but those that write in place become such that answer.
    program = program.run_decompositions({})
    return program, {name: path.removeprefix("model.") for name, path in module_paths(program).items()}


def _bf16(model: nn.Module) -> nn.Module:
    """A copy in bfloat16 that takes and answers float32: an artifact's contract does not depend on its precision."""

    def take(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(x.bfloat16() for x in inputs)

    def answer(module: nn.Module, inputs: Any, found: Any) -> Any:
        return tuple(each.float() for each in found) if isinstance(found, tuple) else found.float()

    changed = clone(model).bfloat16()
    changed.register_forward_pre_hook(take)
    changed.register_forward_hook(answer)  # behind the hook that makes the exits' answers a tuple
    return changed
