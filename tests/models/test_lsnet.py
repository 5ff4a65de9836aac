"""LSNet: published sizes and checkpoints, position biases, one narrow network through everything, published figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.errors import LissomError
from lissom.models.factory import create_model, from_published
from lissom.models.lsnet import BiasedAttention, RepVGGDW, checkpoint_filter_fn
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
    settle,
    small,
)  # fmt: skip

SIZES: dict[str, Any] = {"embed_dim": (16, 16, 24, 32), "depth": (0, 2, 2, 2), "num_classes": 5, "img_size": 96}
PARAMS = {
    "lsnet_t": 11_409_832, "lsnet_s": 16_146_304, "lsnet_b": 23_313_608,
    "lsnet_t_distill": 11_795_600, "lsnet_s_distill": 16_596_200, "lsnet_b_distill": 23_827_632,
}  # fmt: skip
FUSED = {"lsnet_t": 11_370_488, "lsnet_s": 16_098_232, "lsnet_b": 23_249_320}


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    assert count(name) == PARAMS[name]


@pytest.mark.parametrize("name", FUSED)
def test_published_sizes_of_the_deploy_form(name: str) -> None:
    with torch.device("meta"):
        model = reparameterize_model(create_model(name), inplace=True)
    assert sum(p.numel() for p in model.parameters()) == FUSED[name]


def test_a_step_reaches_every_parameter() -> None:
    model = small("lsnet_t", **SIZES, in_chans=1)
    x = images(2, 1, 96, 96)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    model = small("lsnet_t_distill", **SIZES)
    model.set_distilled_training()
    check_trains(model, images(2, 3, 96, 96))
    assert len(model(images(2, 3, 96, 96))) == 2


def test_features_at_any_input_size() -> None:
    check_features("lsnet_t", images(2, 3, 150, 97), **SIZES)


def test_classifiers() -> None:
    x = images(2, 3, 96, 96)
    check_classifier(small("lsnet_t", **SIZES), x)
    model = small("lsnet_t_distill", **SIZES).eval()
    model.reset_classifier(7)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(model(x), (model.head(features) + model.head_dist(features)) / 2)
    assert [layer.out_features for layer in model.get_classifier()] == [7, 7]


def test_the_deploy_form_answers_the_same() -> None:
    model = small("lsnet_t_distill", **SIZES)
    fused = check_fuse(model, images(4, 3, 96, 96))
    left = [path for path, m in fused.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert left == ["blocks2.3.mixer.bn", "blocks3.3.mixer.bn"]  # of the dynamic convolutions, which have no weights
    assert isinstance(fused.blocks2[2].mixer, nn.Conv2d)
    check_export(fused, images(1, 3, 96, 96))


def test_biases_stand_for_distances_and_follow_the_weights() -> None:
    torch.manual_seed(0)
    attention = BiasedAttention(8, 4, 2, (2, 3)).eval()
    before = attention.biases(2, 3).clone()
    nn.init.normal_(attention.attention_biases)  # behind eval(): no stale copy may be used
    found = attention.biases(2, 3)
    assert not torch.equal(found, before)
    for i in range(6):
        for j in range(6):
            rows, columns = abs(i // 3 - j // 3), abs(i % 3 - j % 3)
            assert torch.equal(found[:, i, j], attention.attention_biases[:, 3 * rows + columns])
    nn.init.constant_(attention.attention_biases, 2.0)
    assert attention.biases(5, 4).shape == (2, 20, 20)
    torch.testing.assert_close(attention.biases(5, 4), torch.full((2, 20, 20), 2.0))


def test_the_published_cache_answers_with_stale_biases() -> None:
    torch.manual_seed(0)
    fresh, stale = BiasedAttention(8, 4, 2, (3, 3)), BiasedAttention(8, 4, 2, (3, 3), stale_biases=True)
    stale.load_state_dict(fresh.state_dict())
    x = images(2, 8, 3, 3)
    settle(fresh, x)
    state = fresh.state_dict()
    state["attention_biases"] = images(2, 9)
    before = fresh.attention_biases.clone()
    fresh.load_state_dict(state)
    stale.load_state_dict({**state, "attention_biases": before})
    stale.eval()
    stale.load_state_dict(state)  # after eval(), as the published evaluation does it
    assert stale.state_dict().keys() == state.keys()
    assert torch.equal(stale.biases(3, 3), before[:, stale.attention_bias_idxs])
    assert torch.equal(stale.biases(2, 3), fresh.biases(2, 3))  # of maps of another size none are kept
    stale.train().eval()
    with torch.no_grad():
        assert torch.equal(stale(x), fresh(x))


def test_gradients_of_attention() -> None:
    torch.manual_seed(0)
    attention = settle(BiasedAttention(4, 2, 2, (3, 2)), images(4, 4, 3, 2)).double()
    x = images(1, 4, 3, 2, seed=1).double().requires_grad_()
    table = attention.attention_biases.detach().normal_().requires_grad_()

    def answer(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(attention, {"attention_biases": table}, (x,))

    assert torch.autograd.gradcheck(answer, (x, table))


def test_a_network_for_other_images_takes_the_biases_resized() -> None:
    small_images, large = small("lsnet_t", **SIZES), small("lsnet_t", **{**SIZES, "img_size": 224})
    key = "blocks4.3.mixer.m.attention_biases"
    state = {**small_images.state_dict(), "blocks4.3.mixer.m.attention_bias_idxs": torch.zeros(4, 4).long()}
    state[key] = torch.randn(4, 4)
    found = checkpoint_filter_fn(state, large)
    large.load_state_dict(found)
    # The resized table in a network for large images, and the table resized in the forward pass of the other.
    small_images.load_state_dict(checkpoint_filter_fn(state, small_images))
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(large.eval()(x), small_images.eval()(x))


def test_a_checkpoint_without_one_by_one_branches_gets_silent_ones() -> None:
    model = small("lsnet_t", **SIZES)
    state = {k: v for k, v in settle(model, images(4, 3, 96, 96)).state_dict().items() if ".conv1." not in k}
    model.load_state_dict(checkpoint_filter_fn(state, model))
    mixer, x = model.blocks2[2].mixer, images(1, 16, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), mixer.conv(x) + x)


def test_foreign_checkpoints_are_refused() -> None:
    state = small("lsnet_t").state_dict()
    indices = {"blocks4.3.mixer.m.attention_bias_idxs": torch.zeros(16, 16).long()}
    assert from_published("lsnet_t", {**state, **indices}).num_classes == 1000
    key = "blocks2.3.mixer.lkp.cv4.weight"
    for broken, what in (
        ({k: v for k, v in state.items() if k != key}, f"1 missing: {key}"),
        ({k: v for k, v in state.items() if k != "blocks2.2.mixer.conv1.bn.bias"}, "1 missing: blocks2.2"),
        ({**state, "blocks5.0.x": torch.zeros(1)}, "1 unknown: blocks5.0.x"),
        ({**state, key: state[key][1:]}, "1 of another shape: blocks2.3"),
    ):
        with pytest.raises(LissomError, match=what):
            from_published("lsnet_t", broken)


@needs_parity
@pytest.mark.parametrize(
    ("name", "empty"),
    [("op_repvggdw", lambda: RepVGGDW(12)), ("op_attention", lambda: BiasedAttention(48, 16, 3, (5, 5)))],
)
def test_the_published_answers_of_the_mixers(name: str, empty: type[nn.Module]) -> None:
    def build(state: Mapping[str, torch.Tensor]) -> nn.Module:
        module = empty()
        module.load_state_dict(dict(state))
        return module

    check_operator("lsnet", name, build)


@needs_parity
@pytest.mark.parametrize("name", ["lsnet_t", "lsnet_s_distill"])
def test_the_published_names_are_the_networks_own(name: str) -> None:
    figures = fixture("lsnet", name)
    with torch.device("meta"):
        own = create_model(name).state_dict()
    wanted = {key: tuple(shape) for key, shape in figures["keys"].items() if key not in figures["int_keys"]}
    assert {key: tuple(value.shape) for key, value in own.items()} == wanted


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["lsnet_t", "lsnet_s_distill"])
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("lsnet", name)
