"""Dyn-Perceiver: published sizes and checkpoints, the order of its exits, one tiny network through everything."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from lissom.errors import LissomError
from lissom.export.plan import Plan
from lissom.layers.exits import own_exits
from lissom.meters.costs import layer_costs, total
from lissom.models.dyn_perceiver import (
    CNNS,
    LATENTS,
    CrossAttention,
    DynPerceiver,
    checkpoint_filter_fn,
    own_key,
    split_cnn,
)
from lissom.models.factory import create_model, from_published, is_model
from lissom.techniques.fuse import Fuse
from tests.models.families import (
    check_classifier,
    check_export,
    check_features,
    check_trains,
    count,
    fixture,
    images,
    needs_parity,
    parity,
    settle,
)  # fmt: skip
from tests.models.tiny_perceiver import SHAPE, cnn, tiny
from tests.parity_adapters import OUTPUTS

PARAMS = {
    "reg800m_perceiver_t128": 21_798_360, "resnet50_0375_perceiver_t128": 20_283_336,
    "mobilenetV3_0x75_perceiver_t128": 9_299_040, "reg400m_perceiver_t128": 11_606_544,
    "dyn_perceiver_mobilenetv3_075": 9_299_040,
}  # fmt: skip
# Multiply-accumulates at the four exits by the publisher's counter, which leaves out some small layers.
MACS = {
    "reg800m_perceiver_t128": (0.459e9, 1.065e9, 1.228e9, 1.298e9),
    "mobilenetV3_0x75_perceiver_t128": (0.098e9, 0.182e9, 0.207e9, 0.266e9),
    "reg400m_perceiver_t128": (0.262e9, 0.475e9, 0.611e9, 0.634e9),
}
WIDTHS = {
    "reg800m_perceiver_t128": [32, 64, 144, 320, 784], "resnet50_0375_perceiver_t128": [24, 96, 192, 384, 768],
    "mobilenetV3_0x75_perceiver_t128": [24, 32, 64, 120, 720], "reg400m_perceiver_t128": [32, 48, 104, 208, 440],
}  # fmt: skip
PUBLISHED = tuple(WIDTHS)[:3]
EXITS = (1, 2, 3, 4)


class At(nn.Module):
    """A network that stops at one of its exits."""

    def __init__(self, model: nn.Module, exit: int) -> None:
        super().__init__()
        self.model, self.exit = model, exit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, exit=self.exit)


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    assert count(name) == PARAMS[name]


class All(nn.Module):
    """A network that answers at all of its exits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model.answers(x))


# What runs between one exit and the next.
STEPS = (
    r"stem|stages\.[01]|exchanges\.[012]|heads\.early",
    r"stages\.2|exchanges\.3|heads\.late|knowledge\.early",
    r"stages\.3|heads\.maps",
    r"last_z2x|heads\.merged|knowledge\.late",
)


@pytest.mark.parametrize("name", MACS)
def test_costs_at_the_exits(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert model.widths == WIDTHS[name]
    costs = [cost for cost in layer_costs(All(model), (3, 224, 224)) if cost.macs]
    steps = [sum(c.macs for c in costs if re.match(rf"model\.({step})(\.|$)", c.path)) for step in STEPS]
    assert sum(steps) == sum(c.macs for c in costs)
    found = list(itertools.accumulate(steps))
    found[3] -= sum(c.macs for c in costs if c.path.startswith("model.heads.maps"))
    assert found == pytest.approx(MACS[name], rel=0.02)


def test_every_name_is_known() -> None:
    names = [f"{cnn}_perceiver_t{latents}" for cnn in CNNS for latents in LATENTS[cnn]]
    assert len(names) == 62
    assert all(is_model(name) for name in names)
    for name in ("reg400m_perceiver_t256", "resnet18_perceiver_t128", "mobilenetV3_1x25_perceiver_t128"):
        assert is_model(name)
    assert f"dyn_perceiver/{names[0]}" in OUTPUTS
    config = timm.get_pretrained_cfg("resnet18_perceiver_t128")
    assert config.input_size == (3, 224, 224)
    assert create_model("dyn_perceiver_resnet50_0375", depths=(1, 1, 1, 1), drop_path_rate=0.0).latent.shape[0] == 128


def test_four_answers_in_training_and_the_merged_one_alone_else() -> None:
    model, x = settle(tiny(), images(8, *SHAPE)), images(3, *SHAPE, seed=1)
    with torch.no_grad():
        merged, whole = model(x), tuple(model.answers(x))
        assert torch.equal(merged, whole[-1])
        assert [answer.shape for answer in whole] == [(3, 4)] * 4
        for exit in EXITS:
            torch.testing.assert_close(model(x, exit=exit), whole[exit - 1])
        several = model.train()(x)
    assert isinstance(several, tuple)
    assert len(several) == 4
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(whole))
    for wrong in (0, 5, "all"):
        with pytest.raises(ValueError, match="exits go from 1 to 4"):
            model(x, exit=wrong)


