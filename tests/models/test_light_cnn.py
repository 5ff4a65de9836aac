"""Light CNN: its counts, the two submodels and their merging, dual-input training, progressive unfreezing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError
from lissom.layers.dual import DualModel
from lissom.models.light_cnn import LightTrunk, dual_light_cnn, light_cnn_groups
from lissom.tasks.task import Task
from lissom.training.loop import fit
from lissom.training.methods.dual_input import DualInput, augmented
from lissom.training.unfreezing import fit_unfreezing
from tests.models.families import (
    PARITY,
    check_classifier,
    check_export,
    check_trains,
    count,
    images,
    needs_parity,
    small,
)


def published() -> dict:
    assert PARITY is not None
    return json.loads((PARITY / "light_cnn" / "cases.json").read_text())


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def a_task() -> Task:
    """64 small grey images of three classes, told apart by where they are bright."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 3
    pixels = 0.1 * rng.standard_normal((64, 1, 12, 12)).astype(np.float32)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 4] += 1
    split = ArraySplit("bands", pixels, labels)
    return Task(split, split, split, shape=(1, 12, 12), classes=("a", "b", "c"), name="bands")


def test_counts() -> None:
    assert (count("light_cnn"), count("light_cnn_cifar")) == (14_862, 15_294)
    assert numbers(LightTrunk()) == 7_226
    assert numbers(dual_light_cnn()) == 14_872


@needs_parity
def test_published_counts() -> None:
    for net in published()["nets"]:
        channels = net["in_chans"]
        assert numbers(LightTrunk(channels)) == net["trunk"]
        assert numbers(dual_light_cnn(in_chans=channels)) == net["stage1_model"]
        assert count("light_cnn", in_chans=channels) == net["merged_model"]
        assert (
            numbers(LightTrunk(channels)) + net["dense"] * net["classes"] + net["classes"]
            == (net["single_trunk_baseline"])
        )
    size = published()["size_bytes"]
    assert size["float32"] == 4 * count("light_cnn")
    assert size["float32_with_adam_moments"] == 12 * count("light_cnn")


@pytest.mark.parametrize(("name", "shape"), [("light_cnn", (1, 28, 28)), ("light_cnn_cifar", (3, 32, 32))])
def test_a_network_like_any_other(name: str, shape: tuple[int, ...]) -> None:
    x = images(2, *shape)
    check_trains(small(name), x)
    check_classifier(small(name), x)
    model = small(name).eval()
    with torch.no_grad():
        assert torch.equal(model(x), model.forward_head(model.forward_features(x)))
        assert model(images(2, shape[0], 33, 21)).shape == (2, 10)  # the mean takes any size


def test_export() -> None:
    check_export(small("light_cnn"), images(1, 1, 28, 28))


def test_merged_by_averages_the_answers_stay() -> None:
    torch.manual_seed(0)
    dual = dual_light_cnn()
    x = images(5, 1, 28, 28)
    with torch.no_grad():
        first, second = dual.both(x, x)
        merged = dual.merge()
        torch.testing.assert_close(merged(x), (first + second) / 2)
        torch.testing.assert_close(dual(x), merged(x))
        assert not torch.allclose(dual.merge("random")(x), merged(x))
    merged.trunks[0].conv1.weight.data.zero_()
    assert dual.trunks[0].conv1.weight.any()  # a copy
    small("light_cnn").load_state_dict(merged.state_dict())
    with pytest.raises(ValueError, match="'zeros'"):
        dual.merge("zeros")


@needs_parity
def test_published_merging() -> None:
    case = published()["average_merge"]
    dual = DualModel(nn.Identity, 2, 2)
    with torch.no_grad():
        for head, number in zip(dual.heads, "12", strict=True):
            head.weight.copy_(torch.tensor(case[f"head{number}"]))
            head.bias.copy_(torch.tensor(case[f"bias{number}"]))
    merged = dual.merge()
    assert merged.head.weight.tolist() == case["merged_weight"]
    assert merged.head.bias.tolist() == case["merged_bias"]


