"""LINAS, measured NSGA-II and random search: what is measured, what depends on what, and which finds more."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.search import predictors
from lissom.search.encoding import SearchSpace
from lissom.search.linas import Record, linas, measured_nsga2, next_batch, random_search
from lissom.search.nsga2 import hypervolume

SPACE = SearchSpace({"bits": (24, (4, 8, 32))})
WEIGHTS = np.random.default_rng(5).random(24) ** 3  # a few layers matter, most hardly do
OBJECTIVES = ("-quality", "bytes")
LINAS = functools.partial(linas, inner=600, coarse=True)
SEARCHES = [LINAS, measured_nsga2, random_search]


@pytest.fixture(autouse=True)
def _few_settings(monkeypatch):
    """What is tested here is the loop, not the grid."""
    monkeypatch.setattr(predictors, "COARSE_COSTS", (10.0,))


def measure(config):
    """Few bits in a layer that matters cost quality; the known front spares those first."""
    lost = np.array([{4: 1.0, 8: 0.2, 32: 0.0}[bits] for bits in config["bits"]])
    return {"quality": 90 - 40 * float((WEIGHTS * lost).sum() / WEIGHTS.sum()), "bytes": float(sum(config["bits"]))}


def volume(records):
    points = [(100 - r.measured["quality"], r.measured["bytes"]) for r in records if r.measured]
    return hypervolume(points, (60, 32 * 24))


def dominates(a, b):
    (x, y), (u, v) = ((-r.measured["quality"], r.measured["bytes"]) for r in (a, b))
    return x <= u and y <= v and (x < u or y < v)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_front_is_measured_and_nothing_is_measured_twice(search):
    asked = []

    def counted(config):
        asked.append(config["bits"])
        return measure(config)

    found = search(SPACE, counted, OBJECTIVES, 33, population=8, seed=1)
    assert len(found.records) == len(asked) == len(set(asked)) == 33
    for record, bits in zip(found.records, asked, strict=True):
        assert SPACE.decode(record.vector)["bits"] == bits
        assert record.measured == measure({"bits": bits})
    best = [r for r in found.records if not any(dominates(other, r) for other in found.records)]
    assert list(found.front) == best
    volumes = [volume(found.records[:n]) for n in range(0, 34, 8)]
    assert all(a <= b for a, b in itertools.pairwise(volumes))


def test_all_three_begin_with_the_same_candidates():
    first = [
        [r.vector for r in search(SPACE, measure, OBJECTIVES, 8, population=8, seed=2).records] for search in SEARCHES
    ]
    assert first[0] == first[1] == first[2]


def test_predictors_find_more_than_the_others_and_children_more_than_chance():
    """At equal measured evaluations, seed by seed, on a sum that a ridge regression can learn."""
    for seed in range(2):
        with_predictors, *others = (
            volume(search(SPACE, measure, OBJECTIVES, 60, population=12, seed=seed).records) for search in SEARCHES
        )
        assert with_predictors > 1.08 * max(others)
        children, chance = (
            volume(search(SPACE, measure, OBJECTIVES, 300, population=12, seed=seed).records) for search in SEARCHES[1:]
        )
        assert children > 1.03 * chance


def test_the_predictions_of_a_batch_are_compared_with_its_measurements():
    found = LINAS(SPACE, measure, OBJECTIVES, 30, population=10, seed=0)
    assert len(found.kendall) == 2  # the first batch was random
    assert all(len(taus) == 2 for taus in found.kendall)
    assert found.kendall[-1][1] is not None
    assert found.kendall[-1][1] > 0.5  # bytes are a sum over the entries
    assert random_search(SPACE, measure, OBJECTIVES, 20, population=10).kendall == ()


@pytest.mark.parametrize("name", ["linas", "nsga2", "random"])
def test_a_batch_is_a_function_of_the_seed_and_of_the_records_before_it(name):
    search = dict(zip(("linas", "nsga2", "random"), SEARCHES, strict=True))[name]
    records = search(SPACE, measure, OBJECTIVES, 24, population=8, seed=3).records
    batch = functools.partial(
        next_batch, SPACE, objectives=OBJECTIVES, search=name, population=8, inner=600, coarse=True, seed=3
    )
    for count in (0, 7, 8, 11, 23):
        end = 8 * (count // 8) + 8
        assert batch(records[:count]).tolist() == [list(r.vector) for r in records[count:end]]
    assert batch(records[:16]).tolist() != batch(records[:16], seed=4).tolist()
    # What was measured within a batch does not change the rest of it; what was measured before it does.
    other = [Record(r.vector, {"quality": 50.0 - i, "bytes": 7.0 * i}) for i, r in enumerate(records)]
    assert batch([*records[:16], *other[16:18]]).tolist() == batch(records[:18]).tolist()
    if name != "random":
        assert batch([*other[:16], *records[16:18]]).tolist() != batch(records[:18]).tolist()


@pytest.mark.parametrize("search", SEARCHES)
def test_an_interrupted_search_goes_on_as_it_would_have(search):
    whole = search(SPACE, measure, OBJECTIVES, 25, population=8, seed=0)
    for count in (3, 8, 19):
        again = search(SPACE, measure, OBJECTIVES, 25, population=8, seed=0, records=whole.records[:count])
        assert again.records == whole.records
        assert again.front == whole.front
    assert search(SPACE, measure, OBJECTIVES, 25, population=8, seed=0, records=whole.records).records == whole.records


@pytest.mark.parametrize("search", SEARCHES)
def test_a_given_first_batch(search):
    start = np.stack([np.full(24, value) for value in (0, 1, 2)])
    found = search(SPACE, measure, OBJECTIVES, 12, population=4, start=start)
    assert [r.vector for r in found.records[:3]] == [tuple(row) for row in start.tolist()]
    assert len({r.vector for r in found.records}) == 12
    again = search(SPACE, measure, OBJECTIVES, 12, population=4, start=start, records=found.records[:2])
    assert again.records == found.records


@pytest.mark.parametrize("search", SEARCHES)
def test_candidates_of_one_key_are_measured_once_and_a_small_space_ends(search):
    asked = []

    def counted(config):
        asked.append(config["bits"][:2])
        return {"quality": float(sum(config["bits"][:2])), "bytes": float(config["bits"][0])}

    found = search(SPACE, counted, OBJECTIVES, 50, population=4, key=lambda vector: tuple(vector[:2].tolist()))
    assert sorted(asked) == sorted(itertools.product((4, 8, 32), repeat=2))
    assert len(found.records) == 9


@pytest.mark.parametrize("search", SEARCHES)
def test_what_cannot_be_measured_counts_as_tried(search):
    def failing(config):
        return None if config["bits"][0] == 4 else measure(config)

    found = search(SPACE, failing, OBJECTIVES, 30, population=6, seed=0)
    assert len(found.records) == len({r.vector for r in found.records}) == 30
    failed = [r for r in found.records if r.measured is None]
    assert 0 < len(failed) < 30
    assert all(r.measured is not None for r in found.front)
    nothing = search(SPACE, lambda config: None, OBJECTIVES, 20, population=6)
    assert len(nothing.records) == 20
    assert nothing.front == ()


def test_features_over_seen_values():
    """A table in place of the vectors: what it leaves out, the predictors cannot learn."""
    seen = []

    def features(vectors):
        seen.append(vectors)
        return vectors[:, :3]

    found = LINAS(SPACE, measure, OBJECTIVES, 20, population=10, features=features)
    assert len(found.records) == 20
    assert len(seen[0]) == 10
    assert max(map(len, seen)) == 50  # the inner run's population is the paper's


def test_three_objectives_and_one():
    def three(config):
        return {**measure(config), "spread": float(np.std(config["bits"]))}

    found = LINAS(SPACE, three, (*OBJECTIVES, "spread"), 20, population=10)
    assert len(found.kendall[0]) == 3
    single = LINAS(SPACE, measure, ("bytes",), 40, population=10)
    assert len({r.measured["bytes"] for r in single.front}) == 1
    assert single.front[0].measured["bytes"] < min(r.measured["bytes"] for r in single.records[:10])


def test_what_cannot_be_searched_is_told():
    for arguments, says in (
        ({"search": "annealing"}, "no search 'annealing'"),
        ({"objectives": ()}, "at least one objective"),
        ({"population": 0}, "at least 1 member"),
        ({"first": 0}, "at least 1 member"),
    ):
        with pytest.raises(LissomError, match=says):
            next_batch(SPACE, [], **{"objectives": OBJECTIVES, **arguments})
    with pytest.raises(LissomError, match="gave no 'latency'; it gave quality, bytes"):
        random_search(SPACE, measure, ("latency",), 3, population=3)
    with pytest.raises(LissomError, match="not finite"):
        LINAS(SPACE, lambda config: {"bytes": float("nan")}, ("bytes",), 8, population=3)
    with pytest.raises(LissomError, match="as many evaluations"):
        linas(SPACE, measure, OBJECTIVES, 20, population=10, inner=20, coarse=True)
