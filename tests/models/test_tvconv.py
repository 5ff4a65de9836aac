"""Face networks with TVConv: published sizes, folding, export, checkpoints in the publisher's layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lissom.errors import LissomError
from lissom.layers.tvconv import TVConv2d
from lissom.models.factory import create_model, from_published
from lissom.models.tvconv import checkpoint_filter_fn
from tests.models.families import check_export, check_fuse, check_trains, count, images, settle, small

SMALL: dict[str, Any] = {"img_size": 32, "hidden": 4, "layers": 0, "embedding": 8, "most": 1}
MOBILE, SHUFFLE = "mobilenet_v2_x0_1_tvconv", "shufflenet_v2_x0_5_tvconv"


@pytest.mark.parametrize(
    ("name", "base", "tvconv"),
    [
        ("mobilenet_v2_x0_1", 324_672, 16_369_368),
        ("mobilenet_v2_x0_2", 404_352, 19_678_248),
        ("mobilenet_v2_x0_5", 827_968, 30_079_264),
        ("mobilenet_v2_x1_0", 2_241_280, 49_708_576),
        ("shufflenet_v2_x0_5", 869_664, 10_602_984),
        ("shufflenet_v2_x1_0", 1_781_476, 18_904_696),
    ],
)
def test_published_sizes(name: str, base: int, tvconv: int) -> None:
    assert (count(f"{name}_base"), count(f"{name}_tvconv")) == (base, tvconv)


def test_stored_kernels() -> None:
    with torch.device("meta"):
        model = create_model(MOBILE)
    layers = [m for m in model.modules() if isinstance(m, TVConv2d)]
    stored = sum(m.channels * m.kernel_size**2 * m.size[0] * m.size[1] for m in layers)
    own = sum(p.numel() for m in layers for p in m.parameters())
    assert (stored, sum(p.numel() for p in model.parameters()) - own) == (4_084_992, 315_096)


@pytest.mark.parametrize("name", [MOBILE, SHUFFLE])
def test_a_small_one_trains_folds_and_is_exported(name: str) -> None:
    x = images(2, 3, 32, 32)
    model = small(name, **SMALL)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    folded = check_fuse(small(name, **SMALL), x)
    assert not any(isinstance(m, TVConv2d) for m in folded.modules())
    if name == SHUFFLE:  # the other consists of the same operators
        check_export(folded, images(1, 3, 32, 32, seed=1))


@pytest.mark.parametrize("name", [MOBILE, SHUFFLE, "mobilenet_v2_x0_1_base"])
def test_embedding_classifier_and_maps(name: str) -> None:
    sizes = {**SMALL, "img_size": 32}
    model = small(name, **sizes).eval()
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        assert model(x).shape == (2, 8)
        model.reset_classifier(5)
        assert model(x).shape == (2, 5)
        assert model.get_classifier().out_features == 5
        assert small(name, num_classes=7, **sizes).eval()(x).shape == (2, 7)
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x))
        assert [m.shape[1] for m in maps] == [i["num_chs"] for i in model.feature_info]
        assert [m.shape[-1] for m in maps] == [32 // i["reduction"] for i in model.feature_info]
        only = small(name, features_only=True, **sizes).eval()
        assert [m.shape for m in only(x)] == [m.shape for m in maps]
        assert len(model.forward_intermediates(x, 2, intermediates_only=True, stop_early=True)) == 2
        with pytest.raises(ValueError, match="NCHW"):
            model.forward_intermediates(x, output_fmt="NLC")


def test_the_plain_one_takes_other_sizes_and_the_other_says_why_not() -> None:
    with torch.no_grad():
        assert small("mobilenet_v2_x0_1_base").eval()(images(1, 3, 70, 51)).shape == (1, 512)
        with pytest.raises(ValueError, match="do not fit an input of 48 x 48"):
            small(MOBILE, **SMALL).eval()(images(1, 3, 48, 48))


def test_unknown_forms() -> None:
    with pytest.raises(LissomError, match="'base' or 'tvconv'"):
        create_model(MOBILE, atom="involution")
    with pytest.raises(LissomError, match="x0_5, x1_0"):
        create_model(SHUFFLE, width="x9")


@pytest.mark.parametrize("name", [MOBILE, SHUFFLE])
def test_checkpoints_in_the_publishers_layout(name: str) -> None:
    x = images(2, 3, 32, 32)
    model = settle(small(name, **SMALL), x)
    published = {k.replace("output_layer.layer1.", "output_layer.layer1.0."): v for k, v in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, TVConv2d):
            for number in ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w"):
                published[f"{path}.{number}"] = torch.tensor(3)
    again = create_model(name, **SMALL)
    again.load_state_dict(checkpoint_filter_fn(published, again))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))


def test_checkpoints_that_do_not_fit() -> None:
    state = dict(create_model("mobilenet_v2_x0_1_base").state_dict())
    from_published("mobilenet_v2_x0_1_base", state)
    state["tail.weight"] = state.pop("features.0.0.weight")
    with pytest.raises(LissomError, match=r"missing: features\.0\.0\.weight.*unknown: tail\.weight"):
        from_published("mobilenet_v2_x0_1_base", state)
