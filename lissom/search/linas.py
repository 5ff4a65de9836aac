"""LINAS, and beside it NSGA-II on measurements and random search: what to measure next, from what was measured so far.

SimQ-NAS (arXiv 2312.13301) measures a population, fits one predictor an objective on everything measured, runs NSGA-II
on the predictors from random individuals, and measures the last population of that run; and so on. The result is what
nothing dominates among the measured: predictions are never reported.

All three searches work in batches, and a batch is a pure function of the seed and of the records before it:
``next_batch`` gives it to a caller that keeps the records elsewhere and may be killed at any point; ``linas``,
``measured_nsga2`` and ``random_search`` are loops over the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.search.nsga2 import Key, Space, breed, draw, key_of, non_dominated, nsga2, survive
from lissom.search.predictors import OneHot, Predictor, kendall

__all__ = ["SEARCHES", "Found", "Record", "linas", "measured_nsga2", "next_batch", "random_search"]

SEARCHES = ("linas", "nsga2", "random")
INNER_POPULATION = 50  # of NSGA-II on the predictors, the paper's; more where a batch is larger

Features = Callable[[np.ndarray], np.ndarray]
Measure = Callable[[Any], Mapping[str, float] | None]


@dataclass(frozen=True)
class Record:
    """A candidate that was tried: its vector, and what was measured of it by name (None: it could not be)."""

    vector: tuple[int, ...]
    measured: Mapping[str, float] | None


@dataclass(frozen=True)
class Found:
    """What a search measured: ``records`` in order, and ``front``, those that no other dominates.

    ``kendall``: for each batch that predictors chose, Kendall's tau between what they said of its members and what
    was measured then, one an objective (None: no order to compare).
    """

    records: tuple[Record, ...]
    front: tuple[Record, ...]
    kendall: tuple[tuple[float | None, ...], ...] = ()


@dataclass(frozen=True)
class _Settings:
    """How batches are made. See ``next_batch``."""

    space: Space
    objectives: Sequence[str]
    search: str
    population: int
    inner: int
    seed: int
    key: Key | None
    features: Features | None
    coarse: bool
    first: int

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise LissomError(f"there is no search {self.search!r}; known: {', '.join(SEARCHES)}")
        if not self.objectives:
            raise LissomError("a search needs at least one objective")
        if self.population < 1 or self.first < 1:
            raise LissomError(f"a batch has at least 1 member, not {min(self.population, self.first)}")


def next_batch(
    space: Space,
    records: Sequence[Record],
    objectives: Sequence[str],
    *,
    search: str = "linas",
    population: int = 50,
    inner: int = 10_000,
    seed: int = 0,
    key: Key | None = None,
    features: Features | None = None,
    coarse: bool = False,
    first: int | None = None,
) -> np.ndarray:
    """What is still to be measured of the batch under way: int64 (n, entries); empty where the space is exhausted.

    The first batch is the first ``first`` records (default: ``population`` random vectors), each further one has
    ``population`` members, all new. A batch depends on the seed and on the records before it alone, so that calls with
    more and more records of one batch name fewer and fewer of the same members.

    ``objectives`` are names of what was measured, to be small; ``-accuracy`` is to be large. ``search`` is "linas",
    "nsga2" (children of the measured) or "random". ``inner`` evaluations of the predictors make a LINAS batch: of the
    last population of that run (50, or more where a batch is larger), the members that were never tried, best first.
    Where these do not fill it, random ones do; so they do before anything was measured.

    Two vectors of the same ``key`` are the same candidate. ``features`` turns vectors (n, entries) into a table that
    the predictors encode over the values seen; without it they take the one-hot form of the vectors in full.
    ``coarse`` shortens the predictors' grid. A record that could not be measured counts as tried, and not otherwise.

    Raises LissomError for an unknown search, and for a record that lacks an objective or has one that is not finite.
    """
    settings = _Settings(
        space,
        objectives,
        search,
        population,
        inner,
        seed,
        key,
        features,
        coarse,
        population if first is None else first,
    )
    return _remaining(settings, records)[0]


def linas(
    space: Space,
    measure: Measure,
    objectives: Sequence[str],
    budget: int,
    population: int = 50,
    inner: int = 10_000,
    seed: int = 0,
    key: Key | None = None,
    *,
    features: Features | None = None,
    coarse: bool = False,
    start: np.ndarray | None = None,
    records: Sequence[Record] = (),
) -> Found:
    """Search with predictors until ``budget`` candidates were tried, or the space is exhausted.

    ``measure(space.decode(vector))`` gives the candidate's figures by name, or None where it cannot be measured.
    ``start`` (n, entries) is the first batch in place of a random one; ``records`` are those of an interrupted search
    with the same arguments, which goes on as it would have. The rest is as in ``next_batch``.
    """
    settings = _Settings(
        space, objectives, "linas", population, inner, seed, key, features, coarse, _first(start, population)
    )
    return _loop(settings, measure, budget, start, records)


def measured_nsga2(
    space: Space,
    measure: Measure,
    objectives: Sequence[str],
    budget: int,
    population: int = 50,
    seed: int = 0,
    key: Key | None = None,
    *,
    start: np.ndarray | None = None,
    records: Sequence[Record] = (),
) -> Found:
    """NSGA-II whose every evaluation is a measurement. Arguments and result as of ``linas``."""
    settings = _Settings(space, objectives, "nsga2", population, 0, seed, key, None, False, _first(start, population))
    return _loop(settings, measure, budget, start, records)


def random_search(
    space: Space,
    measure: Measure,
    objectives: Sequence[str],
    budget: int,
    population: int = 50,
    seed: int = 0,
    key: Key | None = None,
    *,
    start: np.ndarray | None = None,
    records: Sequence[Record] = (),
) -> Found:
    """Random candidates, none twice. Arguments and result as of ``linas``; with the same seed and ``population`` all
    three begin with the same candidates."""
    settings = _Settings(space, objectives, "random", population, 0, seed, key, None, False, _first(start, population))
    return _loop(settings, measure, budget, start, records)


def _first(start: np.ndarray | None, population: int) -> int:
    return population if start is None or not len(start) else len(start)


def _loop(
    settings: _Settings, measure: Measure, budget: int, start: np.ndarray | None, before: Sequence[Record]
) -> Found:
    records, taus = list(before), []
    for vector in () if start is None else np.asarray(start, np.int64)[len(records) : budget]:
        records.append(_measured(settings, measure, vector))
    while len(records) < budget:
        batch, predicted = _remaining(settings, records)
        batch = batch[: budget - len(records)]
        if not len(batch):
            break
        fresh = [_measured(settings, measure, vector) for vector in batch]
        records += fresh
        known = [i for i, record in enumerate(fresh) if record.measured is not None]
        if predicted is not None and known:
            measured = _table([fresh[i] for i in known], settings.objectives)
            taus.append(tuple(kendall(p, m) for p, m in zip(predicted[known].T, measured.T, strict=True)))
    measured_ones = [record for record in records if record.measured is not None]
    front = non_dominated(_table(measured_ones, settings.objectives))
    return Found(tuple(records), tuple(measured_ones[i] for i in front), tuple(taus))


def _measured(settings: _Settings, measure: Measure, vector: np.ndarray) -> Record:
    return Record(tuple(vector.tolist()), measure(settings.space.decode(vector)))


def _remaining(settings: _Settings, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray | None]:
    """The members of the batch under way that ``records`` lack, and what predictors say of them (None: none spoke)."""
    position = _start(settings, len(records))
    batch, predicted = _batch(settings, records[:position])
    done = {key_of(np.array(record.vector), settings.key) for record in records[position:]}
    left = [i for i, vector in enumerate(batch) if key_of(vector, settings.key) not in done]
    return batch[left], None if predicted is None else predicted[left]


def _start(settings: _Settings, count: int) -> int:
    """How many of ``count`` records stand before the batch under way."""
    beyond = count - settings.first
    return 0 if beyond < 0 else settings.first + beyond // settings.population * settings.population


def _batch(settings: _Settings, before: Sequence[Record]) -> tuple[np.ndarray, np.ndarray | None]:
    """The batch after the records ``before``: (n, entries), and what predictors say of it, (n, objectives)."""
    # The bytes of a text, because a seed may be negative and NumPy takes none that is.
    generator = np.random.default_rng([*f"{settings.seed}:{len(before)}".encode()])
    tried: set[Hashable] = {key_of(np.array(record.vector), settings.key) for record in before}
    count = settings.population if before else settings.first
    measured = [record for record in before if record.measured is not None]
    if not measured or settings.search == "random":
        return draw(settings.space, count, generator, tried, settings.key), None
    if settings.search == "nsga2":
        return _children(settings, before, generator, tried), None
    return _predicted(settings, measured, generator, tried)


def _predicted(
    settings: _Settings, measured: Sequence[Record], generator: np.random.Generator, tried: set[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """The next batch of LINAS and what its predictors say of it."""
    space, key = settings.space, settings.key
    features = settings.features or (lambda vectors: vectors)
    encoding = None if settings.features is not None else OneHot.full(space.sizes)
    table = features(np.array([record.vector for record in measured], np.int64))
    labels = _table(measured, settings.objectives)
    predictors = [Predictor(coarse=settings.coarse, encoding=encoding).fit(table, column) for column in labels.T]

    def evaluate(vectors: np.ndarray) -> np.ndarray:
        rows = features(vectors)
        return np.stack([predictor.predict(rows) for predictor in predictors], 1)

    population = max(settings.population, INNER_POPULATION)
    vectors, objectives = nsga2(space, evaluate, population, settings.inner, generator, key=key)
    untried = [i for i, vector in enumerate(vectors) if key_of(vector, key) not in tried]
    batch = vectors[untried][survive(objectives[untried], settings.population)]
    tried.update(key_of(vector, key) for vector in batch)
    batch = np.concatenate([batch, draw(space, settings.population - len(batch), generator, tried, key)])
    return batch, evaluate(batch) if len(batch) else np.empty((0, len(settings.objectives)))


def _children(
    settings: _Settings, before: Sequence[Record], generator: np.random.Generator, tried: set[Hashable]
) -> np.ndarray:
    """The next generation of NSGA-II: its population is found again by letting the best survive, batch by batch."""
    alive: list[Record] = []
    position = 0
    while position < len(before):
        end = position + (settings.population if position else settings.first)
        alive += [record for record in before[position:end] if record.measured is not None]
        if alive:
            kept = survive(_table(alive, settings.objectives), settings.population)
            alive = [alive[i] for i in kept]
        position = end
    vectors = np.array([record.vector for record in alive], np.int64)
    objectives = _table(alive, settings.objectives)
    return breed(settings.space, vectors, objectives, settings.population, generator, tried, settings.key)


def _table(records: Sequence[Record], objectives: Sequence[str]) -> np.ndarray:
    """Measured records -> float64 (n, objectives), all to be small."""
    table = np.empty((len(records), len(objectives)))
    for i, record in enumerate(records):
        assert record.measured is not None
        for j, name in enumerate(objectives):
            plain = name.removeprefix("-")
            if plain not in record.measured:
                raise LissomError(
                    f"the measurement gave no {plain!r}; it gave {', '.join(record.measured) or 'nothing'}"
                )
            table[i, j] = record.measured[plain] * (-1 if name.startswith("-") else 1)
    if not np.isfinite(table).all():
        raise LissomError("a measured objective is not finite; measure should return None where it could not measure")
    return table
