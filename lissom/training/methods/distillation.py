"""Knowledge distillation: a student learns a teacher's softened answers (Hinton et al. 2015, arXiv 1503.02531).

With logits z of the student, v of the teacher and temperature T,

    loss = alpha * T^2 * KL(softmax(v / T) || softmax(z / T)) + (1 - alpha) * task loss(z, label)

The factor T^2 keeps the size of the first term's gradient independent of T (section 2 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method, answers_of

__all__ = ["Distillation"]


@register("method", "distillation")
@dataclass(frozen=True)
class Distillation(Method):
    """Learn from ``teacher``, a classifier of the same inputs and classes, run in eval mode without gradient.

    ``alpha`` in [0, 1] weighs the teacher against the labels; without labels it counts as 1. ``temperature`` > 0.
    """

    teacher: nn.Module | None = None
    temperature: float = 4.0
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise LissomError(f"distillation's alpha is {self.alpha}; it lies between 0 and 1")
        if not self.temperature > 0:
            raise LissomError(f"distillation's temperature is {self.temperature}; it is greater than 0")

    def prepare(self, model: nn.Module, task: Task) -> None:
        if self.teacher is None:
            raise LissomError("distillation needs a teacher: Distillation(teacher=model), or --teacher MODEL")
        if self.teacher is model:
            raise LissomError("the teacher is the model itself; give a copy of it, or another model")
        # An input of the data's own shape shows a teacher of other classes before an epoch is spent.
        x = torch.zeros(2, *task.shape)
        student, teacher = (_answer(m, x) for m in (model, self.teacher))
        if student.shape != teacher.shape:
            raise LissomError(
                f"the teacher answers with shape {tuple(teacher.shape[1:])} and the student with "
                f"{tuple(student.shape[1:])}; distillation needs the same classes"
            )

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        assert self.teacher is not None
        answers = _answer(self.teacher.to(inputs.device), inputs)  # (B, classes)
        # A model with several answers in training learns each of them.
        losses = [self._of(output, answers, targets, task) for output in answers_of(model(inputs))]
        return torch.stack(losses).mean()

    def _of(
        self, outputs: torch.Tensor, answers: torch.Tensor, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        t = self.temperature
        # Over classes, which are dimension 1 of answers (B, classes) and of maps (B, classes, H, W) alike.
        own, given = functional.log_softmax(outputs / t, 1), functional.log_softmax(answers / t, 1)
        soft = t * t * functional.kl_div(own, given, reduction="none", log_target=True).sum(1).mean()
        if targets is None or self.alpha == 1:
            return soft
        return self.alpha * soft + (1 - self.alpha) * task.loss(outputs, targets)


def _answer(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The model's answer in eval mode without gradient; its own mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(inputs)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LissomError(
            f"the teacher or the student does not take inputs of shape {tuple(inputs.shape[1:])}: {reason}"
        ) from error
    finally:
        model.train(training)
