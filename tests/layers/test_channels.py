"""Channels: who belongs to whom, what is left alone, and that a narrower network is exactly the whole one masked."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.layers import channels as channels_module
from lissom.layers.channel_importance import activation_scores, best_units, magnitude_scores, random_scores
from lissom.layers.channels import Axis, Channels, find_channels, mask_channels, narrow
from tests.layers.tangled import Tangled


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in double precision, every weight and statistic from random numbers."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                fresh = torch.rand(value.shape, generator=numbers)
                value.copy_(0.5 + fresh if "var" in name else (fresh - 0.4) * (2 / max(1, value[0].numel())) ** 0.5)
    return model.double().eval()


def some(channels: Channels, share: float = 0.6) -> dict[str, list[int]]:
    scores = random_scores(channels, 3)
    return best_units(scores, {name: max(1, round(share * g.size)) for name, g in channels.groups.items()})


@torch.no_grad()
def check_exact(model: nn.Module, shape: tuple[int, ...]) -> Channels:
    """The narrow network answers as the masked one, and its parameters are those that were foretold."""
    channels = find_channels(model, shape)
    model, kept = drawn(copy.deepcopy(model)), some(channels)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    less = narrow(copy.deepcopy(model), channels, kept)
    masked = mask_channels(copy.deepcopy(model), channels, kept)
    want, whole = masked(x), model(x)
    assert torch.allclose(less(x), want, atol=1e-10 * float(want.abs().max()), rtol=1e-9)
    assert (want - whole).abs().max() > 1e-6 * whole.abs().max()  # something was removed
    widths = {name: len(units) for name, units in kept.items()}
    parameters, macs = channels.cost(widths)
    assert parameters == pytest.approx(sum(p.numel() for p in less.parameters()), abs=0.5)
    assert macs == pytest.approx(find_channels(less, shape).cost()[1] if min(widths.values()) > 1 else macs)
    assert channels.cost()[0] == sum(p.numel() for p in model.parameters())
    return channels


def test_a_users_tangled_network():
    model = Tangled()
    channels = check_exact(model, (3, 16, 16))
    assert {name: group.size for name, group in channels.groups.items()} == {
        "stem": 16, "left": 16, "right": 32, "mix": 32, "squeeze": 8, "hidden": 24,
    }  # fmt: skip
    left, mix = channels.groups["left"], channels.groups["mix"]
    # The concatenation: right's channels stand behind left's, in the depthwise convolution and in what reads it.
    assert left.places[Axis("depthwise", "out")] == tuple((i,) for i in range(16))
    assert channels.groups["right"].places[Axis("mix", "in")] == tuple((16 + i,) for i in range(32))
    # Added to what it reads, called twice, gated, and flattened at 2 x 2.
    assert {Axis("shared", "in"), Axis("shared", "out"), Axis("mixed", "out"), Axis("excite", "out")} <= set(mix.places)
    assert mix.places[Axis("hidden", "in")][5] == (20, 21, 22, 23)
    assert mix.stream
    assert not channels.groups["hidden"].stream
    assert channels.left == {"head": "it is the network's answer"}
    assert not model.training or all(p.requires_grad for p in model.parameters())  # the model is left as it was


def test_a_users_cnn():
    folder = os.environ.get("LISSOM_PARITY")
    if not folder or not (path := Path(folder).parent / "models" / "models.py").exists():
        pytest.skip("LISSOM_PARITY is not set, beside which a user's networks lie (models/models.py)")
    spec = importlib.util.spec_from_file_location("plain_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    channels = check_exact(module.cnn(), (3, 32, 32))
    inner = {name for name, group in channels.groups.items() if not group.stream}
    assert inner == {f"blocks.{i}.conv1" for i in range(9)}
    assert {group.size for group in channels.groups.values() if group.stream} == {16, 32, 64}


@pytest.mark.parametrize(
    ("name", "side", "inner"),
    [
        ("resnet10t", 64, {"layer1.0.conv1", "layer4.0.conv1"}),
        ("mobilenetv3_small_050", 64, {"blocks.1.0.conv_pw", "blocks.2.0.conv_pw", "blocks.0.0.se.conv_reduce"}),
        ("regnetx_002", 64, {"s1.b1.conv1.conv"}),
        ("convnext_atto", 64, {"stages.0.blocks.0.mlp.fc1"}),
        ("resnext26ts", 64, set()),
        pytest.param("repvgg_a0", 32, set(), marks=pytest.mark.full),
        pytest.param("densenet121", 32, {"features.denseblock1.denselayer1.conv1"}, marks=pytest.mark.full),
    ],
)
def test_networks_of_timm(name, side, inner):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    channels = check_exact(model, (3, side, side))
    assert inner <= set(channels.groups)
    assert not any(channels.groups[path].stream for path in inner)


def test_groups_of_a_convolution_go_whole():
    """A convolution in groups loses whole groups, and keeps the channels of each."""
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 5, 1))
    channels = check_exact(net, (3, 8, 8))
    (group,) = channels.groups.values()
    assert group.size == 4
    assert group.places[Axis("2", "in")][1] == (3, 4, 5)
    assert group.places[Axis("2", "out")][1] == (6, 7, 8, 9, 10, 11)
    less = narrow(copy.deepcopy(net), channels, {"0": [0, 3]})
    assert (less[2].groups, less[2].in_channels, less[2].out_channels) == (2, 6, 12)
    assert less[2].weight.shape == (12, 3, 3, 3)


def test_transposed_convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten(),
    )  # fmt: skip
    assert set(check_exact(net, (3, 4, 4)).groups) == {"0", "2"}


class Mixing(nn.Module):
    """Two layers whose channels an operator mixes, and one pair that nothing disturbs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(2, 8) if how == "group norm" else nn.Identity()
        self.scale = nn.Parameter(torch.rand(8))
        self.third, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        if self.how == "softmax":
            y = y.softmax(1)
        if self.how == "mean":
            y = y * y.mean(1, keepdim=True).sigmoid()
        if self.how == "number":
            y = y.reshape(len(y), 4, 2, *y.shape[2:]).transpose(1, 2).flatten(1, 2)  # ShuffleNet's
        if self.how == "scale":
            y = y * self.scale[:, None, None]
        return self.head(torch.relu(self.third(self.norm(self.second(y)))))


