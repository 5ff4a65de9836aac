"""UniRepLKNet: published sizes in both forms, one narrow network through everything, the published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.utils.model import reparameterize_model

from lissom.errors import LissomError
from lissom.layers.dilated_reparam import DilatedReparamBlock
from lissom.models.factory import from_published
from lissom.models.unireplknet import UniRepLKNetBlock
from tests.models.families import (
    check_classifier,
    check_export,
    check_features,
    check_fuse,
    check_network,
    check_operator,
    check_trains,
    count,
    fixture,
    images,
    needs_parity,
    parity,
    settle,
    small,
)

SIZES = {
    "a": (4_649_060, 4_437_300), "f": (6_489_328, 6_235_216), "p": (11_080_520, 10_741_704),
    "n": (18_818_880, 18_318_560), "t": (31_693_420, 31_037_980), "s": (56_456_704, 55_645_984),
    "b": (99_089_416, 98_008_456), "l": (220_076_056, 218_454_616), "xl": (388_690_984, 386_529_064),
}  # fmt: skip
NARROW: dict[str, Any] = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "kernel_sizes": (3, 7, (13, 3), 0)}
NAME = "unireplknet_a"


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.models.unireplknet.trunc_normal_", lambda *a, **k: None)  # slow, and not needed here
    trained, merged = SIZES[size]
    assert count(f"unireplknet_{size}") == trained
    assert count(f"unireplknet_{size}", deploy=True) == merged


@pytest.mark.parametrize(("size", "third"), [("n", [13] * 8), ("t", [13, 3] * 9), ("s", [13, 3, 3] * 9)])
def test_kernels_stand_where_they_are_published(size: str, third: list[int]) -> None:
    with torch.device("meta"):
        model = small(f"unireplknet_{size}")

    def kernels(stage: torch.nn.Module) -> list[int]:
        return [b.dwconv.kernel_size if isinstance(b.dwconv, DilatedReparamBlock) else b.dwconv.kernel_size[0]
                for b in stage]  # fmt: skip

    assert [set(kernels(model.stages[i])) for i in (0, 1, 3)] == [{3}, {13}, {13}]
    assert kernels(model.stages[2]) == third


def test_one_network_through_everything() -> None:
    model = small(NAME, **NARROW, num_classes=5)
    x = images(2, 3, 45, 38)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    assert model.forward_head(model.eval().forward_features(x), pre_logits=True).shape == (2, 16)
    check_classifier(model, x)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 16, 2, 2)
    assert small(NAME, **NARROW, in_chans=1, num_classes=2)(images(1, 1, 33, 33)).shape == (1, 2)
    with pytest.raises(ValueError, match="without classes"):
        model.reset_classifier(3, "")


def test_features() -> None:
    x = images(1, 3, 45, 38)
    check_features(NAME, x, **NARROW)
    check_features(NAME, x, **NARROW, feature_norms=True)
    two = small(NAME, **NARROW, features_only=True, out_indices=(0, 2), feature_norms=True)
    assert [m.shape[1] for m in two(x)] == two.feature_info.channels() == [8, 16]
    names = {name for name, _ in two.named_parameters()}
    assert {"model.norm0.weight", "model.norm2.weight"} <= names
    assert not any(name.startswith(("model.stages.3", "model.norm.", "model.norm1", "model.head")) for name in names)
    model = small(NAME, **NARROW, feature_norms=True).eval()
    maps = model.forward_intermediates(x, indices=[1], norm=True, stop_early=True, intermediates_only=True)
    assert torch.allclose(maps[0].mean(1), torch.zeros(1, 6, 5), atol=1e-5)
    with pytest.raises(ValueError, match="feature_norms"):
        small(NAME, **NARROW).forward_intermediates(x, norm=True)


def test_a_fresh_block_hardly_changes_its_input() -> None:
    torch.manual_seed(0)
    block, x = UniRepLKNetBlock(8, 13), images(2, 8, 9, 9)
    assert (block(x) - x).norm() <= 1e-5 * x.norm()


def test_the_merged_form() -> None:
    model = small(NAME, **NARROW, num_classes=5, ls_init_value=1.0)
    for module in model.modules():
        if hasattr(module, "beta"):
            torch.nn.init.normal_(module.gamma)
            torch.nn.init.normal_(module.beta)
    x = images(4, 3, 45, 38)
    merged = check_fuse(model, x)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in merged.modules())
    built = small(NAME, **NARROW, num_classes=5, deploy=True).eval()
    built.load_state_dict(merged.state_dict())
    with torch.no_grad():
        assert torch.equal(built(x), merged(x))
    assert sum(p.numel() for p in reparameterize_model(built).parameters()) == sum(
        p.numel() for p in built.parameters()
    )
    check_trains(built, x)  # a network in the merged form can be tuned on


def test_export_of_the_merged_form() -> None:
    sizes = {"dims": (8, 16), "depths": (1, 1), "kernel_sizes": (3, 13)}
    check_export(small(NAME, **sizes, num_classes=5, deploy=True), images(1, 3, 25, 30))


@pytest.mark.full
def test_export() -> None:
    x = images(1, 3, 45, 38)
    model = small(NAME, **NARROW, num_classes=5, ls_init_value=1.0)
    settle(model, images(4, 3, 45, 38))
    check_export(model, x)


def test_block_of_an_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="kernel size of 1"):
        UniRepLKNetBlock(4, 1)
    with pytest.raises(LissomError, match="differ"):
        small(NAME, depths=(1, 1))


def test_the_publishers_names_load_in_both_forms() -> None:
    model = small(NAME, num_classes=7, in_chans=2)
    loaded = from_published(NAME, model.state_dict())
    assert loaded.num_classes == 7
    assert torch.equal(loaded.head.weight, model.head.weight)
    merged = reparameterize_model(model)
    loaded = from_published(NAME, merged.state_dict())
    assert loaded.state_dict().keys() == merged.state_dict().keys()
    assert torch.equal(loaded.stages[3][1].dwconv.lk_origin.weight, merged.stages[3][1].dwconv.lk_origin.weight)


@pytest.mark.parametrize("deploy", [False, True])
def test_checkpoints_that_do_not_fit(deploy: bool) -> None:
    state = small(NAME, num_classes=3, deploy=deploy).state_dict()
    gone = "stages.1.0.dwconv.lk_origin.weight"
    with pytest.raises(LissomError, match=rf"1 missing: {gone}"):
        from_published(NAME, {key: value for key, value in state.items() if key != gone})
    with pytest.raises(LissomError, match="1 unknown: foreign"):
        from_published(NAME, {**state, "foreign": torch.zeros(1)})
    with pytest.raises(LissomError, match="1 of another shape"):
        from_published(NAME, {**state, gone: torch.zeros(80, 1, 11, 11)})


@needs_parity
def test_the_published_block() -> None:
    def build(state: dict[str, torch.Tensor]) -> UniRepLKNetBlock:
        block = UniRepLKNetBlock(16, 13)
        block.load_state_dict(state)
        return block

    def merged(state: dict[str, torch.Tensor]) -> torch.nn.Module:
        return reparameterize_model(torch.nn.Sequential(build(state).eval()))

    check_operator("unireplknet", "op_block_k13", build)
    check_operator("unireplknet", "op_block_k13", merged)


@needs_parity
@pytest.mark.parametrize("name", ["unireplknet_a", "unireplknet_t", "unireplknet_a_deploy"])
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = small(name.removesuffix("_deploy"), deploy=name.endswith("_deploy"))
    keys = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert keys == fixture("unireplknet", name)["keys"]


@needs_parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["unireplknet_a", "unireplknet_t", "unireplknet_a_deploy"])
def test_the_answers_are_the_published_ones(name: str) -> None:
    check_network("unireplknet", name, rtol=1e-4)


@needs_parity
@pytest.mark.full
def test_the_merged_answer_is_the_published_one() -> None:
    own, figures = parity(), fixture("unireplknet", "unireplknet_a_merged")
    state = {key: torch.zeros(shape) for key, shape in figures["keys"].items()}
    model = reparameterize_model(from_published(NAME, own.fill_(state)).eval())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == figures["keys_after_merge"]
    with torch.no_grad():
        answer = model(own.make_input(tuple(figures["input"])))
    assert own.close(own.digest(answer), figures["output"], rtol=1e-4)
