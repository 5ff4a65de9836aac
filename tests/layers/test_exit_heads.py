"""Exit heads: the published operators to their figures, parameters by formula, and heads by shape of the output."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.layers.exit_heads import (
    ConvExit,
    GlobalAggregationHead,
    LinearExit,
    LocalPerceptionHead,
    MapExit,
    TokenExit,
    build_head,
    channels_come_last,
    head_kinds,
)
from lissom.meters.costs import total

OPERATORS = {
    "op_lph_conv1_1": (lambda: LocalPerceptionHead(48), (7, 7)),
    "op_lph_conv2_1": (lambda: LocalPerceptionHead(48, depthwise=False), (7, 7)),
    "op_gah_r2": (lambda: GlobalAggregationHead(64, 2), (14, 14)),
    "op_gah_r3": (lambda: GlobalAggregationHead(64, 3), (14, 14)),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    where = os.environ.get("LISSOM_PARITY")
    if not where:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return Path(where)


@pytest.fixture(scope="module")
def parity(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("published_figures", folder / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", OPERATORS)
def test_same_operator_as_published(variant: str, folder: Path, parity: Any) -> None:
    fixture = json.loads((folder / "lgvit" / f"{variant}.json").read_text())
    make, grid = OPERATORS[variant]
    head = make().eval()
    assert {name: list(t.shape) for name, t in head.state_dict().items()} == fixture["keys"]
    assert sum(p.numel() for p in head.parameters()) == fixture["params"]
    parity.fill_(head.state_dict())
    with torch.no_grad():
        output = head(parity.make_input(tuple(fixture["input"])), grid)
    assert parity.close(parity.digest(output), fixture["output"], rtol=1e-5)


@pytest.mark.parametrize("dim", [16, 48])
def test_parameters_by_formula(dim: int) -> None:
    def count(head: nn.Module) -> int:
        return sum(p.numel() for p in head.parameters())

    assert count(LocalPerceptionHead(dim)) == 2 * dim**2 + 18 * dim
    assert count(LocalPerceptionHead(dim, depthwise=False)) == 2 * dim**2 + 6 * dim
    for stride in (1, 2, 3):
        assert count(GlobalAggregationHead(dim, stride)) == 4 * dim**2 + dim


def test_aggregation_is_attention_among_every_other_row_and_column() -> None:
    torch.manual_seed(0)
    head = GlobalAggregationHead(16, 2).eval()
    x = torch.randn(2, 35, 16)  # 5 x 7
    kept = [row * 7 + column for row in (0, 2, 4) for column in (0, 2, 4, 6)]
    y = head(x, (5, 7))
    assert y.shape == (2, 12, 16)
    q, k, v = (t.reshape(2, 12, 8, 2).transpose(1, 2) for t in head.qkv(x[:, kept]).chunk(3, -1))
    shares = (q @ k.transpose(-1, -2) * 2**-0.5).softmax(-1)
    torch.testing.assert_close(y, head.proj((shares @ v).transpose(1, 2).reshape(2, 12, 16)))
    # What is left out has no part in it.
    other = x.clone()
    other[:, [i for i in range(35) if i not in kept]] += 1
    assert torch.equal(head(other, (5, 7)), y)


def test_perception_keeps_rows_and_columns_apart() -> None:
    """A changed patch moves its neighbours in the grid, and no others."""
    torch.manual_seed(0)
    head = LocalPerceptionHead(8).eval()
    x = torch.randn(1, 20, 8)  # 4 x 5
    other = x.clone()
    other[:, 5 * 1 + 4] += 1  # row 1, last column
    moved = (head(other, (4, 5)) - head(x, (4, 5))).abs().sum(-1)[0] > 1e-6
    assert moved.reshape(4, 5).nonzero().tolist() == [[r, c] for r in (0, 1, 2) for c in (3, 4)]


class Double(nn.Module):
    """A mixer that is easy to follow."""

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        assert grid == (2, 3)
        return 2 * x


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_logits_on_tokens(prefix: int) -> None:
    torch.manual_seed(0)
    head = TokenExit(4, 3, Double(), (2, 3), prefix)
    x = torch.randn(5, prefix + 6, 4)
    mean = 2 * x[:, prefix:].mean(1)
    torch.testing.assert_close(head(x), head.classifier(mean + x[:, 0] if prefix else mean))


def test_logits_of_a_distilled_transformer() -> None:
    torch.manual_seed(0)
    head = TokenExit(4, 3, Double(), (2, 3), 2, distilled=True)
    x = torch.randn(5, 8, 4)
    mean = 2 * x[:, 2:].mean(1)
    both = head.classifier(mean + x[:, 0]), head.distillation_classifier(mean + x[:, 1])
    torch.testing.assert_close(head(x), (both[0] + both[1]) / 2)
    with pytest.raises(ValueError, match="reads two special tokens, and there are 1"):
        TokenExit(4, 3, Double(), (2, 3), 1, distilled=True)


def test_logits_on_maps() -> None:
    torch.manual_seed(0)
    head = MapExit(4, 3, Double())
    x = torch.randn(5, 2, 3, 4)
    torch.testing.assert_close(head(x), head.classifier(head.norm(2 * x).mean((1, 2))))
    plain = LinearExit(4, 3, 0)
    torch.testing.assert_close(plain(x), plain.classifier(x.mean((1, 2))))
    # The same map as tokens, and with its channels first.
    for other, sizes in ((x.flatten(1, 2), {"grid": (2, 3)}), (x.permute(0, 3, 1, 2), {"channels_first": True})):
        same = MapExit(4, 3, Double(), **sizes)
        same.load_state_dict(head.state_dict())
        torch.testing.assert_close(same(other), head(x))
    first = LinearExit(4, 3, 0, channels_first=True)
    first.load_state_dict(plain.state_dict())
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2)), plain(x))


def test_registers_are_no_class_token() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4 + 6, 4)
    head = TokenExit(4, 3, Double(), (2, 3), 4, class_token=False)
    torch.testing.assert_close(head(x), head.classifier(2 * x[:, 4:].mean(1)))
    plain = LinearExit(4, 3, 4, class_token=False)
    torch.testing.assert_close(plain(x), plain.classifier(x[:, 4:].mean(1)))
    with_class = LinearExit(4, 3, 4)
    torch.testing.assert_close(with_class(x), with_class.classifier(x[:, 0]))


def test_kinds_are_the_published_ones() -> None:
    assert head_kinds(8) == ["lph_a", "lph_a", "lph_b", "lph_b", "gah2", "gah2", "gah3", "gah3"]
    assert head_kinds(6) == ["lph_a", "lph_b", "gah2", "gah2", "gah3", "gah3"]
    assert head_kinds(4) == ["lph_a", "lph_b", "gah2", "gah3"]
    assert head_kinds(2) == ["lph_a", "gah2"]
    assert head_kinds(8, maps=True) == ["lph_a", "lph_a", "lph_b", "lph_b", "gah1", "gah1", "gah2", "gah2"]


@pytest.mark.parametrize("count", [1, 3, 5, 7, 11])
def test_kinds_of_other_numbers_go_from_local_to_global(count: int) -> None:
    kinds = head_kinds(count)
    assert len(kinds) == count
    order = ["lph_a", "lph_b", "gah2", "gah3"]
    places = [order.index(kind) for kind in kinds]
    assert places == sorted(places)
    assert places[0] == 0
    with pytest.raises(ValueError, match="at least one"):
        head_kinds(0)


@pytest.mark.parametrize(
    ("shape", "options", "kind", "made"),
    [
        ((2, 17, 16), {}, "lph_a", TokenExit),
        ((2, 14, 16), {"prefix": 2, "grid": (3, 4), "distilled": True}, "gah2", TokenExit),
        ((2, 16, 16), {"prefix": 0}, "gah3", TokenExit),
        ((2, 17, 16), {}, "linear", LinearExit),
        ((2, 7, 7, 16), {}, "gah1", MapExit),
        ((2, 7, 7, 16), {}, "linear", LinearExit),
        ((2, 7, 5, 16), {"channels_last": True}, "lph_b", MapExit),
        ((2, 16, 7, 5), {}, "lph_a", ConvExit),
        ((2, 16, 8, 8), {}, "lph_a", ConvExit),
        ((2, 16, 16, 16), {}, "lph_a", ConvExit),
        ((2, 3, 1, 1), {}, "lph_a", ConvExit),
        ((2, 16, 7, 5), {}, "linear", LinearExit),
        ((2, 16, 7, 5), {"stages": True, "channels_last": False}, "gah1", MapExit),
        ((2, 12, 16), {"prefix": 0, "stages": True, "grid": (3, 4)}, "lph_a", MapExit),
        ((2, 20, 16), {"prefix": 4, "class_token": False}, "gah2", TokenExit),
        ((2, 20, 16), {"prefix": 4, "class_token": False}, "linear", LinearExit),
    ],
)
def test_a_head_by_the_shape_of_the_output(shape, options, kind, made) -> None:
    torch.manual_seed(0)
    head = build_head(torch.empty(shape, device="meta"), 5, kind, **options).eval()
    assert type(head) is made
    assert not any(p.is_meta for p in head.parameters())
    x = torch.randn(shape)
    logits = head(x)
    assert logits.shape == (2, 5)
    program = torch.export.export(head, (x,))
    torch.testing.assert_close(program.module()(x), logits)
    head.reset_classifier(7)
    assert head(x).shape == (2, 7)


@pytest.mark.parametrize(
    ("sizes", "aspect", "last"),
    [
        ((64, 64, 80), 0.8, False),  # of 256 x 320 pixels: as many channels as rows
        ((64, 80, 64), 1.25, False),
        ((64, 80, 192), 0.8, True),
        ((8, 11, 64), 250 / 330, True),  # rounded up,
        ((7, 10, 64), 250 / 330, True),  # down
        ((64, 7, 10), 250 / 330, False),
        ((64, 80, 100), 0.8, False),  # both pairs of sizes fit: torch's order
        ((7, 7, 16), 1.0, True),
        ((16, 16, 16), 1.0, False),
        ((16, 7, 5), 1.0, False),
        ((7, 8, 16), 1.0, False),
    ],
)
def test_where_a_maps_channels_stand(sizes, aspect, last) -> None:
    assert channels_come_last(sizes, aspect) is last


def test_attention_heads_divide_the_channels() -> None:
    heads = {dim: build_head(torch.empty(1, 5, dim), 2, "gah2").mixer.heads for dim in (16, 12, 10, 7)}
    assert heads == {16: 8, 12: 6, 10: 5, 7: 7}
    with pytest.raises(ValueError, match="8 heads do not divide 12 channels"):
        GlobalAggregationHead(12, 2)


@pytest.mark.parametrize(
    ("shape", "kind", "options", "sentence"),
    [
        ((2, 16), "lph_a", {}, r"the module answers with shape \(2, 16\); take a module further inside"),
        ((2, 16, 8), "lph_a", {}, "16 tokens, 1 of them special, are no grid of 4 x 4 patches"),
        ((2, 13, 8), "lph_a", {"grid": (3, 5)}, "are no grid of 3 x 5 patches"),
        ((2, 1, 8), "lph_a", {}, "1 tokens, 1 of them special"),
        ((2, 5, 8), "lph_c", {}, "no exit head is of the kind 'lph_c'"),
        ((2, 5, 8), "gah0", {}, "kind 'gah0'"),
        ((2, 5, 8), "lph_a", {"distilled": True}, "has two special tokens, and this one has 1"),
    ],
)
def test_what_no_head_can_read(shape, kind, options, sentence) -> None:
    with pytest.raises(NotApplicable, match=sentence):
        build_head(torch.empty(shape), 5, kind, **options)


def test_a_convolutional_head_is_cheap() -> None:
    head = ConvExit(16, 10)
    params, macs = total(head, (16, 8, 8))
    assert macs == 9 * 16 * 32 * 4 * 4 + 32 * 10
    assert params == 9 * 16 * 32 + 2 * 32 + 32 * 10 + 10
    assert ConvExit(256, 10).classifier.in_features == 128
    assert ConvExit(256, 10, width=24).classifier.in_features == 24


def test_costs_are_the_sheets() -> None:
    """At 196 tokens of 768 channels, in 10^9 multiply-accumulates, as counted for the sheet."""
    costs = {}
    for kind in ("lph_a", "lph_b", "gah2", "gah3"):
        head = build_head(torch.empty(1, 197, 768, device="meta"), 100, kind)
        costs[kind] = round(total(head, (197, 768))[1] / 1e9, 2)
    assert costs == {"lph_a": 0.23, "lph_b": 0.23, "gah2": 0.12, "gah3": 0.06}