def test_stopping_early_runs_less() -> None:
    model = tiny().eval()
    ran: list[str] = []
    for path, module in model.named_modules():
        if path.count(".") == 1 and path.startswith(("stages", "exchanges", "heads")):
            module.register_forward_hook(lambda m, i, o, path=path: ran.append(path))
    model(images(1, *SHAPE), exit=1)
    assert ran == ["exchanges.0", "stages.0", "exchanges.1", "stages.1", "exchanges.2", "heads.early"]
    ran.clear()
    model(images(1, *SHAPE), exit=2)
    assert ran[6:] == ["stages.2", "exchanges.3", "heads.late"]
    ran.clear()
    model(images(1, *SHAPE), exit=3)
    assert ran[9:] == ["stages.3", "heads.maps"]
    ran.clear()
    model(images(1, *SHAPE))
    assert ran[9:] == ["stages.3", "heads.merged"]  # what the merged answer does not need is left out
    costs = [total(At(model, exit), SHAPE)[1] for exit in EXITS]
    assert costs == sorted(set(costs))


def test_tokens_are_halved_and_maps_keep_their_shape() -> None:
    model = tiny().eval()
    seen: dict[str, Any] = {}
    for number, exchange in enumerate(model.exchanges):
        for name in ("self_attention", "z2x"):
            if (module := getattr(exchange, name)) is not None:
                module.register_forward_hook(
                    lambda m, i, o, key=f"{number} {name}": seen.update({key: (i[0].shape, o.shape)})
                )
    model(images(2, *SHAPE))
    assert [seen[f"{n} self_attention"][0] for n in range(4)] == [(2, 16, 8), (2, 8, 8), (2, 4, 16), (2, 2, 16)]
    assert [seen[f"{n} z2x"] for n in (1, 2, 3)] == [((2, p, c),) * 2 for p, c in ((64, 8), (16, 16), (4, 16))]


def test_attention_by_definition() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(12, 10, qk_dim=6, num_heads=2, positions=9).double()
    nn.init.normal_(layer.attention.relative_position_bias)
    x, kv = images(2, 5, 12).double(), images(2, 9, 10, seed=1).double()
    own = layer.attention
    q, k, v = own.q_proj(layer.q_norm(x)), own.k_proj(layer.kv_norm(kv)), own.v_proj(layer.kv_norm(kv))
    k = k + own.relative_position_bias
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (q[..., part] @ k[..., part].mT / 3**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    y = x + own.o_proj(torch.cat(heads, -1))
    want = y + layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(layer.mlp.norm(y))))
    torch.testing.assert_close(layer(x, kv), want)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(), kv.requires_grad_()))


def test_a_step_reaches_every_parameter() -> None:
    model, x = tiny(in_chans=1), images(4, 1, 16, 16)
    check_trains(model, x)
    without = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    check_trains(model, x)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, without[name], atol=1e-5, rtol=1e-4)


def test_later_exits_hear_of_earlier_ones() -> None:
    x = images(4, *SHAPE)
    for isc in (True, False):
        model = tiny(isc=isc).train()
        model(x)[1].sum().backward()
        assert (model.heads["early"].weight.grad is not None) == isc  # the gradient goes through the logits
        assert model.heads["maps"].weight.grad is None
        assert model.heads["merged"][1].in_features == 24 + 16 * (1 + isc)
        assert [len(exit.carries) for exit in own_exits(model)] == ([3, 4, 4] if isc else [2, 3, 3])


