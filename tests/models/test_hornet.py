"""HorNet: published sizes and names, the deploy form, one narrow network through everything, the published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lissom.errors import LissomError
from lissom.models.factory import create_model, from_published
from lissom.models.hornet import checkpoint_filter_fn
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
    small,
)  # fmt: skip
from tests.parity_adapters import published

SIZES: dict[str, Any] = {"dim": 8, "depths": (1, 1, 2, 1), "num_classes": 5, "layer_scale": 0.5}
PARAMS = {
    "hornet_tiny_7x7": 22_409_512, "hornet_tiny_gf": 22_991_848, "hornet_small_7x7": 49_528_264,
    "hornet_small_gf": 50_401_768, "hornet_base_7x7": 87_256_680, "hornet_base_gf": 88_421_352,
    "hornet_base_gf_img384": 92_099_560, "hornet_large_7x7": 194_542_504, "hornet_large_gf": 196_289_512,
    "hornet_large_gf_img384": 201_806_824,
}  # fmt: skip
BOTH = ("hornet_tiny_7x7", "hornet_tiny_gf")


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    assert count(name) == PARAMS[name]


@pytest.mark.parametrize("name", BOTH)
def test_a_step_reaches_every_parameter(name: str) -> None:
    model = small(name, **SIZES, in_chans=1, drop_path_rate=0.1)
    x = images(2, 1, 64, 97)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)


@pytest.mark.parametrize("name", BOTH)
def test_features(name: str) -> None:
    check_features(name, images(2, 3, 64, 96), **SIZES)
    model = small(name, features_only=True, out_indices=(0, 2), **SIZES)
    assert [m.shape[1:] for m in model(images(1, 3, 70, 97))] == [(8, 17, 24), (32, 4, 6)]


def test_classifiers() -> None:
    check_classifier(small("hornet_tiny_gf", **SIZES), images(2, 3, 64, 64))
    model = small("hornet_tiny_gf", **SIZES, global_pool="")
    assert model(images(2, 3, 64, 64)).shape == (2, 64, 2, 2)
    with pytest.raises(ValueError, match="'max'"):
        model.reset_classifier(5, "max")


@pytest.mark.parametrize("name", BOTH)
def test_the_deploy_form_answers_the_same(name: str) -> None:
    fused = check_fuse(small(name, **SIZES), images(2, 3, 64, 96))
    assert not any("gamma" in path for path, _ in fused.named_parameters())
    if name.endswith("gf"):  # which has blocks of both kinds
        check_export(fused, images(1, 3, 64, 96))


def test_published_beginnings() -> None:
    plain, even = small("hornet_tiny_gf", **SIZES), small("hornet_tiny_gf", **SIZES, uniform_init=True)
    weight = even.stages[0][0].pwconv1.weight
    assert weight.abs().max() <= (6 / sum(weight.shape)) ** 0.5
    assert weight.std() > 2 * plain.stages[0][0].pwconv1.weight.std()
    scaled = small("hornet_tiny_gf", **SIZES, head_init_scale=0.001)
    torch.testing.assert_close(scaled.head.weight, 0.001 * plain.head.weight)


def test_filters_are_resized_for_larger_images() -> None:
    sizes = {**SIZES, "filter_sizes": (None, None, (4, 3), (2, 2))}
    narrow, wide = small("hornet_tiny_gf", **sizes), small("hornet_tiny_gf", **SIZES)
    wide.load_state_dict(checkpoint_filter_fn(narrow.state_dict(), wide))
    # Resized again in the forward pass, to the size they had: what was between the corners is not lost.
    key = "stages.3.0.gnconv.dwconv.complex_weight"
    corners = narrow.state_dict()[key]
    torch.testing.assert_close(wide.state_dict()[key][:, ::6, ::3], corners)


@pytest.mark.full
def test_a_checkpoint_of_smaller_images_loads_into_the_network_for_larger_ones() -> None:
    published = create_model("hornet_base_gf", num_classes=3).state_dict()
    loaded = from_published("hornet_base_gf_img384", published).state_dict()
    resized = [k for k in loaded if loaded[k].shape != published[k].shape]
    assert resized
    assert all(key.endswith("complex_weight") for key in resized)
    assert all(torch.equal(loaded[k], published[k]) for k in loaded if k not in resized)


def test_foreign_checkpoints_are_refused() -> None:
    load = published("hornet_tiny_gf", **SIZES)
    state = small("hornet_tiny_gf", **SIZES).state_dict()
    assert load(state).num_classes == 5
    key = "stages.2.0.gnconv.pws.1.weight"
    for broken, what in (
        ({k: v for k, v in state.items() if k != key}, f"1 missing: {key}"),
        ({**state, "head_dist.bias": torch.zeros(1)}, "1 unknown: head_dist"),
        ({**state, key: state[key][1:]}, "1 of another shape: stages"),
    ):
        with pytest.raises(LissomError, match=what):
            load(broken)


@needs_parity
@pytest.mark.parametrize("name", BOTH)
def test_the_published_names_are_the_networks_own(name: str) -> None:
    with torch.device("meta"):
        own = create_model(name).state_dict()
    wanted = {key: tuple(shape) for key, shape in fixture("hornet", name)["keys"].items()}
    assert {key: tuple(value.shape) for key, value in own.items()} == wanted


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", BOTH)
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("hornet", name)
