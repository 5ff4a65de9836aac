"""cascade: its members, what is refused, their precisions, trainings and temperatures; other networks as members."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.calibration import never_tested
from lissom.export.cascades import fit_temperature
from lissom.export.plan import Plan, Precision
from lissom.images import Preprocessing
from lissom.layers.cascade import PostCheck
from lissom.runtime.target import Target
from lissom.search.recipes import RecipeSpace
from lissom.tasks.task import Task
from lissom.techniques.cascade import Cascade
from lissom.techniques.low_rank import LowRank
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer
from lissom.training.loop import FitEvent

TARGET = Target("openvino", "cpu", 1, 1, frozenset({"fp32", "int8", "bf16"}))
SHAPE = (3, 32, 32)


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2, num_classes=4
    ).eval()


def task(count: int = 64) -> Task:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, count)
    x = (rng.standard_normal((count, *SHAPE)) + 0.3 * y[:, None, None, None]).astype(np.float32)
    split = ArraySplit("made", x, y.astype(np.int64))
    return Task(choose=split, report=split, fit=split, shape=SHAPE, classes=tuple("abcd"), name="made")


def plan_of(model: nn.Module) -> Plan:
    return Plan.of(model, SHAPE)


@pytest.mark.parametrize(
    "text",
    [
        "cascade()",
        "cascade(first=(low_rank(ratio=2.5) + int8()), second=(int8()))",
        "cascade(first=(low_rank()), second=(fuse() + int8(keep=('head',))), score='entropy', risk=1.0)",
        "fuse() + cascade(first=(int8(linear='conv'))) + bf16()",
        "cascade(first=(), second=(low_rank()), postcheck=False)",
        "cascade(first_model='models.py:small', second_model='resnet18', second_weights='w.pth')",
    ],
)
def test_text_and_back(text: str) -> None:
    assert str(Recipe.parse(text)) == text


def test_members_read_without_parentheses_and_in_any_order() -> None:
    read = Recipe.parse("cascade(second=int8, first=int8 + low_rank(ratio=2.5))")
    assert str(read) == "cascade(first=(low_rank(ratio=2.5) + int8()), second=(int8()))"
    for wrong, says in (
        ("cascade(first=3)", "not of the form"),
        ("cascade(first=(low_rank() - int8()))", "not of the form"),
        ("cascade(first=('low_rank',))", "not of the form"),
        ("cascade(first=(int9()))", "no technique is called 'int9'"),
        ("cascade(score=(int8()))", "not a literal"),
        ("cascade(score='mood')", "score is 'confidence'"),
        ("cascade(risk=0)", "between 0 and 100"),
        ("cascade(second_weights='w.pth')", "second_weights are those of a second_model"),
    ):
        with pytest.raises(LissomError, match=says):
            Recipe.parse(wrong)


@pytest.mark.parametrize("postcheck", [True, False])
def test_the_plan_holds_both_and_one_decision(postcheck: bool) -> None:
    model, of = vit(), task()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = plan_of(model)
    changed = Cascade(postcheck=postcheck, score="confidence").apply(plan, of)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    x = torch.randn(4, *SHAPE)
    thin = LowRank(ratio=3.0).apply(plan, of).model
    with torch.no_grad():
        early, late = changed.model(x)
        torch.testing.assert_close(early, thin(x))
        torch.testing.assert_close(late, PostCheck("confidence")(thin(x), model(x)) if postcheck else model(x))
    (leaving,) = changed.decisions
    assert (leaving.at, leaving.rule, leaving.risk) == ("first", "confidence", 0.5)
    assert leaving.boundary == (("input", "first") if postcheck else ("input",))
    assert 0 < leaving.cost < 1
    assert leaving.heads == pytest.approx(leaving.cost)  # the second is the model itself: together 1 + the first
    assert changed.recovery
    assert changed.precision.float32
    assert any(note.startswith("cascade of the model low_rank(ratio=3.0) and the model") for note in changed.notes)
    small = Cascade(first=Recipe.parse("low_rank(ratio=4.0)"), second=Recipe.parse("low_rank(ratio=3.0)"))
    assert small.apply(plan, of).decisions[0].heads < leaving.heads


def test_what_is_refused() -> None:
    plan, of = plan_of(vit()), task()

    def said(text: str, target: Target = TARGET, plan: Plan = plan, of: Task = of) -> str:
        with pytest.raises(NotApplicable) as caught:
            Recipe.parse(text).apply(plan, of, target)
        return str(caught.value)

    assert "the same network" in said("cascade(first=(), second=())")
    assert "early_exit cannot stand in a member" in said("cascade(first=(early_exit()))")
    assert "cascade cannot stand in a member" in said("cascade(first=(cascade()))")
    assert "cascade(...) + bf16()" in said("cascade(first=(bf16()))")
    assert "a member answers once" in said("early_exit() + cascade()")
    assert "stands in the members" in said("low_rank() + cascade()")
    assert "int8 stands in a member of cascade and around it" in said("cascade(first=(int8())) + int8()")
    assert "stands twice in the recipe" in said("cascade(first=(low_rank() + low_rank()))")
    assert "for classification" in said("cascade()", of=replace(of, kind="segmentation"))
    assert "differ in linear" in said(
        "cascade(first=(low_rank() + int8(linear='conv', model_type='plain')), second=(int8(model_type='plain')))"
    )
    assert "exits already" in said("cascade()", plan=Cascade().apply(plan, of))
    trained = plan.with_recovery(*LowRank().apply(plan, of).recovery)
    assert "let it stand in the members" in said("cascade()", plan=trained)


def test_precision_by_member() -> None:
    plan, of = plan_of(vit()), task()
    one = Recipe.parse("cascade(first=(low_rank() + int8(keep=('head',), linear='conv')))").apply(plan, of, TARGET)
    at = one.precision.at
    assert at("first.network.blocks.0.mlp.fc1.0") == 8
    assert at("first.network.head") == 32
    assert {at("second.network.blocks.0.attn.qkv"), at("check"), at("first.temperature")} == {32}
    assert one.precision.options["linear_in"] == ["first.network."]
    both = Recipe.parse("cascade(first=(low_rank() + int8()), second=(int8(keep=('head',))))").apply(plan, of, TARGET)
    assert both.precision.at("second.network.blocks.0.attn.qkv") == both.precision.at("first.network.head") == 8
    assert both.precision.at("second.network.head") == 32
    assert "linear_in" not in both.precision.options
    around = Recipe.parse("cascade() + int8(keep=('head',)) + bf16()").apply(plan, of, TARGET)
    at = around.precision.at
    assert {at("first.network.head"), at("second.network.head"), at("check"), at("second.temperature")} == {16}
    assert at("first.network.blocks.0.mlp.fc1.0") == at("second.network.patch_embed.proj") == 8
    assert around.precision.options["float_bits"] == 16


def test_a_policy_of_a_network_holds_in_each_member() -> None:
    plan = replace(plan_of(vit()), members=("a", "b"), precision=Precision({"": 32, "check": 32}))
    changed = plan.with_precision(Precision({"": 8, "check": 32, "head": 32}))
    assert dict(changed.precision.bits) == {"": 8, "check": 32, "a.head": 32, "b.head": 32}
    assert dict(changed.with_precision(changed.precision).precision.bits) == dict(changed.precision.bits)
    assert dict(plan_of(vit()).with_precision(Precision({"head": 8})).precision.bits) == {"head": 8}


def test_variants_give_both_members_the_same_setting() -> None:
    plan = plan_of(vit())
    undecided = Recipe.parse("cascade(first=(low_rank() + int8()), second=(int8()))").techniques[0]
    found = undecided.variants(plan, TARGET)
    assert len(found) == 4
    for one in found:
        assert isinstance(one, Cascade)
        assert one.recipe("first").techniques[-1] == one.recipe("second").techniques[-1]
    half = Recipe.parse("cascade(first=(low_rank() + int8()))").techniques[0]
    assert len(half.variants(plan, TARGET)) == 4
    assert Cascade().variants(plan, TARGET) == (Cascade(),)


def test_settling_settles_the_members() -> None:
    plan, of = plan_of(vit()), task()
    asked = []

    def probe(pairs):  # type: ignore[no-untyped-def]
        asked.append(len(pairs))
        return [2.0] * len(pairs)

    settled = Cascade().settle(plan, of, probe)
    assert asked
    assert settled.recipe("first").techniques[0].skip is not None  # type: ignore[attr-defined]
    assert settled.second == Recipe()
    plain = Cascade(first=Recipe.parse("int8()"))
    assert plain.settle(plan, of, probe) == plain


def test_the_space_offers_first_members_that_apply() -> None:
    space = Cascade.space(plan_of(vit()), TARGET)
    assert space["first"][0] is None
    assert [str(r) for r in space["first"][1:]] == ["low_rank()", "low_rank(ratio=4.0)", "token_clustering()"]
    recipes = RecipeSpace(["cascade", "int8"], plan_of(vit()), TARGET)
    for recipe in (Recipe((Cascade(),)), Recipe.parse("cascade(first=(low_rank(ratio=2.0)), risk=1.0)")):
        assert recipes.decode(recipes.encode(recipe)) == recipe
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    assert Cascade.space(plan_of(conv), TARGET)["first"] == (None,)


def test_each_member_is_trained_once_for_all_recipes(tmp_path: Path) -> None:
    plan, of = plan_of(vit()), task()
    epochs: list[FitEvent] = []
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0, progress=epochs.append)
    alone = Recipe.parse("low_rank(ratio=3.0)")
    one = recoverer.recover(alone, alone.apply(plan, of, TARGET))
    (file,) = tmp_path.glob("*.safetensors")
    stamp = file.stat().st_mtime_ns
    (first,) = recoverer.trainings
    assert first.steps == len(epochs) == 1
    recipe = Recipe.parse("cascade(second=(low_rank(ratio=2.0))) + int8()")
    both = recoverer.recover(recipe, recipe.apply(plan, of, TARGET))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert file.stat().st_mtime_ns == stamp
    assert len(recoverer.trainings) == len(epochs) == 2
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(both.model(x)[0], one.model(x))
    other = Recipe.parse("cascade(first=(low_rank(ratio=2.0)), second=(low_rank(ratio=3.0)), score='entropy')")
    turned = recoverer.recover(other, other.apply(plan, of, TARGET))
    assert len(epochs) == 2
    assert recoverer.trainings[1] == first  # what was kept says how long it was trained
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with torch.no_grad():
        torch.testing.assert_close(turned.model.second(x), both.model.first(x))
    assert any("temperatures at 1: only 6 images" in note for note in both.notes)
    with pytest.raises(NotApplicable, match="nothing to train on"):
        Recoverer(plan, of.with_splits(fit=None), TARGET, tmp_path / "no", epochs=1, seconds=None, seed=0).recover(
            recipe, recipe.apply(plan, of, TARGET)
        )


def test_temperatures_are_fitted_on_what_no_promise_is_tested_on(tmp_path: Path) -> None:
    plan, of = plan_of(vit()), task(600)
    with torch.no_grad():
        plan.model.head.weight.mul_(200)  # much too sure of itself  # type: ignore[union-attr,operator]
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    recipe = Recipe.parse("cascade(first=(int8()))")
    made = recipe.apply(plan, of, TARGET)
    found = recoverer.recover(recipe, made)
    values = [found.model.get_submodule(f"{place}.temperature").value for place in ("first", "second")]
    assert values[0] == values[1] > 1.5
    assert made.model.first.temperature.value == 1.0  # type: ignore[union-attr]
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x)[0], plan.model(x) / values[0], rtol=1e-4, atol=1e-4)
    assert any("fitted on 60 images of choose" in note for note in found.notes)
    for text in ("cascade(first=(int8()), calibrated=False)", "cascade(first=(int8()), postcheck=False)"):
        plain = Recipe.parse(text)
        left = recoverer.recover(plain, plain.apply(plan, of, TARGET))
        assert left.model.first.temperature.value == 1.0  # type: ignore[union-attr]
    bare = of.with_splits(choose=ArraySplit("choose", of.choose.inputs(slice(0, 600)), None))
    unlabelled = Recoverer(plan, bare, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    assert any("there are no labels" in note for note in unlabelled.recover(recipe, made).notes)


def test_temperatures_are_fitted_on_a_batch_of_images_at_a_time() -> None:
    asked: list[int] = []

    class Spy(ArraySplit):
        def inputs(self, indices: np.ndarray | slice) -> np.ndarray:
            found = super().inputs(indices)
            asked.append(len(found))
            return found

    plan, of = plan_of(vit()), task(3000)
    made = Recipe.parse("cascade(first=(int8()))").apply(plan, of, TARGET)
    (cascade,) = Recipe.parse("cascade(first=(int8()))").techniques
    whole = Spy("made", of.choose.inputs(slice(None)), of.choose.labels)
    found = cascade.tempered(made, of.with_splits(choose=whole), 0)  # type: ignore[attr-defined]
    assert asked == [256, 44]  # a tenth of the images, each once for both members
    rows = never_tested(3000, 0)
    with torch.no_grad():
        logits = plan.model(torch.from_numpy(of.choose.inputs(rows))).numpy()
    wanted = fit_temperature(logits, of.choose.labels[rows])  # type: ignore[index]
    assert wanted != pytest.approx(1, abs=0.01)
    for place in ("first", "second"):
        assert found.model.get_submodule(f"{place}.temperature").value == pytest.approx(wanted, rel=1e-4)


CODE = """
import torch
from torch import nn
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.5, 0.25)
calls = []
def small(outputs=4):
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))
def five():
    return small(5)
