"""Once-for-All networks: counts, published figures, exact extraction, sorting, published names of both kinds."""

from __future__ import annotations

import json
import re
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.elastic import draw_setting, is_elastic, largest, smallest
from lissom.models.factory import create_model, from_published
from lissom.models.ofa import ElasticMBConv, OFAMobileNetV3, OFANet, OFAProxyless, OFAResNet50, subnet_from_published
from tests.models.families import (
    PARITY,
    check_classifier,
    check_export,
    check_features,
    check_network,
    check_trains,
    count,
    images,
    needs_parity,
    parity,
    settle,
    small,
)

SIZES = {
    "ofa_mobilenetv3_100": (7_678_880, 3_410_792, 7_664_760),
    "ofa_mobilenetv3_120": (10_715_752, 4_602_456, 10_701_632),
    "ofa_proxyless_130": (7_956_882, 3_718_832, 7_942_056),
    "ofa_resnet50": (48_105_992, 6_539_280, 48_105_992),
}
TINY: dict[str, tuple[type, dict[str, Any]]] = {
    "mobile": (OFAMobileNetV3, {"num_classes": 10, "widths": (16, 24), "neck": 32, "features": 40, "depths": (1, 2),
                                "kernels": (3, 5), "expands": (2, 4)}),
    "proxyless": (OFAProxyless, {"num_classes": 10, "width": 0.25, "depths": (1, 2), "features": 24}),
    "resnet": (OFAResNet50, {"num_classes": 10, "base_width": 16, "base_depths": (1, 1, 1, 1), "depths": (0, 1)}),
}  # fmt: skip