@pytest.mark.parametrize(
    ("how", "stays", "says"),
    [
        ("softmax", "first", "mixes its channels"),
        ("mean", "first", "mixes its channels"),
        ("number", "first", ""),
        ("group norm", "second", "a GroupNorm mixes its channels"),
    ],
)
def test_what_an_operator_mixes_is_left_alone(how, stays, says):
    channels = check_exact(Mixing(how), (3, 6, 6))
    assert stays not in channels.groups
    assert "third" in channels.groups
    assert says in channels.left[stays]


def test_a_scale_of_its_own_goes_with_its_channels():
    channels = check_exact(Mixing("scale"), (3, 6, 6))
    assert Axis("scale", "out") in channels.groups["first"].places


class WithInput(nn.Module):
    """What it adds to, and what it concatenates, is the image itself."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.join = join
        self.first = nn.Conv2d(3, 3, 1)
        self.second, self.head = nn.Conv2d(6 if join == "cat" else 3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.head(torch.relu(self.second(torch.cat([x, y], 1) if self.join == "cat" else x + y)))


@pytest.mark.parametrize("join", ["cat", "add"])
def test_the_images_own_channels_stay(join):
    assert set(check_exact(WithInput(join), (3, 6, 6)).groups) <= {"first", "second"}
    assert ("first" in find_channels(WithInput("add"), (3, 6, 6)).groups) is False


def test_where_nothing_can_be_removed():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such size\nand more")

    with pytest.raises(NotApplicable, match=r"cannot be followed on inputs of shape .*: no such size$"):
        find_channels(Branching(), (4,))
    with pytest.raises(NotApplicable, match="no convolution"):
        find_channels(nn.Sequential(nn.ReLU()), (4,))
    with pytest.raises(NotApplicable, match=r"no channels of Linear can be removed: it is the network's answer"):
        find_channels(nn.Linear(4, 4), (4,))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(NotApplicable, match="several layers share its weights"):
        find_channels(tied, (4,))


def test_a_computed_weight_is_told():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    torch.nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(NotApplicable, match="weight of '0' is computed anew"):
        find_channels(net, (4,))


def test_layers_that_nobody_reads_are_left_alone():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.aside, self.head = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.aside(x)
            return self.head(torch.relu(self.first(x)))

    channels = check_exact(Aside(), (4,))
    assert set(channels.groups) == {"first"}
    assert channels.left["aside"] == "no layer is found to read its channels"


def test_wrong_units_are_told():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    channels = find_channels(net, (4,))
    for kept in ({"2": [0]}, {"0": []}, {"0": [6]}):
        with pytest.raises(NotApplicable):
            narrow(net, channels, kept)
    assert net[0].out_features == 6


def test_repeated_units_make_a_group_wider():
    net = Tangled()
    channels = find_channels(net, (3, 16, 16))
    kept = best_units(magnitude_scores(net, channels), {"left": 20, "mix": 40})
    assert len(kept["left"]) == 20
    wider = narrow(copy.deepcopy(net), channels, kept).eval()
    assert wider(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    assert (wider.left.out_channels, wider.depthwise.groups, wider.mix.in_channels) == (20, 52, 52)
    # right's channels stay behind left's.
    assert torch.equal(wider.mix.weight[:, 20:], narrow(net, channels, {"mix": kept["mix"]}).mix.weight[:, 16:])
    assert sum(p.numel() for p in wider.parameters()) == channels.cost({"left": 20, "mix": 40})[0]


# Importance


def test_magnitude_is_of_all_weights_of_a_channel():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 3))
        net[1].weight.copy_(torch.tensor([2.0, 1.0, 1.0, 1.0]))
        net[3].weight.copy_(torch.tensor([[3.0, 1.0, 1.0, 1.0]] * 2))
    scores = magnitude_scores(net, find_channels(net, (3,)))["0"]
    rows = torch.tensor([1.0, 4, 9, 16]) / 7.5
    gammas, columns = torch.tensor([4.0, 1, 1, 1]) / 1.75, torch.tensor([9.0, 1, 1, 1]) / 3
    assert torch.allclose(scores.float(), ((rows + gammas + columns) / 3).sqrt())


def test_activation_is_what_the_readers_lose():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)).eval()
    channels = find_channels(net, (3, 5, 5))
    x = torch.randn(40, 3, 5, 5)
    scores = activation_scores(net, channels, [x[:16], x[16:]])["0"]
    for unit in range(6):
        kept = [u for u in range(6) if u != unit]
        with torch.no_grad():
            lost = (net(x) - narrow(copy.deepcopy(net), channels, {"0": kept})(x)).square().sum(1).mean()
        assert float(scores[unit]) == pytest.approx(float(lost), rel=1e-4)


def test_the_best_units_stay():
    scores = {"a": torch.tensor([0.1, 3.0, 2.0, 2.0]), "b": torch.tensor([1.0, 2.0])}
    assert best_units(scores, {"a": 2, "b": 1}) == {"a": [1, 2], "b": [1]}
    assert best_units(scores, {"b": 3}) == {"b": [0, 1, 1]}


class Shifted(nn.Module):
    """Slices of a map, each shifted by a pixel and with a weight of its own from a head, are added up, in two stages:
    the ways to an operator behind them multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.heads = nn.ModuleList(nn.Conv2d(8, 4 * 9, 1) for _ in range(2))
        self.mixers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.hidden = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.hidden(self.stem(x))
        for head, mixer in zip(self.heads, self.mixers, strict=True):
            height, width = x.shape[2:]
            weights = head(x).reshape(len(x), 4, 9, height, width).repeat(1, 2, 1, 1, 1)
            padded = nn.functional.pad(x, (1, 1, 1, 1))
            x = x + mixer(
                sum(padded[:, :, i // 3 : i // 3 + height, i % 3 : i % 3 + width] * weights[:, :, i] for i in range(9))
            )
        return self.last(x.mean((2, 3)))


def test_remembered_pairs_change_nothing_but_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_pruning.dependency import group

    model, followed = drawn(Shifted()), [0]
    add = group.Group.add_dep

    def counted(self: group.Group, dep: object, idxs: list[object]) -> None:
        followed[0] += 1
        add(self, dep, idxs)

    monkeypatch.setattr(group.Group, "add_dep", counted)
    found, few = find_channels(model, (3, 8, 8)), followed[0]
    monkeypatch.setattr(channels_module, "_pairs_remembered", contextlib.nullcontext)
    plain, many = find_channels(model, (3, 8, 8)), followed[0] - few
    assert repr(found) == repr(plain)
    assert 0 < few < many
