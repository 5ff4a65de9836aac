"""Predictors against the published cases, by hand, and on what they cannot know."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.search.encoding import SearchSpace
from lissom.search.predictors import (
    ALPHAS,
    COSTS,
    OneHot,
    Predictor,
    kendall,
    live_entries,
    normalisation,
    transformer_features,
)

BERT = SearchSpace(
    {
        "num_layers": (1, (6, 7, 8, 9, 10, 11, 12)),
        "num_attention_heads": (12, (6, 8, 10, 12)),
        "intermediate_size": (12, (1024, 2048, 3072)),
        "q_bits": (74, (8, 32)),
    }
)
BLOCKS = {"num_attention_heads": 1, "intermediate_size": 1, "q_bits": 6}
SMALL = SearchSpace({"num_layers": (1, (1, 2)), "q_bits": (6, (4, 8, 32))})  # two linear layers a block, two after


@pytest.fixture(scope="module")
def cases():
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return json.loads((Path(folder) / "simq_nas" / "cases.json").read_text())


def test_the_published_normalisation(cases):
    assert len(cases["normalisation"]) >= 3
    for case in cases["normalisation"]:
        assert normalisation(case["labels"]) == pytest.approx(case["normalisation"], rel=1e-12)


def test_the_published_features(cases):
    found = [case for case in cases["encoding"] if "custom_features" in case]
    assert found
    for case in found:
        vectors = np.array([case["vector"]])
        assert transformer_features(BERT, vectors, BLOCKS, published=True)[0].tolist() == case["custom_features"]
        ours = transformer_features(BERT, vectors, BLOCKS)[0]
        depth = case["params"]["num_layers"][0]
        differ = np.flatnonzero(ours != case["custom_features"])
        # The published mask keeps one dead slot behind the last block, and drops the pooler's.
        slots = {25 + 6 * depth, 25 + 72}
        assert set(differ) <= slots
        assert ours[25 + 6 * depth] == 0
        assert ours[25 + 72] == case["params"]["q_bits"][72]


def test_the_published_one_hot(cases):
    """The other space is tested in test_encoding.py, which also holds this one to ``SearchSpace.one_hot``."""
    found = [case for case in cases["encoding"] if case["space"] == "bert_base_sst2_quantized"]
    assert found
    for case in found:
        features = OneHot.full(BERT.sizes)(np.array([case["vector"]]))[0]
        assert len(features) == case["onehot_generic_length"]
        assert np.flatnonzero(features).tolist() == case["onehot_generic_ones"]


def test_live_entries_by_hand():
    vectors = np.array([[0, 0, 1, 2, 0, 1, 2], [1, 0, 1, 2, 0, 1, 2]])
    t, f = True, False
    assert live_entries(SMALL, vectors, {"q_bits": 2}).tolist() == [[t, t, t, f, f, t, t], [t] * 7]
    assert live_entries(SMALL, vectors, {"q_bits": 2}, published=True).tolist() == [
        [t, t, t, t, f, f, t],
        [t] * 5 + [t, t],
    ]
    assert transformer_features(SMALL, vectors, {"q_bits": 2}).tolist() == [
        [1, 4, 8, 0, 0, 8, 32],
        [2, 4, 8, 32, 4, 8, 32],
    ]
    with pytest.raises(LissomError, match="too few for 4 in each of 2"):
        live_entries(SMALL, vectors, {"q_bits": 4})


def test_vectors_that_differ_in_dead_slots_only_have_the_same_features():
    generator = np.random.default_rng(0)
    one, other = (np.array([BERT.sample(generator) for _ in range(30)]) for _ in range(2))
    one[:5, 0] = [0, 1, 2, 5, 6]
    live = live_entries(BERT, one, BLOCKS)
    assert not live[0].all()
    assert live[4].all()
    mixed = np.where(live, one, other)
    assert (mixed != one).any()
    assert (transformer_features(BERT, mixed, BLOCKS) == transformer_features(BERT, one, BLOCKS)).all()
    # A live slot counts: change one of each, and the features change.
    for i, row in enumerate(one):
        changed = row.copy()
        place = generator.choice(np.flatnonzero(live[i, 1:])) + 1
        changed[place] = (changed[place] + 1) % BERT.sizes[place]
        assert (
            transformer_features(BERT, changed[None], BLOCKS) != transformer_features(BERT, row[None], BLOCKS)
        ).any()


def test_an_unseen_value_leaves_its_slot_empty():
    encoding = OneHot.seen(np.array([[4, 0], [8, 0], [8, 7]]))
    assert encoding(np.array([[4, 0], [8, 7], [32, 7], [4, 9]])).tolist() == [
        [1, 0, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 0, 1],
        [1, 0, 0, 0],
    ]
    assert OneHot.full(np.array([2, 3]))(np.array([[1, 2]])).tolist() == [[0, 1, 0, 0, 1]]


def test_normalisation_by_hand():
    assert [normalisation([y]) for y in (76.5, 340, 0.93, 10, 9.99)] == pytest.approx([1, 10, 0.01, 1, 0.1])
    assert normalisation([-340.0, 12.0]) == pytest.approx(10)
    assert normalisation([0.0, 0.0]) == 1
    assert normalisation([]) == 1


def additive(count, seed, slots=6):
    """Tables whose label is a sum over slots, and that label."""
    generator = np.random.default_rng(seed)
    table = generator.integers(0, 3, (count, slots))
    weights = np.random.default_rng(99).random((slots, 3))
    return table, 5 + weights[np.arange(slots), table].sum(1)


@pytest.mark.parametrize("coarse", [True, False])
def test_it_learns_a_sum(coarse):
    table, labels = additive(60, 0)
    unseen, truth = additive(100, 1)
    predictor = Predictor(coarse=coarse, encoding=OneHot.full(np.full(6, 3))).fit(table, labels)
    assert predictor.kind in ("ridge", "svr")
    assert predictor.setting in (ALPHAS if predictor.kind == "ridge" else COSTS) or coarse
    assert predictor.error < 0.02
    assert abs(predictor.predict(unseen) - truth).max() < 0.1 * (truth.max() - truth.min())
    tau = kendall(predictor.predict(unseen), truth)
    assert tau is not None
    assert tau > 0.9


def test_it_is_the_better_of_two_regressors_by_the_folds(monkeypatch):
    """The same folds, settings and score by hand, with scikit-learn's own regressors."""
    from sklearn.linear_model import Ridge
    from sklearn.svm import SVR

    from lissom.search import predictors

    monkeypatch.setattr(predictors, "COARSE_ALPHAS", (0.1, 10.0))
    monkeypatch.setattr(predictors, "COARSE_COSTS", (1.0, 100.0))
    table, labels = additive(23, 2)
    labels = labels * 100
    features = OneHot.full(np.full(6, 3))(table)
    y = labels / normalisation(labels)
    errors = {}
    for name, make, settings in (
        ("ridge", lambda s: Ridge(alpha=s), (0.1, 10.0)),
        ("svr", lambda s: SVR(kernel="rbf", gamma=1 / features.shape[1], epsilon=0.0, C=s), (1.0, 100.0)),
    ):
        for setting in settings:
            scores = []
            for fold in np.array_split(np.arange(23), 5):
                rest = np.setdiff1d(np.arange(23), fold)
                predicted = make(setting).fit(features[rest], y[rest]).predict(features[fold])
                scores.append(np.mean(abs(predicted - y[fold]) / y[fold]))
            errors[name, setting] = np.mean(scores)
    predictor = Predictor(coarse=True, encoding=OneHot.full(np.full(6, 3))).fit(table, labels)
    assert (predictor.kind, predictor.setting) == min(errors, key=errors.get)
    assert predictor.error == pytest.approx(min(errors.values()), rel=1e-6)
    assert predictor.scale == pytest.approx(normalisation(labels))


