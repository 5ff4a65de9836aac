"""RecipeSpace: recipes over a set of techniques as vectors of integers, so that a search can move among them.

For each technique, in the canonical order, one entry says whether it is there (0 or 1); one entry for each of its knobs
follows, an index into the values that ``Technique.space`` names on this plan and target. As in SimQ-NAS's encoding
(arXiv 2312.13301), the entries of what is absent are dead: two vectors that differ there only are the same recipe.

In the fine form a knob of many items (the layers that stay in float, the sizes of a sub-network) has an entry for each
of them, so that architecture and precision of every layer stand in one vector, as SimQ-NAS has them. Then entries of
layers that lie in a block which another entry leaves out are dead too.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
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
_KEPT = 100_000  # decoded vectors that are remembered: a search asks for the same often


@dataclass(frozen=True)
class _Knob:
    """A knob's entries, from ``start`` on: one, an index into ``values``; or, where there are ``items``, one for each,
    an index into its own values (``values[i]``). ``named``: items are written with their values, as Choices are."""

    name: str
    start: int
    values: tuple[Any, ...]
    items: tuple[str, ...] | None = None
    named: bool = False

    @property
    def sizes(self) -> list[int]:
        return [len(self.values)] if self.items is None else [len(own) for own in self.values]

    @property
    def places(self) -> range:
        return range(self.start, self.start + len(self.sizes))

    def read(self, entries: Sequence[int]) -> Any:
        """The knob's value in a vector."""
        if self.items is None:
            return self.values[entries[self.start]]
        chosen = [
            (item, own[entries[i]], entries[i])
            for i, item, own in zip(self.places, self.items, self.values, strict=True)
        ]
        return tuple((item, value) if self.named else item for item, value, index in chosen if index)

    def write(self, value: Any) -> list[int] | None:
        """The entries of a value; None where it is none of those searched."""
        if self.items is None:
            return [self.values.index(value)] if value in self.values else None
        if not isinstance(value, tuple):
            return None
        given = dict(value) if self.named else dict.fromkeys(value, True)
        known = dict(zip(self.items, self.values, strict=True))
        if any(item not in known or own not in known[item] for item, own in given.items()):
            return None
        return [known[item].index(given[item]) if item in given else 0 for item in self.items]

    def dead(self, gone: Iterable[str]) -> list[int]:
        """The entries of items that are one of the paths ``gone``, or lie inside one."""
        paths = set(gone)
        return [] if self.items is None or not paths else [
            place for place, item in zip(self.places, self.items, strict=True) if _inside(item, paths)
        ]  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """One technique's entries: ``start`` is its switch, those of the ``knobs`` follow."""

    kind: type[Technique]
    start: int
    knobs: tuple[_Knob, ...]


def agreeing(kinds: Sequence[type[Technique]]) -> list[type[Technique]]:
    """The techniques that can stand in one recipe, in the canonical order: of two that refuse each other the later is
    dropped."""
    kept: list[type[Technique]] = []
    for kind in sorted(kinds, key=_order):
        if not _refused(kind, kept):
            kept.append(kind)
    return kept


def _order(kind: type[Technique]) -> tuple[int, int]:
    return STAGES.index(kind.stage), kind.turn


def _refused(kind: type[Technique], others: Sequence[type[Technique]]) -> bool:
    return any(kind.name in other.refuses or other.name in kind.refuses for other in others)


def _inside(item: str, paths: set[str]) -> bool:
    """Whether the item is one of the paths, or lies inside one."""
    while item:
        if item in paths:
            return True
        item = item.rpartition(".")[0]
    return False


