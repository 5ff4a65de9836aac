"""STViT: published sizes, one narrow network through everything, the published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.models.factory import from_published
from lissom.models.svit import SuperTokenBlock
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
)

SIZES = {"stvit_small": 25_495_624, "stvit_base": 51_691_288, "stvit_large": 94_971_096}
NARROW: dict[str, Any] = {
    "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "cells": (4, 2, 1, 1), "projection": 24,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    assert count(name) == SIZES[name]


def test_layer_scales_stand_where_they_are_published() -> None:
    with torch.device("meta"):
        model = small("stvit_base", depths=(1, 1, 1, 1))
    assert [stage.blocks[0].gamma_1 is not None for stage in model.layers] == [False, False, True, True]
    assert [stage.blocks[0].attn.cell for stage in model.layers] == [(8, 8), (4, 4), (1, 1), (1, 1)]


@pytest.mark.parametrize("name", ["stvit_small", "stvit_base"])
def test_one_network_through_everything(name: str) -> None:
    model = small(name, **NARROW, num_classes=5)
    x = images(2, 3, 45, 38)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    assert model.forward_head(model.eval().forward_features(x), pre_logits=True).shape == (2, 24)
    check_classifier(model, x)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 24, 2, 2)
    with pytest.raises(ValueError, match="without classes"):
        model.reset_classifier(3, "")
    assert small(name, **NARROW, in_chans=1, num_classes=2).eval()(images(1, 1, 33, 33)).shape == (1, 2)
    with pytest.raises(LissomError, match="differ"):
        small(name, depths=(1, 1))


def test_features() -> None:
    x = images(1, 3, 45, 38)
    check_features("stvit_small", x, **NARROW)
    two = small("stvit_small", **NARROW, features_only=True, out_indices=(0, 2)).eval()
    assert [m.shape[1] for m in two(x)] == two.feature_info.channels() == [8, 16]
    assert not any(name.startswith("model.layers.3") for name, _ in two.named_modules())
    assert not any(name.startswith(("model.proj", "model.norm", "model.head")) for name, _ in two.named_parameters())
    model = small("stvit_small", **NARROW).eval()
    assert len(model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)) == 1
    with pytest.raises(ValueError, match="none that fits"):
        model.forward_intermediates(x, norm=True)


def test_fused_form_and_export() -> None:
    model = small("stvit_base", **NARROW, num_classes=5)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma_1", "gamma_2")):
            nn.init.ones_(parameter)
    x = images(4, 3, 45, 38)
    fused = check_fuse(model, x)
    # The stem's norms stand behind GELU and in front of padding, the last one in front of no convolution.
    left = {path.rsplit(".", 1)[0] for path, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert left == {"patch_embed.proj", "norm"}
    check_export(model, x[:1])


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the constant kernels that the publisher's checkpoints hold."""
    attended = [key.rsplit(".", 3)[0] for key in state if key.endswith("attn.stoken_refine.qkv.weight")]
    shifts = torch.eye(9).reshape(9, 1, 3, 3)
    return {**state, **{f"{path}.{name}.weights": shifts for path in attended for name in ("unfold", "fold")}}


def test_checkpoints() -> None:
    state = published(small("stvit_small", num_classes=7, in_chans=2).state_dict())
    assert "layers.0.blocks.0.attn.unfold.weights" in state
    loaded = from_published("stvit_small", state)
    assert loaded.num_classes == 7
    gone = "layers.1.blocks.0.attn.stoken_refine.qkv.weight"
    assert torch.equal(loaded.layers[1].blocks[0].attn.stoken_refine.qkv.weight, state[gone])
    with pytest.raises(LissomError, match=rf"1 missing: {gone}"):
        from_published("stvit_small", {key: value for key, value in state.items() if key != gone})
    with pytest.raises(LissomError, match="1 unknown: foreign"):
        from_published("stvit_small", {**state, "foreign": torch.zeros(1)})
    with pytest.raises(LissomError, match="1 of another shape"):
        from_published("stvit_small", {**state, gone: torch.zeros(3, 3, 1, 1)})


@needs_parity
def test_the_published_block() -> None:
    def build(state: dict[str, torch.Tensor]) -> SuperTokenBlock:
        block = SuperTokenBlock(32, (2, 2), 2, ls_init_value=1e-5)
        block.load_state_dict(state)
        return block

    check_operator("svit", "op_layer", build)


@needs_parity
def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = small("stvit_small")
    keys = {key: list(value.shape) for key, value in model.state_dict().items()}
    figures = fixture("svit", "stvit_small")
    assert keys == {key: shape for key, shape in figures["keys"].items() if not key.endswith(tuple(figures["skip"]))}


@needs_parity
@pytest.mark.full
def test_the_answers_are_the_published_ones() -> None:
    check_network("svit", "stvit_small", rtol=1e-4)
