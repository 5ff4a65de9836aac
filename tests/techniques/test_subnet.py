"""subnet: what it keeps, that the plan given stays, exact answers, recovery, refusals; one training for all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.plan import Plan
from lissom.models.ofa import OFAMobileNetV3, OFANet
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer
from lissom.techniques.subnet import Subnet
from lissom.training.methods.recovery import Recovery
from lissom.training.supernet import supernet_of
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


# One training for all


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def recoverer(folder: Path, model: nn.Module, task: Task, **more: Any) -> Recoverer:
    settings: dict[str, Any] = {"epochs": 2, "seconds": None, "seed": 0}
    return Recoverer(Plan.of(model, task.shape), task, TARGET, folder, **{**settings, **more})


def recovered(maker: Recoverer, text: str) -> Plan:
    recipe = Recipe.parse(text)
    return maker.recover(recipe, recipe.apply(maker.plan, maker.task, TARGET))


def kept(folder: Path) -> dict[Path, int]:
    """The weights that trainings left, at any depth -> when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


HALF = "sizes=(('blocks.0.mlp.fc1.width', 0.5), ('blocks.2.attn.heads', 0.75))"


def test_sizes_are_of_single_dimensions() -> None:
    model, task = vit(), a_task()
    plan = Recipe.parse(f"subnet({HALF})").apply(Plan.of(model, task.shape), task, TARGET)
    assert [block.mlp.fc1.out_features for block in plan.model.blocks] == [64, 128, 128, 128]
    assert [block.attn.num_heads for block in plan.model.blocks] == [4, 4, 3, 4]
    assert "1 hidden layers narrower, 1 attentions with fewer heads" in plan.notes[0]
    assert str(Recipe.parse(f"subnet({HALF})")) == f"subnet({HALF})"
    fewer = Recipe.parse("subnet(sizes=(('blocks.depth', -2),))").apply(Plan.of(model, task.shape), task, TARGET)
    assert sum(isinstance(block, nn.Identity) for block in fewer.model.blocks) == 2


def test_many_sub_networks_one_training(tmp_path: Path) -> None:
    model, task = vit(), a_task()
    maker = recoverer(tmp_path, model, task, epochs=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = recovered(maker, f"subnet(shared=True, {HALF})")
    files = kept(tmp_path)
    assert len(files) == 1
    other = recovered(maker, "subnet(shared=True, depth=0.5) + int8()")
    assert recovered(maker, "subnet(shared=True, depth=0.5)").model is other.model  # differs in precision alone
    last = recovered(maker, "subnet(shared=True, width=0.75)")
    assert kept(tmp_path) == files  # nothing was trained again
    # Each is a slice of the network that was trained, and that is not the original.
    network = supernet_of(copy.deepcopy(model), task.shape)
    network.load_state_dict(load_file(next(iter(files))))
    assert not torch.equal(network.model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])
    for plan, setting in (
        (one, {"blocks.0.mlp.fc1.width": 0.5, "blocks.2.attn.heads": 0.75}),
        (other, network.uniform(expand=0.5, heads=0.5, depth=0.5)),
        (last, network.uniform(expand=0.75, heads=0.75)),
    ):
        want = network.extract(setting).state_dict()
        assert plan.model.state_dict().keys() == want.keys()
        assert all(torch.equal(value, want[name]) for name, value in plan.model.state_dict().items())
        assert not plan.recovery
    assert other.precision.bits[""] == 8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_norms_get_statistics_of_their_own_before_they_are_folded(tmp_path: Path) -> None:
    model, task = cnn(), a_task()
    settle(model, torch.from_numpy(task.fit.inputs(slice(None))))
    maker = recoverer(tmp_path, model, task, epochs=1)
    plan = recovered(maker, "subnet(shared=True)")
    network = supernet_of(copy.deepcopy(model), task.shape)
    network.load_state_dict(load_file(next(iter(kept(tmp_path)))))
    sliced = network.extract(network.uniform(expand=0.5))[1]
    assert len(sliced.weight) == 8
    assert torch.equal(plan.model[1].weight, sliced.weight)
    assert not torch.equal(plan.model[1].running_mean, sliced.running_mean)
    want = plan.model[0](torch.from_numpy(task.fit.inputs(slice(None)))).mean((0, 2, 3))  # one batch
    torch.testing.assert_close(plan.model[1].running_mean, want)
    x = torch.from_numpy(task.fit.inputs(slice(0, 4)))
    fused = recovered(maker, "fuse() + subnet(shared=True)")
    assert len(kept(tmp_path)) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.model.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused.model(x), plan.model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "trainings"),
    [
        ("subnet(shared=True) + low_rank()", 2),
        pytest.param("crop(keep=0.7) + subnet(shared=True, depth=0.75)", 1, marks=pytest.mark.full),
        pytest.param("subnet(shared=True) + crop(keep=0.7)", 2, marks=pytest.mark.full),
        ("subnet(shared=True) + token_clustering(after=1) + bf16()", 1),
        pytest.param("subnet(shared=True, depth=0.5) + early_exit(at=(2,))", 2, marks=pytest.mark.full),
        pytest.param(
            "subnet(shared=True) + similarity_exit(at=(1,)) + int8(keep=('blocks.3.mlp.fc1',))",
            1,
            marks=pytest.mark.full,
        ),
        pytest.param(
            "cascade(first=(subnet(shared=True)), second=(subnet(shared=True, width=0.75)))", 1, marks=pytest.mark.full
        ),
    ],
)
def test_what_stands_beside_a_shared_one(tmp_path: Path, text: str, trainings: int) -> None:
    task = a_task()
    maker = recoverer(tmp_path, vit(), task, epochs=1)
    plan = recovered(maker, text)
    x = torch.from_numpy(task.fit.inputs(slice(0, 2)))
    with torch.no_grad():
        answers = plan.model(x)
    assert all(a.shape == (2, 5) for a in (answers if isinstance(answers, tuple) else (answers,)))
    files = kept(tmp_path)
    assert len(files) == trainings
    again = recovered(maker, text)
    assert kept(tmp_path) == files
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in plan.model.state_dict().items())


