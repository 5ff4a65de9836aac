"""PreCrop: widths from densities, budgets met after rounding, and networks that run with them."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError, NotApplicable
from lissom.layers.channels import find_channels
from lissom.training.precropping import (
    FROM_A_BATCH,
    SOURCES,
    chain_widths,
    draw_anew,
    fitted_widths,
    inner_groups,
    layer_densities,
    preconfig,
    precrop,
    width_factors,
)
from tests.layers.tangled import Tangled

SHAPE = (3, 16, 16)


def vgg(widths: tuple[int, ...] = (16, 16, 32, 32, 64, 64)) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for i, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, 1 + (i in (2, 4)), 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet14t", channels=(32, 64, 96, 128), num_classes=10)


def test_the_geometric_mean_rule():
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set")
    cases = json.loads((Path(folder) / "precropping" / "cases.json").read_text())["geometric_mean_crop"]
    for case in cases:
        channels, square = case["channels"], case["kernel"] ** 2
        widths = chain_widths(channels, case["density"], case["fixed_interfaces"])
        assert widths == case["cropped"]

        def weights(c: list[int], square: int = square) -> int:
            return sum(square * a * b for a, b in pairwise(c))

        assert weights(widths) / weights(channels) == pytest.approx(case["kept_fraction"])


def test_a_constant_density_scales_a_chain_by_its_root():
    assert chain_widths([3, 64, 64, 100], [0.25] * 3) == [3, 32, 32, 100]
    assert chain_widths([3, 64, 64, 100], [0.25] * 3, fixed=(2,)) == [3, 32, 64, 100]
    assert chain_widths([3, 64, 64, 100], [1e-9] * 3) == [3, 1, 1, 100]
    assert chain_widths([3, 64, 64, 100], [0.25] * 3, factor=0.5) == [3, 16, 16, 100]
    with pytest.raises(LissomError, match="4 interfaces"):
        chain_widths([3, 64], [0.5] * 3)


def test_the_rule_on_a_networks_own_channels():
    net = vgg()
    channels = find_channels(net, SHAPE)
    paths = list(channels.layers)
    density = dict(zip(paths, (1.0, 0.5, 0.36, 0.25, 0.3, 0.2, 1.0), strict=True))
    factors = width_factors(channels, density)
    assert list(factors) == paths[:-1]
    for (name, factor), before, after in zip(
        factors.items(), list(density.values())[:-1], list(density.values())[1:], strict=True
    ):
        assert factor == pytest.approx((before * after) ** 0.25), name


def test_inside_blocks_densities_are_linear(resnet):
    channels = find_channels(resnet, SHAPE)
    inner = inner_groups(channels)
    assert "layer1.0.conv1" in inner
    assert "layer1.0.conv3" not in inner
    factors = width_factors(channels, dict.fromkeys(channels.layers, 0.3), inner)
    # A bottleneck's middle convolution has both sides free, a basic block's two have one each.
    assert factors["layer1.0.conv1"] == pytest.approx(0.3**0.5)
    mobile = timm.create_model("mobilenetv3_small_050", num_classes=5)
    found = find_channels(mobile, (3, 32, 32))
    names = [n for n in inner_groups(found) if n.endswith("conv_pw") and n.startswith(("blocks.2", "blocks.3"))]
    assert len(names) > 2
    density = dict.fromkeys(found.layers, 0.3)
    assert [width_factors(found, density, names)[n] for n in names] == pytest.approx([0.3] * len(names))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.05])
@pytest.mark.parametrize("of", ["parameters", "macs"])
def test_the_budget_is_met_after_rounding(share, of):
    net = vgg((32, 32, 64, 64, 128, 128))
    channels = find_channels(net, SHAPE)
    density = layer_densities(net, SHAPE, channels, source="closed_form", **{of: share})
    less = precrop(net, SHAPE, density, **{of: share}, channels=channels)
    found = find_channels(less, SHAPE)
    kept = found.cost()[of == "macs"] / channels.cost()[of == "macs"]
    assert share * 0.985 <= kept <= share * (1 + 1e-9)
    assert found.cost()[0] == parameters(less)


@pytest.mark.parametrize("source", [*SOURCES, *FROM_A_BATCH])
def test_every_source_of_densities(source):
    torch.manual_seed(0)
    net = vgg()
    channels = find_channels(net, SHAPE)
    batch = torch.randn(8, *SHAPE), torch.arange(8), functional.cross_entropy
    density = layer_densities(net, SHAPE, channels, source=source, parameters=0.2, steps=20, batch=batch)
    weights = {path: layer.weights for path, layer in channels.layers.items()}
    assert set(density) == set(weights)
    assert all(0 < p <= 1 for p in density.values())
    assert density["0"] == density["20"] == 1  # stem and classifier
    assert sum(weights[p] * d for p, d in density.items()) == pytest.approx(0.2 * sum(weights.values()), rel=0.01)
    by_macs = layer_densities(net, SHAPE, channels, source=source, macs=0.3, steps=5, batch=batch)
    assert all(0 < p <= 1 for p in by_macs.values())


def test_the_closed_form_is_near_synflow():
    """Layers of the sheet's own small network at a tenth: what iterated SynFlow keeps, and the closed form."""
    torch.manual_seed(0)
    net = vgg()
    channels = find_channels(net, SHAPE)
    fixed = ["20"]
    one, other = (
        layer_densities(net, SHAPE, channels, source=s, parameters=0.12, fixed=fixed, steps=50)
        for s in ("synflow", "closed_form")
    )
    paths = list(channels.layers)[:-1]
    a, b = (np.log([density[p] for p in paths]) for density in (one, other))
    assert np.corrcoef(a, b)[0, 1] > 0.97