def test_classifiers() -> None:
    model, x = tiny(), images(2, *SHAPE)
    model.reset_classifier(9)
    assert [answer.shape for answer in model.train()(x)] == [(2, 9)] * 4
    assert set(model.get_classifier()) == {"early", "late", "maps", "merged"}
    check_classifier(model, x)
    assert own_exits(model) == ()
    hidden = tiny(hidden=10, drop_rate=0.2)
    hidden.reset_classifier(6)
    assert hidden.heads["maps"][0].out_features == 10
    assert hidden.eval()(x).shape == (2, 6)
    with pytest.raises(ValueError, match="averaged"):
        model.reset_classifier(3, "max")


def test_features() -> None:
    sizes: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_classes": 5}
    check_features("mobilenetV3_0x5_perceiver_t128", images(1, 3, 64, 64), **sizes)
    maps = create_model("reg400m_perceiver_t32", features_only=True, out_indices=(0, 1), **sizes)(images(1, 3, 64, 64))
    assert [m.shape for m in maps] == [(1, 48, 16, 16), (1, 104, 8, 8)]


@pytest.mark.full
def test_export_and_fusion_keep_the_merged_answer() -> None:
    model = settle(tiny(), images(8, *SHAPE))
    check_export(model, images(1, *SHAPE))
    x = images(2, *SHAPE, seed=2)
    fused = Fuse().apply(Plan.of(model, SHAPE), _task()).model  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), atol=1e-4, rtol=1e-3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def _task() -> Any:
    from lissom.tasks.task import Task

    return Task(None, None, shape=SHAPE)  # type: ignore[arg-type]


BACKBONES = {
    "torchvision's ResNet": lambda: torchvision.models.resnet18(),
    "timm's ResNet": lambda: timm.create_model("resnet18"),
    "timm's features of a RegNet": lambda: timm.create_model("regnety_002", features_only=True),
    "timm's features of a ConvNeXt": lambda: timm.create_model("convnext_atto", features_only=True),
    "timm's features of an EfficientNet": lambda: timm.create_model("tinynet_e", features_only=True),
    "a pair": cnn,
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_any_cnn_of_four_stages_will_do(kind: str) -> None:
    backbone = BACKBONES[kind]()
    model = DynPerceiver(
        backbone, num_classes=3, latents=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), self_ratio=1.0, pool=2
    ).train()
    assert all(answer.shape == (2, 3) for answer in model(images(2, 3, 64, 64)))
    assert len(model.stages) == 4
    assert [info["num_chs"] for info in model.feature_info] == model.widths[1:]


def test_the_stem_ends_where_the_first_stage_begins() -> None:
    features = timm.create_model("resnet18", features_only=True)
    stem, stages = split_cnn(features)
    whole, x = timm.create_model("resnet18").eval(), images(1, 3, 64, 64)
    whole.load_state_dict(features.state_dict(), strict=False)
    assert [type(m).__name__ for m in stem.children()][-1] == "MaxPool2d"
    with torch.no_grad():
        stem.eval()
        y = stem(x)
        for stage in stages:
            y = stage.eval()(y)
        torch.testing.assert_close(y, whole.forward_features(x))