@pytest.mark.full
def test_what_follows_is_trained_for_each_sub_network(tmp_path: Path) -> None:
    maker = recoverer(tmp_path, vit(), a_task(), epochs=1)
    recovered(maker, "subnet(shared=True) + low_rank()")
    recovered(maker, "subnet(shared=True, width=0.75) + low_rank()")
    assert len(kept(tmp_path)) == 3
    assert len(kept(tmp_path).keys() & set(tmp_path.glob("*.safetensors"))) == 1


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    model, task = cnn(), a_task()
    whole = recovered(recoverer(tmp_path / "whole", model, task, epochs=3), "subnet(shared=True)").model.state_dict()

    class Killed(Exception):
        pass

    def die(event: Any) -> None:
        if event.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        recovered(recoverer(tmp_path / "cut", model, task, epochs=3, progress=die), "subnet(shared=True)")
    assert not kept(tmp_path / "cut")
    seen: list[int] = []
    last = recoverer(tmp_path / "cut", model, task, epochs=3, progress=lambda event: seen.append(event.epoch))
    found = recovered(last, "subnet(shared=True)").model.state_dict()
    assert seen == [3]
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    assert not [path for path in (tmp_path / "cut").iterdir() if path.is_dir()]


def test_a_tuned_one_is_trained_on_by_itself(tmp_path: Path) -> None:
    model, task = cnn(), a_task()
    maker = recoverer(tmp_path, model, task, epochs=1)
    shared = recovered(maker, "subnet(shared=True)").model.state_dict()
    files = kept(tmp_path)
    tuned = recovered(maker, "subnet(shared=True, tuned=True) + int8()")
    state = tuned.model.state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: v.shape for name, v in shared.items()}
    assert not torch.equal(state["0.weight"], shared["0.weight"])
    assert not torch.equal(state["1.running_mean"], shared["1.running_mean"])
    assert not tuned.recovery
    after = kept(tmp_path)
    assert len(after) == 2
    assert files.items() <= after.items()  # the super-network was trained once
    # It began where the shared training ended: a step of Adam moves a weight by no more than the learning rate.
    assert (state["0.weight"] - shared["0.weight"]).abs().max() < 5e-3
    again = recovered(recoverer(tmp_path, model, task, epochs=1), "subnet(tuned=True, shared=True)")
    assert kept(tmp_path) == after
    assert all(torch.equal(v, state[n]) for n, v in again.model.state_dict().items())
    assert recovered(maker, "subnet(shared=True)").model.state_dict().keys() == shared.keys()
    assert all(torch.equal(v, shared[n]) for n, v in recovered(maker, "subnet(shared=True)").model.state_dict().items())


def test_what_a_search_hands_over_is_trained_on() -> None:
    recipe = Recipe.parse(f"fuse() + subnet(shared=True, {HALF}) + int8(model_type='plain')")
    done = recipe.finished()
    assert str(done) == f"fuse() + subnet(shared=True, {HALF}, tuned=True) + int8(model_type='plain')"
    assert done.finished() is None
    assert Recipe.parse("subnet(width=0.75) + int8()").finished() is None


