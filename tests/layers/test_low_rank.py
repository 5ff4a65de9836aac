"""Low-rank layers: the published ranks, factors and sizes; what is replaced and what is left; there and back."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.low_rank import (
    LowRankLayer,
    factorisable,
    factorise,
    load_low_rank,
    merge_low_rank,
    obstacles,
    published_ranks,
    rank_of_ratio,
    spread_ratios,
    thin_layers,
)
from lissom.models.factory import create_model, from_published


@pytest.fixture
def published():
    """cases.json of the figures read from the published code, and its module of deterministic inputs."""
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    sys.path.insert(0, folder)
    try:
        import parity
    finally:
        sys.path.remove(folder)
    return json.loads((Path(folder) / "pela" / "cases.json").read_text()), parity


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias)


# Ranks and factors


def test_ranks_are_the_published_ones(published):
    cases, _ = published
    for case in cases["ranks"]:
        assert rank_of_ratio(case["in_features"], case["out_features"], case["ratio"]) == case["rank"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "ratio", "rank"),
    [(3, 10, 3, 1), (1, 50, 2.0, 1), (64, 64, 0.5, 64), (64, 64, 0.1, 64), (64, 64, 1.0, 32), (10, 7, 1.1, 3)],
)
def test_ranks_stay_between_one_and_the_shorter_side(inputs, outputs, ratio, rank):
    assert rank_of_ratio(inputs, outputs, ratio) == rank


def test_a_ratio_is_positive():
    with pytest.raises(LissomError, match="greater than 0"):
        rank_of_ratio(4, 4, 0.0)


def test_factors_are_the_published_ones(published):
    cases, parity = published
    for number, case in enumerate(cases["svd"]):
        shape = (case["out_features"], case["in_features"])
        weight = parity.make_input(shape, f"pelaW{number}") / case["in_features"] ** 0.5
        layer = nn.Linear(case["in_features"], case["out_features"])
        layer.weight.data.copy_(weight)
        pair = thin_layers(layer, rank_of_ratio(shape[1], shape[0], case["ratio"]))
        error = pair.weight.detach() - weight
        assert pair.rank == case["rank"]
        assert float(error.square().mean()) == pytest.approx(case["mse"], rel=1e-5)
        assert float(error.abs().max()) == pytest.approx(case["max_abs_error"], rel=1e-5)
        norms = [float(factor.weight.detach().norm()) for factor in pair]
        assert norms == pytest.approx(case["left_right_norm"], rel=1e-5)


@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(12, 31, 5), (31, 12, 5), (16, 16, 3), (7, 7, 7)])
def test_the_error_is_that_of_the_discarded_singular_values(inputs, outputs, rank):
    layer = linear(inputs, outputs).double()
    pair = thin_layers(layer, rank)
    weight, first, second = (m.weight.detach() for m in (layer, *pair))
    values = torch.linalg.svdvals(weight)
    error = float((second @ first - weight).square().sum())
    assert error == pytest.approx(float(values[rank:].square().sum()), abs=1e-12)
    assert float(first.norm()) == pytest.approx(float(second.norm()))
    assert float(first.square().sum()) == pytest.approx(float(values[:rank].sum()))


def test_a_weight_of_lower_rank_is_exact_and_finite():
    layer = linear(9, 11)
    layer.weight.data = torch.randn(11, 2) @ torch.randn(2, 9)
    assert torch.allclose(thin_layers(layer, 6).weight, layer.weight, atol=1e-5)
    layer.weight.data.zero_()
    pair = thin_layers(layer, 6)
    assert torch.equal(pair.weight, torch.zeros(11, 9))


def test_a_pair_answers_as_its_product_and_both_factors_learn():
    layer = linear(20, 30)
    pair = thin_layers(layer, 6)
    x = torch.randn(2, 5, 20)
    assert torch.allclose(pair(x), nn.functional.linear(x, pair.weight, pair.bias), atol=1e-5)
    pair(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in pair.parameters())
    assert (pair.in_features, pair.out_features, pair.rank) == (20, 30, 6)
    assert list(pair.state_dict()) == ["0.weight", "1.weight", "1.bias"]


def test_half_precision_is_factorised_in_more():
    layer = linear(24, 24)
    exact = thin_layers(layer, 8).weight
    half = thin_layers(copy.deepcopy(layer).half(), 8)
    assert half[0].weight.dtype == torch.float16
    assert torch.allclose(half.weight.float(), exact, atol=5e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_convolution_keeps_its_stride(stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 18, 1, stride=stride)
    x = torch.randn(2, 12, 7, 7)
    exact = thin_layers(conv, 12)
    assert torch.allclose(exact(x), conv(x), atol=1e-5)
    assert exact[0](x).shape[-1] == conv(x).shape[-1]  # the stride is in the first: the second sees fewer values
    thin = thin_layers(conv, 4)
    assert thin.weight.shape == conv.weight.shape
    assert torch.allclose(thin(x), nn.functional.conv2d(x, thin.weight, conv.bias, stride), atol=1e-5)


def test_what_a_layer_had_is_kept():
    layer = linear(16, 16, bias=False).eval()
    layer.weight.requires_grad_(False)
    pair = thin_layers(layer, 3)
    assert pair.bias is None
    assert not pair.training
    assert not any(p.requires_grad for p in pair.parameters())


@pytest.mark.parametrize(("rank", "init", "says"), [(0, "svd", "1 to 4"), (5, "svd", "1 to 4"), (2, "zero", "'svd'")])
def test_what_thin_layers_refuses(rank, init, says):
    with pytest.raises(LissomError, match=says):
        thin_layers(linear(4, 6), rank, init)


# Ratios by singular values


def falling(values: torch.Tensor, inputs: int, outputs: int) -> nn.Linear:
    """A layer of these singular values."""
    layer = linear(inputs, outputs)
    left, right = (torch.linalg.qr(torch.randn(n, len(values)))[0] for n in (outputs, inputs))
    layer.weight.data = left @ torch.diag(values) @ right.T
    return layer


def weights(layers: dict[str, nn.Linear], ratios: dict[str, float]) -> int:
    total = 0
    for path, layer in layers.items():
        rank = rank_of_ratio(layer.in_features, layer.out_features, ratios[path])
        whole = layer.weight.numel()
        total += whole if ratios[path] == 1 else min(whole, rank * (layer.in_features + layer.out_features))
    return total


def kept(layers: dict[str, nn.Linear], ratios: dict[str, float]) -> float:
    """The product of the shares of their energy that the layers' thin forms keep."""
    total = 1.0
    for path, layer in layers.items():
        if ratios[path] > 1:
            thin = thin_layers(layer, rank_of_ratio(layer.in_features, layer.out_features, ratios[path]))
            error = (thin.weight - layer.weight).detach().square().sum() / layer.weight.detach().square().sum()
            total *= 1 - float(error)
    return total


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_layers_of_slow_singular_values_get_more_rank_at_no_more_weights(ratio):
    steep, flat = torch.logspace(0, -4, 48), torch.linspace(1, 0.8, 48)
    layers = {"steep": falling(steep, 48, 96), "flat": falling(flat, 48, 96), "middle": linear(48, 48)}
    found = spread_ratios(layers, ratio)
    assert found["steep"] > ratio
    assert found["steep"] > found["flat"]
    even = dict.fromkeys(layers, ratio)
    assert weights(layers, found) <= weights(layers, even)
    assert kept(layers, found) > kept(layers, even)