def test_neither_submodel_feels_the_others_images() -> None:
    torch.manual_seed(0)
    dual, task = dual_light_cnn(3), a_task()
    x, y = torch.from_numpy(task.fit.inputs(slice(0, 8))), torch.arange(8) % 3

    def gradients(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        dual.zero_grad()
        one, other = dual.both(first, second)
        (task.loss(one, y) + task.loss(other, y)).backward()
        return [trunk.conv1.weight.grad.clone() for trunk in dual.trunks]

    plain, changed = gradients(x, x), gradients(x, x.flip(0))
    assert torch.equal(plain[0], changed[0])
    assert not torch.equal(plain[1], changed[1])


def test_dual_input_training_learns() -> None:
    torch.manual_seed(0)
    dual, task = dual_light_cnn(3), a_task()
    result = fit(dual, task, method=DualInput(), epochs=8, batch=8, lr=5e-3, augment=False)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.history[-1]["quality"] > 80


def test_augmented_images_stay_near() -> None:
    x = torch.zeros(16, 2, 20, 12)
    x[:, :, 8:12, 4:8] = 1
    torch.manual_seed(0)
    moved = augmented(x)
    assert moved.shape == x.shape
    assert not torch.equal(moved[0], moved[1])
    assert (moved.sum((1, 2, 3)) / x.sum((1, 2, 3))).sub(1).abs().max() < 0.5
    torch.testing.assert_close(augmented(x, 0, 0, 0, 0), x, rtol=1e-5, atol=1e-5)


def test_turning_keeps_shapes_in_images_that_are_not_square() -> None:
    x = torch.zeros(1, 1, 40, 20)
    x[:, :, 14:26, 9:11] = 1  # a bar, 12 high and 2 wide
    torch.manual_seed(1)
    moved = augmented(x.expand(64, -1, -1, -1), 90 - 1e-3, 0, 0, 0)
    rows = moved.sum(3).gt(0.2).sum(2).float()  # height of what is seen
    columns = moved.sum(2).gt(0.2).sum(2).float()
    assert ((rows**2 + columns**2).sqrt() < 16).all()  # it has turned, and was not stretched
    assert columns.max() > 9


def test_layers_thaw_from_the_last_to_the_first(tmp_path: Path) -> None:
    model, task = small("light_cnn", num_classes=3), a_task()
    seen: list[dict[str, torch.Tensor]] = [{k: v.clone() for k, v in model.state_dict().items()}]
    groups = light_cnn_groups()
    for phases in range(1, len(groups) + 1):
        # The same folder: what is trained is not trained again, and one phase more follows.
        results = fit_unfreezing(model, task, groups[:phases], epochs=1, batch=16, folder=tmp_path, resume=True)
        assert len(results) == phases
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        changed = {k for k, v in seen[-1].items() if not torch.equal(v, seen[-2][k])}
        order = ("head", "dense", "conv3", "conv2", "conv1")
        assert changed == {k for k in seen[0] if k.split(".")[-2] in order[:phases]}


@needs_parity
def test_published_order() -> None:
    order = published()["unfreeze_order"]
    assert [group.removesuffix(r"\.").split(r"\.")[-1].lstrip("^") for group in light_cnn_groups()] == order


@pytest.mark.parametrize(
    ("groups", "reason"), [((), "nothing to unfreeze"), (("tail",), "'tail'"), (("head", "head"), "two groups")]
)
def test_groups_that_cannot_be(groups: tuple[str, ...], reason: str) -> None:
    with pytest.raises(LissomError, match=reason):
        fit_unfreezing(small("light_cnn", num_classes=3), a_task(), groups)


@pytest.mark.parametrize(
    ("wrong", "reason"), [({"degrees": 180}, "below 180"), ({"zoom": -0.1}, "at least 0"), ({"shift": 1}, "below 1")]
)
def test_ranges_that_cannot_be(wrong: dict[str, float], reason: str) -> None:
    with pytest.raises(LissomError, match=reason):
        DualInput(**wrong)


def test_another_model_is_refused() -> None:
    with pytest.raises(LissomError, match="DualModel"):
        fit(small("light_cnn", num_classes=3), a_task(), method="dual_input", augment=False)
