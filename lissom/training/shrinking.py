"""Progressive shrinking from end to end: a super-network's sub-networks, stage after stage (arXiv 1908.09791)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lissom.errors import LissomError
from lissom.tasks.task import Task
from lissom.training.loop import FitResult, fit
from lissom.training.methods.delayed_shrinking import check_elastic
from lissom.training.methods.progressive_shrinking import (
    KERNEL_RATE,
    ProgressiveShrinking,
    Stage,
    published_stages,
    teacher_of,
)

__all__ = ["fit_progressive", "lengths"]


def lengths(weights: Sequence[float], total: int) -> list[int]:
    """``total`` divided in proportion to ``weights``, in whole numbers of at least 1 that sum up to it.

    Raises LissomError where there are more weights than units to give.
    """
    if total < len(weights):
        raise LissomError(f"{total} is too few for {len(weights)} stages; each takes at least 1")
    spare, whole = total - len(weights), sum(weights)
    shares = [spare * weight / whole for weight in weights]
    found = [1 + int(share) for share in shares]
    for place in sorted(range(len(weights)), key=lambda i: int(shares[i]) - shares[i])[: total - sum(found)]:
        found[place] += 1
    return found


def fit_progressive(
    network: nn.Module,
    task: Task,
    *,
    epochs: int = 1,
    steps: Sequence[int] | None = None,
    stages: Sequence[Stage] | None = None,
    teacher: nn.Module | None = None,
    kd_ratio: float = 1.0,
    lr: float = KERNEL_RATE,
    folder: str | Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[FitResult, ...]:
    """Train the sub-networks of ``network``, whose whole form is trained already, in place; one result a stage.

    ``epochs`` for all stages together, divided as the stages' own are (``published_stages``, None: those); or
    ``steps``, a number for each stage, which decides alone. ``lr`` is the highest rate of the first; other stages keep
    their ratio to it. ``teacher``: a frozen copy of the network as it
    comes, where none is given. ``folder`` keeps a checkpoint a stage, in a folder of its own; other ``settings`` are
    those of ``fit``, ``resume`` included; published are SGD, a weight decay of 3e-5 and a dropout of 0.1.

    Raises LissomError for a model that is no super-network, fewer epochs than stages, another number of ``steps`` than
    of stages, and what ``fit`` refuses.
    """
    check_elastic(network, "fit_progressive")
    asked = published_stages(network) if stages is None else tuple(stages)  # type: ignore[arg-type]
    if not asked:
        raise LissomError("the super-network has nothing to open: every dimension has one value")
    teacher = teacher_of(network) if teacher is None else teacher
    if steps is None:
        parts = lengths([stage.epochs for stage in asked], epochs)
    elif len(steps) != len(asked):
        raise LissomError(f"{len(steps)} numbers of steps are given for {len(asked)} stages")
    else:
        assert task.fit is not None
        an_epoch = max(1, len(task.fit) // settings.get("batch", 64))
        parts = [math.ceil(count / an_epoch) for count in steps]
    results = []
    for number, (stage, length) in enumerate(zip(asked, parts, strict=True)):
        if stage.sort is not None and callable(sort := getattr(network, "sort_channels", None)):
            sort(stage.sort)  # a function of the weights alone: a resumed run does the same
        results.append(
            fit(
                network,
                task,
                method=ProgressiveShrinking(teacher, stage.opened, stage.count, kd_ratio),
                epochs=length,
                max_steps=None if steps is None else steps[number],
                lr=lr * stage.lr / asked[0].lr,
                warmup=stage.warmup,
                seed=seed + number,
                folder=None if folder is None else Path(folder) / f"stage{number}",
                **settings,
            )
        )
    return tuple(results)
