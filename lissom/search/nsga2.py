"""NSGA-II on vectors of integers, its non-dominated sort, and the hypervolume of a front.

Deb, Pratap, Agarwal and Meyarivan, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II" (IEEE Transactions on
Evolutionary Computation 6(2), 2002), with the settings that SimQ-NAS (arXiv 2312.13301) uses. All objectives are to be
small. Simulated binary crossover is Deb and Agrawal's (Complex Systems 9, 1995), polynomial mutation Deb and Goyal's
(Computer Science and Informatics 26, 1996); their results are rounded and held in range.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from lissom.errors import LissomError

__all__ = ["Space", "breed", "hypervolume", "non_dominated", "nsga2", "ranks", "survive"]

CROSSOVER, CROSSOVER_ETA = 0.9, 15.0  # share of the pairs that is crossed
MUTATION, MUTATION_ETA = 0.02, 20.0  # share of the entries that is mutated
_BREEDINGS = 5  # attempts at new children in a generation before random vectors take the empty places
_DRAWS = 20  # attempts at new random vectors before the space counts as exhausted

Key = Callable[[np.ndarray], Hashable]


class Space(Protocol):
    """What a search needs to know of a space: SearchSpace and RecipeSpace are two."""

    @property
    def sizes(self) -> np.ndarray:
        """int64 (entries,): entry i of a vector is one of 0 to sizes[i] - 1."""
        ...

    def decode(self, vector: np.ndarray) -> Any:
        """What the vector (entries,) stands for."""
        ...


def nsga2(
    space: Space,
    evaluate: Callable[[np.ndarray], np.ndarray],
    population: int,
    evaluations: int,
    seed: int | np.random.Generator,
    start: np.ndarray | None = None,
    key: Key | None = None,
    mutation: float = MUTATION,
) -> tuple[np.ndarray, np.ndarray]:
    """The last population: vectors int64 (n, entries) and their objectives float64 (n, objectives), best first.

    ``evaluate`` maps int64 (n, entries) to (n, objectives), all to be small; it is asked for ``evaluations`` vectors in
    all, ``population`` at a time. The first are ``start`` (n, entries), as far as there are any, then random ones.
    Two vectors of the same ``key`` (default: the vector itself) count as one, and none is evaluated twice: where the
    parents have too few new children, random vectors take the empty places, and where these find nothing new either,
    the search ends early (n may then stay below ``population``). ``mutation`` is the share of entries that mutate.

    Raises LissomError for a population below 2, fewer evaluations than that, and objectives that are not finite or
    of another shape.
    """
    if population < 2 or evaluations < population:
        raise LissomError(
            f"NSGA-II needs a population of at least 2 and as many evaluations; it has {population} and {evaluations}"
        )
    generator = np.random.default_rng(seed)
    seen: set[Hashable] = set()
    vectors = np.empty((0, len(space.sizes)), np.int64)
    if start is not None:
        vectors = new(np.asarray(start, np.int64)[:population], seen, key)
    vectors = np.concatenate([vectors, draw(space, population - len(vectors), generator, seen, key)])
    objectives = _checked(evaluate(vectors), len(vectors))
    spent = len(vectors)
    while spent < evaluations:
        wanted = min(population, evaluations - spent)
        children = breed(space, vectors, objectives, wanted, generator, seen, key, mutation)
        if not len(children):
            break
        spent += len(children)
        vectors = np.concatenate([vectors, children])
        objectives = np.concatenate([objectives, _checked(evaluate(children), len(children))])
        kept = survive(objectives, population)
        vectors, objectives = vectors[kept], objectives[kept]
    kept = survive(objectives, population)
    return vectors[kept], objectives[kept]


def breed(
    space: Space,
    vectors: np.ndarray,
    objectives: np.ndarray,
    count: int,
    generator: np.random.Generator,
    seen: set[Hashable],
    key: Key | None = None,
    mutation: float = MUTATION,
) -> np.ndarray:
    """At most ``count`` children of the population ``vectors`` (n, entries) whose keys are not in ``seen``, which grows
    by them: int64 (count or fewer, entries). Parents win binary tournaments by rank, then by crowding distance; where
    they have too few new children, random vectors take the empty places."""
    rank = ranks(objectives)
    spread = _crowding_by_front(objectives, rank)
    found = [np.empty((0, len(space.sizes)), np.int64)]
    left = count
    for _ in range(_BREEDINGS if len(vectors) else 0):
        if left <= 0:
            break
        first, second = (_tournament(rank, spread, (count + 1) // 2, generator) for _ in range(2))
        children = _crossed(vectors[first], vectors[second], space.sizes, generator)
        children = _mutated(children, space.sizes, mutation, generator)
        found.append(new(children, seen, key, left))
        left -= len(found[-1])
    return np.concatenate([*found, draw(space, left, generator, seen, key)])


def draw(
    space: Space, count: int, generator: np.random.Generator, seen: set[Hashable], key: Key | None = None
) -> np.ndarray:
    """At most ``count`` random vectors whose keys are not in ``seen``, which grows by them; every entry drawn evenly,
    unless the space has a ``draw(count, generator)`` of its own."""
    own = getattr(space, "draw", None)
    found = [np.empty((0, len(space.sizes)), np.int64)]
    left = count
    for _ in range(_DRAWS):
        if left <= 0:
            break
        drawn = own(count, generator) if own else generator.integers(0, space.sizes, (count, len(space.sizes)))
        found.append(new(drawn, seen, key, left))
        left -= len(found[-1])
    return np.concatenate(found)


def new(vectors: np.ndarray, seen: set[Hashable], key: Key | None = None, most: int | None = None) -> np.ndarray:
    """Of ``vectors`` (n, entries), the first ``most`` (all) whose keys are not in ``seen``, which grows by them."""
    kept: list[int] = []
    for i, vector in enumerate(vectors):
        if len(kept) == most:
            break
        name = key_of(vector, key)
        if name not in seen:
            seen.add(name)
            kept.append(i)
    return vectors[kept]


def key_of(vector: np.ndarray, key: Key | None = None) -> Hashable:
    """The vector's key: what makes two vectors the same candidate."""
    return tuple(vector.tolist()) if key is None else key(vector)


