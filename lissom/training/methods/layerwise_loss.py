"""Layer-wise task loss: every layer's answer through the shared head learns the task, not the last alone (2211.11152).

With y_l the logits of layer l through the model's own norm and classifier,

    loss = sum_l loss(y_l),  loss(y) = (1 - e - e_i) (-log p_target) + e_i sum_v (-log p_v),  e_i = e / (V - 1)

p the softmax of y over V classes, e the label smoothing: unweighted, the last layer among them. The published trainer
sums over tokens and divides by their number; here it is the mean over targets that are not ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method, answers_of
from lissom.training.methods.recovery import Seen, Term

__all__ = ["LayerwiseAnswers", "LayerwiseTaskLoss", "layerwise_losses", "smoothed_cross_entropy"]

IGNORED = -100


def smoothed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The loss above, a scalar: logits (..., V), targets int64 (...); those that are -100 are left out.

    Smoothing gives e / (V - 1) to every class but the target, where torch's own gives e / V to all of them. NaN where
    every target is left out, as in torch.
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    kept = targets != IGNORED
    logs = functional.log_softmax(logits[kept], -1)
    others = label_smoothing / max(1, logits.shape[-1] - 1)
    nll = -logs.gather(-1, targets[kept].unsqueeze(-1)).squeeze(-1)
    return ((1 - label_smoothing - others) * nll - others * logs.sum(-1)).mean()


def layerwise_losses(
    logits: Sequence[torch.Tensor], targets: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """The loss of every layer's logits, (L,); their sum is what is trained on."""
    return torch.stack([smoothed_cross_entropy(answer, targets, label_smoothing) for answer in logits])


def _check(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise LissomError(f"label_smoothing is {label_smoothing}; it is at least 0 and below 1")


def _fits(task: Task) -> None:
    if task.kind != "classification":
        raise LissomError(f"the layer-wise loss smooths class labels; a task of {task.kind} has none")


@register("method", "layerwise_loss")
@dataclass(frozen=True)
class LayerwiseTaskLoss(Method):
    """Train a model on the sum of the losses of all its answers, so that any depth can feed its head.

    The model answers at several depths (``lissom.layers.own_end`` hangs its own head behind its blocks) and, last, as
    it is. ``label_smoothing`` is 0.1 for captions and 0 for SNLI-VE in the published scripts.
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        _check(self.label_smoothing)

    def prepare(self, model: nn.Module, task: Task) -> None:
        _fits(task)
        if task.fit is not None and task.fit.labels is None:
            raise LissomError("layerwise_loss learns from labels, and the data have none")

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        if targets is None:
            raise LissomError("layerwise_loss learns from labels, and the data have none")
        return layerwise_losses(answers_of(model(inputs)), targets, self.label_smoothing).sum()


@dataclass(frozen=True)
class LayerwiseAnswers(Term):
    """Of a recovery: the same sum, which trains the whole model. Without labels the original's best class is one."""

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        _check(self.label_smoothing)

    def prepare(self, model: nn.Module, original: nn.Module, task: Task) -> None:
        _fits(task)

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        return model.parameters()

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        if len(student.answers) < 2:
            raise LissomError(
                "the layer-wise loss trains a model that answers at several depths; this one answers once"
            )
        labels = teacher.answer.argmax(1) if targets is None else targets
        return layerwise_losses(student.answers, labels, self.label_smoothing).sum()