def test_equal_layers_share_evenly_and_one_layer_has_the_ratio():
    assert spread_ratios({"one": linear(64, 64)}, 2.0) == {"one": 2.0}
    assert spread_ratios({}, 2.0) == {}
    twins = {str(i): falling(torch.linspace(1, 0.01, 64), 64, 64) for i in range(4)}
    found = spread_ratios(twins, 2.0)
    assert weights(twins, found) <= weights(twins, dict.fromkeys(twins, 2.0))
    assert spread_ratios(twins, 1.0) == dict.fromkeys(twins, 1.0)
    with pytest.raises(LissomError, match="at least 1"):
        spread_ratios(twins, 0.5)


def test_the_product_of_kept_shares_is_the_largest_there_is():
    torch.manual_seed(1)
    layers = {str(i): falling(torch.rand(20).sort(descending=True)[0], 20, n) for i, n in enumerate((24, 40, 64))}
    found = spread_ratios(layers, 2.0)
    budget = weights(layers, dict.fromkeys(layers, 2.0))
    every = [dict(zip(layers, ways, strict=True)) for ways in itertools.product((1.0, 1.5, 2.0, 3.0, 4.0), repeat=3)]
    within = [kept(layers, ratios) for ratios in every if weights(layers, ratios) <= budget]
    assert len(within) < len(every)
    assert weights(layers, found) <= budget
    assert kept(layers, found) == pytest.approx(max(within), rel=1e-4)


