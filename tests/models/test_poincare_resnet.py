"""Poincaré ResNet: published sizes, one narrow network of each geometry through everything, published answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lissom.errors import LissomError
from lissom.layers.poincare import (
    MobiusResidual,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareHead,
    collect_statistics_,
)
from lissom.models.factory import create_model, from_published
from lissom.models.poincare_resnet import GEOMETRIES, PoincareResNet, checkpoint_filter_fn, named
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
    parity,
    small,
)  # fmt: skip

PARAMS = {
    "hyperbolic_4_8_16_resnet_20": 17_529, "hyperbolic_8_16_32_resnet_20": 68_757,
    "hyperbolic_8_16_32_resnet_32": 117_601, "hyperbolic_16_32_64_resnet_20": 272_397,
    "euclidean_4_8_16_resnet_20": 17_682, "euclidean_8_16_32_resnet_20": 69_082,
    "euclidean_8_16_32_resnet_32": 118_138, "euclidean_16_32_64_resnet_20": 273_066,
    "euclideanwhypclass_4_8_16_resnet_20": 17_682, "euclideanwhypclass_8_16_32_resnet_20": 69_082,
    "euclideanwhypclass_8_16_32_resnet_32": 118_138, "euclideanwhypclass_16_32_64_resnet_20": 273_066,
}  # fmt: skip
NAME = "hyperbolic_4_8_16_resnet_20"
SMALL: dict[str, Any] = {"widths": (4, 6, 8), "depth": 8, "num_classes": 5}
PUBLISHED: dict[str, Any] = {"lambda_form": "published", "skip_dim": "width", "running": False}
SMALL_NAMES = [f"{geometry}_4_8_16_resnet_20" for geometry in GEOMETRIES]


def published_names(model: PoincareResNet) -> dict[str, torch.Tensor]:
    """The state of a network as the publisher would have written it."""
    state = {}
    for path, module in list(model.named_modules())[1:]:
        own = {f"{path}.{key}": value for key, value in module._parameters.items() if value is not None}
        if isinstance(module, PoincareConv2d):
            own = {f"{path}.weights": module.weight.flatten(1).T.clone(), f"{path}.bias": module.bias}
        elif isinstance(module, PoincareHead):
            own = {f"{path}.z": module.weight.T.clone(), f"{path}.bias": module.bias}
        elif isinstance(module, PoincareBatchNorm2d):
            own = {f"{path}.norm.{key}": value for key, value in own_state(module).items()}
            own[f"{path}.norm.running_mean"] = module.running_mean[None]
        else:
            own |= {f"{path}.{key}": value for key, value in module._buffers.items()}
        state |= own
        if hasattr(module, "ball"):
            state[f"{path}.ball.isp_c"] = torch.tensor(module.ball.fixed)
    return {**state, "conv_ball.isp_c": torch.tensor(0.1)}


def own_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


def shaken(model: Any) -> Any:
    """Weights that are not those of the start, so that what they multiply is felt."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    assert count(name) == PARAMS[name]


def test_any_name_of_the_publishers() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in named(name.replace("_", "-")).parameters()) for name in PARAMS}
        model = named("hyperbolic-4-8-16-resnet-8", num_classes=3)
    assert sizes == PARAMS
    assert len(model.group3) == 1
    assert model.fc.out_features == 3
    with pytest.raises(ValueError, match="no name of the form"):
        named("spherical-4-8-16-resnet-8")


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_a_step_reaches_every_parameter(name: str) -> None:
    model = small(name, **SMALL, in_chans=1)
    x = images(2, 1, 11, 9)
    check_trains(model, x)
    want = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    check_trains(model, x)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[key])


