"""vit_segmenter: shapes, decoders, timm's conventions, and tokens that another technique can shorten."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lissom.errors import LissomError
from lissom.export.capture import capture
from lissom.models.factory import create_model, from_published, load_model
from lissom.models.segmenter import MaskTransformer
from lissom.models.vit import waves

SMALL = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture(params=["vit_segmenter", "vit_segmenter_mask"])
def name(request):
    return request.param


def test_the_default_network(name):
    model = create_model(name)
    assert model(torch.zeros(1, 3, 96, 128)).shape == (1, 11, 96, 128)
    assert len(model.blocks) == 6
    assert torch.allclose(model.pos_embed[0], 0.7 * waves(12, 16, 192))
    prepared = load_model(name, num_classes=4).preprocessing((360, 480))
    assert (prepared.height, prepared.width, prepared.resize, prepared.crop) == (96, 128, "squash", 1.0)


def test_any_size_the_patch_divides_and_prefix_tokens(name):
    model = create_model(name, **SMALL)
    assert model(torch.zeros(2, 3, 16, 24)).shape == (2, 5, 16, 24)
    more = create_model(name, **SMALL, class_token=True, reg_tokens=2, in_chans=1)
    x = torch.rand(2, 1, 16, 24)
    assert more(x).shape == (2, 5, 16, 24)
    assert more.forward_features(x).shape == (2, 3 + 24, 12)
    assert more.forward_head(more.forward_features(x), pre_logits=True).shape == (2, 24, 12)


def test_the_linear_decoder_is_a_layer_a_token_and_a_bilinear_enlargement():
    model = create_model("vit_segmenter", **SMALL).eval()
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        tokens = model.forward_features(x)  # (2, 24, 12)
        maps = torch.einsum("bnd,kd->bkn", tokens, model.head.weight) + model.head.bias[:, None]
        expected = functional.interpolate(maps.reshape(2, 5, 4, 6), scale_factor=4, mode="bilinear")
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_the_mask_transformer_scores_by_the_cosine_of_patch_and_class():
    torch.manual_seed(0)
    decoder = MaskTransformer(12, 5, layers=1).eval()
    x = torch.randn(2, 7, 12)
    seen = {}
    decoder.scale.register_forward_hook(lambda module, inputs, output: seen.update(cosines=inputs[0]))
    with torch.no_grad():
        logits = decoder(x)
        z = decoder.norm(decoder.blocks(torch.cat([x, decoder.classes.weight.expand(2, 5, 12)], 1)))
        patches, classes = decoder.patch_proj(z[:, :7]), decoder.class_proj(z[:, 7:])
        cosines = functional.cosine_similarity(patches[:, :, None], classes[:, None], dim=-1)
    assert torch.allclose(seen["cosines"], cosines, atol=1e-5)
    assert torch.allclose(logits, functional.layer_norm(cosines, (5,)), atol=1e-4)


def test_tokens_can_be_shortened_between_blocks_and_logits_restored(name):
    model = create_model(name, **SMALL).eval()
    x = torch.rand(1, 3, 16, 24)
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output.unflatten(1, (12, 2)).mean(2))
    model.head.register_forward_hook(lambda module, inputs, output: output.repeat_interleave(2, 1))
    with torch.no_grad():
        assert model(x).shape == (1, 5, 16, 24)


def test_timms_conventions(name):
    model = create_model(name, **SMALL)
    model.reset_classifier(3)
    assert model(torch.zeros(1, 3, 16, 24)).shape == (1, 3, 16, 24)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 16, 24)).shape == (1, 24, 12)
    features = create_model(name, **SMALL, features_only=True, out_indices=(0, 1))
    assert [f.shape for f in features(torch.zeros(1, 3, 16, 24))] == [(1, 12, 4, 6)] * 2


def test_weights_tell_the_number_of_classes(name):
    model = create_model(name, num_classes=4, depth=6).eval()
    again = from_published(name, model.state_dict()).eval()
    x = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def test_it_trains_and_exports(name):
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL, "depth": 1})
    loss = functional.cross_entropy(model(torch.rand(2, 3, 16, 24)), torch.randint(5, (2, 16, 24)))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    x = torch.rand(1, 3, 16, 24)
    program = capture(model, (3, 16, 24))
    with torch.no_grad():
        assert torch.allclose(program.module()(x), model.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": (18, 24)}, "the patches of 4 x 4 do not divide 18 x 24"),
        ({"decoder": "conv"}, "the decoder 'conv' is none of linear, mask"),
        ({"dynamic_img_size": True}, "fixed input size"),
        ({"global_pool": "avg"}, "decoded one by one"),
    ],
)
def test_what_cannot_be_built_is_told(arguments, message):
    with pytest.raises(LissomError, match=message):
        create_model("vit_segmenter", **{**SMALL, **arguments})