class RecipeSpace:
    """Every recipe over ``techniques`` (names) on ``plan`` and ``target``, as ``nsga2`` and ``next_batch`` take spaces.

    A knob whose space is a ``Subset`` or ``Choices`` would need an entry for each item, a hundred in a deep network. It
    gets one entry instead: an index into at most 16 values, drawn with ``seed`` once and the same ever after, the first
    of them empty, then those that are always to be tried. With ``fine`` it has an entry for each item, 0 for the
    default. A knob that is not searched here keeps its default.

    Techniques that refuse each other cannot stand in one recipe: the later in the canonical order is dropped. So is a
    technique that refuses its own combination of knobs (with ValueError, as its constructor does).

    Raises LissomError for an unknown technique, for one named twice, and for a knob without values.
    """

    def __init__(
        self, techniques: Sequence[str], plan: Plan, target: Target, seed: int = 0, *, fine: bool = False
    ) -> None:
        if len(set(techniques)) < len(techniques):
            raise LissomError("a technique is named twice; once is enough")
        kinds: list[type[Technique]] = [load_part("technique", name) for name in techniques]
        parts, start = [], 0
        for kind in sorted(kinds, key=_order):
            knobs: list[_Knob] = []
            place = start + 1
            for name, values in kind.space(plan, target).items():
                knobs.append(_knob(name, place, values, fine, f"{seed}:{kind.name}:{name}"))
                if 0 in knobs[-1].sizes:
                    raise LissomError(f"{kind.name} names no value for its knob {name!r}")
                place += len(knobs[-1].sizes)
            parts.append(_Part(kind, start, tuple(knobs)))
            start = place
        self._plan, self._fine = plan, fine
        self._parts = tuple(parts)
        self._sizes = np.array([n for p in parts for n in (2, *(n for k in p.knobs for n in k.sizes))], np.int64)
        self._made: dict[tuple[str, tuple[Any, ...]], Technique | None] = {}
        self._decoded: dict[tuple[int, ...], tuple[tuple[_Part, Technique, frozenset[int]], ...]] = {}

    def __len__(self) -> int:
        """The number of entries of a vector; 0 where there is no technique."""
        return len(self._sizes)

    @property
    def sizes(self) -> np.ndarray:
        """int64 (entries,): 2 for a technique's switch, the number of values for a knob, or for each of its items."""
        return self._sizes

    @property
    def names(self) -> tuple[tuple[str, str, str], ...]:
        """What each entry is: (technique, knob, item); knob and item are "" where it is a switch, or has no items."""
        found = []
        for part in self._parts:
            found.append((part.kind.name, "", ""))
            for knob in part.knobs:
                found += [
                    (part.kind.name, knob.name, item) for item in (knob.items if knob.items is not None else ("",))
                ]
        return tuple(found)

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Random vectors int64 (count, entries): every entry evenly, but for knobs of many items.

        Of those each vector has a share of its own of the items that leave their default, between none and all: mostly
        few where the default is that an item is not named (a policy that spares most layers saves nothing), evenly for
        choices. Drawn entry by entry all vectors would have one half.
        """
        vectors = generator.integers(0, self._sizes, (count, len(self)))
        for part in self._parts:
            for knob in part.knobs:
                if knob.items:
                    share = generator.random((count, 1)) ** (1 if knob.named else 2)
                    most = np.array(knob.sizes)
                    other = 1 + generator.integers(0, np.maximum(most - 1, 1), (count, len(most)))
                    moved = (generator.random((count, len(most))) < share) & (most > 1)
                    vectors[:, knob.start : knob.start + len(most)] = np.where(moved, other, 0)
        return vectors

    def decode(self, vector: Sequence[int] | np.ndarray) -> Recipe:
        """The recipe of a vector (entries,), refusals repaired. Raises LissomError for a vector of another space."""
        return Recipe(tuple(technique for _, technique, _ in self._there(self._entries(vector))))

    def encode(self, recipe: Recipe) -> np.ndarray:
        """The vector int64 (entries,) nearest to a recipe: knobs that are not searched here leave no trace in it.

        Raises LissomError for a technique that is not of this space, one that stands twice, and a searched knob with
        a value that is none of those searched (as an undecided knob has).
        """
        vector = np.zeros(len(self), np.int64)
        parts = {part.kind.name: part for part in self._parts}
        for given in recipe.techniques:
            part = parts.get(given.name)
            if part is None:
                raise LissomError(f"{given.name} is none of this space's techniques: {', '.join(parts) or 'none'}")
            if vector[part.start]:
                raise LissomError(f"{given.name} stands twice in the recipe; once is enough")
            vector[part.start] = 1
            technique = given.as_searched(self._plan)
            for knob in part.knobs:
                value = getattr(technique, knob.name)
                entries = knob.write(value)
                if entries is None:
                    raise LissomError(f"{technique.name}({knob.name}={value!r}) is not among the values searched")
                vector[knob.start : knob.start + len(entries)] = entries
        return vector

    def live(self, vector: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The key of what ``decode`` gives (entries,): 0 for a dead entry, else 1 + its index (a switch: 1)."""
        entries = self._entries(vector)
        key = [0] * len(entries)
        for part, _, dead in self._there(entries):
            key[part.start] = 1
            for knob in part.knobs:
                for i in knob.places:
                    key[i] = 0 if i in dead else 1 + entries[i]
        return tuple(key)

    def features(self, vectors: np.ndarray) -> np.ndarray:
        """vectors (n, entries) -> int64 (n, entries), the rows of ``live``: a table for ``Predictor``."""
        return np.array([self.live(vector) for vector in vectors], np.int64).reshape(len(vectors), len(self))

    def _there(self, entries: tuple[int, ...]) -> tuple[tuple[_Part, Technique, frozenset[int]], ...]:
        """The techniques that the entries switch on, less those that others before them refuse; with each the entries
        that are dead because another, or one of its own, leaves out what they speak of."""
        if entries not in self._decoded:
            if len(self._decoded) >= _KEPT:
                self._decoded.clear()
            self._decoded[entries] = self._found(entries)
        return self._decoded[entries]

    def _found(self, entries: tuple[int, ...]) -> tuple[tuple[_Part, Technique, frozenset[int]], ...]:
        there: list[tuple[_Part, Technique, frozenset[int]]] = []
        gone: set[str] = set()
        for part in self._parts:
            if not entries[part.start]:
                continue
            if _refused(part.kind, [other.kind for other, _, _ in there]):
                continue
            technique = self._technique(part, entries)
            if technique is None:
                continue
            # What it leaves out is known of the plan as it is; behind one that changes the structure it may be another.
            if self._fine and all(other.kind.stage == "fuse" for other, _, _ in there):
                gone |= set(technique.left_out(self._plan))
            dead = frozenset(place for knob in part.knobs for place in knob.dead(gone))
            if any(entries[place] for place in dead):
                technique = self._technique(part, tuple(0 if i in dead else n for i, n in enumerate(entries)))
            if technique is not None:
                there.append((part, technique, dead))
        return tuple(there)

    def _technique(self, part: _Part, entries: Sequence[int]) -> Technique | None:
        """The technique with the knobs of a vector; None where it refuses their combination."""
        knobs = {knob.name: knob.read(entries) for knob in part.knobs}
        place = part.kind.name, tuple(knobs.values())
        if place not in self._made:
            if len(self._made) >= _KEPT:
                self._made.clear()
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


def _knob(name: str, start: int, values: Sequence[Any] | Subset | Choices, fine: bool, seed: str) -> _Knob:
    if not isinstance(values, Subset | Choices):
        return _Knob(name, start, tuple(values))
    if not fine:
        return _Knob(name, start, _drawn(values, seed))
    if isinstance(values, Subset):
        return _Knob(name, start, ((False, True),) * len(values.items), values.items)
    return _Knob(
        name, start, tuple(own for _, own in values.items), tuple(item for item, _ in values.items), named=True
    )


def _drawn(space: Subset | Choices, seed: str) -> tuple[tuple[Any, ...], ...]:
    """At most 16 different values, the empty one first, then those always to be tried; the same for the same items and
    seed."""
    rng = random.Random(seed)
    always = space.always if isinstance(space, Choices) else ()
    found: dict[tuple[Any, ...], None] = dict.fromkeys(((), *always)[:SUBSETS])
    for _ in range(_TRIES if space.items else 0):
        if len(found) == SUBSETS:
            break
        found[space.draw(rng)] = None
    return tuple(found)