def test_a_layer_of_zeros_and_a_convolution_can_be_spread():
    zeros = linear(32, 32)
    nn.init.zeros_(zeros.weight)
    layers = {"zeros": zeros, "conv": nn.Conv2d(32, 64, 1), "linear": linear(32, 64)}
    found = spread_ratios(layers, 2.0)
    assert found["zeros"] >= 2.0  # nothing is lost of it
    assert set(found.values()) <= {1.0, 1.5, 2.0, 3.0, 4.0}


# Models


class Awkward(nn.Module):
    """Layers that cannot be replaced, each for a reason of its own, and two that can."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.embedding = nn.Embedding(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.embedding.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda module, inputs, output: output * 2)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.padded = nn.Conv2d(16, 16, 1, padding=1)
        self.wide = nn.Conv2d(16, 16, 3)
        self.own = Doubling(16, 16)
        self.plain = Named(16, 16)
        self.conv = nn.Conv2d(16, 16, 1)
        self.again = self.plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0]
        for layer in (self.tied, self.normed, self.hooked, self.own, self.plain, self.again):
            x = torch.tanh(layer(x))
        return self.wide(self.padded(self.grouped(self.conv(x.mT[..., None].expand(-1, -1, -1, 3))))).flatten(1)


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A class of its own that computes what torch's does."""


def test_what_cannot_be_replaced_is_told_with_its_reason():
    reasons = obstacles(Awkward())
    assert {path for path, reason in reasons.items() if not reason} == {"plain", "conv"}
    for path, part in {
        "attention.out_proj": "reads its weight",
        "tied": "shares",
        "normed": "computed",
        "hooked": "hooks",
        "grouped": "grouped",
        "padded": "padded",
        "own": "forward of its own",
    }.items():
        assert part in reasons[path]
    assert "wide" not in reasons
    assert obstacles(nn.Linear(16, 16)) == {"": "it is the whole model"}


def test_a_layer_under_two_paths_is_replaced_under_both():
    torch.manual_seed(0)
    model = Awkward().eval()
    x = torch.randn(2, 5, 16)
    before = model(x)
    factorise(model, {"plain": 16, "conv": 16})
    assert model.plain is model.again
    assert isinstance(model.plain, LowRankLayer)
    assert torch.allclose(model(x), before, atol=1e-4)
    assert set(factorisable(model)) == set()


@pytest.mark.parametrize(
    ("ranks", "says"),
    [({"tied": 2}, "shares its weight"), ({"wide": 2}, "no linear layer"), ({"plain": 2, "conv": 17}, "1 to 16")],
)
def test_nothing_is_replaced_where_one_cannot_be(ranks, says):
    model = Awkward()
    with pytest.raises(LissomError, match=says):
        factorise(model, ranks)
    assert not any(isinstance(m, LowRankLayer) for m in model.modules())


