"""Several trainings of one model, one after the other: a recovery in phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lissom.errors import LissomError
from lissom.layers.exits import exits_of
from lissom.tasks.task import Task
from lissom.training.loop import FitEvent, FitResult, fit
from lissom.training.methods.recovery import Phase, Recovery

__all__ = ["fit_phases"]


def fit_phases(
    model: nn.Module,
    task: Task,
    phases: Sequence[Phase],
    *,
    original: nn.Module | None,
    epochs: int,
    max_steps: int | None = None,
    time_limit: float | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[FitEvent], None] | None = None,
    **settings: Any,
) -> tuple[FitResult, ...]:
    """Train ``model`` in place, phase by phase, each a ``Recovery`` from ``original``, or from the model itself where
    it trains heads alone; one result a phase. The model is left in evaluation mode.

    A phase lasts ``epochs`` and ``max_steps`` times its length, at least one of each; of ``time_limit``, in seconds for
    all together, it has a share in proportion to its length. ``folder`` keeps a checkpoint a phase, in a folder of its
    own. Called again with the same folder, phases that are done are not trained again and the one under way goes on, so
    that the result is that of an uninterrupted run. ``progress`` counts epochs over all phases. ``settings`` are those
    of ``fit``.

    Raises LissomError for no phases, a phase of a module that the model lacks, heads where there are none, and what
    ``fit`` refuses.
    """
    if not phases:
        raise LissomError("a recovery without phases has nothing to learn")
    modules = dict(model.named_modules())
    if missing := [phase.of for phase in phases if phase.of not in modules]:
        raise LissomError(f"a phase is to train the module {missing[0]!r}, which the model lacks")
    lasts = [max(1, round(epochs * phase.length)) for phase in phases]
    whole = sum(phase.length for phase in phases)
    results = []
    for number, phase in enumerate(phases):
        exits = exits_of(modules[phase.of])
        if phase.heads:
            if exits is None:
                raise LissomError("a phase is to train the heads of exits, and the model has none")
            exits.detached = True
        told = None if progress is None else _offset(progress, sum(lasts[:number]), sum(lasts))
        results.append(
            fit(
                modules[phase.of],
                task,
                method=Recovery(None if phase.heads else original, phase.terms),
                epochs=lasts[number],
                max_steps=None if max_steps is None else max(1, round(max_steps * phase.length)),
                time_limit=None if time_limit is None else time_limit * phase.length / whole,
                seed=seed + number,
                folder=None if folder is None else Path(folder) / f"phase{number}",
                resume=True,
                progress=told,
                **settings,
            )
        )
    model.eval()
    return tuple(results)


def _offset(progress: Callable[[FitEvent], None], before: int, whole: int) -> Callable[[FitEvent], None]:
    """Epochs counted on from those of earlier phases."""

    def told(event: FitEvent) -> None:
        progress(replace(event, epoch=before + event.epoch, epochs=whole))

    return told