def test_learnt_curvatures() -> None:
    # At the start a linear layer is the identity at every curvature: no gradient could come from there.
    model = shaken(small(NAME, **SMALL, learn_c=True, c=0.3))
    check_trains(model, images(2, 3, 8, 8))
    curvatures = {name: p for name, p in model.named_parameters() if name.endswith("ball.raw")}
    assert len(curvatures) == sum(hasattr(m, "ball") for m in model.modules()) == 20
    assert all(p.grad != 0 for p in curvatures.values())


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_features_and_classifiers_at_odd_sizes(name: str) -> None:
    check_features(name, images(2, 3, 15, 9), **SMALL)
    check_classifier(small(name, **SMALL), images(2, 3, 15, 9))
    model = small(name, **SMALL).eval()
    with torch.no_grad():
        assert model(images(1, 3, 7, 5)).shape == (1, 5)  # one image
        maps = model.forward_intermediates(images(1, 3, 7, 5), [0, 1], stop_early=True, intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 7, 5), (6, 4, 3)]
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(images(1, 3, 7, 5), output_fmt="NHWC")


def test_a_new_classifier_is_of_the_networks_own_kind() -> None:
    for name, kind in zip(SMALL_NAMES, (PoincareHead, torch.nn.Linear, PoincareHead), strict=True):
        model = small(name, **SMALL)
        model.reset_classifier(3)
        assert type(model.fc) is kind
    model.use_published_forms_()
    model.reset_classifier(4)
    assert model.fc.lambda_form == "published"