def test_torchs_own_encoder_layer_reads_weights_and_stays_right():
    """In eval mode it hands the weights of its linear layers to one fused operator, and calls none of them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True, dropout=0.0).eval()
    factorise(layer, {"linear1": 4, "linear2": 4})
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = layer(x)
    assert torch.allclose(fast, layer(x), atol=1e-5)  # with gradient it calls its layers


@pytest.mark.parametrize(
    ("name", "sizes", "side"), [("test_vit", {}, 160), ("resnet14t", {"channels": (16, 24, 32, 48)}, 64)]
)
def test_merging_gives_the_same_answers(name, sizes, side):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=11, **sizes).eval()
    x = torch.randn(2, 3, side, side)
    keys = list(model.state_dict())
    ranks = {p: rank_of_ratio(*layer.weight.shape[1::-1], 2.0) for p, layer in factorisable(model).items()}
    assert len(ranks) >= 8
    before = model(x)
    factorise(model, ranks)
    thin = model(x)
    assert not torch.allclose(thin, before, atol=1e-3)
    merge_low_rank(model)
    assert torch.allclose(model(x), thin, atol=1e-4)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(m, LowRankLayer) for m in model.modules())


def test_a_single_pair_is_not_merged_in_place():
    with pytest.raises(LissomError, match="single low-rank layer"):
        merge_low_rank(thin_layers(linear(4, 4), 2))


# Of the sheet's table, not in the cases.
MORE_SIZES = {"deit_tiny r2": [5717416, 3044776], "deit_small r1.5": [22050664, 14935912]}


@pytest.mark.parametrize(
    ("network", "names", "more"),
    [
        ("deit_tiny_patch16_224", {2.0: "deit_tiny r2"}, ()),
        ("deit_small_patch16_224", {1.5: "deit_small r1.5"}, ()),
        ("deit_base_patch16_224", {2.0: "deit_base r2", 1.5: "deit_base r1.5"}, ()),
        ("deit3_large_patch16_224", {2.0: "deit3_large r2"}, ()),
        ("swin_base_patch4_window7_224", {1.5: "swin_base r1.5", 2.0: "swin_base r2"}, ("attn.proj",)),
    ],
)
def test_sizes_are_the_published_ones(published, network, names, more):
    with torch.device("meta"):
        dense = timm.create_model(network)
    skip = ("norm", "head", "patch_embed", "downsample", *more)
    for ratio, name in names.items():
        ranks = {
            path: rank_of_ratio(*layer.weight.shape[1::-1], ratio)
            for path, layer in factorisable(dense).items()
            if not any(part in path for part in skip)
        }
        thin = factorise(copy.deepcopy(dense), ranks, "random")
        sizes = [sum(p.numel() for p in model.parameters()) for model in (dense, thin)]
        assert sizes == {**published[0]["model_params"], **MORE_SIZES}[name]


# Published weights


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 5)))


def test_a_state_says_which_layers_are_thin():
    model = factorise(small(), {"0": 6, "2.0": 3})
    state = model.state_dict()
    assert published_ranks(small(), state) == {"0": 6, "2.0": 3}
    assert published_ranks(small(), small().state_dict()) == {}
    loaded = load_low_rank(small(), state)
    x = torch.randn(4, 20)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(load_low_rank(small(), small().state_dict())(x), small()(x))


@pytest.mark.last
def test_the_published_network_answers_as_published(published):
    _, parity = published
    figures = json.loads((Path(os.environ["LISSOM_PARITY"]) / "pela" / "deit_tiny_r2.0.json").read_text())
    state = parity.fill_({key: torch.zeros(shape) for key, shape in figures["keys"].items()})
    model = from_published("deit_tiny_patch16_224", state).eval()
    assert model.blocks[0].attn.qkv.rank == 72
    with torch.no_grad():
        answer = model(parity.make_input(tuple(figures["input"])))
    assert parity.close(parity.digest(answer), figures["output"])


def test_a_low_rank_checkpoint_brings_its_own_number_of_classes():
    whole = factorise(create_model("digits_vit", num_classes=7), {"blocks.0.mlp.fc1": 4, "blocks.2.attn.qkv": 9})
    loaded = from_published("digits_vit", whole.state_dict())
    assert loaded.head.out_features == 7
    assert loaded.blocks[2].attn.qkv.rank == 9
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_a_state_that_does_not_fit_is_told():
    state = factorise(small(), {"0": 6}).state_dict()
    del state["2.1.bias"]
    with pytest.raises(LissomError, match=r"do not fit Sequential.*2\.1\.bias"):
        load_low_rank(small(), state)
