"""FFNet: published sizes, one narrow network through everything, enlarging images, the published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import SqueezeExcite
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.errors import LissomError
from lissom.models.factory import from_published
from lissom.models.metamixer import ChannelMixer, PatchMerging
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
)

SIZES = {
    "ffnet_1": (13_775_656, 13_660_152),
    "ffnet_2": (27_208_408, 26_908_440),
    "ffnet_3": (48_817_896, 48_330_632),
    "ffnet_4": (79_868_968, 79_200_360),
}
NARROW: dict[str, Any] = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "stem_dim": 8}


@pytest.fixture
def unfilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are only counted are not initialised: slow, and not needed."""
    monkeypatch.setattr("lissom.models.metamixer.trunc_normal_", lambda *a, **k: None)


@pytest.mark.usefixtures("unfilled")
@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    assert count(name) == SIZES[name][0]


@pytest.mark.usefixtures("unfilled")
@pytest.mark.parametrize(
    "name", ["ffnet_1", *(pytest.param(name, marks=pytest.mark.full) for name in ("ffnet_2", "ffnet_3", "ffnet_4"))]
)
def test_published_sizes_of_the_fused_form(name: str) -> None:
    with torch.device("meta"):
        fused = reparameterize_model(small(name), inplace=True)
    assert sum(p.numel() for p in fused.parameters()) == SIZES[name][1]


@pytest.mark.parametrize("name", ["ffnet_1", "ffnet_3"])
def test_one_network_through_everything(name: str) -> None:
    model = small(name, **NARROW, num_classes=5)
    x = images(2, 3, 45, 38)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    assert model.forward_head(model.eval().forward_features(x), pre_logits=True).shape == (2, 16)
    check_classifier(model, x)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 16, 2, 2)
    with pytest.raises(ValueError, match="without classes"):
        model.reset_classifier(3, "")


def test_options() -> None:
    x = images(2, 1, 33, 33)
    more = {"squeeze_excite": (False, False, True, False), "layer_norm_last": True, "ls_init_value": 0.0}
    model = small("ffnet_2", **NARROW, **more, in_chans=1, num_classes=2).eval()
    assert model(x).shape == (2, 2)
    assert [isinstance(block.token_mixer[1], SqueezeExcite) for block in model.stages[2][1:]] == [True, False]
    block, maps = model.stages[3][1], images(1, 16, 3, 3)
    assert torch.equal(block(maps), maps)  # a layer scale of 0
    with pytest.raises(LissomError, match="differ"):
        small("ffnet_1", depths=(1, 1))


def test_features() -> None:
    x = images(1, 3, 45, 38)
    check_features("ffnet_1", x, **NARROW)
    two = small("ffnet_3", **NARROW, features_only=True, out_indices=(0, 2))
    assert [m.shape[1] for m in two(x)] == two.feature_info.channels() == [8, 16]
    assert not any(
        name.startswith(("model.stages.3", "model.norm", "model.head")) for name, _ in two.named_parameters()
    )
    model = small("ffnet_1", **NARROW).eval()
    last, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(last, maps[-1])


@pytest.mark.parametrize("name", ["ffnet_1", pytest.param("ffnet_3", marks=pytest.mark.full)])
def test_the_fused_form(name: str) -> None:
    model = small(name, **NARROW, num_classes=5, **({"ls_init_value": 1.0} if name == "ffnet_3" else {}))
    x = images(4, 3, 45, 38)
    fused = check_fuse(model, x)
    assert [path for path, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["norm"]
    check_export(fused if name == "ffnet_1" else model, x[:1])


def test_the_publishers_names_load_in_both_forms() -> None:
    model = small("ffnet_1", num_classes=7, in_chans=2)
    loaded = from_published("ffnet_1", model.state_dict())
    assert loaded.num_classes == 7
    assert torch.equal(loaded.head.weight, model.head.weight)
    fused = reparameterize_model(model)
    loaded = from_published("ffnet_1", fused.state_dict())
    assert loaded.state_dict().keys() == fused.state_dict().keys()
    assert torch.equal(loaded.stages[3][0].proj[1].weight, fused.stages[3][0].proj[1].weight)


@pytest.mark.parametrize("name", ["ffnet_1", "ffnetsr_light_x2"])
def test_checkpoints_that_do_not_fit(name: str) -> None:
    state = small(name).state_dict()
    gone = "stages.1.0.proj.1.conv.c.weight" if name == "ffnet_1" else "conv_bef_up.weight"
    with pytest.raises(LissomError, match=rf"1 missing: {gone}"):
        from_published(name, {key: value for key, value in state.items() if key != gone})
    with pytest.raises(LissomError, match="1 unknown: foreign"):
        from_published(name, {**state, "foreign": torch.zeros(1)})
    with pytest.raises(LissomError, match="1 of another shape"):
        from_published(name, {**state, gone: torch.zeros(3, 3, 1, 1)})


# Enlarging images


@pytest.mark.parametrize(("scale", "norm"), [(2, "BN"), (3, None), (4, "LN")])
def test_enlarging(scale: int, norm: str | None) -> None:
    model = small("ffnetsr_light_x2", scale=scale, dim=8, depth=2, norm=norm)
    x = images(2, 3, 7, 10)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    settle(model, x)
    assert model(x).shape == (2, 3, 7 * scale, 10 * scale)
    nn.init.zeros_(model.conv_bef_up.weight)
    nn.init.zeros_(model.conv_bef_up.bias)
    with torch.no_grad():
        assert torch.equal(model(x), nn.functional.interpolate(x, scale_factor=scale))


def test_published_enlargers() -> None:
    assert len(small("ffnetsr_base_x2", dim=4).body) == 48
    assert count("ffnetsr_light_x2") == 36 * (96 * 97 + 3 * 960 + 2 * 96 * 192 + 192 + 96) + 2688 + 10_380
    assert small("ffnetsr_light_x2", depth=1).default_cfg["num_classes"] == 0
    for wrong in ({"norm": "GN"}, {"num_classes": 3}, {"in_chans": 1}):
        with pytest.raises(LissomError, match="cannot be built"):
            small("ffnetsr_light_x2", depth=1, **wrong)


def test_enlarging_exports() -> None:
    check_export(small("ffnetsr_light_x2", dim=8, depth=1, norm="LN"), images(1, 3, 6, 9))


# The published figures


def loaded(model: nn.Module, state: dict[str, torch.Tensor], fused: bool) -> nn.Module:
    model.load_state_dict(state)
    return reparameterize_model(nn.Sequential(model.eval())) if fused else model


@needs_parity
@pytest.mark.parametrize("fused", [False, True])
def test_published_layers(fused: bool) -> None:
    check_operator("metamixer", "op_channel_mixer_7", lambda state: loaded(ChannelMixer(16, 7, 3), state, fused))
    check_operator("metamixer", "op_patch_merging", lambda state: loaded(PatchMerging(12, 24), state, fused))


@needs_parity
@pytest.mark.usefixtures("unfilled")
@pytest.mark.parametrize("name", ["ffnet_1", "ffnet_3"])
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = small(name)
    keys = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert keys == fixture("metamixer", name)["keys"]


@needs_parity
def test_enlarged_images_are_the_published_ones() -> None:
    check_network("metamixer", "ffnetsr_x4_small", rtol=1e-4)


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["ffnet_1", "ffnet_3"])
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("metamixer", name, rtol=1e-4)
