"""Progressive unfreezing: fine-tune a model from its last layers backwards, one more group of them a phase.

As in ULMFiT (arXiv 1801.06146, section 3.3) and the second stage of Light CNN (arXiv 2501.15547). Every phase is a
training of its own: a new optimiser, its own epochs and learning rate. Layers that are still frozen keep their weights
to the last bit, and their BatchNorms the statistics.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lissom.errors import LissomError
from lissom.tasks.task import Task
from lissom.training.loop import FitResult, fit

__all__ = ["fit_unfreezing"]


def fit_unfreezing(
    model: nn.Module,
    task: Task,
    groups: Sequence[str],
    *,
    epochs: int | Sequence[int] = 2,
    lrs: float | Sequence[float] = (1e-3, 3e-4, 1e-4),
    folder: str | Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[FitResult, ...]:
    """Train ``model`` in place in as many phases as there are ``groups``; one result a phase.

    A group is a pattern (``re.search``) of parameters' names, the last layers first. Phase k trains groups 0 to k.
    ``epochs`` and ``lrs`` are one for all phases, or one each; the last of them serves the phases beyond. ``folder``
    keeps a checkpoint a phase, in a folder of its own; other ``settings`` are those of ``fit``, ``resume`` included.

    Raises LissomError for no groups, a group without parameters, a parameter in two groups, and what ``fit`` refuses.
    """
    if not groups:
        raise LissomError("there is nothing to unfreeze; give the groups of layers, the last first")
    names = [name for name, _ in model.named_parameters()]
    members = [{name for name in names if re.search(group, name)} for group in groups]
    for number, (group, own) in enumerate(zip(groups, members, strict=True)):
        if not own:
            raise LissomError(f"no parameter's name matches the group {group!r}")
        twice = own & set().union(*members[:number])
        if twice:
            raise LissomError(f"{min(twice)} belongs to two groups; the second is {group!r}")
    results = []
    for phase in range(len(groups)):
        training = set().union(*members[: phase + 1])
        results.append(
            fit(
                model,
                task,
                epochs=_at(epochs, phase),
                lr=_at(lrs, phase),
                seed=seed + phase,
                folder=None if folder is None else Path(folder) / f"phase{phase}",
                parameters=lambda name, _, training=training: name in training,  # type: ignore[misc]
                **settings,
            )
        )
    return tuple(results)


def _at(values: Any, phase: int) -> Any:
    return values[min(phase, len(values) - 1)] if isinstance(values, Sequence) else values