def test_the_scale_of_the_labels_does_not_matter():
    table, labels = additive(30, 3)
    small, large = (Predictor(coarse=True).fit(table, factor * labels) for factor in (1e-6, 1e6))
    assert small.kind == large.kind
    assert small.predict(table) * 1e12 == pytest.approx(large.predict(table), rel=1e-6)


def test_a_label_of_zero_does_not_decide():
    table, labels = additive(40, 4)
    labels = labels - labels.min()
    predictor = Predictor(coarse=True).fit(table, labels)
    assert predictor.error < 1  # by the plain rule it would be astronomic
    tau = kendall(predictor.predict(table), labels)
    assert tau is not None
    assert tau > 0.9


def test_few_rows():
    table, labels = additive(4, 5)
    for count in (2, 3, 4):
        predictor = Predictor(coarse=True).fit(table[:count], labels[:count])
        assert predictor.kind in ("ridge", "svr")
        assert np.isfinite(predictor.predict(table)).all()
    lone = Predictor().fit(table[:1], [340.0])
    assert (lone.kind, lone.predict(table).tolist()) == ("mean", pytest.approx([340.0] * 4))
    same = Predictor().fit(np.ones((6, 3)), [1.0, 2, 3, 4, 5, 6])
    assert (same.kind, same.predict(np.zeros((2, 3))).tolist()) == ("mean", pytest.approx([3.5, 3.5]))
    assert same.error == np.inf


def test_it_is_refitted_from_scratch():
    table, labels = additive(30, 6)
    other, its = additive(30, 7)
    predictor = Predictor(coarse=True).fit(other, 100 * its).fit(table, labels)
    fresh = Predictor(coarse=True).fit(table, labels)
    assert (predictor.predict(other) == fresh.predict(other)).all()


def test_kendall_by_hand():
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall([1], [1]) is None
    assert kendall([1, 1, 1], [1, 2, 3]) is None


def test_what_cannot_be_fitted_is_told():
    with pytest.raises(LissomError, match="not been fitted"):
        Predictor().predict(np.zeros((1, 2)))
    with pytest.raises(LissomError, match="a row and a label"):
        Predictor().fit(np.zeros((0, 2)), [])
    with pytest.raises(LissomError, match="a row and a label"):
        Predictor().fit(np.zeros((3, 2)), [1.0, 2.0])
    with pytest.raises(LissomError, match="not finite"):
        Predictor().fit(np.zeros((2, 2)), [1.0, float("nan")])
