"""Sub-networks as vectors: there and back, dead choices, the published search, the library's own on this space."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.errors import LissomError
from lissom.layers.elastic import draw_setting, largest, smallest
from lissom.models.ofa import OFAMobileNetV3
from lissom.search.linas import linas
from lissom.search.subnets import SubnetSpace, evolve


def a_space() -> SubnetSpace:
    with torch.device("meta"):
        return SubnetSpace(OFAMobileNetV3(num_classes=3, widths=(8, 16, 24), neck=16, features=24))


def test_there_and_back() -> None:
    space = a_space()
    assert space.sizes.tolist() == [len(d.values) for d in space.network.dimensions()]
    for _ in range(10):
        setting = draw_setting(space.network)
        assert space.decode(space.encode(setting)) == setting
    assert space.encode(smallest(space.network)).max() == 0
    assert space.encode({}).tolist() == (space.sizes - 1).tolist()
    with pytest.raises(LissomError, match="entries"):
        space.decode(space.sizes)
    with pytest.raises(LissomError, match="entries"):
        space.decode(np.zeros(3, np.int64))
    with pytest.raises(LissomError, match="no dimension"):
        space.encode({"width": 1})


def test_what_a_depth_leaves_out_counts_for_nothing() -> None:
    space = a_space()
    one = {**largest(space.network), "stages.0.depth": 2}
    other = {**one, "blocks.4.kernel": 3, "blocks.3.expand": 3}
    third = {**one, "blocks.2.kernel": 3}
    a, b, c = (space.encode(setting) for setting in (one, other, third))
    assert space.key(a) == space.key(b) != space.key(c)
    rows = space.features(np.stack([a, b, c]))
    assert rows.shape == (3, space.sizes.sum())
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    assert rows[0].sum() == len(space.sizes) - 4  # two blocks of two choices


def test_evolution_finds_the_best_that_fits() -> None:
    space = a_space()
    live = [i for i, d in enumerate(space.dimensions) if d.kind == "depth"]
    asked: list[tuple[int, ...]] = []

    def score(vector: np.ndarray) -> float:
        asked.append(space.key(vector))
        return float(vector[live].sum())

    def fits(setting: dict) -> bool:
        return setting["stages.1.depth"] < 4

    found, value = evolve(space, score, fits, population=20, generations=15)
    assert value == 2 + 1 + 2
    assert [found[f"stages.{i}.depth"] for i in range(3)] == [4, 3, 4]
    assert len(asked) == len(set(asked))  # nothing twice
    again, _ = evolve(space, score, fits, population=20, generations=15)
    assert again == found


def test_a_limit_that_nothing_keeps() -> None:
    with pytest.raises(LissomError, match="limit"):
        evolve(a_space(), lambda vector: 0.0, lambda setting: False, population=4, generations=1)
    for wrong in ({"population": 2}, {"generations": 0}, {"parents": 0}, {"mutation": 2}, {"mutated": -1}):
        with pytest.raises(LissomError, match=next(iter(wrong))):
            evolve(a_space(), lambda vector: 0.0, lambda setting: True, **wrong)


def test_predictors_search_it() -> None:
    space = a_space()

    def measure(setting: dict) -> dict[str, float]:
        size = sum(setting[f"stages.{i}.depth"] for i in range(3))
        return {"latency": size + 0.01 * setting["blocks.1.kernel"], "error": 20.0 - size}

    found = linas(
        space, measure, ("latency", "error"), 24, population=8, inner=200, key=space.key, features=space.features,
        coarse=True,
    )  # fmt: skip
    assert len(found.records) == 24
    assert len({space.key(np.array(record.vector)) for record in found.records}) == 24
    assert found.front