@pytest.mark.parametrize(
    ("name", "options", "reductions"),
    [
        ("efficientnet_b0", {}, [2, 4, 8, 16, 32]),
        ("mobilenetv3_large_100", {}, [2, 4, 8, 16, 32]),
        ("mobilenetv3_small_050", {}, [2, 4, 8, 16, 32]),  # its first map is the first convolution's
        ("mobilenetv4_conv_small", {"out_indices": (1, 2, 3, 4)}, [2, 4, 8, 16, 32]),
        ("efficientnet_b0", {"out_indices": (0, 1, 2, 3)}, [2, 2, 4, 8, 16]),
    ],
)
def test_networks_of_timm_that_give_features_of_their_own(name: str, options: Any, reductions: list[int]) -> None:
    torch.manual_seed(0)
    features, x = timm.create_model(name, features_only=True, **options).eval(), images(1, 3, 64, 64)
    stem, stages = split_cnn(features)
    with torch.no_grad():
        want, found = features(x), [stem(x)]
        for stage in stages:
            found.append(stage(found[-1]))
    assert [64 // y.shape[2] for y in found] == reductions
    for own, other in zip(found[1:], want[-4:], strict=True):
        assert torch.equal(own, other)


def test_looking_at_the_widths_leaves_the_cnn_alone() -> None:
    backbone = torchvision.models.resnet18()
    backbone.layer2.eval()
    model = DynPerceiver(backbone, num_classes=3, latents=8, depths=(1, 1, 1, 1), in_chans=1)
    assert all(int(m.num_batches_tracked) == 0 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert [stage.training for stage in model.stages] == [True, False, True, True]
    assert model.stem[0].weight.shape == (64, 1, 7, 7)
    assert model.latent.abs().max() < 2
    assert 0.015 < model.latent.std() < 0.025


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="four stages of SqueezeNet are not known"):
        DynPerceiver(torchvision.models.squeezenet1_1())
    with pytest.raises(ValueError, match="4 stages, not 3"):
        DynPerceiver((cnn()[0], cnn()[1][:3]))
    for name in ("resnet18", "tinynet_e"):
        with pytest.raises(ValueError, match="features are 2 maps"):
            DynPerceiver(timm.create_model(name, features_only=True, out_indices=(0, 1)))
    inside = timm.create_model("tinynet_e", features_only=True, feature_location="expansion")
    with pytest.raises(ValueError, match="four stages of EfficientNetFeatures are not known"):
        DynPerceiver(inside)
    with pytest.raises(ValueError, match="multiple of 8"):
        tiny(latents=12)
    with pytest.raises(ValueError, match="3 heads do not divide 8"):
        tiny(num_heads=(3, 1, 1, 1))
    with pytest.raises(ValueError, match="4 numbers each"):
        tiny(depths=(1, 1, 1))
    name = "mobilenetV3_0x5_perceiver_t128"
    with pytest.raises(LissomError, match="1 unknown: x"):
        from_published(name, {**create_model(name).state_dict(), "x": torch.zeros(1)})


def test_a_checkpoint_says_how_many_classes() -> None:
    name = "mobilenetV3_0x5_perceiver_t128"
    model = create_model(name, num_classes=7, in_chans=1)
    found = from_published(name, model.state_dict())
    assert found.num_classes == 7
    x = images(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.eval()(x), model.eval()(x))
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


@needs_parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_names_and_shapes(name: str) -> None:
    figures = fixture("dyn_perceiver", name)
    with torch.device("meta"):
        own = create_model(name)
    wanted = {own_key(key): tuple(shape) for key, shape in figures["keys"].items()}
    assert {key: tuple(value.shape) for key, value in own.state_dict().items()} == wanted
    assert sum(buffer.numel() for buffer in own.buffers()) == figures["buffers"]


@needs_parity
@pytest.mark.parametrize(
    ("name", "layer"),
    [("op_x2z", lambda: CrossAttention(32, 32, positions=49)), ("op_z2x", lambda: CrossAttention(64, 64, qk_dim=8))],
)
def test_the_published_answers_of_cross_attention(name: str, layer: Any) -> None:
    own, figures = parity(), fixture("dyn_perceiver", name)
    state = own.fill_({key: torch.zeros(shape) for key, shape in figures["keys"].items()})
    module = layer()
    module.load_state_dict({own_key(key): value for key, value in state.items()})
    assert sum(p.numel() for p in module.parameters()) == figures["params"]
    inputs = [own.make_input(tuple(entry["shape"]), entry["name"]) for entry in figures["inputs"]]
    with torch.no_grad():
        assert own.close(own.digest(module.eval()(*inputs)), figures["output"])


def _of_figures(own: Any, figures: Mapping[str, Any]) -> nn.Module:
    state = {
        key: torch.zeros(shape, dtype=torch.long if key.endswith("num_batches_tracked") else torch.float32)
        for key, shape in figures["keys"].items()
    }
    return from_published(figures["variant"], own.fill_(state))


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_answers_are_the_published_ones(name: str) -> None:
    own, figures = parity(), fixture("dyn_perceiver", name)
    model = own.calibrate_(_of_figures(own, figures), own.make_input((8, 3, 224, 224), "calibration"))
    x = own.make_input(tuple(figures["input"]))
    with torch.no_grad():
        answers = tuple(model.answers(x))
        torch.testing.assert_close(model(x), answers[-1])
    for answer, want in zip(answers, figures["output"], strict=True):
        assert own.close(own.digest(answer), want)
