"""SearchSpace against the published encoding, and against itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.search.encoding import SearchSpace

SPACES = {
    "bert_base_sst2_quantized": SearchSpace(
        {
            "num_layers": (1, (6, 7, 8, 9, 10, 11, 12)),
            "num_attention_heads": (12, (6, 8, 10, 12)),
            "intermediate_size": (12, (1024, 2048, 3072)),
            "q_bits": (74, (8, 32)),
        }
    ),
    "inc_quantization_ofa_resnet50": SearchSpace(
        {
            "d": (5, (0, 1, 2)),
            "e": (18, (0.2, 0.25, 0.35)),
            "w": (6, (0, 1, 2)),
            "q_bits": (61, (8, 32)),
            "q_weights_mode": (61, ("symmetric", "asymmetric")),
        }
    ),
}
SMALL = SearchSpace({"depth": (1, (2, 3, 4)), "q_bits": (3, (4, 8, 32))})


def test_the_published_cases():
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    cases = json.loads((Path(folder) / "simq_nas" / "cases.json").read_text())
    for name, figures in cases["spaces"].items():
        assert len(SPACES[name]) == figures["variables"]
        assert int((SPACES[name].sizes - 1).sum()) == figures["upper_bounds_sum"]
        assert SPACES[name].log10_size == pytest.approx(figures["log10_size"])
    assert len(cases["encoding"]) >= 2
    for case in cases["encoding"]:
        space = SPACES[case["space"]]
        assert {k: list(v) for k, v in space.decode(case["vector"]).items()} == case["params"]
        assert space.encode(case["params"]).tolist() == case["vector"]
        features = space.one_hot(case["vector"])
        assert len(features) == case["onehot_generic_length"]
        assert np.flatnonzero(features).tolist() == case["onehot_generic_ones"]


@pytest.mark.parametrize("space", [SMALL, *SPACES.values()])
def test_encode_undoes_decode(space):
    generator = np.random.default_rng(0)
    for _ in range(50):
        vector = space.sample(generator)
        assert (space.encode(space.decode(vector)) == vector).all()
        assert space.one_hot(vector).sum() == len(space)


def test_a_small_space_by_hand():
    assert len(SMALL) == 4
    assert SMALL.log10_size == pytest.approx(np.log10(81))
    assert SMALL.decode([1, 0, 2, 1.4]) == {"depth": (3,), "q_bits": (4, 32, 8)}
    assert SMALL.one_hot([1, 0, 2, 1]).tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0]


def test_samples_cover_every_value():
    generator = np.random.default_rng(1)
    drawn = np.array([SMALL.sample(generator) for _ in range(200)])
    assert drawn.min(0).tolist() == [0, 0, 0, 0]
    assert drawn.max(0).tolist() == [2, 2, 2, 2]


def test_what_does_not_belong_to_the_space_is_told():
    for vector, sentence in (([1, 0, 2], "4 entries"), ([3, 0, 0, 0], "range"), ([0, -1, 0, 0], "range"),
                             ([0, float("nan"), 0, 0], "range")):  # fmt: skip
        with pytest.raises(LissomError, match=sentence):
            SMALL.decode(vector)
    for params, sentence in (
        ({"depth": (2,)}, "differ in: q_bits"),
        ({"depth": (2,), "q_bits": (4, 8)}, "2 choices and the space 3"),
        ({"depth": (2,), "q_bits": (4, 8, 16)}, "16, which is none of 4, 8, 32"),
    ):
        with pytest.raises(LissomError, match=sentence):
            SMALL.encode(params)
    with pytest.raises(LissomError, match="twice"):
        SearchSpace({"a": (1, (4, 4))})
    with pytest.raises(LissomError, match="no entry"):
        SearchSpace({"a": (0, (4, 8))})
