"""What to try next: a pure function of the seed and the trials so far, so that a killed run goes on as it would have.

First the baseline, plain int8, each technique alone as it opens, and their composition, again with each rung of the
techniques that have some. Then LINAS over the space of recipes (SimQ-NAS, arXiv 2312.13301; see lissom/search/linas.py
and recipes.py): batch by batch, what the predictors fitted on all earlier trials take for the best recipes that were
not tried. "joint" is LINAS over the fine form of that space, in which every size of a sub-network and the precision of
every layer is an entry of its own. For comparison NSGA-II without predictors, or random recipes whose knobs are drawn
from the techniques' own spaces.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lissom.errors import LissomError
from lissom.export.plan import Plan
from lissom.registry import load_part
from lissom.runtime.target import Target
from lissom.search.choosing import cost
from lissom.search.linas import SEARCHES as LOOPS
from lissom.search.linas import Record, next_batch
from lissom.search.recipes import RecipeSpace, agreeing
from lissom.search.trials import Metrics, Trial
from lissom.techniques.base import Choices, Subset, Technique
from lissom.techniques.recipe import Recipe

__all__ = ["SEARCHES", "Proposal", "batch_size", "propose"]

SEARCHES = (*LOOPS, "joint")
INNER = 2_000  # evaluations of the predictors for a batch: some tenths of a second, beside trials of many
_TRIES = 60  # draws before the space counts as exhausted
_REUSE = 0.75  # share of knobs taken from the best trial so far rather than drawn: most settle once for a device

Proposal = tuple[str, Recipe]


def batch_size(trials: int) -> int:
    """Members of a LINAS batch in a search of ``trials`` in all: a fifth of them, but 4 to 50."""
    return max(4, min(50, trials // 5))


def propose(
    seed: int,
    trials: Sequence[Trial],
    techniques: Sequence[str],
    plan: Plan,
    target: Target,
    best: Trial | None = None,
    *,
    search: str = "linas",
    population: int = 4,
    quantities: Sequence[str] = ("latency",),
    baseline: Metrics | None = None,
) -> Proposal | None:
    """The next (role, recipe), or None where nothing new is left.

    The roles are "baseline", "plain int8", "alone" and "together", then that of ``search``: "linas", "nsga2", "random"
    or "joint". ``population`` is the size of a batch (``batch_size``). Objectives are the error (1 - quality / 100) and
    each of ``quantities`` (as budgets name them) relative to ``baseline`` (default: the baseline's trial). ``best`` is
    a function of ``trials``; random recipes take most knobs from it, and the other searches ignore it.

    A technique that did not work alone is not searched. A trial that did not work, or lacks an objective, counts as
    tried and teaches the predictors nothing; so does one whose knobs the space does not hold. Raises LissomError for
    an unknown search and for no quantities.
    """
    if search not in SEARCHES:
        raise LissomError(f"there is no search {search!r}; known: {', '.join(SEARCHES)}")
    if not quantities:
        raise LissomError("a search needs a quantity to make small, such as latency")
    kinds: list[type[Technique]] = [load_part("technique", name) for name in techniques]
    roles = {t.role for t in trials}
    if "baseline" not in roles:
        return "baseline", Recipe()
    if "plain int8" not in roles:
        return "plain int8", Recipe((load_part("technique", "int8").plain(),))
    openings = {kind: kind.opening(plan, target) for kind in kinds}
    tried = {t.recipe for t in trials} | {t.resolved for t in trials if t.ok and t.role != "plain int8"}
    for kind in kinds:
        recipe = Recipe((openings[kind],))
        if str(recipe) not in tried:
            return "alone", recipe
    alone = {t.recipe: t for t in trials if t.role == "alone"}
    fitting = [kind for kind in kinds if alone[str(openings[kind])].status != "not applicable"]
    together = Recipe(tuple(openings[kind] for kind in agreeing(fitting)))
    if len(together) > 1 and str(together) not in tried:
        return "together", together
    working = [kind for kind in fitting if alone[str(openings[kind])].ok]
    others = agreeing(working) if any(t.role == "together" and t.ok for t in trials) else []
    for kind in working:
        for rung in kind.rungs(plan, target):
            beside = [other for other in others if other is not kind] if kind in others else []
            recipe = Recipe((rung, *(openings[other] for other in beside)))
            if str(recipe) not in tried:
                return "together" if beside else "alone", recipe
    if search == "random":
        return _drawn(random.Random(f"{seed}:{len(trials)}"), working, plan, target, best, tried)
    base = baseline or next(t.metrics for t in trials if t.role == "baseline")
    space = RecipeSpace([kind.name for kind in working], plan, target, seed, fine=search == "joint")
    return _searched(seed, trials, space, search, population, quantities, base, tried)


def _searched(
    seed: int,
    trials: Sequence[Trial],
    space: RecipeSpace,
    search: str,
    population: int,
    quantities: Sequence[str],
    base: Metrics,
    tried: set[str],
) -> Proposal | None:
    """The first member of the batch under way that was not tried; trials of other roles stand before all batches."""
    if not len(space):
        return None
    before = [record for t in trials if t.role != search for record in _records(space, t, quantities, base)]
    own = [record for t in trials if t.role == search for record in _records(space, t, quantities, base)]
    batch = next_batch(
        space,
        [*before, *own],
        ("error", *quantities),
        search="linas" if search == "joint" else search,
        population=population,
        inner=INNER,
        seed=seed,
        key=space.live,
        features=space.features,
        coarse=True,
        first=len(before),
    )
    recipes = [space.decode(vector) for vector in batch]
    return next(((search, recipe) for recipe in recipes if len(recipe) and str(recipe) not in tried), None)


def _records(space: RecipeSpace, trial: Trial, quantities: Sequence[str], base: Metrics) -> list[Record]:
    """The trial as a record of the space: as it was asked for, else as it was settled; none where neither fits."""
    for text in (trial.recipe, trial.resolved) if trial.ok else (trial.recipe,):
        try:
            vector = space.encode(Recipe.parse(text))
        except LissomError:  # an undecided knob, or a technique that is not searched
            continue
        return [Record(tuple(vector.tolist()), _objectives(trial, quantities, base))]
    return []


def _objectives(trial: Trial, quantities: Sequence[str], base: Metrics) -> dict[str, float] | None:
    """Error and relative costs, all to be small; None where one of them is not known."""
    if not trial.ok or trial.metrics.quality is None:
        return None
    found = {"error": 1 - trial.metrics.quality / 100, **{q: cost(q, trial.metrics, base) for q in quantities}}
    return found if all(math.isfinite(value) for value in found.values()) else None


def _drawn(
    rng: random.Random,
    kinds: Sequence[type[Technique]],
    plan: Plan,
    target: Target,
    best: Trial | None,
    tried: set[str],
) -> Proposal | None:
    for _ in range(_TRIES):
        recipe = _draw(rng, kinds, plan, target, best)
        if len(recipe) and str(recipe) not in tried:
            return "random", recipe
    return None


def _draw(
    rng: random.Random, kinds: Sequence[type[Technique]], plan: Plan, target: Target, best: Trial | None
) -> Recipe:
    known = {t.name: t for t in Recipe.parse(best.resolved).techniques} if best else {}
    chosen = agreeing([kind for kind in kinds if rng.random() < 0.8])
    drawn: list[Technique] = []
    for kind in chosen:
        knobs: dict[str, Any] = {}
        for knob, values in kind.space(plan, target).items():
            if isinstance(values, Subset | Choices):
                knobs[knob] = values.draw(rng)
            elif kind.name in known and rng.random() < _REUSE:
                knobs[knob] = getattr(known[kind.name], knob)
            else:
                knobs[knob] = rng.choice(list(values))
        drawn.append(replace(kind(), **knobs))
    return Recipe(tuple(drawn))
