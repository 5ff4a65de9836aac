"""layer_costs: exact on hand counts, complete on real networks, no double counting."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lissom.errors import LissomError
from lissom.meters.costs import KINDS, LayerCost, layer_costs, total


def by_path(model: nn.Module, shape: tuple[int, ...], **options: int) -> dict[str, LayerCost]:
    costs = layer_costs(model, shape, **options)
    assert len({cost.path for cost in costs}) == len(costs)
    return {cost.path: cost for cost in costs}


class PlainNet(nn.Module):
    """As users write them: functional relu and mean, a shortcut with addition, one ReLU module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.unused = nn.Linear(5, 5)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = self.act(self.grouped(x))
        x = torch.relu(self.point(self.depthwise(x)) + x)
        return self.head(x.mean((2, 3)))


def test_hand_counts_of_a_plain_network() -> None:
    costs = by_path(PlainNet(), (3, 8, 8), batch=2)
    rows = {path: (c.kind, c.macs, c.params) for path, c in costs.items()}
    assert rows["stem"] == ("conv", 2 * 64 * 8 * 27, 216)
    assert rows["grouped"] == ("grouped", 2 * 16 * 16 * 36, 16 * 36 + 16)
    assert rows["depthwise"] == ("depthwise", 2 * 16 * 16 * 9, 16 * 9 + 16)
    assert rows["point"] == ("pointwise", 2 * 16 * 16 * 16, 16 * 16 + 16)
    assert rows["head"] == ("linear", 2 * 16 * 10, 170)
    assert rows["bn"] == ("norm", 0, 16)
    assert rows["act"][:2] == ("activation", 0)
    assert rows[""][1] == 0  # relu, + and mean belong to the network itself
    assert "unused" not in rows
    assert all(c.kind in KINDS for c in costs.values())


def test_bytes_are_input_output_and_weights_once() -> None:
    stem = by_path(PlainNet(), (3, 8, 8), batch=2)["stem"]
    assert (stem.read_bytes, stem.write_bytes, stem.weight_bytes) == (4 * 2 * 3 * 64, 4 * 2 * 8 * 64, 4 * 216)
    assert stem.ops == 2 * stem.macs
    assert stem.intensity == stem.ops / stem.bytes
    half = by_path(PlainNet(), (3, 8, 8), batch=2, bits=16)["stem"]
    assert half == stem.at(bits=16)
    assert by_path(PlainNet(), (3, 8, 8), batch=6)["stem"] == stem.at(batch=6)
    assert 2 * half.bytes == stem.bytes
    assert LayerCost.from_json(stem.to_json()) == stem


def test_total_counts_every_parameter_and_each_product_once() -> None:
    model = PlainNet()
    params, macs = total(model, (3, 8, 8))
    assert params == sum(p.numel() for p in model.parameters())
    assert macs == 64 * 8 * 27 + 16 * (16 * 36 + 16 * 9 + 16 * 16) + 160


class Products(nn.Module):
    """Every way of writing a product by hand, in modules that have children and in ones that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))
        self.kernel = nn.Parameter(torch.randn(4, 1, 3))
        self.inner = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 6, 12)
        x = F.linear(x, self.weight)  # 6*12*12
        x = x @ self.weight.t()  # 6*12*12
        q = x.view(-1, 6, 3, 4).transpose(1, 2)  # (B, 3, 6, 4)
        x = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)  # 3 * 6*6*(4+4)
        scores = torch.einsum("bnc,bmc->bnm", x, x).softmax(-1)  # 6*6*12
        x = self.inner(torch.bmm(scores, x))  # 6*6*12
        return F.conv1d(x[:, :4], self.kernel, groups=4)  # 4*10*3


def test_functional_products_count_for_the_module_that_calls_them() -> None:
    (cost,) = layer_costs(Products(), (6, 12), batch=5)
    assert cost.path == ""
    assert cost.macs == 5 * (2 * 6 * 144 + 3 * 36 * 8 + 2 * 36 * 12 + 120)
    assert cost.params == 144 + 12
    assert cost.kind == "linear"  # most of the products


def test_attention_module_and_its_projections_are_rows_of_their_own() -> None:
    costs = by_path(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1), (3, 64, 64))
    tokens, width = 17, 192
    attention = costs["blocks.0.attn"]
    assert attention.kind == "attention"
    assert attention.macs == 2 * tokens * tokens * width
    assert costs["blocks.0.attn.qkv"].macs == tokens * width * 3 * width
    assert attention.read_bytes == 3 * attention.write_bytes == 4 * 3 * tokens * width


def test_multihead_attention_is_counted_though_torch_would_run_it_in_one_call() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    costs = by_path(layer, (5, 8))
    assert sum(c.macs for c in costs.values()) == 5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16
    assert sum(c.params for c in costs.values()) == sum(p.numel() for p in layer.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_transposed_and_recurrent_layers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 16, batch_first=True)
            self.up = nn.ConvTranspose1d(16, 6, 3, groups=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.lstm(x)[0].transpose(1, 2))

    costs = by_path(Mixed(), (10, 8))
    assert costs["lstm"].macs == 10 * 4 * 16 * (8 + 16)
    assert costs["up"].macs == 10 * 16 * 3 * 3


NETWORKS = [
    ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
    ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 1, 1)}),
    ("convnext_atto", {"depths": (1, 1, 2, 1)}),
    ("resnet18", {}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_agrees_with_torch_on_networks_of_timm(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, **options).eval()
    costs = layer_costs(model, (3, 64, 64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert sum(c.ops for c in costs) == counter.get_total_flops()
    assert sum(c.params for c in costs) == sum(p.numel() for p in model.parameters())


def test_the_model_is_left_as_it_was() -> None:
    model = PlainNet().train()
    model.point.eval()
    mean = model.bn.running_mean.clone()
    layer_costs(model, (3, 8, 8))
    assert model.training
    assert model.bn.training
    assert not model.point.training
    assert torch.equal(model.bn.running_mean, mean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_input_that_does_not_fit_is_one_sentence() -> None:
    model = PlainNet()
    with pytest.raises(LissomError, match=r"does not run on an input of shape \(1, 5, 8, 8\)"):
        layer_costs(model, (5, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
