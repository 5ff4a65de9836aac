"""SharedRecovery: a trained model's super-network is trained so that its sub-networks work, the model as the teacher.

The sandwich steps of ``lissom.training.methods.delayed_shrinking`` (BigNAS, arXiv 2003.11142; DepS, arXiv 2407.06167),
with two differences that follow from where it begins: the whole network is trained already, so that nothing is gained
by a warm-up, and what it was is there to learn from, as Once-for-All (arXiv 1908.09791) learns from its whole network.
With t the share of the training that is done, every step minimises

    L(whole) + sum over i of eps(t) * L(z_i),      L = alpha T^2 KL(original, .) + (1 - alpha) task loss,

over the smallest sub-network and ``random`` drawn ones; eps rises from ``eps0`` to 1 over the first ``ramp``, so that
weights which fit the whole network are not spoilt before the slices have begun to adapt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.elastic import largest, without_statistics
from lissom.tasks.task import Task
from lissom.training.methods.base import unwrapped
from lissom.training.methods.delayed_shrinking import (
    DelayedShrinking,
    check_elastic,
    refuse_processes,
    resized,
    sandwich_settings,
)
from lissom.training.methods.recovery import Answers, Seen

__all__ = ["SharedRecovery"]


@dataclass(frozen=True)
class SharedRecovery(DelayedShrinking):
    """Train the super-network of ``original``, which is never trained itself; its answers teach every sub-network.

    ``answers`` is the loss of each. The other settings are those of ``DelayedShrinking``, whose own teachers are not
    used. Without labels the answers of the original are all there is to learn.
    """

    start: float = 0.0
    original: nn.Module | None = None
    answers: Answers = field(default_factory=Answers)

    @property
    def teacher(self) -> nn.Module | None:
        return self.original

    def prepare(self, model: nn.Module, task: Task) -> None:
        check_elastic(model, "a shared recovery")
        if self.original is None or self.original is model:
            raise LissomError(
                "a shared recovery learns from the original model: give original=, another than the model"
            )
        self.original.eval()
        model.set_active(largest(model))  # type: ignore[operator, arg-type]

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        assert self.original is not None
        refuse_processes()
        inner = unwrapped(model)
        whole = largest(inner)  # type: ignore[arg-type]
        inner.set_active(whole)  # type: ignore[operator]
        inputs = resized(inputs, self.resolutions)
        with torch.no_grad():
            taught = Seen((self.original.to(inputs.device).eval()(inputs),), {})

        def own() -> torch.Tensor:
            return self.answers.loss(inner, Seen((model(inputs),), {}), taught, targets, task)

        loss, eps = own(), self.eps * self.weight
        if eps == 0:
            return loss
        try:
            with without_statistics(inner):
                for setting in sandwich_settings(inner, self.random):
                    inner.set_active(setting)  # type: ignore[operator]
                    loss = loss + eps * own()
        finally:
            inner.set_active(whole)  # type: ignore[operator]
        return loss