def test_a_super_network_is_trained_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = OFAMobileNetV3(num_classes=5, widths=(8, 16), neck=16, features=24, depths=(1, 2), expands=(2, 4)).eval()
    task = a_task(32)
    settle(network, torch.from_numpy(task.fit.inputs(slice(None))))
    maker = recoverer(tmp_path, network, task, epochs=1)
    for text in ("subnet(shared=True, depth=0.5)", "subnet(shared=True, sizes=(('stages.1.depth', 1),))"):
        assert type(recovered(maker, text).model) is OFANet
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ("sizes=()", "name no dimension"),
        ("sizes=('a',)", "tuple of"),
        ("sizes=(('a', 0.5),), width=0.75", "leave out width"),
        ("shared=1", "True or False"),
        ("tuned=True", "give both"),
        ("shared=True, tuned=0.5", "True or False"),
    ],
)
def test_sizes_that_cannot_be(knobs: str, reason: str) -> None:
    with pytest.raises(LissomError, match=reason):
        Recipe.parse(f"subnet({knobs})")


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ("sizes=(('nowhere', 0.5),)", "'nowhere', which the super-network has not; it has blocks.0"),
        ("shared=True, sizes=(('blocks.0.mlp.fc1.width', 0.3),)", "it may be 0.5, 0.75, 1.0"),
        ("shared=True, width=0.35", "width 0.5 or 0.75 or 1, not 0.35"),
        ("shared=True, heads=0.3", "heads 0.5 or"),
        ("shared=True, stream=0.5", "stream 1, not 0.5"),
        ("shared=True, depth=0.2", "at least 0.25 of the blocks"),
    ],
)
def test_sizes_that_the_super_network_has_not(knobs: str, reason: str) -> None:
    task = a_task()
    with pytest.raises(NotApplicable, match=reason):
        Recipe.parse(f"subnet({knobs})").apply(Plan.of(vit(), task.shape), task, TARGET)


def test_nothing_to_train_on_is_a_reason(tmp_path: Path) -> None:
    task = a_task().with_splits(fit=None)
    with pytest.raises(NotApplicable, match="nothing to train on"):
        recovered(recoverer(tmp_path, vit(), task), "subnet(shared=True)")


# In a search


def test_a_search_has_many_sub_networks_of_one_super_network() -> None:
    model, task = vit(), a_task()
    plan = Plan.of(model, task.shape)
    space = Subnet.space(plan, TARGET)
    assert space["shared"] == (True,)
    names = [name for name, _ in space["sizes"].items]
    assert names == [d.name for d in supernet_of(copy.deepcopy(model), task.shape).dimensions()]
    assert len(space["sizes"].always) == 11  # three widths and four depths, less the whole network
    assert dict(space["sizes"].items)["blocks.depth"] == (0, -1, -2, -3)
    uniform = Subnet(shared=True, width=0.75, depth=0.75)
    written = uniform.as_searched(plan)
    assert written.sizes in space["sizes"].always
    one, other = (each.apply(plan, task).model.state_dict() for each in (uniform, written))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert Subnet(width=0.4).as_searched(plan) == Subnet(width=0.4)
    assert Subnet.opening(plan, TARGET).training_form() == Subnet(shared=True) == uniform.training_form()
    assert Subnet(width=0.4).training_form() == Subnet(width=0.4)
    bare = Subnet.space(Plan.of(model), TARGET)  # nobody said what an input is
    assert set(bare) == {"shared", "width", "depth"}


def test_blocks_that_are_left_out_are_told() -> None:
    model, task = vit(), a_task()
    with torch.no_grad():
        model.blocks[2].attn.proj.weight.zero_()
        model.blocks[2].mlp.fc2.weight.zero_()
    plan = Plan.of(model, task.shape)
    gone = Subnet(sizes=(("blocks.depth", -1),)).left_out(plan)
    assert gone == ("blocks.2", "blocks.2.attn.heads", "blocks.2.mlp.fc1.width")
    assert Subnet(sizes=(("blocks.0.mlp.fc1.width", 0.5),)).left_out(plan) == ()
    assert Subnet(depth=0.5).left_out(plan) == ()  # of a super-network of its own
    # The weights were changed where they lie: the order of the blocks is found anew.
    with torch.no_grad():
        model.blocks[2].attn.proj.weight.normal_()
        model.blocks[2].mlp.fc2.weight.normal_()
        model.blocks[1].attn.proj.weight.zero_()
        model.blocks[1].mlp.fc2.weight.zero_()
    assert Subnet(sizes=(("blocks.depth", -1),)).left_out(plan)[0] == "blocks.1"


def test_of_networks_elastic_by_themselves_the_blocks_that_are_missing() -> None:
    torch.manual_seed(0)
    network = OFAMobileNetV3(num_classes=5, widths=(8, 16), neck=16, features=24, depths=(1, 2), expands=(2, 4)).eval()
    plan = Plan.of(network, (3, 32, 32))
    dimensions = dict(Subnet.space(plan, TARGET)["sizes"].items)
    depth = next(name for name in dimensions if name.endswith("depth"))
    gone = Subnet(sizes=((depth, 1),)).left_out(plan)
    there = {path for path, _ in network.extract({depth: 1}).named_modules()}
    layers = [path for path, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    assert [path for path in layers if path in gone] == [path for path in layers if path not in there]
    assert set(network.dead({depth: 1})) <= set(gone)
