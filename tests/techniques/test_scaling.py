"""scale: the published factors, roundings and networks; settings stay pure, and what cannot be scaled is told."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

import lissom
from lissom.errors import LissomError, NotApplicable
from lissom.meters.activations import complexity
from lissom.models.factory import create_model
from lissom.models.stages import Stages, read_stages, with_stages
from lissom.techniques.scaling import (
    PRESETS,
    adjust_block_compatibility,
    exponents,
    scale_config,
    scaling_factors,
    type_of_alpha,
)
from tests.models.families import PARITY, needs_parity

# As the paper's code has them: B0, and RegNetY-4.0GF as explicit stages; images as there.
B0 = Stages("efficientnet", (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320), stem=32, head=1280)
Y4G = Stages("regnet", (2, 6, 12, 2), (128, 192, 512, 1088), (1.0,) * 4, (64,) * 4)
SMALL = Stages("regnet", (1, 2, 3, 1), (16, 32, 64, 128), (1.0,) * 4, (8,) * 4, stem=32)
NAMES = {"efficientnet_b0": B0, "regnety_040": Y4G}


def cases(kind: str) -> list[dict[str, Any]]:
    if PARITY is None:
        return []
    return json.loads((PARITY / "model_scaling" / "cases.json").read_text())[kind]


def meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **kwargs)


# The rules


@needs_parity
def test_the_published_factors() -> None:
    for case in cases("scaling_factors"):
        found = scaling_factors(case["scale_type"], case["scale_factor"])
        assert list(found) == pytest.approx(case["d_w_g_r"], rel=1e-9), case


@needs_parity
def test_the_published_compatibility_of_widths_and_groups() -> None:
    for case in cases("adjust_block_compatibility"):
        found = adjust_block_compatibility(tuple(case["ws"]), tuple(case["bs"]), tuple(case["gs"]))
        widths, _, groups = case["out"]
        assert found == (tuple(widths), tuple(groups)), case


@needs_parity
@pytest.mark.parametrize("number", range(6))
def test_a_published_scaled_model(number: int) -> None:
    """Settings, and all three counts before and after, as the paper's code computes them."""
    case = cases("scaled_models")[number]
    name, before = ("efficientnet_b0", B0) if "EN-B0" in case["config"] else ("regnety_040", Y4G)
    network = meta(name)
    assert replace(read_stages(network), train_size=224, test_size=256) == before
    after = scale_config(before, case["scale_type"], case["scale_factor"])
    want = case["after"]
    assert after.depths == tuple(want["depths"])
    assert after.widths == tuple(want["widths"])
    assert after.group_widths == tuple(want.get("group_ws", ()))
    assert (after.stem, after.head) == (want["stem_w"], want.get("head_w", 0))
    assert (after.train_size, after.test_size) == (want["train_size"], want["test_size"])
    with torch.device("meta"):
        networks = [with_stages(network, stages) for stages in (before, after)]
    for built, stages, key in zip(networks, (before, after), ("complexity_before", "complexity_after"), strict=True):
        figures = case[key]
        cost = complexity(built, (3, stages.train_size, stages.train_size))
        assert stages.train_size == figures["input"]
        assert (cost.macs, cost.params, cost.activations) == (figures["flops"], figures["params"], figures["acts"])


@pytest.mark.parametrize("scale_type", [*PRESETS, "d1_w2_g2_r0", "w.5_r1.5", type_of_alpha(0.5)])
@pytest.mark.parametrize("factor", [0.25, 1, 2, 4, 16.0])
def test_factors_multiply_to_what_was_asked(scale_type: str, factor: float) -> None:
    d, w, _, r = scaling_factors(scale_type, factor)
    assert d * w**2 * r**2 == pytest.approx(factor)


@pytest.mark.parametrize(
    ("scale_type", "params", "activations"),
    [
        ("d", 1, 1), ("w", 1, 0.5), ("r", 0, 1), ("dw", 1, 0.75), ("dr", 0.5, 1), ("wr", 0.5, 0.75),
        ("dwr", 2 / 3, 5 / 6), ("dWr", 0.9, 0.6), (type_of_alpha(0.8), 0.9, 0.6),
    ],
)  # fmt: skip
def test_exponents_of_the_papers_table(scale_type: str, params: float, activations: float) -> None:
    found = exponents(scale_type)
    assert (found["params"], found["activations"]) == (pytest.approx(params), pytest.approx(activations))
    assert found["d"] + found["w"] + found["r"] == pytest.approx(1)


