"""crop on trained networks: what it removes, what it asks of the training, what it refuses, what stands beside it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import run_eager
from lissom.export.exporting import export_plan, run_artifact
from lissom.export.plan import Plan
from lissom.layers.channels import find_channels, mask_channels
from lissom.layers.low_rank import LowRankLayer
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.crop import Crop
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer
from lissom.training.methods.narrowed import Narrowed
from lissom.training.methods.pela import FeatureMSE
from tests.layers.tangled import Tangled

SHAPE = (3, 16, 16)
TARGET = Target("openvino", threads=1)


def task(shape: tuple[int, ...] = SHAPE, classes: int = 10, count: int = 48) -> Task:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, *shape)).astype(np.float32)
    y = rng.integers(0, classes, count)
    split = ArraySplit("made", x, y)
    return Task(choose=split, report=split, fit=split, shape=shape, classes=tuple(map(str, range(classes))))


TASK = task()


@pytest.fixture(scope="module")
def tangled() -> nn.Module:
    torch.manual_seed(0)
    return Tangled(width=32).eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet14t", channels=(32, 64, 96, 128), num_classes=10).eval()


def applied(model: nn.Module, text: str, of: Task = TASK) -> Plan:
    return Recipe.parse(text).apply(Plan.of(model, of.shape), of, TARGET)


def macs(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> float:
    return find_channels(model, shape).cost()[1]


# What is removed


@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_the_share_is_kept_and_the_rest_answers_as_if_masked(tangled, keep):
    before = copy.deepcopy(tangled.state_dict())
    plan = applied(tangled, f"crop(keep={keep})")
    assert macs(plan.model) / macs(tangled) == pytest.approx(keep, abs=0.06)
    assert macs(plan.model) <= keep * macs(tangled)
    assert all(torch.equal(v, before[k]) for k, v in tangled.state_dict().items())
    x = torch.randn(4, *SHAPE)
    crop, found = Crop(keep=keep), find_channels(tangled, SHAPE)
    masked = mask_channels(copy.deepcopy(tangled), found, crop._chosen(tangled, found, TASK))
    assert torch.allclose(run_eager(plan.model, x), run_eager(masked, x), atol=1e-4)
    assert plan.notes[0].startswith("crop removed ")
    assert "head (it is the network's answer)" in plan.notes[0]


def test_the_weakest_channels_go():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 10, 1),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()  # fmt: skip
    weak = list(range(0, 32, 2))
    with torch.no_grad():
        net[0].weight[weak] *= 1e-3
        net[2].weight[:, weak] *= 1e-3
    plan = applied(net, "crop(keep=0.62, skip=('2',))")
    assert plan.model[0].out_channels == 16
    x = torch.randn(4, *SHAPE)
    lost = (run_eager(plan.model, x) - run_eager(net, x)).abs().max()
    random = applied(net, "crop(keep=0.62, skip=('2',), importance='random')")
    assert lost < 0.1 * (run_eager(random.model, x) - run_eager(net, x)).abs().max()
    assert plan.model[2].out_channels == 32


def test_the_control_is_drawn_by_its_seed(tangled):
    first, again, other = (
        applied(tangled, f"crop(keep=0.5, importance='random', seed={seed})").model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name: v.shape for name, v in first.items()} == {name: v.shape for name, v in other.items()}
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_parameters_instead_of_multiplications(resnet):
    plan = applied(resnet, "crop(keep=0.4, of='parameters')")
    kept, whole = (sum(p.numel() for p in m.parameters()) for m in (plan.model, resnet))
    assert 0.37 * whole < kept <= 0.4 * whole


def test_streams_stay_where_the_blocks_suffice(resnet):
    plan = applied(resnet, "crop(keep=0.5)")
    (term,) = plan.recovery
    assert isinstance(term, Narrowed)
    assert "layer1.0.conv1" in term.paths
    assert not {"layer1.0", "layer2.0", ""} & set(term.paths)
    every = applied(resnet, "crop(keep=0.5, streams=True)")
    assert {"layer1.0", "layer4.0"} <= set(every.recovery[0].paths)
    inner = {p for p in plan.recovery[0].paths if p.endswith(".conv1")}
    kept, wider = (sum(p.model.get_submodule(i).out_channels for i in inner) for p in (plan, every))
    assert kept < wider


@pytest.mark.parametrize("densities", ["closed_form", pytest.param("synflow", marks=pytest.mark.full), "erk"])
def test_precrops_densities_and_new_weights(densities):
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).eval()
    same = applied(net, f"crop(keep=0.5, densities='{densities}')")
    uniform = applied(net, "crop(keep=0.5)")
    assert [same.model[i].out_channels for i in (0, 4, 8)] != [uniform.model[i].out_channels for i in (0, 4, 8)]
    new = applied(net, f"crop(keep=0.5, densities='{densities}', fresh=True)")
    kept, fresh = same.model[4].weight, new.model[4].weight
    assert kept.shape == fresh.shape
    assert not torch.equal(kept, fresh)
    again = applied(net, f"crop(keep=0.5, densities='{densities}', fresh=True)")
    assert torch.equal(again.model[4].weight, fresh)
    assert not new.model.training


def test_a_vision_transformers_mlps():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3,
                            num_classes=10).eval()  # fmt: skip
    plan = applied(vit, "crop(keep=0.6)", task((3, 32, 32)))
    assert plan.model.blocks[0].mlp.fc1.out_features < 192
    assert plan.model.blocks[0].attn.qkv.weight.shape == (144, 48)
    assert run_eager(plan.model, torch.zeros(1, 3, 32, 32)).shape == (1, 10)


# Activations


def test_settle_writes_what_activations_say(tangled):
    crop = Crop(keep=0.5, importance="activation")
    with pytest.raises(NotApplicable, match="settle"):
        crop.apply(Plan.of(tangled, SHAPE), TASK)
    settled = crop.settle(Plan.of(tangled, SHAPE), TASK, lambda pairs: pytest.fail("nothing is measured"))
    assert Recipe.parse(str(settled)).techniques == (settled,)
    assert settled.settle(Plan.of(tangled, SHAPE), TASK, lambda pairs: []) is settled
    assert Crop().settle(Plan.of(tangled, SHAPE), TASK, lambda pairs: []) == Crop()
    plan = settled.apply(Plan.of(tangled, SHAPE), TASK)
    assert macs(plan.model) == macs(applied(tangled, "crop(keep=0.5)").model)
    x = torch.from_numpy(TASK.fit.inputs(slice(None)))
    lost = {
        name: (run_eager(other.model, x) - run_eager(tangled, x)).square().mean()
        for name, other in (("activation", plan), ("random", applied(tangled, "crop(keep=0.5, importance='random')")))
    }
    assert lost["activation"] < lost["random"]
    # As the recipe's first technique is: folded norms have the same channels.
    fused = Recipe.parse(f"fuse() + {settled}").apply(Plan.of(tangled, SHAPE), TASK, TARGET)
    assert fused.model.stem.out_channels == plan.model.stem.out_channels
    without = settled.settle(Plan.of(tangled, SHAPE), replace(TASK, fit=None), lambda pairs: [])
    assert without == settled


def test_masks_that_do_not_fit_are_told(tangled):
    for kept, says in (
        ((("nowhere", "ff"),), "knows no channels to remove at 'nowhere'"),
        ((("head", "ff"),), "it is the network's answer"),
        ((("stem", "ff"),), "one of the 32 channels at 'stem'"),
        ((("stem", "00000000"),), "at least one bit"),
    ):
        with pytest.raises(NotApplicable, match=says):
            Crop(kept=kept).apply(Plan.of(tangled, SHAPE), TASK)
    plan = Crop(kept=(("stem", "80000001"),)).apply(Plan.of(tangled, SHAPE), TASK)
    assert torch.equal(plan.model.stem.weight, tangled.stem.weight[[0, 31]])


# In a recipe


def test_crop_comes_before_low_rank_whatever_the_text_says(resnet):
    recipe = Recipe.parse("low_rank(ratio=2.0) + crop(keep=0.6)")
    assert str(recipe) == "crop(keep=0.6) + low_rank()"
    plan = recipe.apply(Plan.of(resnet, SHAPE), TASK, TARGET)
    assert any(isinstance(m, LowRankLayer) for m in plan.model.modules())
    narrowed, features = plan.recovery
    assert isinstance(narrowed, Narrowed)
    assert features == FeatureMSE(tuple(f"layer{i}.0" for i in range(1, 5)))
    # A stream that was cropped has nothing to be compared with.
    plan = Recipe.parse("low_rank() + crop(keep=0.6, streams=True)").apply(Plan.of(resnet, SHAPE), TASK, TARGET)
    assert not any(isinstance(term, FeatureMSE) for term in plan.recovery)


def test_ranks_of_thin_layers_are_no_channels_of_its(resnet):
    thin = applied(resnet, "low_rank()")
    found = find_channels(thin.model, SHAPE)
    ranks = {name for name in found.groups if name.endswith(".0") and ".conv" in name}
    assert ranks
    plan = Crop(keep=0.7).apply(thin, TASK)
    for name in ranks:
        before, after = thin.model.get_submodule(name), plan.model.get_submodule(name)
        assert after.weight.shape[0] == before.weight.shape[0], name


@pytest.mark.parametrize(
    "text",
    [
        "fuse() + crop(keep=0.6)",
        "crop(keep=0.6) + low_rank() + int8(model_type='plain')",
        "fuse() + crop(keep=0.6) + early_exit(at=('layer2',)) + bf16()",
        "cascade(first=(crop(keep=0.4)), second=())",
        pytest.param("crop(keep=0.6) + dynamic_perceiver(latents=8, depths=(1, 1, 1, 1))", marks=pytest.mark.full),
    ],
)
def test_what_it_stands_beside(resnet, text):
    side = (3, 32, 32)
    of = task(side)
    target = replace(TARGET, capabilities=frozenset({"fp32", "int8", "bf16"}))
    plan = Recipe.parse(text).apply(Plan.of(resnet, side), of, target)
    with torch.no_grad():
        answers = plan.model(torch.zeros(1, *side))
    answers = answers if isinstance(answers, tuple) else (answers,)
    assert len(answers) == len(plan.decisions) + 1
    assert {tuple(a.shape) for a in answers} == {(1, 10)}


@pytest.mark.parametrize("other", ["cascade(second=())", "converting(force=True)"])
def test_what_cannot_stand_beside_it(tangled, other):
    with pytest.raises(NotApplicable, match="crop with"):
        applied(tangled, f"crop() + {other}")


def test_a_short_recovery_trains_all_and_comes_back(tangled, tmp_path):
    recipe = Recipe.parse("fuse() + crop(keep=0.5)")
    start = recipe.apply(Plan.of(tangled, SHAPE), TASK, TARGET)

    def recovered() -> Plan:
        recoverer = Recoverer(
            Plan.of(tangled, SHAPE), TASK, TARGET, tmp_path, epochs=1, steps=2, seconds=None, seed=0, threads=1
        )
        return recoverer.recover(recipe, recipe.apply(Plan.of(tangled, SHAPE), TASK, TARGET))

    first, second = recovered(), recovered()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    pairs = list(zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(torch.equal(a, b) for (a, _), b in zip(pairs, start.model.parameters(), strict=True))


def test_the_exported_graph_answers_as_the_model(tangled, tmp_path):
    plan = applied(tangled, "fuse() + crop(keep=0.5)")
    x = torch.randn(3, *SHAPE)
    artifact = export_plan(plan, Target("openvino", batch=3), tmp_path / "a", shape=SHAPE, verify=x.numpy())
    assert np.allclose(run_artifact(artifact, x.numpy(), 1), run_eager(plan.model, x).numpy(), atol=1e-4)


# What it refuses


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("crop(keep=0)", "between 0 and 1"),
        ("crop(keep=True)", "between 0 and 1"),
        ("crop(keep=1.0)", "between 0 and 1"),
        ("crop(importance='l1')", "'magnitude' or 'activation'"),
        ("crop(of='size')", "'macs' or 'parameters'"),
        ("crop(densities='snip')", "'synflow' or"),
        ("crop(streams='yes')", "True, False or None"),
        ("crop(multiple=0)", "at least 1"),
        ("crop(skip='head')", "tuple"),
        ("crop(fresh=1)", "True or False"),
        ("crop(seed=-1)", "at least 0"),
        ("crop(kept=(('a', 'xyz'),))", "hexadecimal"),
    ],
)
def test_wrong_knobs_are_told(text, says):
    with pytest.raises(LissomError, match=says):
        Recipe.parse(text)


@pytest.mark.parametrize("text", ["crop()", "crop(keep=0.65, importance='activation')", "crop(kept=(('a', '0f'),))"])
def test_text_and_back(text):
    assert str(Recipe.parse(text)) == text


def test_where_it_does_not_apply(tangled):
    with pytest.raises(NotApplicable, match="neither"):
        applied(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768)), "crop()")
    with pytest.raises(NotApplicable, match="no module of that path"):
        applied(tangled, "crop(skip=('hed',))")
    with pytest.raises(NotApplicable, match="leave out skip"):
        applied(tangled, "crop(skip=('stem', 'left', 'right', 'mix', 'shared', 'excite', 'squeeze', 'hidden'))")
    with pytest.raises(NotApplicable, match=r"crop\(keep=0\.001\): .* above the budget"):
        applied(tangled, "crop(keep=0.001)")
    with pytest.raises(NotApplicable, match="no channels of Sequential can be removed"):
        applied(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), "crop()")


def test_what_a_search_tries(tangled):
    space = Crop.space(Plan.of(tangled, SHAPE), TARGET)
    assert {Crop(keep=k, importance=i) for k in space["keep"] for i in space["importance"]}
