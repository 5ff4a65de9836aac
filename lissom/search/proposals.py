"""What to try next: a pure function of the seed and the trials so far, so that a killed run goes on as it would have.

First the baseline, plain int8, each technique alone at its default, and their composition; then seeded random recipes
whose knobs are drawn from the techniques' own spaces.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lissom.export.plan import Plan
from lissom.registry import load_part
from lissom.runtime.target import Target
from lissom.search.trials import Trial
from lissom.techniques.base import Subset, Technique
from lissom.techniques.recipe import Recipe

__all__ = ["Proposal", "propose"]

_TRIES = 60  # draws before the space counts as exhausted
_REUSE = 0.75  # share of knobs taken from the best trial so far rather than drawn: most settle once for a device

Proposal = tuple[str, Recipe]


def propose(
    seed: int,
    trials: Sequence[Trial],
    techniques: Sequence[str],
    plan: Plan,
    target: Target,
    best: Trial | None = None,
) -> Proposal | None:
    """The next (role, recipe), or None where nothing new is left. ``best`` is a function of ``trials``."""
    kinds: list[type[Technique]] = [load_part("technique", name) for name in techniques]
    roles = {t.role for t in trials}
    if "baseline" not in roles:
        return "baseline", Recipe()
    if "plain int8" not in roles:
        return "plain int8", Recipe((load_part("technique", "int8").plain(),))
    tried = {t.recipe for t in trials} | {t.resolved for t in trials if t.ok and t.role != "plain int8"}
    for kind in kinds:
        recipe = Recipe((kind(),))
        if str(recipe) not in tried:
            return "alone", recipe
    alone = {t.recipe: t for t in trials if t.role == "alone"}
    fitting = [kind for kind in kinds if alone[str(Recipe((kind(),)))].status != "not applicable"]
    together = Recipe(tuple(kind() for kind in fitting))
    if len(fitting) > 1 and str(together) not in tried:
        return "together", together
    rng = random.Random(f"{seed}:{len(trials)}")
    for _ in range(_TRIES):
        recipe = _draw(rng, fitting, plan, target, best)
        if len(recipe) and str(recipe) not in tried:
            return "random", recipe
    return None


def _draw(
    rng: random.Random, kinds: Sequence[type[Technique]], plan: Plan, target: Target, best: Trial | None
) -> Recipe:
    known = {t.name: t for t in Recipe.parse(best.resolved).techniques} if best else {}
    chosen = [kind for kind in kinds if rng.random() < 0.8]
    drawn: list[Technique] = []
    for kind in chosen:
        knobs: dict[str, Any] = {}
        for knob, values in kind.space(plan, target).items():
            if isinstance(values, Subset):
                knobs[knob] = values.draw(rng)
            elif kind.name in known and rng.random() < _REUSE:
                knobs[knob] = getattr(known[kind.name], knob)
            else:
                knobs[knob] = rng.choice(list(values))
        drawn.append(replace(kind(), **knobs))
    return Recipe(tuple(drawn))