def tiny(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    family, arguments = TINY[kind]
    return family(**{**arguments, **more})


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_counts(name: str) -> None:
    whole, least, most = SIZES[name]
    assert count(name) == whole
    with torch.device("meta"):
        network = create_model(name)
        assert is_elastic(network)
        assert numbers(network.extract(smallest(network))) == least
        assert numbers(network.extract(largest(network))) == most


def test_counts_in_between() -> None:
    with torch.device("meta"):
        mobile = create_model("ofa_mobilenetv3_100")
        assert numbers(mobile.extract(mobile.setting(kernel=5, expand=4, depth=3))) == 4_551_792
        resnet = create_model("ofa_resnet50")
        assert numbers(resnet.extract(resnet.setting(depth=1, expand=0.25, width=1))) == 15_860_768


def test_the_space_is_as_large_as_published() -> None:
    with torch.device("meta"):
        network = create_model("ofa_mobilenetv3_100")
    values = {d.name: len(d.values) for d in network.dimensions()}
    size = prod(
        sum(
            prod(values[f"blocks.{b}.kernel"] * values[f"blocks.{b}.expand"] for b in stage[:depth])
            for depth in (2, 3, 4)
        )
        for stage in network.stages
    )
    assert size == 21758655492572485851


@needs_parity
@pytest.mark.parametrize("name", ["ofa_mbv3_w1.0_max", "ofa_mbv3_w1.0_min", "ofa_resnet50_mid"])
def test_published_figures(name: str) -> None:
    check_network("deps", name)


@pytest.mark.parametrize("kind", TINY)
def test_an_extracted_network_answers_the_same(kind: str) -> None:
    network, x = tiny(kind), images(2, 3, 33, 41)
    settle(network, x)
    with torch.no_grad():
        for matrix in (p for name, p in network.named_parameters() if "matrix" in name):
            matrix.add_(0.1 * torch.randn_like(matrix))
        settings = [largest(network), smallest(network), *(draw_setting(network) for _ in range(6))]
        answers = []
        for setting in settings:
            network.set_active(setting)
            plain = network.extract()
            assert type(plain) is OFANet
            assert not plain.training
            assert network.active == setting
            kinds = {type(m).__name__ for m in plain.modules()}
            assert not any(name.startswith("Elastic") for name in kinds)
            answers.append(network(x))
            assert torch.equal(answers[-1], plain(x))
            maps, own = network.forward_intermediates(x)[1], plain.forward_intermediates(x)[1]
            assert all(torch.equal(a, b) for a, b in zip(maps, own, strict=True))
            assert [m.shape[1] for m in own] == [info["num_chs"] for info in plain.feature_info]
        assert not torch.allclose(answers[0], answers[1])
        plain.blocks[0].project.conv.weight.zero_() if hasattr(plain.blocks[0], "project") else None
        assert torch.equal(answers[-1], network(x))  # a copy


def test_dead_dimensions_change_nothing() -> None:
    network, x = tiny("mobile").eval(), images(1, 3, 32, 32)
    setting = {"stages.0.depth": 1}
    dead = network.dead(setting)
    assert dead == {"blocks.2.kernel", "blocks.2.expand"}
    assert network.active == largest(network)
    with torch.no_grad():
        network.set_active(setting)
        want = network(x)
        network.set_active({**setting, "blocks.2.kernel": 3, "blocks.2.expand": 2})
        assert torch.equal(network(x), want)
        network.set_active({**setting, "blocks.1.kernel": 3})
        assert not torch.equal(network(x), want)


def test_gradients_stay_in_the_active_slices() -> None:
    network = tiny("mobile")
    network.set_active(smallest(network))
    network(images(2, 3, 32, 32)).square().sum().backward()
    block = network.blocks[1]
    hidden = block.hidden(2)
    assert block.expand.conv.weight.grad[:hidden].abs().sum() > 0
    assert block.expand.conv.weight.grad[hidden:].abs().sum() == 0
    assert network.blocks[2].project.conv.weight.grad is None  # depth 1


@pytest.mark.parametrize("kind", TINY)
def test_sorting_leaves_the_whole_network_as_it_is(kind: str) -> None:
    network, x = tiny(kind), images(2, 3, 32, 32)
    settle(network, x)
    with torch.no_grad():
        whole = network(x)
        network.set_active(smallest(network))
        least = network(x)
        network.sort_channels()
        sorted_least = network(x)
        network.set_active({})
        torch.testing.assert_close(network(x), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(least, sorted_least)
    if kind == "mobile":
        importance = network.blocks[1].project.conv.weight.abs().sum((0, 2, 3))
        assert torch.equal(importance, importance.sort(descending=True).values)


def test_sorting_keeps_channels_in_widths_that_are_trained() -> None:
    torch.manual_seed(0)
    block = ElasticMBConv(8, 8, (3, 5), (3, 4, 6), 1, "relu", True)
    block.depthwise.bn.running_mean.copy_(torch.arange(48))
    block.sort_channels(opened=1)
    places = block.depthwise.bn.running_mean
    assert sorted(places[:32].tolist()) == list(range(32))
    block.depthwise.bn.running_mean.copy_(torch.arange(48))
    block.sort_channels(opened=2)
    assert sorted(block.depthwise.bn.running_mean[:24].tolist()) == list(range(24))


@needs_parity
def test_published_sorting() -> None:
    assert PARITY is not None
    own = parity()
    for case in json.loads((PARITY / "deps" / "cases.json").read_text())["sorting"]:
        outputs, use_se = (16, True) if "[8],[16]" in case["constructor"] else (8, False)
        block = ElasticMBConv(8, outputs, (3, 5, 7), (3, 4, 6), 1, "relu", use_se)
        state = own.fill_({key: torch.zeros(shape) for key, shape in case["keys"].items()})
        renamed = {}
        for key, value in state.items():
            name = key.replace(".conv.conv.", ".conv.").replace(".bn.bn.", ".bn.")
            name = re.sub(r"(\d)to(\d)_matrix", r"matrix_\2", name).replace("depth_conv.se.fc.", "se.")
            for theirs, ours in (
                ("inverted_bottleneck", "expand"),
                ("depth_conv", "depthwise"),
                ("point_linear", "project"),
            ):
                name = name.replace(theirs, ours)
            renamed[name] = value.long() if name.endswith("tracked") else value
        block.load_state_dict(renamed)
        block.skip = False  # the published layer has no shortcut
        block.eval()
        stage = case["expand_ratio_stage"]
        x = own.make_input((2, 8, 10, 10), f"sort{stage}")
        first = block.project.conv.weight.abs().sum((0, 2, 3))[:8].tolist()
        assert first == pytest.approx(case["importance_first8"], rel=1e-5)
        with torch.no_grad():
            before = block(x)
            assert own.close(own.digest(before), case["output_before"])
            block.sort_channels(stage)
            assert (block(x) - before).abs().max() < 1e-6
            block.set_active(7, 3)
            assert own.close(own.digest(block(x)), case["output_expand3_after_sort"])


def published(state: dict[str, torch.Tensor], *, doubled: bool, old: bool = False) -> dict[str, torch.Tensor]:
    """Our names of a MobileNetV3 as the publisher writes them."""
    found = {}
    for key, value in state.items():
        name = re.sub(r"^blocks\.(\d+)\.", rf"blocks.\1.{'mobile_inverted_conv' if old else 'conv'}.", key)
        twice = doubled and not name.startswith(("stem.", "neck.", "mix.", "blocks.0."))
        for theirs, ours in (
            ("inverted_bottleneck", "expand"),
            ("depth_conv", "depthwise"),
            ("point_linear", "project"),
        ):
            name = re.sub(rf"(blocks\.\d+\.\w+)\.{ours}\.", rf"\1.{theirs}.", name)
        name = re.sub(r"(blocks\.\d+\.\w+)\.se\.", r"\1.depth_conv.se.fc.", name)
        name = re.sub(r"matrix_(\d)", lambda m: f"{int(m[1]) + 2}to{m[1]}_matrix", name)
        if twice and "matrix" not in name and ".se." not in name:
            name = re.sub(r"\.(conv|bn)\.(\w+)$", r".\1.\1.\2", name)
        for theirs, ours in (("first_conv", "stem"), ("final_expand_layer", "neck"), ("feature_mix_layer", "mix")):
            name = re.sub(rf"^{ours}\.", f"{theirs}.", name)
        found[re.sub(r"^classifier\.", "classifier.linear." + ("linear." if doubled else ""), name)] = value
    return found


@pytest.mark.parametrize("old", [False, True])
def test_published_names_of_a_super_network(old: bool) -> None:
    network, x = small("ofa_mobilenetv3_100", num_classes=7).eval(), images(1, 3, 64, 64)
    loaded = from_published("ofa_mobilenetv3_100", published(network.state_dict(), doubled=True, old=old)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("old", [False, True])
def test_published_names_of_a_sub_network(old: bool) -> None:
    network, x = tiny("mobile").eval(), images(2, 3, 32, 32)
    for _ in range(4):
        plain = network.extract(draw_setting(network))
        loaded = subnet_from_published(network, published(plain.state_dict(), doubled=False, old=old)).eval()
        with torch.no_grad():
            assert torch.equal(loaded(x), plain(x))


def test_published_names_of_a_resnets_sub_network() -> None:
    network, x = tiny("resnet").eval(), images(2, 3, 32, 32)
    for _ in range(4):
        plain = network.extract(draw_setting(network))
        loaded = subnet_from_published(network, plain.state_dict()).eval()
        with torch.no_grad():
            assert torch.equal(loaded(x), plain(x))


def test_weights_of_no_sub_network() -> None:
    network = tiny("mobile")
    state = network.extract(smallest(network)).state_dict()
    with pytest.raises(LissomError, match="hidden channels"):
        subnet_from_published(network, {**state, "blocks.1.depthwise.conv.weight": torch.zeros(9, 1, 3, 3)})
    state.pop("neck.conv.weight")
    with pytest.raises(LissomError, match="neck"):
        subnet_from_published(network, state)


def test_settings_that_cannot_be() -> None:
    network = tiny("mobile")
    with pytest.raises(LissomError, match=r"no dimension 'blocks\.99\.kernel'"):
        network.set_active({"blocks.99.kernel": 3})
    with pytest.raises(LissomError, match=r"blocks.1.kernel is 7; it may be 3, 5"):
        network.set_active({"blocks.1.kernel": 7})
    with pytest.raises(LissomError, match="3 values for 2 places"):
        network.setting(depth=[1, 2, 1])
    assert network.active == largest(network)
    with pytest.raises(LissomError, match="0 to 2"):
        tiny("resnet").setting(width=3)


@pytest.mark.parametrize("kind", TINY)
def test_a_network_like_any_other(kind: str) -> None:
    x = images(2, 3, 37, 45)
    network = tiny(kind)
    for parameter in (p for name, p in network.named_parameters() if "matrix" in name):
        parameter.requires_grad_(False)  # the whole network uses the largest kernels, which need no matrix
    check_trains(network, x)
    check_classifier(tiny(kind), x)


def test_features() -> None:
    x = images(1, 3, 67, 91)
    check_features("ofa_mobilenetv3_100", x)


@pytest.mark.full
@pytest.mark.parametrize("name", ["ofa_proxyless_130", "ofa_resnet50"])
def test_features_of_the_others(name: str) -> None:
    check_features(name, images(1, 3, 67, 91))


def test_export() -> None:
    network = tiny("mobile").eval()
    network.set_active(smallest(network))
    check_export(network.extract(), images(1, 3, 32, 32))