def test_alpha_runs_from_depth_and_image_to_width() -> None:
    assert scaling_factors(type_of_alpha(0.8), 5) == pytest.approx(scaling_factors("dWr", 5))
    assert scaling_factors(type_of_alpha(1), 5) == pytest.approx(scaling_factors("wg", 5))
    assert scaling_factors(type_of_alpha(0), 5) == pytest.approx(scaling_factors("dr", 5))
    thirds, uniform = scaling_factors(type_of_alpha(1 / 3), 5), scaling_factors("dwr", 5)
    assert (thirds.depth, thirds.width, thirds.resolution) == pytest.approx(
        (uniform.depth, uniform.width, uniform.resolution), rel=1e-6
    )
    assert uniform.group == 1
    assert thirds.group > 1


def test_more_width_means_fewer_activations_at_equal_factor() -> None:
    """Counted on networks, not by the formula; the factor is large, so that rounding is small beside it."""
    before = replace(SMALL, depths=(2, 4, 6, 2), train_size=96, test_size=112)
    network = with_stages(meta("regnetx_002"), before)
    counts = []
    for alpha in (0.0, 1 / 3, 0.6, 0.8, 1.0):
        after = scale_config(before, type_of_alpha(alpha), 16)
        with torch.device("meta"):
            counts.append(complexity(with_stages(network, after), (3, after.train_size, after.train_size)).activations)
    assert all(more > fewer for more, fewer in itertools.pairwise(counts))


def test_a_factor_of_one_changes_nothing_but_roundings() -> None:
    for stages in (B0, Y4G):
        for scale_type in PRESETS:
            assert scale_config(stages, scale_type, 1) == stages
    odd = Stages("regnet", (1, 1, 1, 1), (20, 43, 60, 100), (1.0,) * 4, (4,) * 4, train_size=225, test_size=257)
    rounded = scale_config(odd, "dWr", 1)
    assert rounded.widths == (16, 40, 64, 96)  # 20 / 8 and 60 / 8 lie halfway: to the even neighbour
    assert (rounded.train_size, rounded.test_size) == (224, 256)
    assert odd.widths == (20, 43, 60, 100)  # what was given is left alone


def test_groups_round_to_few_widths_and_divide_the_inside() -> None:
    for group, wide in ((1, 1), (2, 2), (3, 4), (5, 4), (6, 8), (11, 8), (12, 16), (28, 32)):
        # 28 / 8 is halfway, and its even neighbour is 4
        found = scale_config(replace(SMALL, widths=(64, 64, 128, 256), group_widths=(group,) * 4), "d", 1)
        assert found.group_widths == (wide,) * 4
    for share, factor in itertools.product((0.25, 0.5, 1.0, 4.0), (1, 2, 4, 16)):
        found = scale_config(replace(SMALL, bottlenecks=(share,) * 4, widths=(64, 64, 128, 256)), "dWr", factor)
        for width, group in zip(found.widths, found.group_widths, strict=True):
            assert round(width * share) % group == 0


def test_one_group_of_all_stays_one() -> None:
    assert adjust_block_compatibility((256, 40), (0.25, 1.0), (0, 0)) == ((256, 40), (0, 0))
    resnet = read_stages(meta("resnet50"))
    assert resnet.group_widths == (0, 0, 0, 0)
    assert resnet.bottlenecks == (0.25,) * 4
    assert scale_config(resnet, "w", 4).group_widths == (0, 0, 0, 0)


# Networks


@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", "efficientnet_b3", "tf_efficientnet_b0", "efficientnetv2_rw_t", "mobilenetv2_100",
     "mnasnet_100", "efficientnet_es", "regnetx_008", "regnety_008", "regnetv_040", "regnetz_040", "resnet18",
     "resnet50", "resnet50d", "seresnet50", "resnext50_32x4d", "wide_resnet50_2"],
)  # fmt: skip
def test_families_of_timm_scale_and_answer(name: str) -> None:
    """Every one comes out the same from its own numbers, else ``with_stages`` refuses; scaled, it runs."""
    before = read_stages(network := meta(name))
    after = scale_config(before, "dWr", 0.1)
    model = with_stages(network, after, num_classes=5).eval()
    assert read_stages(model) == after
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_scale_gives_a_network_with_its_true_factors() -> None:
    found = lissom.scale("regnetx_002", 0.25, image_size=64, num_classes=7)
    assert found.before.train_size == 64
    assert read_stages(found.model) == found.after == lissom.scale(found.before, 0.25)
    size = found.after.train_size
    assert found.model.default_cfg["input_size"] == (3, size, size)
    assert complexity(found.model, (3, size, size)) == found.cost_after
    assert found.ratios["macs"] == found.cost_after.macs / found.cost_before.macs
    assert 0.1 < found.ratios["macs"] < 0.5
    assert found.model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert not any(p.is_meta for p in found.model.parameters())
    assert "x0." in str(found)


