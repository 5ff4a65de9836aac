"""A module as an exported graph whose nodes still know the module they come from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lissom.errors import LissomError

__all__ = ["capture", "module_paths", "run_eager"]


def capture(model: nn.Module, shape: tuple[int, ...], batch: int = 1) -> torch.export.ExportedProgram:
    """``torch.export`` of the model in evaluation mode at a static shape (batch, *shape); the model stays as it was.

    Raises LissomError where the model cannot be exported, with the first line of torch's own reason.
    """
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            example = torch.zeros(batch, *shape, device=_device(model))
            return torch.export.export(model, (example,), strict=False)
    except Exception as error:  # torch.export raises its errors from half a dozen modules
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LissomError(
            f"the model cannot be exported at input {(batch, *shape)}: {reason}; "
            "its forward must take one tensor and follow the same path for every input"
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def _device(model: nn.Module) -> torch.device:
    tensor = next(iter(model.parameters()), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def module_paths(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Graph node name -> path of the innermost module that computes it ("" for the model itself)."""
    return {
        node.name: _path(node.meta.get("nn_module_stack")) for node in program.graph.nodes if node.op == "call_function"
    }


def _path(stack: Mapping[str, tuple[str, object]] | None) -> str:
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    # A module called twice appears as "conv@1" the second time: the same weights, so the same path.
    return path.partition("@")[0]


@torch.no_grad()
def run_eager(model: nn.Module, inputs: torch.Tensor, batch: int = 64) -> Any:
    """The model's answers in evaluation mode, on its own device, a batch at a time; float32 on the CPU. A model with
    several answers gives a list."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        device = _device(model)
        parts = [model(part.to(device)) for part in inputs.split(batch)]
        if isinstance(parts[0], tuple):
            return [torch.cat([a.float().cpu() for a in answers]) for answers in zip(*parts, strict=True)]
        return torch.cat([part.float().cpu() for part in parts])
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def clone(model: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode on the CPU, for a technique to change."""
    return copy.deepcopy(model).cpu().eval()