def deep():
    return nn.Sequential(nn.Conv2d(3, 8, 64), nn.Flatten(), nn.Linear(8, 4))
"""


def test_another_network_as_a_member(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    prepared = Preprocessing(32, 32, 3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    plan, of = plan_of(vit()), replace(task(), preprocessing=prepared)
    recipe = Recipe.of(f"cascade(first_model='{file}:small', second=(low_rank()))")
    changed = recipe.apply(plan, of, TARGET)
    pixels = torch.rand(2, *SHAPE)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.5, 0.5, 0.25)))
    with torch.no_grad():
        want = changed.model.first.network((pixels - mean) / std)  # type: ignore[operator,union-attr]
        torch.testing.assert_close(changed.model((pixels - 0.5) / 0.25)[0], want, rtol=1e-4, atol=1e-5)
    assert changed.decisions[0].cost < 0.5
    for name, says in (("five", "has 5 outputs, and the model has 4"), ("deep", "does not take inputs of shape")):
        with pytest.raises(NotApplicable, match=says):
            Recipe.of(f"cascade(first_model='{file}:{name}')").apply(plan, of, TARGET)
    # Its own recipe is trained by itself as its teacher, and its weights lie apart from the model's.
    trained = Recipe.of(f"cascade(first=(), second_model='{file}:small', second=(fuse()))")
    with pytest.raises(NotApplicable, match="nothing to fuse"):
        trained.apply(plan, of, TARGET)
    other = vit(3)
    save_file(other.state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "big.py").write_text(
        "import timm\ndef net():\n    return timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, "
        "embed_dim=32, num_heads=2, depth=2, num_classes=4)\n"
    )
    files = f"second_model='{tmp_path}/big.py:net', second_weights='{tmp_path}/vit.safetensors'"
    text = f"cascade({files}, second=(low_rank()))"
    recipe = Recipe.of(text)
    recoverer = Recoverer(plan, of, TARGET, tmp_path / "weights", epochs=1, seconds=None, seed=0)
    both = recoverer.recover(recipe, recipe.apply(plan, of, TARGET))
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "weights").glob("*/*.safetensors"))) == 1
    assert not torch.equal(both.model.second.network.head.weight, both.model.first.network.head.weight)  # type: ignore


def test_code_and_downloads_are_run_for_the_user_only(tmp_path: Path) -> None:
    file = tmp_path / "evil.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef net(): ...\n")
    plan, of = plan_of(vit()), task()
    saved = tmp_path / "plan.json"
    for text in (
        f"cascade(second_model='{file}:net')",
        "cascade(second_model='resnet18', second_weights='pretrained')",
    ):
        saved.write_text(json.dumps({"recipe": text}))
        for recipe in (Recipe.of(saved), Recipe.parse(text), Recipe.parse(f"fuse() + {text}")):
            with pytest.raises(
                LissomError, match=r"comes from a file; give the recipe's text yourself|nothing to fuse"
            ):
                recipe.apply(plan, of, TARGET)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(LissomError, match="returned NoneType"):
        Recipe.of(f"cascade(second_model='{file}:net')").apply(plan, of, TARGET)
    assert (tmp_path / "ran").exists()
    with pytest.raises(LissomError, match="comes without trained weights"):
        Recipe.of("cascade(second_model='resnet18')").apply(plan, of, TARGET)
    with pytest.raises(LissomError, match="no network is called"):
        Recipe.of("cascade(second_model='resnet17')").apply(plan, of, TARGET)
