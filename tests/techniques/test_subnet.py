"""subnet: what it keeps, that the plan given stays, exact answers, recovery, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.plan import Plan
from lissom.models.ofa import OFAMobileNetV3, OFANet
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.recipe import Recipe
from lissom.techniques.subnet import Subnet
from lissom.training.methods.recovery import Recovery
from tests.models.families import settle

TARGET = Target("openvino", "cpu", 1, 1, frozenset({"fp32", "int8", "bf16"}))


def a_task(side: int = 16) -> Task:
    rng = np.random.default_rng(0)
    split = ArraySplit("noise", rng.standard_normal((8, 3, side, side)).astype(np.float32), np.arange(8) % 5)
    return Task(split, split, split, shape=(3, side, side), classes=tuple("abcde"))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5
    ).eval()


def test_half_of_a_vit() -> None:
    model, task = vit(), a_task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Subnet(depth=0.5).apply(Plan.of(model, task.shape), task)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = [block for block in plan.model.blocks if not isinstance(block, nn.Identity)]
    assert len(kept) == 2
    assert all(block.mlp.fc1.out_features == 64 and block.attn.num_heads == 2 for block in kept)
    assert "4 hidden layers narrower, 4 attentions with fewer heads, 2 blocks fewer" in plan.notes[0]
    with torch.no_grad():
        assert plan.model(torch.zeros(1, *task.shape)).shape == (1, 5)
    assert plan.recovery


def test_heads_may_stay_whole() -> None:
    task = a_task()
    plan = Subnet(width=0.5, heads=1.0).apply(Plan.of(vit(), task.shape), task)
    assert {block.attn.num_heads for block in plan.model.blocks} == {4}


def test_recovery_trains_every_weight() -> None:
    model, task = vit(), a_task()
    plan = Subnet().apply(Plan.of(model, task.shape), task)
    method = Recovery(model, plan.recovery)
    method.prepare(plan.model, task)
    assert len(list(method.parameters(plan.model))) == len(list(plan.model.parameters()))


@pytest.mark.parametrize("text", ["subnet() + low_rank()", "low_rank() + subnet()", "subnet(width=0.7) + int8()"])
def test_it_stands_with_others(text: str) -> None:
    model, task = vit(), a_task()
    plan = Recipe.parse(text).apply(Plan.of(model, task.shape), task, TARGET)
    with torch.no_grad():
        assert plan.model(torch.zeros(1, *task.shape)).shape == (1, 5)


def test_low_rank_reads_the_blocks_that_are_left() -> None:
    model, task = vit(), a_task()
    plan = Recipe.parse("subnet(depth=0.5) + low_rank()").apply(Plan.of(model, task.shape), task, TARGET)
    method = Recovery(model, plan.recovery)
    method.prepare(plan.model, task)
    x, y = torch.from_numpy(task.fit.inputs(slice(0, 4))), torch.arange(4)
    method.loss(plan.model, x, y, task).backward()


def test_a_resnets_streams() -> None:
    torch.manual_seed(0)
    model, task = timm.create_model("resnet18", num_classes=5).eval(), a_task(32)
    hidden = Subnet().apply(Plan.of(model, task.shape), task).model
    assert (hidden.layer1[0].conv1.out_channels, hidden.layer1[0].conv2.out_channels) == (32, 64)
    with torch.no_grad():
        assert hidden(torch.zeros(1, *task.shape)).shape == (1, 5)


def test_a_super_network_gives_one_of_its_own() -> None:
    torch.manual_seed(0)
    network = OFAMobileNetV3(num_classes=5, widths=(8, 16), neck=16, features=24, depths=(1, 2), expands=(2, 4)).eval()
    task = a_task(32)
    plan = Subnet(depth=0.5).apply(Plan.of(network, task.shape), task)
    assert type(plan.model) is OFANet
    assert len(plan.model.blocks) == 3
    assert plan.model.blocks[1].depthwise.conv.kernel_size == (7, 7)
    want = network.extract(network.setting(expand=2, depth=1)).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in plan.model.state_dict().items())
    assert "4 hidden layers narrower, 2 blocks fewer" in plan.notes[0]
    with pytest.raises(NotApplicable, match="nearer"):
        Subnet(width=0.95).apply(Plan.of(network, task.shape), task)


def test_fuse_leaves_elastic_norms_alone() -> None:
    torch.manual_seed(0)
    network = OFAMobileNetV3(num_classes=5, widths=(8, 16), neck=16, features=24, depths=(1, 2), expands=(2, 4))
    task = a_task(32)
    settle(network, torch.from_numpy(task.fit.inputs(slice(None))))
    plan = Recipe.parse("fuse() + subnet(depth=0.5)").apply(Plan.of(network, task.shape), task, TARGET)
    assert not isinstance(plan.model.stem.bn, nn.BatchNorm2d)  # the stem is of plain layers
    network.set_active(network.setting(expand=2, depth=1))
    x = torch.from_numpy(task.fit.inputs(slice(0, 2)))
    with torch.no_grad():
        torch.testing.assert_close(plan.model(x), network(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ("width=0", "width is 0"),
        ("depth=2", "depth is 2"),
        ("width=True", "width is True"),
        ("width=1.0", "all shares"),
    ],
)
def test_knobs_that_cannot_be(knobs: str, reason: str) -> None:
    with pytest.raises(LissomError, match=reason):
        Recipe.parse(f"subnet({knobs})")


def test_networks_that_cannot_be() -> None:
    task = a_task()
    single = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    with pytest.raises(NotApplicable, match="hidden"):
        Subnet().check(Plan.of(single), TARGET)
    with pytest.raises(NotApplicable, match="elastic"):
        Subnet(width=1, heads=1, depth=0.5).apply(
            Plan.of(nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Linear(8, 5))), task
        )