class EveryLayer(torch.nn.Module):
    """One of each, as a network has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = PoincareConv2d(3, 4, 3, 2, 1), PoincareBatchNorm2d(4)
        self.downsample, self.skip, self.fc = PoincareConv2d(3, 4, 1, 2), MobiusResidual(), PoincareHead(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.skip(self.bn(self.conv(x)), self.downsample(x)).relu().mean((2, 3)))


def test_export_of_every_layer() -> None:
    model = shaken(EveryLayer())
    collect_statistics_(model, [images(8, 3, 13, 10)])
    check_export(model, images(1, 3, 13, 10, seed=5))


@pytest.mark.full
def test_export_with_running_statistics() -> None:
    model = shaken(small(NAME, **SMALL))
    collect_statistics_(model, [images(8, 3, 13, 10, seed=seed) for seed in range(2)])
    x = images(3, 3, 13, 10, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
    check_export(model, x[:1])


@pytest.mark.parametrize("name", SMALL_NAMES[1:])
def test_export_of_the_others(name: str) -> None:
    check_export(shaken(small(name, **SMALL)).eval(), images(1, 3, 12, 8))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_short_numbers(kind: torch.dtype) -> None:
    model = small(NAME, **SMALL).eval()
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        want = model(x)
        found = copy.deepcopy(model).to(kind)(x.to(kind))
    assert found.dtype is kind
    assert (found.float() - want).norm() < 0.05 * want.norm()


def test_published_checkpoints() -> None:
    source = shaken(PoincareResNet((8, 16, 32), 20, num_classes=7, in_chans=1)).use_published_forms_().eval()
    state = published_names(source)
    found = from_published("hyperbolic_8_16_32_resnet_20", state).eval()
    assert (found.num_classes, found.in_chans) == (7, 1)
    x = images(2, 1, 9, 9)
    with torch.no_grad():
        assert torch.equal(found(x), source(x))
        # Kept in own names, the weights still bring their forms; a network of the correct ones answers otherwise.
        again = from_published("hyperbolic_8_16_32_resnet_20", found.state_dict()).eval()
        assert torch.equal(again(x), source(x))
        other = create_model("hyperbolic_8_16_32_resnet_20", num_classes=7, in_chans=1).eval()
        other.load_state_dict({k: v for k, v in source.state_dict().items() if k != "forms"}, strict=False)
        assert not torch.allclose(other(x), source(x), rtol=1e-3)
    head = shaken(PoincareResNet((4, 8, 16), 20, "euclideanwhypclass")).use_published_forms_().eval()
    found = from_published("euclideanwhypclass_4_8_16_resnet_20", published_names(head)).eval()
    with torch.no_grad():
        assert torch.equal(found(images(2, 3, 9, 9)), head(images(2, 3, 9, 9)))
    for broken, what in (
        ({**state, "conv.ball.isp_c": torch.tensor(1.0)}, "curvature 1 at conv.ball, the network 0.1"),
        ({k: v for k, v in state.items() if k != "group1.1.bn1.norm.mean"}, "1 missing: group1.1.bn1.mean"),
        ({**state, "group4.0.conv1.bias": torch.zeros(1)}, "1 unknown: group4.0.conv1.bias"),
        ({**state, "group1.1.conv1.weights": torch.zeros(72, 9)}, "1 of another shape: group1.1.conv1.weight"),
        ({**state, "group1.1.conv1.weights": torch.zeros(71, 8)}, "not in a form known"),
    ):
        with pytest.raises(LissomError, match=what):
            from_published("hyperbolic_8_16_32_resnet_20", broken)


def test_forms_belong_to_the_weights() -> None:
    arguments = {"lambda_form": ("correct", "published"), "skip_dim": ("channel", "width"), "running": (True, False)}
    for number, (name, (correct, published)) in enumerate(arguments.items()):
        model = small(NAME, **SMALL, **{name: published})
        state = model.state_dict()
        assert state["forms"].tolist() == [int(place == number) for place in range(3)]
        plain = small(NAME, **SMALL, **{name: correct})
        assert plain.state_dict()["forms"].tolist() == [0, 0, 0]
        plain.load_state_dict(state)
        assert plain._is_in() == model._is_in()
        shown = {"lambda_form": plain.group2[0].conv1.lambda_form, "skip_dim": plain.group1[0].skip.dim,
                 "running": plain.group3[0].bn2.running}  # fmt: skip
        assert shown[name] == {"width": -1}.get(published, published)
        plain.load_state_dict({key: value for key, value in state.items() if key != "forms"}, strict=False)
        assert plain._is_in() == model._is_in()
    copied = copy.deepcopy(model)
    collect_statistics_(copied, [images(4, 3, 8, 8)])
    assert copied.state_dict()["forms"].tolist() == [0, 0, 0]
    assert model.state_dict()["forms"].tolist() == [0, 0, 1]
    assert "forms" not in small(SMALL_NAMES[1], **SMALL).state_dict()
    head = small(SMALL_NAMES[2], **SMALL)
    head.load_state_dict(small(SMALL_NAMES[2], **SMALL, lambda_form="published").state_dict())
    assert head.fc.lambda_form == "published"


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"depth": 18}, "not 6 n"),
        ({"widths": (4, 8)}, "each of the three groups"),
        ({"geometry": "flat"}, "none of hyperbolic"),
        ({"skip_dim": "height"}, "none of channel, width"),
        ({"lambda_form": "other"}, "none of correct, published"),
        ({"order": "ff"}, "none of fr, rf"),
        ({"init": "zero"}, "none of identity, normal"),
        ({"c": 0.0}, "makes no ball"),
    ],
)
def test_networks_that_cannot_be(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PoincareResNet(**wrong)


# Published figures

NETWORKS = ("hyperbolic_4_8_16_resnet_20", "hyperbolic_8_16_32_resnet_20")


@needs_parity
@pytest.mark.parametrize("name", NETWORKS)
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("poincare_resnet", name)


@needs_parity
def test_the_start_is_the_published_one() -> None:
    own, figures = parity(), fixture("poincare_resnet", "hyperbolic_8_16_32_resnet_20_identity_init")
    x = own.make_input(tuple(figures["input"]))
    with torch.no_grad():
        model = create_model("hyperbolic_8_16_32_resnet_20", **PUBLISHED).eval()
        assert own.close(own.digest(model(x)), figures["output"], 1e-5)
        for correct in ({"lambda_form": "correct"}, {"skip_dim": "channel"}, {"running": True}):
            other = create_model("hyperbolic_8_16_32_resnet_20", **{**PUBLISHED, **correct}).eval()
            assert not own.close(own.digest(other(x)), figures["output"], 1e-2)


@needs_parity
@pytest.mark.parametrize("name", NETWORKS)
def test_every_published_name_is_translated(name: str) -> None:
    figures = fixture("poincare_resnet", name)
    state = {key: torch.full(shape, 0.1) for key, shape in figures["keys"].items()}  # the curvatures with them
    model = create_model(name)
    found = checkpoint_filter_fn(state, model)
    assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in model.state_dict().items()}
