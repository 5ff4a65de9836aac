"""Method: a change to how a model is trained; its fields are its settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from lightning_fabric.wrappers import _FabricModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lissom.errors import LissomError
from lissom.registry import load_part
from lissom.tasks.task import Task

__all__ = ["Method", "answers_of", "method_of", "unwrapped"]


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass whose fields are its settings, with the paper's defaults.

    A field may be a module (a teacher); ``fit`` never trains it. Random numbers come from torch's global generator,
    which ``fit`` seeds anew every epoch: then a resumed run repeats exactly.
    """

    def prepare(self, model: nn.Module, task: Task) -> None:
        """Called once before training, the model on the processor. Raises LissomError where this cannot work."""

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        """The scalar to minimise. inputs (B, C, H, W); targets int64 (B,), or None where the data have no labels."""
        raise NotImplementedError

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Which of the model's parameters this method trains: all of them."""
        return model.parameters()

    def at(self, share: float) -> Self:
        """This method as it is at ``share`` (0 to 1) of the training: itself where nothing changes with time."""
        return self

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What it remembers from step to step, tensors and numbers, for a checkpoint: nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Go on from what ``state`` returned."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what Fabric and DDP put around it."""
    while isinstance(model, _FabricModule | DistributedDataParallel):
        model = model.module
    return model


def answers_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A model's answers to a batch, its own last: those of all exits where it answers with a tuple. In a named tuple
    its own is the field ``logits``, wherever it stands."""
    own = getattr(output, "logits", None) if isinstance(output, tuple) else None
    if own is not None:
        return (*(answer for answer in output if answer is not own), own)
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def method_of(method: str | Method) -> Method:
    """The method itself, or the registered one of that name with its defaults. Raises LissomError for another name."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise LissomError(f"a method is a name or a Method, not {type(method).__name__}")
    return load_part("method", method)()
