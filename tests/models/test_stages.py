"""EfficientNets and RegNets of explicit stages: the published sizes, checkpoints and figures; timm's ways with them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.models import efficientnet, regnet
from lissom.models.factory import create_model, from_published
from lissom.models.stages import Stages, read_stages, with_stages
from lissom.techniques.scaling import scale_config
from tests.models.families import (
    check_classifier,
    check_export,
    check_features,
    check_network,
    check_trains,
    count,
    fixture,
    images,
    needs_parity,
    small,
)  # fmt: skip

PARAMS = {"effnet_b0": 5_288_548, "effnet_b0_dWr4": 15_824_374, "regnety_800mf_dWr4": 19_857_304}
NARROW: dict[str, dict[str, Any]] = {
    "effnet_b0": {
        "depths": (1, 2, 1, 1, 1, 1, 1), "widths": (8, 8, 8, 16, 16, 16, 24), "stem": 8, "head": 32, "num_classes": 5,
    },
    "regnety_800mf_dWr4": {
        "depths": (1, 2, 1, 1), "widths": (8, 16, 16, 24), "group_widths": (8, 8, 8, 8), "num_classes": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_the_published(name: str) -> None:
    assert count(name) == PARAMS[name]


@pytest.mark.parametrize(
    ("name", "base"), [("effnet_b0_dWr4", "efficientnet_b0"), ("regnety_800mf_dWr4", "regnety_008")]
)
def test_the_scaled_networks_are_what_the_rule_makes(name: str, base: str) -> None:
    with torch.device("meta"):
        scaled, unscaled = create_model(name), create_model(base)
    before = read_stages(unscaled)
    assert (before.train_size, before.test_size) == (224, 256)
    assert read_stages(scaled) == scale_config(before, "dWr", 4)


@pytest.mark.parametrize("name", ["effnet_b0", "regnety_800mf_dWr4"])
@needs_parity
def test_the_published_figures(name: str) -> None:
    check_network("model_scaling", name)


@needs_parity
def test_the_published_keys_are_all_translated() -> None:
    for name in ("effnet_b0", "regnety_800mf_dWr4"):
        keys = fixture("model_scaling", name)["keys"]
        with torch.device("meta"):
            model = create_model(name)
        module = efficientnet if name == "effnet_b0" else regnet
        state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
        found = module.checkpoint_filter_fn(state, model)
        assert {key: value.shape for key, value in found.items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }


# Kept apart from the code under test: timm's names as the publisher's.
BLOCK_NAMES = {
    "ds": {"conv_dw": "dwise", "bn1": "dwise_bn", "conv_pw": "lin_proj", "bn2": "lin_proj_bn"},
    "ir": {"conv_pw": "exp", "bn1": "exp_bn", "conv_dw": "dwise", "bn2": "dwise_bn", "conv_pwl": "lin_proj",
           "bn3": "lin_proj_bn"},
    "reg": {"downsample.conv": "proj", "downsample.bn": "bn", "conv1.conv": "f.a", "conv1.bn": "f.a_bn",
            "conv2.conv": "f.b", "conv2.bn": "f.b_bn", "conv3.conv": "f.c", "conv3.bn": "f.c_bn",
            "se.fc1": "f.se.f_ex.0", "se.fc2": "f.se.f_ex.2"},
}  # fmt: skip
SQUEEZE = {"se.conv_reduce": "se.f_ex.0", "se.conv_expand": "se.f_ex.2"}
TOP = {
    "conv_stem": "stem.conv", "bn1": "stem.bn", "conv_head": "head.conv", "bn2": "head.conv_bn",
    "classifier": "head.fc",
}  # fmt: skip


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {}
    for key, value in state.items():
        path, _, leaf = key.rpartition(".")
        if path.startswith("blocks."):
            _, stage, block, rest = path.split(".", 3)
            inside = {**(BLOCK_NAMES["ds"] if stage == "0" else BLOCK_NAMES["ir"]), **SQUEEZE}
            path = f"s{int(stage) + 1}.b{int(block) + 1}.{inside[rest]}"
        elif path[0] == "s" and path[1].isdigit():
            stage, block, rest = path.split(".", 2)
            path = f"{stage}.{block}.{BLOCK_NAMES['reg'][rest]}"
        names[f"{TOP.get(path, path)}.{leaf}"] = value
    assert len(names) == len(state)
    return names


@pytest.mark.parametrize("name", ["effnet_b0", "regnetx_002", "regnety_002", "efficientnet_b0"])
def test_a_checkpoint_of_the_publisher_loads(name: str) -> None:
    """Into timm's own networks as well, of another number of classes and of input channels."""
    model = small(name, num_classes=3, in_chans=1).eval()
    x = images(1, 1, 64, 48)
    loaded = from_published(name, published(model.state_dict())).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    again = from_published(name, model.state_dict()).eval()  # its own names pass as they are
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    state = published(model.state_dict())
    del state["head.fc.bias"]
    with pytest.raises(LissomError, match="1 missing"):
        from_published(name, state)