def ranks(objectives: np.ndarray) -> np.ndarray:
    """objectives (n, m) -> int64 (n,): 0 for those that nothing dominates, 1 for those that only these do, and so on
    (the fast non-dominated sort, section III-A)."""
    # [i, j]: i is nowhere worse than j, and somewhere better.
    one, other = objectives[:, None], objectives[None]
    better = np.logical_and((one <= other).all(-1), (one < other).any(-1))
    above = better.sum(0)
    rank = np.full(len(objectives), -1, np.int64)
    level = 0
    while (rank < 0).any():
        front = (rank < 0) & (above == 0)
        rank[front] = level
        above = above - better[front].sum(0)
        level += 1
    return rank


def crowding(objectives: np.ndarray) -> np.ndarray:
    """objectives (n, m) of one front -> float64 (n,): the size of the gap around each, infinite at the ends
    (section III-B)."""
    distance = np.zeros(len(objectives))
    for values in objectives.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return distance


def survive(objectives: np.ndarray, count: int) -> np.ndarray:
    """Indices of the best ``count`` of ``objectives`` (n, m): lower rank first, then the larger crowding distance."""
    rank = ranks(objectives)
    return np.lexsort((-_crowding_by_front(objectives, rank), rank))[:count]


def _crowding_by_front(objectives: np.ndarray, rank: np.ndarray) -> np.ndarray:
    distance = np.zeros(len(objectives))
    for level in range(int(rank.max(initial=-1)) + 1):
        distance[rank == level] = crowding(objectives[rank == level])
    return distance


def non_dominated(objectives: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """objectives (n, m), all to be small -> ascending indices of those that no other dominates.

    Of equal ones all are kept. Raises LissomError for a value that is not a number.
    """
    points = np.asarray(objectives, np.float64)
    if not len(points):
        return np.empty(0, np.int64)
    if np.isnan(points).any():
        raise LissomError("an objective is not a number, so nothing can be compared with it")
    left: np.ndarray = np.lexsort(points.T[::-1])  # whatever dominates a point stands before it
    kept: list[int] = []
    while len(left):
        first = points[left[0]]
        equal = (points[left] == first).all(1)
        kept += left[equal].tolist()
        left = left[(points[left] < first).any(1) & ~equal]
    return np.sort(np.array(kept, np.int64))


def hypervolume(points: Sequence[Sequence[float]] | np.ndarray, reference: Sequence[float]) -> float:
    """Volume that ``points`` (n, m) dominate below ``reference`` (m,), exact, in the product of the objectives' units.

    A point that is not below the reference in every objective adds nothing. With two objectives a sweep; with more,
    slices along the last objective (Zitzler and Thiele 1998 define the measure), in time that grows as n^(m - 1).
    Raises LissomError where the points and the reference differ in the number of objectives.
    """
    corner = np.asarray(reference, np.float64)
    found = np.asarray(points, np.float64)
    found = found.reshape(0, len(corner)) if found.size == 0 else found
    if found.ndim != 2 or found.shape[1] != len(corner):
        raise LissomError(f"points of shape {found.shape} and a reference of {len(corner)} objectives do not match")
    return _volume(found[(found < corner).all(1)], corner)


def _volume(points: np.ndarray, corner: np.ndarray) -> float:
    if not len(points):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - points.min())
    points = points[non_dominated(points)]
    points = points[np.argsort(points[:, -1], kind="stable")]
    if len(corner) == 2:  # the second rises, so the first falls
        strips = np.diff(points[:, 0], prepend=corner[0])
        return float(-(strips * (corner[1] - points[:, 1])).sum())
    # Between two values of the last objective the points below both dominate the same cross-section.
    depths = np.diff(points[:, -1], append=corner[-1])
    return sum(float(depth) * _volume(points[: i + 1, :-1], corner[:-1]) for i, depth in enumerate(depths) if depth > 0)


