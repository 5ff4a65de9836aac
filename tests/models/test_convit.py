"""ConViT: timm's class with the publisher's sizes and checkpoints, the form without local blocks, gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Attention

from lissom.errors import LissomError
from lissom.models.convit import ConViT, attention_distances, checkpoint_filter_fn, gates, gpsa_from_attention
from lissom.models.factory import from_published
from lissom.ops.gpsa import GPSA
from tests.models.families import (
    check_classifier,
    check_export,
    check_network,
    check_trains,
    count,
    images,
    needs_parity,
    small,
)

SIZES = {"convit_tiny": 5_710_512, "convit_small": 27_777_322, "convit_base": 86_540_040}
# timm multiplies the width by the heads.
NARROW: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 4, "num_heads": 4, "depth": 3}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    assert count(name) == SIZES[name]


def test_the_form_without_local_blocks() -> None:
    # GPSA has a projection of positions, (3 + 1) h, and gates, h: 5 h parameters more than plain attention.
    assert count("convit_tiny_local0") == SIZES["convit_tiny"] - 10 * 5 * 4
    model = small("convit_tiny_local0", **NARROW, num_classes=5)
    assert gates(model) == {}
    assert model.forward_features(images(2, 3, 32, 32)).shape == (2, 17, 16)


@pytest.mark.parametrize("local", [0, 2])
def test_one_network_through_everything(local: int) -> None:
    model = small("convit_tiny_local0", **NARROW, num_classes=5, local_up_to_layer=local)
    x = images(2, 3, 32, 32)
    check_trains(model, x)
    check_classifier(model, x)
    maps = small("convit_tiny_local0", **NARROW, local_up_to_layer=local, features_only=True, out_indices=(1, 2))(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4)] * 2
    check_export(small("convit_tiny_local0", **NARROW, num_classes=5, local_up_to_layer=local), x[:1])


@pytest.mark.parametrize(("name", "dim", "heads"), [("tiny", 256, 4), ("small", 576, 9), ("base", 1024, 16)])
def test_sizes_of_the_wider_networks(name: str, dim: int, heads: int) -> None:
    def formula(dim: int, heads: int) -> int:
        return 12 * (12 * dim**2 + 10 * dim) + 50 * heads + (768 + 196 + 4 + 1000) * dim + 1000

    assert formula(48 * heads, heads) == SIZES[f"convit_{name}"]
    assert count(f"convit_{name}_plus") == formula(dim, heads)


def test_with_our_layers_it_is_timms_network() -> None:
    theirs = small("convit_tiny", **NARROW, local_up_to_layer=2, num_classes=5).eval()
    ours = small("convit_tiny_plus", **NARROW, local_up_to_layer=2, num_classes=5).eval()
    assert isinstance(ours, ConViT)
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        distances = attention_distances(ours, x), attention_distances(theirs, x)
    assert distances[0].keys() == distances[1].keys() == {"blocks.0.attn", "blocks.1.attn"}
    for path, found in distances[0].items():
        torch.testing.assert_close(found, distances[1][path], rtol=1e-4, atol=1e-4)
    assert not ours._modules["blocks"][0].attn._forward_hooks


def test_what_timms_network_does_not_do() -> None:
    model = small("convit_tiny_plus", **{**NARROW, "img_size": (32, 48)}, local_up_to_layer=2, num_classes=5)
    for block in model.blocks[:2]:
        block.attn.pos_proj.bias.requires_grad_(False)  # the softmax takes it away
    x = images(2, 3, 32, 48)
    check_trains(model, x)
    kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    check_trains(model, x)
    for name, parameter in model.named_parameters():
        if name in kept:
            torch.testing.assert_close(parameter.grad, kept[name])
    check_export(model, x[:1])
    begun, random = (small("convit_tiny_plus", **NARROW, local_init=flag).blocks[0].attn for flag in (True, False))
    assert torch.equal(begun.v.weight, torch.eye(16))
    assert random.v.weight.abs().max() < 0.2
    with pytest.raises(LissomError, match="no dropout inside"):
        small("convit_tiny_plus", **NARROW, attn_drop_rate=0.1)


def test_position_embeddings_of_another_grid_are_resized() -> None:
    square = small("convit_tiny", **NARROW, local_up_to_layer=2)
    wide = small("convit_tiny_plus", **{**NARROW, "img_size": (32, 64)}, local_up_to_layer=2)
    torch.nn.init.constant_(square.pos_embed, 0.5)
    wide.load_state_dict(checkpoint_filter_fn(square.state_dict(), wide))
    torch.testing.assert_close(wide.pos_embed, torch.full((1, 32, 16), 0.5))
    assert wide.eval()(images(1, 3, 32, 64)).shape == (1, 1000)


def test_gates() -> None:
    model = small("convit_tiny", **NARROW, local_up_to_layer=2)
    found = gates(model)
    assert found.keys() == {"blocks.0.attn", "blocks.1.attn"}
    assert torch.allclose(found["blocks.0.attn"], torch.full((4,), 0.7310586))
    assert gates(GPSA(8, 4)).keys() == {""}


def test_the_operator_answers_as_timms_layer() -> None:
    layer = small("convit_tiny", **NARROW, local_up_to_layer=2).blocks[0].attn
    torch.nn.init.normal_(layer.pos_proj.weight, std=0.3)
    torch.nn.init.normal_(layer.gating_param)
    op = GPSA(16, 4)
    op.load_state_dict(layer.state_dict())
    x = images(2, 16, 16)
    assert torch.allclose(op(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_becomes_gated(bias: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, qkv_bias=bias).double()
    gated = gpsa_from_attention(attention, grid=(2, 3), gate=-60.0)
    x = images(2, 6, 8).double()
    assert torch.allclose(gated(x), attention(x))
    with pytest.raises(ValueError, match="normalises inside"):
        gpsa_from_attention(Attention(8, 2, qk_norm=True, norm_layer=torch.nn.LayerNorm))
    with pytest.raises(ValueError, match="no qkv"):
        gpsa_from_attention(torch.nn.Linear(8, 8))


@pytest.mark.parametrize("name", ["convit_tiny", "convit_tiny_local0"])
def test_checkpoints(name: str) -> None:
    state = small(name, num_classes=7, in_chans=1).state_dict()
    loaded = from_published(name, state)
    assert loaded.num_classes == 7
    assert torch.equal(loaded.pos_embed, state["pos_embed"])
    gone = "blocks.11.attn.qkv.weight"
    with pytest.raises(LissomError, match=rf"1 missing: {gone}"):
        from_published(name, {key: value for key, value in state.items() if key != gone})
    with pytest.raises(LissomError, match="1 unknown: foreign"):
        from_published(name, {**state, "foreign": torch.zeros(1)})
    with pytest.raises(LissomError, match="1 of another shape"):
        from_published(name, {**state, gone: torch.zeros(3, 3)})


def test_the_two_forms_do_not_mix() -> None:
    with pytest.raises(LissomError, match=r"missing: blocks.0.attn.qkv.weight"):
        from_published("convit_tiny_local0", small("convit_tiny").state_dict())


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["convit_tiny", "convit_small"])
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("convit", name, rtol=1e-4)
