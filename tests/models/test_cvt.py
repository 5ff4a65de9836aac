"""CvT: published sizes, both layouts of checkpoints, one narrow network through everything, the published figures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.models.cvt import checkpoint_filter_fn
from lissom.models.factory import create_model
from tests.models.families import (
    check_classifier,
    check_export,
    check_features,
    check_fuse,
    check_network,
    check_trains,
    count,
    fixture,
    images,
    needs_parity,
    settle,
    small,
)  # fmt: skip
from tests.parity_adapters import published

SIZES: dict[str, Any] = {"dims": (8, 12, 16), "heads": (1, 3, 2), "depths": (1, 1, 2), "num_classes": 5}
PARAMS = {
    "cvt_13_224": 19_997_480, "cvt_13_384": 19_997_480, "cvt_21_224": 31_622_696, "cvt_21_384": 31_622_696,
    "cvt_w24_384": 277_196_392,
}  # fmt: skip
NAME = "cvt_13_224"


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    assert count(name) == PARAMS[name]


def test_the_published_size_without_convolutions() -> None:
    assert count(NAME, method="avg") == count(NAME, method="linear") == 19_855_976


@pytest.mark.parametrize("more", [{}, {"method": "linear", "cls_token": False, "drop_path_rate": 0.2}])
def test_a_step_reaches_every_parameter(more: dict[str, Any]) -> None:
    model = small(NAME, **SIZES, in_chans=1, **more)
    x = images(2, 1, 48, 70)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)


def test_features() -> None:
    check_features(NAME, images(2, 3, 32, 64), **SIZES)
    model = small(NAME, features_only=True, out_indices=(0, 1), **SIZES)
    assert [m.shape[1:] for m in model(images(1, 3, 50, 33))] == [(8, 12, 8), (12, 6, 4)]
    last, maps = small(NAME, **SIZES).forward_intermediates(images(1, 3, 32, 32), indices=[0], stop_early=True)
    assert last.shape == (1, 64, 8)
    assert len(maps) == 1


def test_classifiers() -> None:
    x = images(2, 3, 32, 48)
    check_classifier(small(NAME, **SIZES), x)
    check_classifier(small(NAME, **SIZES, cls_token=False), x)
    model = small(NAME, **SIZES).eval()
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 1 + 2 * 3, 16)
        assert torch.equal(model(x), model.head(tokens[:, 0]))
        assert model(x[:1]).shape == (1, 5)
        model.reset_classifier(4, "avg")
        assert torch.equal(model(x), model.head(tokens[:, 1:].mean(1)))


@pytest.mark.parametrize(
    "wrong", [{"act": "relu"}, {"global_pool": "max"}, {"global_pool": "token", "cls_token": False}]
)
def test_arguments_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(LissomError, match="known"):
        create_model(NAME, **SIZES, **wrong)


def test_paths_are_dropped_in_the_last_stage_alone() -> None:
    model = small(NAME, **SIZES, drop_path_rate=0.1)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for i in range(3) for b in getattr(model, f"stage{i}").blocks]
    assert rates == pytest.approx([0, 0, 0, 0.1])


def test_the_deploy_form_answers_the_same() -> None:
    fused = check_fuse(small(NAME, **SIZES), images(4, 3, 32, 48))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    check_export(fused, images(1, 3, 32, 48))


def test_transformers_names_are_read() -> None:
    model = settle(small(NAME, **SIZES), images(4, 3, 32, 48))
    own = model.state_dict()
    long = {"q": "query", "k": "key", "v": "value"}
    theirs = {}
    for key, value in own.items():
        name = re.sub(r"^stage(\d)\.", r"cvt.encoder.stages.\1.", key)
        name = name.replace(".patch_embed.proj.", ".embedding.convolution_embeddings.projection.")
        name = name.replace(".patch_embed.norm.", ".embedding.convolution_embeddings.normalization.")
        name = name.replace(".blocks.", ".layers.").replace(".norm1.", ".layernorm_before.")
        name = name.replace(".norm2.", ".layernorm_after.").replace(".attn.proj.", ".attention.output.dense.")
        name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        for letter, word in long.items():
            spatial = f".attention.attention.convolution_projection_{word}.convolution_projection."
            name = name.replace(f".attn.conv_proj_{letter}.conv.", f"{spatial}convolution.")
            name = name.replace(f".attn.conv_proj_{letter}.bn.", f"{spatial}normalization.")
            name = name.replace(f".attn.proj_{letter}.", f".attention.attention.projection_{word}.")
        name = re.sub(r"^norm\.", "layernorm.", name)
        theirs[re.sub(r"^head\.", "classifier.", name)] = value
    assert len(theirs) == len(own)
    assert not theirs.keys() & own.keys()
    found = checkpoint_filter_fn(theirs, model)
    assert found.keys() == own.keys()
    assert all(found[key] is own[key] for key in own)
    assert published(NAME, **SIZES)(theirs).num_classes == 5


def test_foreign_checkpoints_are_refused() -> None:
    load = published(NAME, **SIZES)
    state = small(NAME, **SIZES).state_dict()
    key = "stage1.blocks.0.attn.conv_proj_k.conv.weight"
    for broken, what in (
        ({k: v for k, v in state.items() if k != key}, f"1 missing: {key}"),
        ({**state, "stage0.cls_token": torch.zeros(1)}, "1 unknown: stage0"),
        ({**state, key: state[key][1:]}, "1 of another shape: stage1"),
    ):
        with pytest.raises(LissomError, match=what):
            load(broken)


@needs_parity
@pytest.mark.parametrize(("name", "more"), [("cvt_13_224", {}), ("cvt_13_avg", {"method": "avg"})])
def test_the_published_names_are_the_networks_own(name: str, more: dict[str, Any]) -> None:
    with torch.device("meta"):
        own = create_model(NAME, **more).state_dict()
    wanted = {key: tuple(shape) for key, shape in fixture("cvt", name)["keys"].items()}
    assert {key: tuple(value.shape) for key, value in own.items()} == wanted


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["cvt_13_224", "cvt_13_avg"])
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("cvt", name)
