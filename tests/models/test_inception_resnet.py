"""Inception-ResNet: published sizes and figures, the plain form, folded scales, views and ensembles."""

from __future__ import annotations

import pytest
import torch

from lissom.errors import LissomError
from lissom.models.ensemble import Ensemble, multi_crop
from lissom.models.factory import create_model, from_published
from lissom.models.inception_resnet import InceptionResNet, ResidualInception
from tests.models.families import (
    check_classifier,
    check_export,
    check_fuse,
    check_operator,
    check_trains,
    count,
    images,
    needs_parity,
    settle,
    small,
)

NAMES = ("inception_resnet_v1", "inception_resnet_v1_facenet", "inception_resnet_v2_paper")
SMALL = {"width": 1 / 16, "depths": (1, 1, 1), "num_classes": 5, "drop_rate": 0.0}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("inception_resnet_v1", 22_756_328),
        ("inception_resnet_v1_facenet", 23_995_624),
        ("inception_v4", 42_679_816),
        ("inception_resnet_v2", 55_843_464),
    ],
)
def test_published_sizes(name: str, params: int) -> None:
    assert count(name) == params


def test_the_papers_second_version_has_the_widths_that_additions_allow() -> None:
    with torch.device("meta"):
        model = create_model("inception_resnet_v2_paper")
        assert [info["num_chs"] for info in model.feature_info] == [64, 192, 384, 1152, 2144]


@pytest.mark.parametrize("name", NAMES)
def test_a_small_one_trains_and_folds(name: str) -> None:
    x = images(2, 3, 96, 91)
    check_trains(small(name, **SMALL), x)
    check_fuse(small(name, **SMALL), x)


@pytest.mark.parametrize("name", NAMES)
def test_classifier_and_maps(name: str) -> None:
    model = small(name, **SMALL).eval()
    x = images(2, 3, 96, 96)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x))
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        only = small(name, features_only=True, **SMALL).eval()
        assert [m.shape for m in only(x)] == [m.shape for m in maps]
        assert len(model.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)) == 2
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
    if name == "inception_resnet_v1_facenet":
        model.reset_classifier(0)
        assert model(x).shape == (2, 512)
    else:
        check_classifier(model, x)


def test_export() -> None:
    model = settle(small("inception_resnet_v1_facenet", **SMALL), images(2, 3, 96, 96))
    check_export(model, images(1, 3, 96, 96, seed=1))


def test_grids_of_the_paper() -> None:
    with torch.device("meta"):
        model = create_model("inception_resnet_v1")
        assert [m.shape[-1] for m in model.forward_intermediates(torch.empty(1, 3, 299, 299))[1][2:]] == [35, 17, 8]
        assert [m.shape[-1] for m in model.forward_intermediates(torch.empty(1, 3, 160, 160))[1][2:]] == [17, 8, 3]


BRANCHES = [[(4, 1)], [(4, 1), (6, (1, 7)), (6, (7, 1))]]


def test_a_residual_block_follows_its_formula() -> None:
    block = settle(ResidualInception(8, BRANCHES, scale=0.3), images(4, 8, 9, 7))
    x = images(2, 8, 9, 7, seed=1)
    with torch.no_grad():
        mixed = torch.cat([block.branch0(x), block.branch1(x)], 1)
        assert torch.allclose(block(x), (x + 0.3 * block.conv2d(mixed)).relu())
        block.scale = 0.0
        assert torch.equal(block(x), x.relu())
        block.scale, block.act = 0.3, torch.nn.Identity()
        assert (block(x) < 0).any()
        block.residual = False
        assert torch.allclose(block(x), block.conv2d(mixed))


def test_scales_fold_into_the_expansions() -> None:
    model = settle(small("inception_resnet_v1", **SMALL), images(4, 3, 96, 96))
    x = images(2, 3, 96, 96, seed=1)
    with torch.no_grad():
        want = model(x)
        assert model.fold_scale_() is model
        assert all(m.scale == 1 for m in model.modules() if isinstance(m, ResidualInception))
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-6)


def test_without_the_additions_the_parameters_are_as_many() -> None:
    assert count("inception_resnet_v1", residual=False) == count("inception_resnet_v1")
    x = images(2, 3, 96, 96)
    plain, other = (settle(small("inception_resnet_v1", **SMALL, residual=r), x) for r in (False, True))
    with torch.no_grad():
        assert not torch.allclose(plain(x), other(x))