def test_the_ratio_of_training_and_test_size_is_kept() -> None:
    for train, test in ((240, 276), (284, 324), (200, 228), (36, 41)):
        model = with_stages(meta("regnetx_002"), replace(SMALL, train_size=train, test_size=test))
        assert read_stages(model) == replace(SMALL, train_size=train, test_size=test)


def test_a_network_of_ones_own_is_read_and_scaled_again() -> None:
    once = lissom.scale("efficientnet_b0", 0.05, image_size=64, num_classes=3)
    twice = lissom.scale(once.model, 2, "w")
    assert twice.before == once.after
    assert twice.model.num_classes == 3
    assert twice.cost_before == once.cost_after
    assert twice.ratios["macs"] > 1.2
    grey = lissom.scale("resnet18", 0.1, image_size=32, in_chans=1)
    assert grey.model(torch.zeros(2, 1, 28, 28)).shape == (2, 1000)


def test_alpha_takes_the_place_of_a_type() -> None:
    assert lissom.scale(B0, 4, alpha=0.8) == lissom.scale(B0, 4)
    with pytest.raises(LissomError, match="not both"):
        lissom.scale(B0, 4, "dwr", alpha=0.5)
    with pytest.raises(LissomError, match="from 0 to 1"):
        lissom.scale(B0, 4, alpha=1.5)


@pytest.mark.parametrize("wrong", ["", "x", "dd", "d1_d2", "d1w2", "d-1", "d0_w0", "d1_", "d1e400", "wide"])
def test_another_type_is_refused(wrong: str) -> None:
    with pytest.raises(LissomError, match=r"no type|all weights"):
        scaling_factors(wrong, 4)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), True, "4"])
def test_a_factor_that_is_no_factor_is_refused(wrong: Any) -> None:
    with pytest.raises(LissomError, match="above 0"):
        scaling_factors("dWr", wrong)


def test_networks_of_other_kinds_are_refused() -> None:
    for name in ("mixnet_s", "mobilenetv4_conv_small", "resnest50d"):
        network = meta(name)
        with pytest.raises(NotApplicable):
            with_stages(network, read_stages(network))
    with pytest.raises(NotApplicable, match="EfficientNets, RegNets and ResNets"):
        lissom.scale("vit_tiny_patch16_224", 4)
    with pytest.raises(LissomError, match="no network is called"):
        lissom.scale("regnet_9000", 4)
    with pytest.raises(LissomError, match="not int"):
        lissom.scale(4, 4)
    with pytest.raises(LissomError, match="num_classes belongs to a network"):
        lissom.scale(B0, 4, num_classes=3)
    with pytest.raises(LissomError, match="image_size is 0"):
        lissom.scale("resnet18", 2, image_size=0)


def test_a_changed_network_is_refused() -> None:
    """What its numbers do not tell would be lost silently."""
    network = meta("resnet18", num_classes=3)
    network.layer2[0].conv1 = nn.Conv2d(64, 128, 5, 2, 2, bias=False, device="meta")
    with pytest.raises(NotApplicable, match="does not come out the same"):
        lissom.scale(network, 2)
    with pytest.raises(NotApplicable, match="does not say which"):
        lissom.scale(type(network)(type(network.layer1[0]), (1, 1, 1, 1), channels=(8, 8, 8, 8)), 2)


def test_settings_check_themselves() -> None:
    fields = asdict(SMALL)
    for name, value, reason in (
        ("family", "vgg", "family"), ("depths", (0, 1, 1, 1), "positive"), ("widths", (8, 8), "one number a stage"),
        ("group_widths", (-1, 1, 1, 1), "positive"), ("bottlenecks", (0.0, 1, 1, 1), "positive"),
        ("stem", 0, "at least 1"), ("depths", [1, 1, 1, 1], "tuple"),
    ):  # fmt: skip
        with pytest.raises(LissomError, match=reason):
            Stages(**{**fields, name: value})
    network = meta("regnetx_002")
    with pytest.raises(LissomError, match="14 stages"):
        with_stages(meta("efficientnet_b0"), replace(B0, depths=B0.depths * 2, widths=B0.widths * 2))
    with pytest.raises(LissomError, match="is a regnet"):
        with_stages(network, B0)
    with pytest.raises(LissomError, match="do not divide"):
        with_stages(network, replace(SMALL, group_widths=(7, 8, 8, 8)))
