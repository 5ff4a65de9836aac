"""NSGA-II against brute force: the sort, crowding by hand, hypervolume by counting, and a front that is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.search.encoding import SearchSpace
from lissom.search.nsga2 import (
    _crossed,
    _mutated,
    breed,
    crowding,
    hypervolume,
    non_dominated,
    nsga2,
    ranks,
    survive,
)


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def peeled(points):
    """Ranks by the definition: take off the front, and again."""
    rank, left, level = [-1] * len(points), set(range(len(points))), 0
    while left:
        front = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        for i in front:
            rank[i] = level
        left, level = left - front, level + 1
    return rank


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_sort_is_the_definition(objectives):
    generator = np.random.default_rng(objectives)
    for _ in range(20):
        points = generator.integers(0, 6, (40, objectives)).astype(float)  # few values: ties and equal points
        expected = peeled(points.tolist())
        assert ranks(points).tolist() == expected
        assert non_dominated(points).tolist() == [i for i, rank in enumerate(expected) if rank == 0]


def test_crowding_by_hand():
    points = np.array([[0.0, 8.0], [4.0, 1.0], [1.0, 4.0], [8.0, 0.0]])
    assert crowding(points).tolist() == [np.inf, (8 - 1) / 8 + (4 - 0) / 8, (4 - 0) / 8 + (8 - 1) / 8, np.inf]
    assert crowding(np.ones((3, 2))).tolist()[1] == 0  # no span: nothing is added, nothing divided by 0
    assert crowding(np.array([[2.0, 3.0]])).tolist() == [np.inf]


def test_survivors_are_whole_fronts_and_then_the_least_crowded():
    points = np.array([[0, 9], [9, 0], [1, 8], [2, 7], [8, 1], [9, 9], [10, 10.0]])
    assert set(survive(points, 5)) == {0, 1, 2, 3, 4}
    # Of the five on one line the ends stay, then the two beside the gap.
    assert set(survive(points, 4)) == {0, 1, 3, 4}
    assert survive(points, 7)[-2:].tolist() == [5, 6]
    assert len(survive(np.empty((0, 2)), 3)) == 0


def covered(points, reference):
    """Hypervolume of integer points by counting unit cells."""
    return sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points)
        for cell in itertools.product(*(range(r) for r in reference))
    )


@pytest.mark.parametrize("reference", [(7,), (9, 6), (5, 6, 7), (4, 5, 4, 5)])
def test_hypervolume_counts_the_cells(reference):
    generator = np.random.default_rng(len(reference))
    for count in (1, 2, 5, 12):
        points = np.stack([generator.integers(0, r + 2, count) for r in reference], 1)  # some lie outside
        assert hypervolume(points, reference) == pytest.approx(covered(points.tolist(), reference))


def test_hypervolume_by_hand():
    assert hypervolume([], (1, 10)) == 0
    assert hypervolume([(0.5, 5)], (1, 10)) == pytest.approx(2.5)
    assert hypervolume([(0.5, 5), (0.2, 8), (0.6, 6), (0.5, 5)], (1, 10)) == pytest.approx(0.8 * 2 + 0.5 * 3)
    assert hypervolume([(0.1, 11), (1.5, 1)], (1, 10)) == 0
    random = np.random.default_rng(0).random((40, 3))
    volumes = [hypervolume(random[:n], (1, 1, 1)) for n in range(41)]
    assert all(a <= b for a, b in itertools.pairwise(volumes))
    assert volumes[-1] > volumes[10]


def zdt1(vectors):
    """ZDT1 (Zitzler, Deb and Thiele 2000) on a grid: on the front, f2 = 1 - sqrt(f1), all entries but one are 0."""
    x = vectors[:, 0] / 19
    g = 1 + 9 * vectors[:, 1:].mean(1) / 2
    return np.stack([x, g * (1 - np.sqrt(x / g))], 1)


ZDT1 = SearchSpace({"x": (1, tuple(range(20))), "rest": (30, (0, 1, 2))})


def test_a_known_front_is_found_whole():
    vectors, objectives = nsga2(ZDT1, zdt1, 50, 6000, 0)
    assert vectors.dtype == np.int64
    assert (objectives == zdt1(vectors)).all()
    front = vectors[non_dominated(objectives)]
    assert (front[:, 1:] == 0).all()
    assert sorted(front[:, 0]) == list(range(20))


def test_it_counts_evaluations_and_repeats_none():
    asked = []

    def evaluate(vectors):
        asked.extend(map(tuple, vectors.tolist()))
        return zdt1(vectors)

    nsga2(ZDT1, evaluate, 20, 333, 1)
    assert len(asked) == 333
    assert len(set(asked)) == 333


def test_the_seed_decides():
    first, again, other = (nsga2(ZDT1, zdt1, 20, 200, seed)[0].tolist() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_small_space_is_seen_whole_and_the_search_ends():
    space = SearchSpace({"a": (3, (0, 1, 2))})
    asked = []

    def evaluate(vectors):
        asked.extend(map(tuple, vectors.tolist()))
        return vectors[:, :2].astype(float)

    vectors, objectives = nsga2(space, evaluate, 10, 1000, 0)
    assert sorted(asked) == sorted(itertools.product(range(3), repeat=3))
    assert len(vectors) == 10
    assert objectives[:3].tolist() == [[0, 0]] * 3


def test_one_candidate_a_key():
    asked = []

    def evaluate(vectors):
        asked.extend(vectors[:, 0].tolist())
        return zdt1(vectors)

    vectors, _ = nsga2(ZDT1, evaluate, 10, 200, 0, key=lambda vector: int(vector[0]))
    assert sorted(asked) == list(range(20))  # 20 keys, and no vector more
    assert len(vectors) == 10


def test_the_given_ones_come_first():
    asked = []

    def evaluate(vectors):
        asked.append(vectors)
        return zdt1(vectors)

    start = np.zeros((3, 31), np.int64)
    start[1:, 0] = 7  # the last two are the same
    nsga2(ZDT1, evaluate, 5, 5, 0, start=start)
    assert asked[0][:2, 0].tolist() == [0, 7]
    assert (asked[0][:2, 1:] == 0).all()
    assert (asked[0][2:, 1:] > 0).any()
    assert len(asked[0]) == 5


def test_children_stay_in_range_and_between_or_near_their_parents():
    generator = np.random.default_rng(0)
    sizes = np.array([2, 3, 30])
    one, other = generator.integers(0, sizes, (2, 4000, 3))
    children = _crossed(one, other, sizes, generator)
    assert children.shape == (8000, 3)
    assert (children >= 0).all()
    assert (children < sizes).all()
    low, high = np.minimum(one, other)[:, 2], np.maximum(one, other)[:, 2]
    first, second = children[:4000, 2], children[4000:, 2]
    # With eta = 15 a child lies close to a parent, and the two lie about the parents' mean.
    near = np.minimum(abs(first - low), abs(first - high))
    assert near.mean() < 0.1 * (high - low).mean()
    assert abs((first + second) - (low + high)).max() <= (high - low).max()
    # Entries are exchanged one by one: some children take entry 0 of one parent and entry 1 of the other.
    apart = (one[:, 0] != other[:, 0]) & (one[:, 1] != other[:, 1])
    mixed = (children[:4000, 0] == one[:, 0]) & (children[:4000, 1] == other[:, 1]) & apart
    assert 0.1 < mixed.sum() / apart.sum() < 0.5
    same = np.full((50, 3), 1)
    assert (_crossed(same, same, sizes, generator) == 1).all()


def test_crossover_spreads_as_published():
    """Far from the bounds half of the crossed children lie outside their parents, and a crossing has 0.9 x 0.5 odds."""
    ones = np.ones((20000, 1), np.int64)
    children = _crossed(40000 * ones, 60000 * ones, np.array([100001]), np.random.default_rng(0))[:, 0]
    crossed = children[(children != 40000) & (children != 60000)]
    assert len(crossed) / len(children) == pytest.approx(0.45, abs=0.02)
    assert ((crossed < 40000) | (crossed > 60000)).mean() == pytest.approx(0.5, abs=0.02)
    # u = 1/4 gives beta = (1/2)^(1/16): a quarter of the children is farther inside than that.
    inside = np.minimum(abs(crossed - 40000), abs(crossed - 60000)) > 10000 * (1 - 0.5 ** (1 / 16))
    assert (inside & (crossed > 40000) & (crossed < 60000)).mean() == pytest.approx(0.25, abs=0.02)


def test_mutation_moves_its_share_of_entries_and_keeps_the_range():
    generator = np.random.default_rng(0)
    sizes = np.array([1, 2, 3, 40])
    vectors = generator.integers(0, sizes, (5000, 4))
    moved = _mutated(vectors, sizes, 0.2, generator)
    assert (moved >= 0).all()
    assert (moved < sizes).all()
    share = (moved != vectors).mean(0)
    assert share[0] == 0  # one value: nowhere to go
    assert share[1:] == pytest.approx(0.2, abs=0.02)  # a step that rounding would undo is made all the same
    steps = abs(moved - vectors)[moved[:, 3] != vectors[:, 3], 3]
    assert 1 < steps.mean() < 5  # eta = 20: mostly a small share of the 39
    assert (_mutated(vectors, sizes, 0.0, generator) == vectors).all()
    # Far from the bounds u = 1/4 gives a step of 1 - (1/2)^(1/21) of the range: the median.
    steps = _mutated(np.full((5000, 1), 50000), np.array([100001]), 1.0, generator) - 50000
    assert np.median(abs(steps)) == pytest.approx(100000 * (1 - 0.5 ** (1 / 21)), rel=0.06)
    assert (steps > 0).mean() == pytest.approx(0.5, abs=0.03)


def test_a_space_may_draw_by_itself():
    class Odd:
        sizes = np.array([6, 6, 6])

        def decode(self, vector):
            return vector

        def draw(self, count, generator):
            return 1 + 2 * generator.integers(0, 3, (count, 3))

    vectors, _ = nsga2(Odd(), lambda vectors: vectors.sum(1, keepdims=True), 8, 8, 0)
    assert len(vectors) == 8
    assert (vectors % 2 == 1).all()


def test_breeding_knows_what_was_seen():
    space = SearchSpace({"a": (2, (0, 1))})
    vectors = np.array([[0, 0], [1, 1]])
    seen = {(0, 0), (1, 1), (0, 1)}
    children = breed(space, vectors, vectors.astype(float), 5, np.random.default_rng(0), seen)
    assert children.tolist() == [[1, 0]]
    assert seen == set(itertools.product((0, 1), repeat=2))


def test_better_parents_have_more_children():
    space = SearchSpace({"a": (1, tuple(range(10))), "b": (20, (0, 1))})
    generator = np.random.default_rng(0)
    vectors = generator.integers(0, 2, (20, 21))
    vectors[:, 0] = np.repeat([0, 9], 10)
    children = breed(space, vectors, vectors[:, :1].astype(float), 200, generator, set(), mutation=0.0)
    # The worse half wins only against itself, a quarter of the tournaments; none wins where all are better.
    assert 0.15 < (children[:, 0] > 4).mean() < 0.35


@pytest.mark.parametrize(
    ("population", "evaluations", "evaluate", "says"),
    [
        (1, 10, zdt1, "at least 2"),
        (10, 9, zdt1, "as many evaluations"),
        (4, 8, lambda v: np.full((len(v), 2), np.nan), "not finite"),
        (4, 8, lambda v: np.zeros(len(v)), r"shape \(4,\)"),
        (4, 8, lambda v: np.zeros((3, 2)), r"shape \(3, 2\)"),
    ],
)
def test_what_cannot_be_searched_is_told(population, evaluations, evaluate, says):
    with pytest.raises(LissomError, match=says):
        nsga2(ZDT1, evaluate, population, evaluations, 0)


def test_what_cannot_be_compared_is_told():
    with pytest.raises(LissomError, match="not a number"):
        non_dominated([[1.0, float("nan")]])
    with pytest.raises(LissomError, match="do not match"):
        hypervolume([(1.0, 2.0, 3.0)], (1, 1))
    assert non_dominated([]).tolist() == []
    assert non_dominated([[float("inf"), 1.0], [0.0, 2.0]]).tolist() == [0, 1]
