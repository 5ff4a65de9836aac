"""LGViT's networks: published sizes, checkpoints in published names, answers in order, and the published figures."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lissom.errors import LissomError
from lissom.layers.exit_heads import GlobalAggregationHead, LocalPerceptionHead
from lissom.layers.exits import attach_exits, put_away_exits
from lissom.models.factory import _load, create_model, from_published
from lissom.models.lgvit import checkpoint_filter_fn

SMALL: dict[str, dict[str, Any]] = {
    "lgvit_vit_base": {"img_size": 64, "embed_dim": 16, "num_heads": 2, "num_classes": 5},
    "lgvit_deit_small": {"img_size": 64, "embed_dim": 16, "num_heads": 2, "num_classes": 5},
    "lgvit_swin_base": {"img_size": 64, "window_size": 2, "embed_dim": 8, "num_heads": (1, 2, 2, 4), "num_classes": 5},
}
VARIANTS = {
    "vit_base_cifar100": "lgvit_vit_base",
    "deit_small_10cls": "lgvit_deit_small",
    "swin_base_cifar100": "lgvit_swin_base",
}


def small(name: str, **sizes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(name, **{**SMALL[name], **sizes})


def outline(name: str, **sizes: Any) -> torch.nn.Module:
    """Names and shapes, without values: costs neither memory nor time."""
    with torch.device("meta"):
        return create_model(name, weight_init="skip", **sizes)


@pytest.mark.parametrize(
    ("name", "classes", "params", "heads"),
    [
        ("lgvit_vit_base", 100, 101_277_060, [1_270_372] * 2 + [1_261_156] * 2 + [2_436_964] * 4),
        ("lgvit_deit_base", 100, 101_970_696, [1_347_272] * 2 + [1_338_056] * 2 + [2_513_864] * 4),
        ("lgvit_deit_small", 10, 25_442_484, [309_524] * 2 + [304_916] * 2 + [597_908] * 4),
        ("lgvit_swin_base", 100, 96_356_924, None),
    ],
)
def test_published_sizes(name: str, classes: int, params: int, heads: list[int] | None) -> None:
    model = outline(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == params
    if heads:
        assert [sum(p.numel() for p in head.parameters()) for head in model.exits.heads] == heads


@pytest.mark.parametrize("name", SMALL)
def test_the_answers_of_the_exits_come_first(name: str) -> None:
    model = small(name).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    for path in model.exits.positions:
        model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: seen.__setitem__(path, output)
        )
    with torch.no_grad():
        answers = model(x)
        assert [tuple(answer.shape) for answer in answers] == [(2, 5)] * 9
        for answer, path, head in zip(answers, model.exits.positions, model.exits.heads, strict=False):
            assert torch.equal(answer, head(seen[path]))
        assert torch.equal(answers[-1], model.forward_head(model.forward_features(x)))
    model.reset_classifier(7)
    assert [tuple(answer.shape) for answer in model(x)] == [(2, 7)] * 9


def test_exits_stand_where_they_are_published() -> None:
    vit = outline("lgvit_vit_base")
    assert vit.exits.positions == tuple(f"blocks.{i}" for i in range(3, 11))
    kinds = [type(head.mixer) for head in vit.exits.heads]
    assert kinds == [LocalPerceptionHead] * 4 + [GlobalAggregationHead] * 4
    assert [head.mixer.stride for head in vit.exits.heads[4:]] == [2, 2, 3, 3]
    assert vit.blocks[0].norm1.eps == 1e-12
    swin = outline("lgvit_swin_base")
    assert swin.exits.positions == (
        "layers.1.blocks.1", *(f"layers.2.blocks.{i}" for i in (2, 5, 8, 11, 14, 17)), "layers.3.blocks.0",
    )  # fmt: skip
    assert [head.mixer.stride for head in swin.exits.heads[4:]] == [1, 1, 2, 2]
    assert [getattr(head.mixer, "depthwise", None) for head in swin.exits.heads[:4]] == [True, True, False, False]
    four = outline("lgvit_vit_base", exits=(4, 6, 9, 11))
    assert [getattr(head.mixer, "stride", 0) for head in four.exits.heads] == [0, 0, 2, 3]


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_exits_go_along_with_another_size_of_the_images(name: str, away: bool) -> None:
    model = small(name).eval()
    exits = model.exits
    if away:
        put_away_exits(model)
    model.set_input_size(img_size=(96, 64))
    if away:
        attach_exits(model, exits)
    with torch.no_grad():
        assert [tuple(answer.shape) for answer in model(torch.zeros(2, 3, 96, 64))] == [(2, 5)] * 9


@pytest.mark.parametrize("exits", [(), (4, 4), (6, 4), (0, 3), (4, 12)])
def test_exits_that_cannot_be(exits: tuple[int, ...]) -> None:
    with pytest.raises(LissomError, match="no rising numbers of blocks between 1 and 11"):
        outline("lgvit_vit_base", exits=exits)


@pytest.fixture(scope="module")
def folder() -> Path:
    where = os.environ.get("LISSOM_PARITY")
    if not where:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return Path(where)


def fixture(folder: Path, variant: str) -> dict[str, Any]:
    return json.loads((folder / "lgvit" / f"{variant}.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_names_become_the_networks_own(folder: Path, variant: str) -> None:
    keys = fixture(folder, variant)["keys"]
    model = outline(VARIANTS[variant], num_classes=10 if variant == "deit_small_10cls" else 100)
    state = checkpoint_filter_fn({name: torch.empty(shape, device="meta") for name, shape in keys.items()}, model)
    own = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == own


def test_queries_keys_and_values_stand_in_that_order() -> None:
    state = {
        f"deit.encoder.layer.2.attention.attention.{name}.bias": torch.full((2,), float(i))
        for i, name in enumerate(("value", "query", "key"))
    }
    found = checkpoint_filter_fn(state, outline("lgvit_vit_base"))
    assert found.keys() == {"blocks.2.attn.qkv.bias"}
    assert found["blocks.2.attn.qkv.bias"].tolist() == [1, 1, 2, 2, 0, 0]


def test_a_checkpoint_without_queries_says_so() -> None:
    model = small("lgvit_vit_base", depth=3, exits=(1,))
    state = {"deit.encoder.layer.0.attention.attention.key.bias": torch.zeros(16)}
    with pytest.raises(LissomError, match=r"missing: .*1 unknown: blocks\.0\.attn\.key\.bias"):
        _load(model, checkpoint_filter_fn(state, model), "a file")


def test_own_names_load_as_they_are() -> None:
    model = outline("lgvit_deit_small")
    state = {name: value for name, value in model.state_dict().items() if name != "exits.steps"}
    found = checkpoint_filter_fn(state, model)
    assert found.keys() == state.keys()
    assert all(found[name] is value for name, value in state.items())


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_answers_are_the_published_ones(folder: Path, variant: str) -> None:
    spec = importlib.util.spec_from_file_location("published_figures", folder / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    published = fixture(folder, variant)
    state = {
        name: torch.zeros(shape, dtype=torch.long if name.endswith("num_batches_tracked") else torch.float32)
        for name, shape in published["keys"].items()
        if name not in published.get("int_keys", ())
    }
    model = from_published(VARIANTS[variant], parity.fill_(state)).eval()
    assert sum(p.numel() for p in model.parameters()) == published["params"]
    tokens: list[torch.Tensor] = []
    for head in model.exits.heads:
        head.mixer.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        answers = model(parity.make_input(tuple(published["input"])))
    for answer, expected in zip(answers, published["output"], strict=True):
        assert parity.close(parity.digest(answer), expected, rtol=1e-4)
    for own, expected in zip(tokens, published.get("head_features", ()), strict=False):
        assert parity.close(parity.digest(own), expected, rtol=1e-4)