@pytest.mark.parametrize("name", ["effnet_b0", pytest.param("regnety_800mf_dWr4", marks=pytest.mark.full)])
def test_a_narrow_one_does_what_networks_do(name: str) -> None:
    x = images(2, 3, 67, 91)
    check_trains(small(name, **NARROW[name]), x)
    check_classifier(small(name, **NARROW[name]), x)
    check_features(name, x, **{k: v for k, v in NARROW[name].items() if k != "num_classes"})
    check_export(small(name, **NARROW[name]).eval(), images(1, 3, 64, 64))


def test_effnet_b0_is_timms() -> None:
    """Module by module, in the same order: timm's weights load, and the answers are its own."""
    with torch.device("meta"):
        ours, theirs = create_model("effnet_b0"), timm.create_model("efficientnet_b0")
    assert str(ours) == str(theirs)


def test_drop_paths_grow_to_the_rate_as_timms_do() -> None:
    for name in ("regnety_002", "efficientnet_b0"):
        with torch.device("meta"):
            theirs = timm.create_model(name, drop_path_rate=0.2)
            ours = with_stages(timm.create_model(name), read_stages(theirs), drop_path_rate=0.2)

        def rates(model: nn.Module) -> list[float]:
            return [round(m.drop_prob, 6) for m in model.modules() if type(m).__name__ == "DropPath"]

        assert rates(ours) == rates(theirs) != []


@pytest.mark.parametrize("stride", [8, 16])
def test_a_smaller_output_stride_keeps_maps_large(stride: int) -> None:
    sizes = {**NARROW["regnety_800mf_dWr4"], "depths": (1, 2, 2, 2)}  # a stage's first block is not dilated yet
    model = small("regnety_800mf_dWr4", output_stride=stride, **sizes).eval()
    theirs = timm.create_model("regnety_002", output_stride=stride).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert model.forward_features(x).shape[-2:] == (64 // stride, 64 // stride)
        assert theirs.forward_features(x).shape[-2:] == (64 // stride, 64 // stride)
    dilations = [m.dilation for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert max(dilations) == (32 // stride, 32 // stride)


def test_numbers_that_do_not_fit_are_told() -> None:
    for numbers, reason in (
        ({"depths": (1, 1, 1)}, "four numbers"),
        ({"group_widths": (48, 32, 32, 32)}, "do not divide"),
    ):
        with pytest.raises(LissomError, match=reason):
            create_model("regnety_800mf_dWr4", **numbers)
    network = create_model("resnet50", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    own = read_stages(network)
    assert own == Stages("resnet", (1,) * 4, (32,) * 4, (0.25,) * 4, (0,) * 4, 64, train_size=own.train_size,
                         test_size=own.test_size)  # fmt: skip
