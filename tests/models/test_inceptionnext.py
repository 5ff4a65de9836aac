"""InceptionNeXt: published sizes and names, the deploy form, one narrow network through everything, the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.models.factory import create_model, from_published
from lissom.models.inceptionnext import MetaNeXtBlock
from tests.models.families import (
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

SIZES: dict[str, Any] = {"dims": (8, 16, 16, 24), "depths": (1, 1, 2, 1), "num_classes": 5, "ls_init_value": 0.5}
PARAMS = {
    "inceptionnext_atto": 4_156_520, "inceptionnext_tiny": 28_055_680, "inceptionnext_small": 49_374_016,
    "inceptionnext_base": 86_672_136, "inceptionnext_base_384": 86_672_136,
}  # fmt: skip
NAME = "inceptionnext_tiny"


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    assert count(name) == PARAMS[name]


def test_it_is_timms_network() -> None:
    """Under the same names, the same answers."""
    ours = settle(small("inceptionnext_atto", **SIZES), images(4, 3, 64, 64))
    theirs = timm.create_model("inception_next_atto", **SIZES).eval()
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 70, 97)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_the_last_stage_is_narrower_inside() -> None:
    with torch.device("meta"):
        model = create_model(NAME)
    shapes = [stage.blocks[0].mlp.fc1.weight.shape for stage in model.stages]
    assert [out // width for out, width, *_ in shapes] == [4, 4, 4, 3]
    assert create_model("inceptionnext_atto", **SIZES).stages[0].blocks[0].token_mixer.dwconv_w.kernel_size == (1, 9)


def test_a_step_reaches_every_parameter() -> None:
    model = small(NAME, **SIZES, in_chans=1, drop_path_rate=0.1)
    x = images(2, 1, 64, 97)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)


def test_features() -> None:
    check_features(NAME, images(2, 3, 64, 96), **SIZES)


def test_dilation_instead_of_stride() -> None:
    model = check_fuse(small(NAME, **SIZES, output_stride=16), images(4, 3, 64, 64))
    with torch.no_grad():
        assert model.forward_features(images(1, 3, 64, 64)).shape == (1, 24, 4, 4)


def test_classifiers() -> None:
    model, x = small(NAME, **SIZES).eval(), images(2, 3, 64, 64)
    assert model.get_classifier().out_features == 5
    with torch.no_grad():
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
        assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_the_deploy_form_answers_the_same() -> None:
    fused = check_fuse(small(NAME, **SIZES), images(4, 3, 64, 96))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert not any(name.endswith("gamma") for name, _ in fused.named_parameters())
    check_export(fused, images(1, 3, 64, 96))


@pytest.mark.parametrize("more", [{}, {"norm_layer": nn.GroupNorm, "ls_init_value": None}])
def test_a_block_folds_what_it_can(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if more:
        more = {**more, "norm_layer": lambda dim, **_: nn.GroupNorm(2, dim)}
    block = MetaNeXtBlock(8, **{"ls_init_value": 0.5, **more})
    check_fuse(nn.Sequential(block), images(4, 8, 5, 7), 1e-5)


def test_foreign_checkpoints_are_refused() -> None:
    state = small("inceptionnext_atto").state_dict()
    assert from_published("inceptionnext_atto", state).num_classes == 1000
    key = "stages.0.blocks.0.token_mixer.dwconv_w.weight"
    for broken, what in (
        ({k: v for k, v in state.items() if k != key}, f"1 missing: {key}"),
        ({**state, "norm.weight": torch.zeros(1)}, r"1 unknown: norm\.weight"),
        ({**state, key: state[key].transpose(2, 3)}, "1 of another shape: stages"),  # the bands exchanged
    ):
        with pytest.raises(LissomError, match=what):
            from_published("inceptionnext_atto", broken)


@needs_parity
def test_the_published_answer_of_a_block() -> None:
    def build(state: Mapping[str, torch.Tensor]) -> nn.Module:
        block = MetaNeXtBlock(24)
        block.load_state_dict(dict(state))
        return block

    check_operator("inceptionnext", "op_block", build)


@needs_parity
@pytest.mark.parametrize("name", ["inceptionnext_atto", "inceptionnext_tiny"])
def test_the_published_names_are_the_networks_own(name: str) -> None:
    with torch.device("meta"):
        own = create_model(name).state_dict()
    wanted = {key: tuple(shape) for key, shape in fixture("inceptionnext", name)["keys"].items()}
    assert {key: tuple(value.shape) for key, value in own.items()} == wanted


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["inceptionnext_atto", "inceptionnext_tiny"])
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("inceptionnext", name)
