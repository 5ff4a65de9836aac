"""Self-distillation of a network with several exits: the last answer teaches the others (Dyn-Perceiver, 2306.11248).

With logits y_1 ... y_K of K exits in order of execution, the last being the best, weights w_k, and temperature T,

    loss = sum_k w_k task loss(y_k) + alpha sum_{k<K} T^2 KL( softmax(sg(y_K) / T) || softmax(y_k / T) )

where sg stops the gradient and KL is the mean over the batch: the last answer learns from labels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lissom.errors import LissomError
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method, answers_of
from lissom.training.methods.recovery import Seen, Term, kl

__all__ = ["MultiExitKD", "OwnExits", "kd_term", "multi_exit_loss"]


def kd_term(answers: Sequence[torch.Tensor], teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """sum_k T^2 KL(softmax(teacher / T) || softmax(y_k / T)) of logits (B, classes); no gradient to the teacher."""
    given, t = teacher.detach() / temperature, temperature
    return torch.stack([t * t * kl(given, answer / t) for answer in answers]).sum()


def multi_exit_loss(
    answers: Sequence[torch.Tensor],
    targets: torch.Tensor,
    task: Task,
    weights: Sequence[float],
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The loss above for ``answers`` (B, classes) each, the last one last, and ``targets`` int64 (B,)."""
    losses = [w * task.loss(answer, targets) for w, answer in zip(weights, answers, strict=True)]
    if alpha and len(answers) > 1:
        losses.append(alpha * kd_term(answers[:-1], answers[-1], temperature))
    return torch.stack(losses).sum()


def _check(alpha: float, temperature: float) -> None:
    if not alpha >= 0:
        raise LissomError(f"alpha is {alpha}; it is at least 0, where nothing is distilled")
    if not temperature > 0:
        raise LissomError(f"temperature is {temperature}; it is greater than 0")


@register("method", "multi_exit_kd")
@dataclass(frozen=True)
class MultiExitKD(Method):
    """Train a network that answers several times, its last answer teaching the others.

    ``weights`` of the answers' own losses, in order of execution; the defaults are Dyn-Perceiver's (early, late, maps,
    merged). ``alpha`` weighs what is distilled, ``temperature`` softens it. A network answers several times where it
    does so by itself in training, or has exits attached (lissom.layers.exits) with ``detached=False``.
    """

    weights: tuple[float, ...] = (0.5, 0.5, 1.0, 1.0)
    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(self.alpha, self.temperature)
        if not self.weights or min(self.weights) < 0 or not self.weights[-1] > 0:
            raise LissomError(f"weights are {self.weights}; none is below 0, and the last answer's is above")

    def prepare(self, model: nn.Module, task: Task) -> None:
        if task.fit is not None and task.fit.labels is None:
            raise LissomError("multi_exit_kd needs labels: the last answer has nothing else to learn from")

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        if targets is None:
            raise LissomError("multi_exit_kd needs labels: the last answer has nothing else to learn from")
        answers = answers_of(model(inputs))
        if len(answers) != len(self.weights):
            raise LissomError(
                f"the model gives {len(answers)} answers in training and there are {len(self.weights)} weights; "
                "give MultiExitKD(weights=...), one an answer"
            )
        return multi_exit_loss(answers, targets, task, self.weights, self.alpha, self.temperature)


@dataclass(frozen=True)
class OwnExits(Term):
    """Of a recovery: a network's own exits learn, from labels and from a better answer.

    ``weights`` are of the exits' own losses, one an exit; () is ``weight`` for all of them. ``taught_by``: "original",
    the original's last answer teaches them; "last", the network's own last answer does, as in the paper, without a
    gradient. Without labels they learn from that alone. The network's last answer is another term's (``Answers``).
    """

    weight: float = 0.5
    alpha: float = 0.5
    temperature: float = 1.0
    weights: tuple[float, ...] = ()
    taught_by: str = "original"

    def __post_init__(self) -> None:
        _check(self.alpha, self.temperature)
        if min((self.weight, *self.weights)) < 0:
            raise LissomError(f"weights of exits are at least 0, not {self.weights or self.weight}")
        if self.taught_by not in ("original", "last"):
            raise LissomError(f"exits learn from the 'original' or from the 'last' answer, not {self.taught_by!r}")

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """All of them: the exits' gradients reach into the network."""
        return model.parameters()

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        early = student.answers[:-1]
        if not early:
            raise LissomError("OwnExits trains exits, and the model answers once; attach_own_exits opens its exits")
        weights = self.weights or (self.weight,) * len(early)
        if len(weights) != len(early):
            raise LissomError(f"OwnExits has {len(weights)} weights for {len(early)} exits; give one an exit")
        given = teacher.answer if self.taught_by == "original" else student.answer
        loss = self.alpha * kd_term(early, given, self.temperature)
        if targets is None:
            return loss
        own = [weight * task.loss(answer, targets) for weight, answer in zip(weights, early, strict=True)]
        return loss + torch.stack(own).sum()