def _checked(objectives: np.ndarray, count: int) -> np.ndarray:
    values = np.asarray(objectives, np.float64)
    if values.ndim != 2 or len(values) != count:
        raise LissomError(f"the evaluation of {count} vectors gave shape {values.shape}, not ({count}, objectives)")
    if not np.isfinite(values).all():
        raise LissomError("an objective is not finite, so its vector has no place in the order")
    return values


def _tournament(rank: np.ndarray, spread: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Winners (count,) of as many pairs: the lower rank, then the larger distance, then the first drawn."""
    one, other = generator.integers(0, len(rank), (2, count))
    wins = (rank[other] < rank[one]) | ((rank[other] == rank[one]) & (spread[other] > spread[one]))
    return np.where(wins, other, one)


def _crossed(one: np.ndarray, other: np.ndarray, sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Parents (n, entries) twice -> children (2n, entries).

    Simulated binary crossover, bounded: with u uniform, the children lie at the mean of the parents minus and plus
    beta / 2 times their distance, where beta = (u a)^(1/(eta+1)) for u <= 1/a, else (1/(2 - u a))^(1/(eta+1)), and
    a = 2 - b^-(eta+1), b = 1 + 2 (distance of the nearer parent to that side's bound) / (distance of the parents).
    """
    low, high = np.minimum(one, other), np.maximum(one, other)
    gap = high - low
    mixed = (generator.random((len(one), 1)) < CROSSOVER) & (generator.random(one.shape) < 0.5) & (gap > 0)
    u = generator.random(one.shape)
    power = CROSSOVER_ETA + 1
    children = []
    for room, sign in ((low, -1.0), (sizes - 1 - high, 1.0)):
        a = 2 - (1 + 2 * room / np.maximum(gap, 1)) ** -power
        beta = np.where(u <= 1 / a, u * a, 1 / (2 - u * a)) ** (1 / power)
        children.append((low + high + sign * beta * gap) / 2)
    swapped = generator.random(one.shape) < 0.5  # else one child would have the smaller value in every entry
    first, second = np.where(swapped, children[::-1], children)
    both = np.concatenate([np.where(mixed, first, one), np.where(mixed, second, other)])
    return np.clip(np.rint(both), 0, sizes - 1).astype(np.int64)


def _mutated(vectors: np.ndarray, sizes: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Polynomial mutation of ``share`` of the entries, bounded.

    With u uniform and d the distance to the bound on that side, as a share of the range, the step is, in ranges,
    (2u + (1 - 2u) (1 - d)^(eta+1))^(1/(eta+1)) - 1 for u < 1/2, else 1 - (2(1-u) + (2u-1) (1 - d)^(eta+1))^(1/(eta+1)).
    With eta = 20 and few values nearly every step is below a half, and rounding would undo it: an entry drawn for
    mutation that would stay goes to the neighbour on its step's side (at a bound, to the only neighbour).
    """
    span = np.maximum(sizes - 1, 1)
    chosen = (generator.random(vectors.shape) < share) & (sizes > 1)
    u = generator.random(vectors.shape)
    power = MUTATION_ETA + 1
    down = (2 * u + (1 - 2 * u) * (1 - vectors / span) ** power).clip(0) ** (1 / power) - 1
    up = 1 - (2 * (1 - u) + (2 * u - 1) * (vectors / span) ** power).clip(0) ** (1 / power)
    moved = np.clip(np.rint(vectors + span * np.where(u < 0.5, down, up)), 0, span).astype(np.int64)
    side = np.where(u < 0.5, -1, 1)
    side = np.where((vectors + side < 0) | (vectors + side > span), -side, side)
    moved = np.where(moved == vectors, vectors + side, moved)
    return np.where(chosen, moved, vectors)
