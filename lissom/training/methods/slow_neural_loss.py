"""The Terminator's training loss: smoothed labels, kernels drawn together, norms as a penalty (arXiv 2401.17948).

loss = cross-entropy with smoothed labels + weight x slow loss of the model + penalty x (sum of the L2 norms of the fast
parameters + kernel_penalty x sum of those of the slow networks' weights). The norms are not squared: their gradient
pulls every tensor to zero with one strength, whatever its size. Published with Kar3 and no weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lissom.errors import LissomError
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method

__all__ = ["SlowNeuralLoss", "norm_penalty"]


def norm_penalty(model: nn.Module, kernel_penalty: float = 1e-6) -> torch.Tensor:
    """A scalar: L2 norms of fast parameters, and ``kernel_penalty`` times those of slow networks' weights.

    Fast is every parameter with "fast" in its name that is in no slow network, a module called ``Kernel``; of the slow
    networks the weights of 2-D convolutions count. Parameters that do not train are left out. 0 where there are none.
    """
    fast = [
        parameter.norm()
        for name, parameter in model.named_parameters()
        if "fast" in name and "Kernel" not in name.split(".") and parameter.requires_grad
    ]
    slow = [
        module.weight.norm()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and "Kernel" in name.split(".") and module.weight.requires_grad
    ]
    total = next(model.parameters()).new_zeros(())
    if fast:
        total = total + torch.stack(fast).sum()
    if slow:
        total = total + kernel_penalty * torch.stack(slow).sum()
    return total


@register("method", "slow_neural_loss")
@dataclass(frozen=True)
class SlowNeuralLoss(Method):
    """Train a network that has a ``slow_loss()``, a ``Terminator``; call ``fit`` with ``weight_decay=0``.

    ``weight`` of the slow loss; ``smoothing`` of the labels; ``penalty`` of the norms (4e-5 for CIFAR-100), within them
    ``kernel_penalty`` of the slow networks'. 0 leaves a term out.
    """

    weight: float = 1.0
    smoothing: float = 0.09
    penalty: float = 5e-5
    kernel_penalty: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("weight", "penalty", "kernel_penalty"):
            if not getattr(self, name) >= 0:
                raise LissomError(f"slow_neural_loss's {name} is {getattr(self, name)}; it is at least 0")
        if not 0 <= self.smoothing < 1:
            raise LissomError(f"slow_neural_loss's smoothing is {self.smoothing}; it is at least 0 and below 1")

    def prepare(self, model: nn.Module, task: Task) -> None:
        if not callable(getattr(model, "slow_loss", None)):
            raise LissomError(
                f"slow_neural_loss needs a network with slow networks and a slow_loss(), such as terminator_cifar, "
                f"not {type(model).__name__}"
            )
        if task.kind != "classification":
            raise LissomError(f"slow_neural_loss smooths class labels; a task of {task.kind} has none")
        if task.fit is not None and task.fit.labels is None:
            raise LissomError("slow_neural_loss learns from labels, and the data have none")

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        if targets is None:
            raise LissomError("slow_neural_loss learns from labels, and the data have none")
        total = F.cross_entropy(model(inputs), targets, label_smoothing=self.smoothing)
        inner = getattr(model, "module", model)  # Fabric's wrapper
        if self.weight:
            total = total + self.weight * inner.slow_loss()
        if self.penalty:
            total = total + self.penalty * norm_penalty(inner, self.kernel_penalty)
        return total
