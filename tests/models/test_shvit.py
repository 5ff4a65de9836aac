"""SHViT: published sizes and checkpoints in timm's classes, the networks with two heads, the published figures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from timm.models.shvit import PatchMerging
from torch import nn

from lissom.errors import LissomError
from lissom.layers.shsa import SHSA
from lissom.models.factory import create_model, from_published
from lissom.models.shvit import checkpoint_filter_fn
from tests.models.families import (
    check_classifier,
    check_export,
    check_features,
    check_fuse,
    check_network,
    check_operator,
    check_trains,
    count,
    fixture,
    images,
    needs_parity,
    small,
)  # fmt: skip

SIZES: dict[str, Any] = {"embed_dim": (16, 24, 32), "partial_dim": (4, 6, 8), "depth": (1, 2, 1), "num_classes": 5}
PARAMS = {
    "shvit_s1": 6_330_808, "shvit_s2": 11_483_072, "shvit_s3": 14_245_273, "shvit_s4": 16_588_484,
    "shvit_s1_distilled": 6_652_448, "shvit_s2_distilled": 11_932_968, "shvit_s3_distilled": 14_695_169,
    "shvit_s4_distilled": 17_038_380,
}  # fmt: skip
FUSED = {"shvit_s1": 6_308_660, "shvit_s2": 11_453_508, "shvit_s3": 14_210_010, "shvit_s4": 16_546_248}
BOTH = ("shvit_s1", "shvit_s1_distilled")


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names as the publisher's."""
    names = {}
    for key in state:
        name = re.sub(r"^stages\.0\.blocks\.", "blocks1.", key)
        name = re.sub(r"^stages\.(\d)\.downsample\.([01])\.", lambda m: f"blocks{int(m[1]) + 1}.0.{m[2]}.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.2\.", lambda m: f"blocks{int(m[1]) + 1}.1.", name)
        name = re.sub(
            r"^stages\.(\d)\.downsample\.([34])\.", lambda m: f"blocks{int(m[1]) + 1}.2.{int(m[2]) - 3}.", name
        )
        name = re.sub(
            r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + 3}.", name
        )  # fmt: skip
        names[name] = state[key]
    assert len(names) == len(state)
    return names


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    assert count(name) == PARAMS[name]


@pytest.mark.parametrize("name", FUSED)
def test_published_sizes_of_the_deploy_form(name: str) -> None:
    """Folding takes a norm's weight and leaves its bias to the convolution; the classifier keeps its own."""
    with torch.device("meta"):
        model = create_model(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert PARAMS[name] - sum(m.num_features for m in norms) - 2 * model.num_features == FUSED[name]


@pytest.mark.parametrize("name", BOTH)
def test_a_step_reaches_every_parameter(name: str) -> None:
    model = small(name, **SIZES, in_chans=1)
    x = images(2, 1, 50, 70)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)


@pytest.mark.parametrize("name", BOTH)
def test_features_at_any_input_size(name: str) -> None:
    check_features(name, images(2, 3, 70, 97), **SIZES)


def test_classifiers() -> None:
    x = images(2, 3, 64, 64)
    check_classifier(small("shvit_s1", **SIZES), x)
    model = small("shvit_s1_distilled", **SIZES).eval()
    assert [layer.out_features for layer in model.get_classifier()] == [5, 5]
    model.reset_classifier(7)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(model(x), (model.head(features) + model.head_dist(features)) / 2)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert torch.equal(model(x), features)


def test_both_heads_answer_apart_where_they_are_taught_apart() -> None:
    model, x = small("shvit_s1_distilled", **SIZES), images(2, 3, 64, 64)
    assert model.train()(x).shape == (2, 5)
    model.set_distilled_training()
    check_trains(model, x)
    own, distilled = model(x)
    assert own.shape == distilled.shape == (2, 5)
    assert model.eval()(x).shape == (2, 5)


def test_another_activation_reaches_the_blocks() -> None:
    model = small("shvit_s1_distilled", **SIZES, act_layer=nn.Hardswish)
    kinds = {type(m) for path, m in model.named_modules() if path.startswith("stages") and path.endswith(".m.act")}
    assert kinds == {nn.Hardswish}


@pytest.mark.parametrize("name", BOTH)
def test_the_deploy_form_answers_the_same(name: str) -> None:
    fused = check_fuse(small(name, **SIZES), images(4, 3, 64, 96))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    if name.endswith("distilled"):  # the other differs by one head
        check_export(fused, images(1, 3, 64, 96))


def test_the_mixer_is_timms() -> None:
    """Under the same names, the same answer: lissom's operator may take the place of timm's."""
    model = small("shvit_s1", **SIZES)
    theirs = model.stages[1].blocks[0].mixer.m
    ours = SHSA(24, 16, 6)
    ours.load_state_dict(theirs.state_dict())
    nn.init.ones_(ours.proj[1].bn.weight)
    nn.init.ones_(theirs.proj[1].bn.weight)
    x = images(2, 24, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_published_names_become_timms(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    own = model.state_dict()
    theirs = published(own)
    assert "blocks3.7.mixer.m.qkv.c.weight" in theirs
    assert not any(key.startswith("stages") for key in theirs)
    found = checkpoint_filter_fn(theirs, model)
    assert found.keys() == own.keys()
    assert all(found[key] is own[key] for key in own)
    assert checkpoint_filter_fn(own, model).keys() == own.keys()


@needs_parity
@pytest.mark.parametrize("name", ["shvit_s1", "shvit_s4"])
def test_the_published_names_are_read(name: str) -> None:
    keys = fixture("shvit", name)["keys"]
    with torch.device("meta"):
        model = create_model(name)
        state = checkpoint_filter_fn({key: torch.empty(shape) for key, shape in keys.items()}, model)
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_foreign_checkpoints_are_refused() -> None:
    state = published(small("shvit_s1").state_dict())
    assert from_published("shvit_s1", state).num_classes == 1000
    key = "blocks2.3.mixer.m.qkv.c.weight"
    for broken, what in (
        ({k: v for k, v in state.items() if k != key}, "1 missing: stages.1.blocks.0.mixer.m.qkv.c.weight"),
        ({**state, "blocks4.0.x": torch.zeros(1)}, "1 unknown: blocks4.0.x"),
        ({**state, key: state[key][1:]}, r"1 of another shape: .*qkv"),
    ):
        with pytest.raises(LissomError, match=what):
            from_published("shvit_s1", broken)
    with pytest.raises(LissomError, match="missing: head_dist"):
        from_published("shvit_s1_distilled", state)


@needs_parity
def test_the_published_answer_of_a_merging() -> None:
    def build(state: dict[str, torch.Tensor]) -> nn.Module:
        module = PatchMerging(24, 40)
        module.load_state_dict(state)
        return module

    check_operator("shvit", "op_patch_merging", build)


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["shvit_s1", "shvit_s4"])
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("shvit", name)
