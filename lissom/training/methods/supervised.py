"""Supervised training: the task's own loss on labelled data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lissom.errors import LissomError
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method, answers_of

__all__ = ["Supervised"]


@register("method", "supervised")
@dataclass(frozen=True)
class Supervised(Method):
    """Minimises ``task.loss(model(inputs), targets)``; the mean over all answers where the model gives several."""

    def prepare(self, model: nn.Module, task: Task) -> None:
        if task.fit is not None and task.fit.labels is None:
            raise LissomError("supervised training needs labels; without them use distillation from a teacher")

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        if targets is None:
            raise LissomError("supervised training needs labels; without them use distillation from a teacher")
        return torch.stack([task.loss(answer, targets) for answer in answers_of(model(inputs))]).mean()