def test_gradient_checkpoints_change_nothing() -> None:
    x = images(2, 3, 96, 96)
    gradients = []
    for enable in (False, True):
        model = small("inception_resnet_v1", **SMALL).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append(model.conv2d_1a.conv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_there_is_no_third_version() -> None:
    with pytest.raises(ValueError, match="versions 1 and 2"):
        InceptionResNet(3)


def test_published_checkpoints_fit_strictly() -> None:
    state = dict(create_model("inception_resnet_v1_facenet", num_classes=8631).state_dict())
    model = from_published("inception_resnet_v1_facenet", state)
    assert model.num_classes == 8631
    state["last_linear.bias"] = state.pop("last_linear.weight")[0]
    with pytest.raises(LissomError, match=r"last_linear\.weight.*last_linear\.bias"):
        from_published("inception_resnet_v1_facenet", state)


@needs_parity
@pytest.mark.parametrize(
    ("name", "channels", "scale", "branches"),
    [
        ("op_irv1_block35", 256, 0.17, [[(32, 1)], [(32, 1), (32, 3)], [(32, 1), (32, 3), (32, 3)]]),
        ("op_irv1_block17", 896, 0.10, [[(128, 1)], [(128, 1), (128, (1, 7)), (128, (7, 1))]]),
    ],
)
def test_published_blocks(name: str, channels: int, scale: float, branches: list) -> None:
    def build(state: dict[str, torch.Tensor]) -> torch.nn.Module:
        block = ResidualInception(channels, branches, scale)
        block.load_state_dict(state)
        return block

    check_operator("inception_v4", name, build)


@needs_parity
def test_timms_block_is_the_published_one() -> None:
    from functools import partial

    from timm.layers import ConvNormAct
    from timm.models.inception_v4 import InceptionA

    def build(state: dict[str, torch.Tensor]) -> torch.nn.Module:
        conv = partial(ConvNormAct, padding=0, norm_kwargs={"eps": 1e-3}, act_layer=torch.nn.ReLU)
        block = InceptionA(conv)
        block.load_state_dict(state)
        return block

    check_operator("inception_v4", "op_inception_a", build)


class Constant(torch.nn.Module):
    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1) * x.flatten(1)[:, :1]


def test_an_ensemble_averages_shares() -> None:
    one, other = Constant(2.0, 0.0, -1.0), Constant(0.0, 1.0, 0.5)
    x = torch.ones(2, 1)
    want = (one(x).softmax(-1) + other(x).softmax(-1)) / 2
    assert torch.allclose(Ensemble([one, other])(x).softmax(-1), want)
    assert torch.allclose(Ensemble([one, other])(x).exp(), want)
    assert torch.allclose(Ensemble([one, other], "logit")(x), (one(x) + other(x)) / 2)


def test_an_ensemble_averages_views() -> None:
    model = Constant(2.0, 0.0, -1.0)
    x = torch.tensor([[1.0], [3.0], [0.5], [2.0]])  # two views of each of two images
    shares = Ensemble([model], views=2)(x).exp()
    want = torch.stack([model(x[:2]).softmax(-1).mean(0), model(x[2:]).softmax(-1).mean(0)])
    assert torch.allclose(shares, want)


@pytest.mark.parametrize(
    ("models", "average", "reason"), [([], "prob", "at least one"), ([Constant(1.0)], "max", "'max'")]
)
def test_ensembles_that_cannot_be(models: list, average: str, reason: str) -> None:
    with pytest.raises(LissomError, match=reason):
        Ensemble(models, average)


@pytest.mark.parametrize("shape", [(3, 60, 90), (3, 90, 60), (1, 41, 41)])
@pytest.mark.parametrize("number", [1, 10, 12, 144])
def test_views(shape: tuple[int, ...], number: int) -> None:
    image = images(*shape)
    views = multi_crop(image, 28, number)
    assert views.shape == (number, shape[0], 28, 28)
    if number == 10:
        assert torch.equal(views[5:], views[:5].flip(-1))
        assert torch.equal(views[0], multi_crop(image, 28, 1)[0])


def test_views_stand_where_they_should() -> None:
    rows = torch.arange(64.0)[None, :, None].expand(1, 64, 64)  # a resize to the same size changes nothing
    views = multi_crop(rows, 56, 10)
    assert views[0, 0, 0, 0].item() == pytest.approx(4, abs=1e-3)
    assert [v[0, 0, 0].item() for v in views[1:5]] == pytest.approx([0, 0, 8, 8], abs=1e-3)


def test_views_that_cannot_be() -> None:
    with pytest.raises(LissomError, match="not 11"):
        multi_crop(images(3, 40, 40), 28, 11)
    with pytest.raises(LissomError, match=r"\(C, H, W\)"):
        multi_crop(images(1, 3, 40, 40), 28)
