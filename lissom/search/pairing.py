"""The two of a pool of recipes that make up for each other best, as the members of a cascade (arXiv 2412.01039).

Each recipe of the pool is applied to the model and trained once, in the folder where trials keep trained weights, so
that the cascade's own recovery finds both members there. What each gets right on ``choose`` is recorded beside them.
Quantisation is left out of that: it is of the cascade's whole graph, and changes few answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import run_eager
from lissom.export.cascades import Pair, best_pair
from lissom.meters.costs import total
from lissom.runtime.artifact import new_file
from lissom.tasks.task import Split, batches
from lissom.techniques.base import STAGES
from lissom.techniques.cascade import Cascade
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer
from lissom.training.loop import data_marks, weights_mark

__all__ = ["Pool", "pair_recipes", "record_pool"]

BATCH = 250


@dataclass(frozen=True, eq=False)
class Pool:
    """Recipes, and what each got right: ``correct`` bool (M, N) on ``choose``, ``macs`` (M,) of one image."""

    recipes: tuple[Recipe, ...]
    correct: np.ndarray
    macs: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """float64 (M,), in points."""
        return 100 * self.correct.mean(1)


def record_pool(recipes: Sequence[Recipe | str], recoverer: Recoverer) -> Pool:
    """What each of the recipes gets right on the task's ``choose``, each trained as ``recoverer`` would.

    Raises LissomError where there are no labels or no recipes, a recipe has exits or members, or stands twice;
    NotApplicable where one does not apply.
    """
    pool = tuple(Recipe.of(recipe) for recipe in recipes)
    if not pool:
        raise LissomError("a pool without recipes has nothing to record; give two or more to choose a pair from")
    task, labels = recoverer.task, recoverer.task.choose.labels
    if labels is None or task.kind != "classification":
        raise LissomError("a pair is chosen by right and wrong answers, and the data have no labels of classes")
    if len(set(pool)) < len(pool):
        raise LissomError("a recipe stands twice in the pool; a network and itself make up for nothing")
    correct, macs = [], []
    for recipe in pool:
        if any(STAGES.index("exits") <= STAGES.index(t.stage) < STAGES.index("precision") for t in recipe.techniques):
            raise NotApplicable(f"{recipe} answers several times an image; a member of a cascade answers once")
        plan = recoverer.recover(recipe, recipe.apply(recoverer.plan, task, recoverer.target))
        macs.append(total(plan.model, task.shape)[1])
        correct.append(_right(recipe, plan.model, task.choose, labels, recoverer))
    return Pool(pool, np.array(correct).reshape(len(pool), -1), np.array(macs, np.int64))


def pair_recipes(
    pool: Pool, budget: float | None = None, penalty: bool = True, order: str = "cheaper", **knobs: Any
) -> tuple[Cascade, Pair]:
    """The cascade of the pool's most complementary two that together cost ``budget`` multiply-accumulates at most.

    The "cheaper" one is first, or with ``order`` the more "accurate". ``knobs`` are the cascade's others (``score``,
    ``risk``). Raises LissomError as ``lissom.export.cascades.best_pair``.
    """
    pair = best_pair(pool.correct, pool.macs, budget, penalty, order)
    return Cascade(first=pool.recipes[pair.first], second=pool.recipes[pair.second], **knobs), pair


def _right(
    recipe: Recipe, model: torch.nn.Module, split: Split, labels: np.ndarray, recoverer: Recoverer
) -> np.ndarray:
    """bool (N,), from the recoverer's folder where it is known already of this model and these data."""
    key = f"{recipe} {weights_mark(model)} {' '.join(data_marks(split))} {len(labels)}"
    path = Path(recoverer.folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.right.npy"
    if path.is_file():
        with suppress(ValueError, EOFError):  # a damaged file is none
            found = np.load(path)
            if found.dtype == bool and found.shape == labels.shape:
                return found
    answers = [run_eager(model, torch.from_numpy(x)).argmax(1).numpy() for x in batches(split, BATCH)]
    right = np.concatenate(answers) == labels
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, right)
    return right
