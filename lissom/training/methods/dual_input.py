"""Dual-input training: two submodels learn at once, one from images, one from augmented images (arXiv 2501.15547).

With submodels T1, T2 and an augmentation a, the loss is task loss(T1(x), y) + task loss(T2(a(x)), y). Nothing is
shared, so neither submodel's gradient depends on the other's images. The paper names rotation, zoom, brightness and
translation; their ranges are not published, those here are common ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.dual import DualModel
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method

__all__ = ["DualInput", "augmented"]


def augmented(
    images: torch.Tensor, degrees: float = 10.0, zoom: float = 0.1, shift: float = 0.1, brightness: float = 0.1
) -> torch.Tensor:
    """images (B, C, H, W), each turned by up to ``degrees`` either way, scaled by 1 - zoom to 1 + zoom, moved by up to
    the share ``shift`` of its sides, and multiplied by 1 - brightness to 1 + brightness; all uniform.

    Resampled bilinearly, its edge repeated outside. Drawn from torch's global generator.
    """
    count = len(images)
    draws = 2 * torch.rand(5, count) - 1
    angle, scale = draws[0] * math.radians(degrees), 1 / (1 + zoom * draws[1])
    cos, sin = angle.cos() * scale, angle.sin() * scale
    height, width = images.shape[-2:]
    # affine_grid's axes reach from -1 to 1 along either side, so that turning must know their proportions.
    rows = (
        torch.stack([cos, -sin * height / width, 2 * shift * draws[2]], 1),
        torch.stack([sin * width / height, cos, 2 * shift * draws[3]], 1),
    )
    matrix = torch.stack(rows, 1).to(images)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved * (1 + brightness * draws[4]).to(images)[:, None, None, None]


@register("method", "dual_input")
@dataclass(frozen=True)
class DualInput(Method):
    """Train a ``DualModel``. Ranges as ``augmented`` takes them; call ``fit`` with ``augment=False``, since the first
    submodel learns from the images as they are."""

    degrees: float = 10.0
    zoom: float = 0.1
    shift: float = 0.1
    brightness: float = 0.1

    def __post_init__(self) -> None:
        for name in ("degrees", "zoom", "shift", "brightness"):
            value, most = getattr(self, name), 180 if name == "degrees" else 1
            if not 0 <= value < most:
                raise LissomError(f"dual_input's {name} is {value}; it is at least 0 and below {most}")

    def prepare(self, model: nn.Module, task: Task) -> None:
        if not isinstance(model, DualModel):
            raise LissomError(
                f"dual_input trains two submodels, a lissom.layers.dual.DualModel, not {type(model).__name__}; "
                "DualModel(trunk, features, classes) makes one"
            )
        if len(task.shape) != 3:
            raise LissomError("dual_input augments images (C, H, W)")

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        if targets is None:
            raise LissomError("dual_input learns from labels, and the data have none")
        moved = augmented(inputs, self.degrees, self.zoom, self.shift, self.brightness)
        inner = getattr(model, "module", model)  # Fabric's wrapper
        first, second = inner.both(inputs, moved)
        return task.loss(first, targets) + task.loss(second, targets)