def test_a_cropped_network_is_dense_new_and_runs(resnet):
    before = {k: v.clone() for k, v in resnet.state_dict().items()}
    less = precrop(resnet, SHAPE, {}, parameters=0.5, seed=1)
    assert parameters(less) <= 0.5 * parameters(resnet)
    assert less.train()(torch.zeros(2, *SHAPE)).shape == (2, 10)
    assert less.conv1[0].out_channels == resnet.conv1[0].out_channels or less.conv1 is not resnet.conv1
    again, other = precrop(resnet, SHAPE, {}, parameters=0.5, seed=1), precrop(resnet, SHAPE, {}, parameters=0.5)
    assert all(torch.equal(a, b) for a, b in zip(less.parameters(), again.parameters(), strict=True))
    assert not torch.equal(less.layer1[0].conv1.weight, other.layer1[0].conv1.weight)
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())


def test_streams_are_cropped_where_the_blocks_do_not_suffice(resnet):
    channels = find_channels(resnet, SHAPE)
    stream = {name for name, group in channels.groups.items() if group.stream}
    assert stream

    def widths(model: nn.Module) -> dict[str, int]:
        found = find_channels(model, SHAPE)
        return {name: found.groups[name].size for name in stream if name in found.groups}

    kept = widths(precrop(resnet, SHAPE, {}, parameters=0.5))
    assert kept == {name: channels.groups[name].size for name in stream}
    cropped = widths(precrop(resnet, SHAPE, {}, parameters=0.5, streams=True))
    assert all(cropped[name] < channels.groups[name].size for name in stream)
    small = precrop(resnet, SHAPE, {}, parameters=0.01)
    assert parameters(small) <= 0.01 * parameters(resnet)
    with pytest.raises(NotApplicable, match="above the budget"):
        precrop(resnet, SHAPE, {}, parameters=0.01, streams=False)
    with pytest.raises(NotApplicable, match="above the budget"):
        precrop(resnet, SHAPE, {}, parameters=1e-6)


def test_a_tangled_network_and_fixed_groups():
    net = Tangled()
    less = precrop(net, SHAPE, {}, parameters=0.5, fixed=("left",), streams=True)
    assert less.left.out_channels == 16
    assert less.depthwise.groups == 16 + less.right.out_channels
    assert parameters(less) == pytest.approx(0.5 * parameters(net), rel=0.02)


def test_widths_in_multiples():
    net = vgg((16, 64, 64, 128, 128, 128))
    channels = find_channels(net, SHAPE)
    widths = fitted_widths(channels, dict.fromkeys(channels.groups, 1.0), macs=0.5, multiple=8)
    assert [w % 8 for w in widths.values()][1:] == [0] * 5
    assert widths["0"] % 4 == 0  # 16 channels in steps of 4
    assert channels.cost(widths)[1] <= 0.5 * channels.cost()[1]
    wide = fitted_widths(channels, dict.fromkeys(channels.groups, 1.0), macs=1.0)
    assert wide == channels.widths
    floor = fitted_widths(channels, {"0": 1e-3, "3": 1.0}, macs=0.9, least=0.5)
    assert floor["0"] == 8
    for wrong in ({}, {"macs": 0.0}, {"macs": 0.5, "multiple": 0}):
        with pytest.raises(LissomError):
            fitted_widths(channels, {"0": 1.0}, **wrong)


def test_reconfiguration_widens_cheap_layers_under_both_budgets():
    net = vgg((32, 32, 64, 64, 128, 128))
    channels = find_channels(net, SHAPE)
    less = preconfig(net, SHAPE, parameters=0.8, macs=1.0)
    found = find_channels(less, SHAPE)
    assert max(found.groups[n].size / channels.groups[n].size for n in channels.groups) > 1
    assert parameters(less) <= 0.8 * parameters(net)
    assert found.cost()[1] <= channels.cost()[1]
    assert less.eval()(torch.zeros(1, *SHAPE)).shape == (1, 10)


def test_wrong_sources_and_budgets_are_told():
    net = vgg()
    channels = find_channels(net, SHAPE)
    for options, says in (
        ({"source": "gut", "macs": 0.5}, "no source of densities"),
        ({}, "need a budget"),
        ({"source": "snip", "macs": 0.5}, "give batch="),
        ({"source": "synflow", "macs": 0.5, "parameters": 0.5}, "two budgets"),
        ({"parameters": 1e-6}, "take the whole budget"),
    ):
        with pytest.raises(LissomError, match=says):
            layer_densities(net, SHAPE, channels, **options)


def test_weights_are_drawn_as_torch_and_the_network_do():
    net = vgg()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draw_anew(net, 3)
    assert torch.equal(torch.get_rng_state(), state)
    bound = 1 / (3 * 9) ** 0.5
    assert float(net[0].weight.abs().max()) <= bound

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def init_weights(self) -> None:
            nn.init.zeros_(self.layer.weight)

    assert not draw_anew(Own()).layer.weight.any()
