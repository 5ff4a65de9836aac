"""RecipeSpace: recipes over a set of techniques as vectors of integers, so that a search can move among them.

For each technique, in the canonical order, one entry says whether it is there (0 or 1); one entry for each of its knobs
follows, an index into the values that ``Technique.space`` names on this plan and target. As in SimQ-NAS's encoding
(arXiv 2312.13301), the entries of what is absent are dead: two vectors that differ there only are the same recipe.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.export.plan import Plan
from lissom.registry import load_part
from lissom.runtime.target import Target
from lissom.techniques.base import STAGES, Choices, Subset, Technique
from lissom.techniques.recipe import Recipe

__all__ = ["RecipeSpace", "agreeing"]

SUBSETS = 16  # candidates of a knob that is any subset of many items, or a choice for each of them
_TRIES = 200  # draws that look for them


@dataclass(frozen=True)
class _Part:
    """One technique's entries: ``start`` is its switch, ``knobs`` (name -> values) follow."""

    kind: type[Technique]
    start: int
    knobs: dict[str, tuple[Any, ...]]


def agreeing(kinds: Sequence[type[Technique]]) -> list[type[Technique]]:
    """The techniques that can stand in one recipe, in the canonical order: of two that refuse each other the later is
    dropped."""
    kept: list[type[Technique]] = []
    for kind in sorted(kinds, key=lambda kind: STAGES.index(kind.stage)):
        if not _refused(kind, kept):
            kept.append(kind)
    return kept


def _refused(kind: type[Technique], others: Sequence[type[Technique]]) -> bool:
    return any(kind.name in other.refuses or other.name in kind.refuses for other in others)


class RecipeSpace:
    """Every recipe over ``techniques`` (names) on ``plan`` and ``target``, as ``nsga2`` and ``next_batch`` take spaces.

    A knob whose space is a ``Subset`` or ``Choices`` would need an entry for each item, a hundred in a deep network. It
    gets one entry instead: an index into at most 16 values, drawn with ``seed`` once and the same ever after, the first
    of them empty. A knob that is not searched here keeps its default.

    Techniques that refuse each other cannot stand in one recipe: the later in the canonical order is dropped. So is a
    technique that refuses its own combination of knobs (with ValueError, as its constructor does).

    Raises LissomError for an unknown technique, for one named twice, and for a knob without values.
    """

    def __init__(self, techniques: Sequence[str], plan: Plan, target: Target, seed: int = 0) -> None:
        if len(set(techniques)) < len(techniques):
            raise LissomError("a technique is named twice; once is enough")
        kinds: list[type[Technique]] = [load_part("technique", name) for name in techniques]
        parts, start = [], 0
        for kind in sorted(kinds, key=lambda kind: STAGES.index(kind.stage)):
            knobs = {
                knob: _drawn(values, f"{seed}:{kind.name}:{knob}")
                if isinstance(values, Subset | Choices)
                else tuple(values)
                for knob, values in kind.space(plan, target).items()
            }
            empty = [knob for knob, values in knobs.items() if not values]
            if empty:
                raise LissomError(f"{kind.name} names no value for its knob {empty[0]!r}")
            parts.append(_Part(kind, start, knobs))
            start += 1 + len(knobs)
        self._parts = tuple(parts)
        self._sizes = np.array([n for p in parts for n in (2, *(len(values) for values in p.knobs.values()))], np.int64)
        self._made: dict[tuple[str, tuple[int, ...]], Technique | None] = {}

    def __len__(self) -> int:
        """The number of entries of a vector; 0 where there is no technique."""
        return len(self._sizes)

    @property
    def sizes(self) -> np.ndarray:
        """int64 (entries,): 2 for a technique's switch, the number of values for a knob."""
        return self._sizes

    def decode(self, vector: Sequence[int] | np.ndarray) -> Recipe:
        """The recipe of a vector (entries,), refusals repaired. Raises LissomError for a vector of another space."""
        return Recipe(tuple(technique for _, technique in self._there(self._entries(vector))))

    def encode(self, recipe: Recipe) -> np.ndarray:
        """The vector int64 (entries,) nearest to a recipe: knobs that are not searched here leave no trace in it.

        Raises LissomError for a technique that is not of this space, one that stands twice, and a searched knob with
        a value that is none of those searched (as an undecided knob has).
        """
        vector = np.zeros(len(self), np.int64)
        parts = {part.kind.name: part for part in self._parts}
        for technique in recipe.techniques:
            part = parts.get(technique.name)
            if part is None:
                raise LissomError(f"{technique.name} is none of this space's techniques: {', '.join(parts) or 'none'}")
            if vector[part.start]:
                raise LissomError(f"{technique.name} stands twice in the recipe; once is enough")
            vector[part.start] = 1
            for i, (knob, values) in enumerate(part.knobs.items(), part.start + 1):
                value = getattr(technique, knob)
                if value not in values:
                    raise LissomError(f"{technique.name}({knob}={value!r}) is not among the values searched")
                vector[i] = values.index(value)
        return vector

    def live(self, vector: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The key of what ``decode`` gives (entries,): 0 for a dead entry, else 1 + its index (a switch: 1)."""
        entries = self._entries(vector)
        key = [0] * len(entries)
        for part, _ in self._there(entries):
            key[part.start] = 1
            for i in range(part.start + 1, part.start + 1 + len(part.knobs)):
                key[i] = 1 + entries[i]
        return tuple(key)

    def features(self, vectors: np.ndarray) -> np.ndarray:
        """vectors (n, entries) -> int64 (n, entries), the rows of ``live``: a table for ``Predictor``."""
        return np.array([self.live(vector) for vector in vectors], np.int64).reshape(len(vectors), len(self))

    def _there(self, entries: tuple[int, ...]) -> list[tuple[_Part, Technique]]:
        """The techniques that the entries switch on, less those that others before them refuse."""
        there: list[tuple[_Part, Technique]] = []
        for part in self._parts:
            if not entries[part.start]:
                continue
            if _refused(part.kind, [other.kind for other, _ in there]):
                continue
            technique = self._technique(part, entries[part.start + 1 : part.start + 1 + len(part.knobs)])
            if technique is not None:
                there.append((part, technique))
        return there

    def _technique(self, part: _Part, indices: tuple[int, ...]) -> Technique | None:
        """The technique with these knobs; None where it refuses their combination. A search asks for the same often."""
        place = part.kind.name, indices
        if place not in self._made:
            knobs = {knob: values[i] for (knob, values), i in zip(part.knobs.items(), indices, strict=True)}
            try:
                self._made[place] = part.kind(**knobs)
            except (LissomError, ValueError):
                self._made[place] = None
        return self._made[place]

    def _entries(self, vector: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        entries = np.asarray(vector)
        if entries.shape != (len(self),):
            raise LissomError(f"a vector of shape {entries.shape} is none of this space's {len(self)} entries")
        whole = not len(entries) or np.issubdtype(entries.dtype, np.integer)
        if not whole or (entries < 0).any() or (entries >= self._sizes).any():
            raise LissomError("an entry of the vector lies outside its range, or is no integer")
        return tuple(entries.tolist())


def _drawn(space: Subset | Choices, seed: str) -> tuple[tuple[Any, ...], ...]:
    """At most 16 different values, the empty one first; the same for the same items and seed."""
    rng = random.Random(seed)
    found: dict[tuple[Any, ...], None] = {(): None}
    for _ in range(_TRIES if space.items else 0):
        if len(found) == SUBSETS:
            break
        found[space.draw(rng)] = None
    return tuple(found)
