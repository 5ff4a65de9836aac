"""Sub-networks as integer vectors, and Once-for-All's search among them (arXiv 1908.09791): evolution under a limit.

``SubnetSpace`` makes a super-network (``lissom.layers.elastic``) a space for every search here: ``linas`` and
``nsga2`` take it with its ``key`` and ``features``, in which choices inside blocks that a depth leaves out count for
nothing. ``evolve`` is the published single-objective search on a predicted score.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.layers.elastic import ElasticNetwork, Setting, check_setting

__all__ = ["SubnetSpace", "evolve"]

ATTEMPTS = 1000  # at one individual that keeps the limit


class SubnetSpace:
    """The settings of a super-network as vectors: entry i says which of dimension i's values, 0 the smallest."""

    def __init__(self, network: ElasticNetwork) -> None:
        self.network = network
        self.dimensions = network.dimensions()
        if not self.dimensions:
            raise LissomError("the super-network has nothing to choose")

    @property
    def sizes(self) -> np.ndarray:
        """int64 (entries,): the number of values of each dimension."""
        return np.array([len(d.values) for d in self.dimensions], np.int64)

    def decode(self, vector: np.ndarray) -> dict[str, Any]:
        """Vector (entries,) -> setting. Raises LissomError for another length and entries outside their range."""
        entries = np.asarray(vector)
        if entries.shape != self.sizes.shape or (entries < 0).any() or (entries >= self.sizes).any():
            raise LissomError(f"a vector of the space has {len(self.dimensions)} entries, each from 0 to its size")
        return {d.name: d.values[int(i)] for d, i in zip(self.dimensions, entries, strict=True)}

    def encode(self, setting: Setting) -> np.ndarray:
        """Setting -> int64 (entries,); dimensions that are not named are at their largest. Raises LissomError for what
        the network does not have."""
        whole = check_setting(self.network, setting)
        return np.array([d.values.index(whole[d.name]) for d in self.dimensions], np.int64)

    def live(self, vector: np.ndarray) -> np.ndarray:
        """bool (entries,): which choices mean something beside the others."""
        dead = getattr(self.network, "dead", None)
        gone = dead(self.decode(vector)) if callable(dead) else frozenset()
        return np.array([d.name not in gone for d in self.dimensions])

    def key(self, vector: np.ndarray) -> Hashable:
        """Equal for vectors that mean the same sub-network."""
        return tuple(np.where(self.live(vector), vector, -1).tolist())

    def features(self, vectors: np.ndarray) -> np.ndarray:
        """vectors (n, entries) -> float64 (n, sum of sizes): one-hot, zeros for what does not mean anything."""
        starts = np.cumsum(self.sizes) - self.sizes
        found = np.zeros((len(vectors), int(self.sizes.sum())))
        for row, vector in zip(found, np.asarray(vectors, np.int64), strict=True):
            live = self.live(vector)
            row[(starts + vector)[live]] = 1
        return found


def evolve(
    space: SubnetSpace,
    score: Callable[[np.ndarray], float],
    fits: Callable[[Mapping[str, Any]], bool],
    *,
    population: int = 100,
    generations: int = 500,
    parents: float = 0.25,
    mutation: float = 0.1,
    mutated: float = 0.5,
    seed: int = 0,
) -> tuple[dict[str, Any], float]:
    """The setting of the highest ``score`` among those found that ``fits`` (a latency, say), and its score.

    Once-for-All's: of each generation the best ``parents`` stay; the share ``mutated`` of the rest are children of one
    of them, each entry drawn anew with probability ``mutation``, the others of two, each entry from either. Children
    that do not fit are made again. ``score`` takes a vector and is asked once for each sub-network; the defaults are
    the published ones.

    Raises LissomError where nothing fits in 1000 random draws, and for settings that cannot work.
    """
    kept = max(2, round(parents * population))
    for wrong, sentence in (
        (population < 4, f"population is {population}; it is at least 4"),
        (generations < 1, f"generations is {generations}; it is at least 1"),
        (not 0 < parents <= 1 or kept > population, f"parents is {parents}; it is a share above 0, at most 1"),
        (not 0 <= mutation <= 1, f"mutation is {mutation}; it is a probability"),
        (not 0 <= mutated <= 1, f"mutated is {mutated}; it is a share"),
    ):
        if wrong:
            raise LissomError(sentence)
    numbers = np.random.default_rng(seed)
    known: dict[Hashable, float] = {}

    def scored(vector: np.ndarray) -> tuple[float, np.ndarray]:
        name = space.key(vector)
        if name not in known:
            known[name] = float(score(vector))
        return known[name], vector

    def made(draw: Callable[[], np.ndarray]) -> np.ndarray | None:
        """The first vector drawn that fits."""
        return next((v for v in (draw() for _ in range(ATTEMPTS)) if fits(space.decode(v))), None)

    def anew() -> np.ndarray:
        return numbers.integers(0, space.sizes)

    first = [made(anew) for _ in range(population)]
    if any(vector is None for vector in first):
        raise LissomError(f"no sub-network of {ATTEMPTS} drawn keeps the limit; the smallest may not either")
    ranked = sorted((scored(v) for v in first if v is not None), key=lambda pair: -pair[0])
    for _ in range(generations):
        best = [vector for _, vector in ranked[:kept]]

        def changed(best: list[np.ndarray] = best) -> np.ndarray:
            parent = best[numbers.integers(len(best))]
            return np.where(numbers.random(len(parent)) < mutation, anew(), parent)

        def crossed(best: list[np.ndarray] = best) -> np.ndarray:
            one, other = (best[i] for i in numbers.integers(0, len(best), 2))
            return np.where(numbers.random(len(one)) < 0.5, one, other)

        children = []
        for number in range(population - kept):
            child = made(changed if number < mutated * (population - kept) else crossed)
            children.append(scored(best[0] if child is None else child))
        ranked = sorted([*ranked[:kept], *children], key=lambda pair: -pair[0])
    value, vector = ranked[0]
    return space.decode(vector), value
