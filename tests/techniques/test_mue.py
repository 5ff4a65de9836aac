"""similarity_exit: where exits stand, what they answer and cost, what is refused, and what is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.plan import Plan
from lissom.layers.exits import exits_of
from lissom.meters.costs import total
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.low_rank import LowRank
from lissom.techniques.mue import SimilarityExit, places
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer, training_form
from lissom.techniques.token_clustering import ClusterTokens
from lissom.training.methods.layerwise_loss import LayerwiseAnswers

TARGET = Target("openvino", "cpu", 1, 1)
SHAPE = (3, 32, 32)


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=6, num_classes=4
    ).eval()


def task(count: int = 64) -> Task:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, count)
    x = (rng.standard_normal((count, *SHAPE)) * 0.3 + y[:, None, None, None]).astype(np.float32)
    split = ArraySplit("made", x, y.astype(np.int64))
    return Task(choose=split, report=split, fit=split, shape=SHAPE, classes=tuple("abcd"), name="made")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.of(small_vit(), SHAPE)


def test_places_are_blocks_from_a_third_of_the_model_on(plan):
    assert places(plan.model, SHAPE) == tuple(f"blocks.{i}" for i in (1, 2, 3, 4))
    space = SimilarityExit.space(plan, TARGET)
    assert ("blocks.1",) in space["at"]
    assert ("blocks.3", "blocks.4") in space["at"]
    assert len(space["at"]) == len(set(space["at"]))
    assert SimilarityExit.space(Plan.of(plan.model), TARGET) == {}


def test_the_plan_answers_by_its_own_head_and_leaves_the_model_alone(plan):
    before = {k: v.clone() for k, v in plan.model.state_dict().items()}
    changed = SimilarityExit(at=(0, "blocks.3"), risk=1.0).apply(plan, task())
    assert exits_of(plan.model) is None
    assert all(torch.equal(before[k], v) for k, v in plan.model.state_dict().items())
    assert not any(m._forward_hooks for m in plan.model.modules())
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        early, late, last = changed.model(x)
        assert torch.equal(last, plan.model(x))
        h = plan.model.norm_pre(plan.model._pos_embed(plan.model.patch_embed(x)))
        torch.testing.assert_close(early, plan.model.forward_head(plan.model.norm(plan.model.blocks[0](h))))
        torch.testing.assert_close(late, plan.model.forward_head(plan.model.norm(plan.model.blocks[:4](h))))
    assert changed.recovery == ()
    assert [e.at for e in changed.decisions] == ["blocks.0", "blocks.3"]
    assert {(e.rule, e.risk, e.carries) for e in changed.decisions} == {("similarity", 1.0, ())}
    # Two ends and two cosines.
    own = total(plan.model, SHAPE)[1]
    first, second = changed.decisions
    assert first.heads == pytest.approx((32 * 4 + 3 * 17 * 32) / own)
    assert second.heads == pytest.approx(2 * first.heads)
    assert 0.1 < first.cost - first.heads < 0.25
    assert 0.6 < second.cost - second.heads < 0.75


def test_numbers_paths_and_all(plan):
    of = task()
    at = lambda *where: [e.at for e in SimilarityExit(at=where).apply(plan, of).decisions]  # noqa: E731
    assert at(3, 1) == at("blocks.1", "blocks.3") == ["blocks.1", "blocks.3"]
    assert at("*") == [f"blocks.{i}" for i in (1, 2, 3, 4)]
    assert at("*", 0) == [f"blocks.{i}" for i in range(5)]
    assert len(SimilarityExit().apply(plan, of).decisions) == 3
    assert str(SimilarityExit(at=(1, 3), train=True)) == "similarity_exit(at=(1, 3), train=True)"
    assert Recipe.parse("similarity_exit(at=(1, 3)) + int8()").techniques[0] == SimilarityExit(at=(1, 3))
    assert SimilarityExit().only(("blocks.2",)) == SimilarityExit(at=("blocks.2",))


def test_what_is_refused(plan):
    of = task()
    for wrong in (5, 9, -1, "blocks.5", "blocks.1.mlp", "nowhere"):
        with pytest.raises(NotApplicable, match=r"no similarity exit can stand behind .*blocks\.0 to blocks\.5"):
            SimilarityExit(at=(wrong,)).apply(plan, of)
    with pytest.raises(NotApplicable, match="exits already"):
        SimilarityExit().check(SimilarityExit().apply(plan, of), TARGET)
    with pytest.raises(NotApplicable, match="changes one whole model"):
        SimilarityExit().check(replace(plan, stages=(plan.model, plan.model)), TARGET)
    with pytest.raises(NotApplicable, match="keep early_exit, which trains heads, or similarity_exit"):
        Recipe.parse("similarity_exit() + early_exit()").check(plan, TARGET)
    with pytest.raises(NotApplicable, match="for classification"):
        SimilarityExit().apply(plan, replace(of, kind="segmentation"))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(NotApplicable, match=r"two or more blocks of one kind.*Sequential has none"):
        SimilarityExit().apply(Plan.of(flat, SHAPE), of)
    assert places(flat, SHAPE) == ()
    resnet = timm.create_model("resnet18", num_classes=4).eval()
    with pytest.raises(NotApplicable, match=r"layer1\.0 to layer1\.1, lie \d\d% of the model's operations"):
        SimilarityExit().apply(Plan.of(resnet, SHAPE), of)
    for wrong in (
        {"at": "blocks.1"}, {"at": ()}, {"at": (True,)}, {"at": 4.5}, {"at": (4.5,)}, {"at": (None,)},
        {"risk": 0}, {"risk": 100}, {"risk": "a"}, {"risk": None}, {"train": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"at is|risk is|train is"):
            SimilarityExit(**wrong)
    with pytest.raises(LissomError, match="similarity_exit: at is"):
        Recipe.parse("similarity_exit(at=3)")


def test_an_end_that_reads_more_is_no_place():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 4)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in "abc")

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            h = self.embed(images).flatten(2).transpose(1, 2)
            states = [h]
            for block in self.blocks:
                states.append(block(states[-1]))
            return self.head(sum(state.mean(1) for state in states))

    torch.manual_seed(0)
    with pytest.raises(NotApplicable, match="which everything goes through"):
        SimilarityExit().apply(Plan.of(Both().eval(), SHAPE), task())


def test_of_swin_the_blocks_of_its_last_stage():
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=4, embed_dim=16,
                              num_heads=(1, 2, 2, 4)).eval()  # fmt: skip
    assert places(model, (3, 56, 56)) == ("layers.3.blocks.0",)
    of = replace(task(), shape=(3, 56, 56))
    changed = SimilarityExit().apply(Plan.of(model, (3, 56, 56)), of)
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        early, last = changed.model(x)
        h = model.layers[:3](model.patch_embed(x))
        h = model.layers[3].blocks[0](model.layers[3].downsample(h))
        torch.testing.assert_close(early, model.forward_head(model.norm(h)))
        torch.testing.assert_close(last, model(x))
    with pytest.raises(NotApplicable, match=r"layers\.3\.blocks\.0 to layers\.3\.blocks\.1"):
        SimilarityExit(at=("layers.2.blocks.1",)).apply(Plan.of(model, (3, 56, 56)), of)


def test_beside_low_rank_and_clustered_tokens(plan):
    of = task()
    recipe = Recipe((LowRank(ratio=2.0), ClusterTokens(after=2, grid=(2, 3)), SimilarityExit(at=(1, 3))))
    recipe.check(plan, TARGET)
    changed = recipe.apply(plan, of, TARGET)
    with torch.no_grad():
        answers = changed.model(torch.randn(2, *SHAPE))
    assert [a.shape for a in answers] == [(2, 4)] * 3
    assert [e.at for e in changed.decisions] == ["blocks.1", "blocks.3"]
    # Without train the rest of the recipe is trained as if the exits were not there.
    assert str(training_form(recipe)) == str(training_form(Recipe(recipe.techniques[:1])))


def test_it_stands_on_weights_that_others_trained(plan, tmp_path):
    of = task()
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    alone = Recipe((SimilarityExit(),))
    changed = alone.apply(plan, of, TARGET)
    assert recoverer.recover(alone, changed) is changed  # nothing to train
    both = Recipe((LowRank(ratio=2.0), SimilarityExit(at=(2,))))
    found = recoverer.recover(both, both.apply(plan, of, TARGET))
    without = Recipe(both.techniques[:1])
    other = recoverer.recover(without, without.apply(plan, of, TARGET))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(found.model(x)[-1], other.model(x))


def test_with_train_the_whole_model_learns_once_for_every_choice(plan, tmp_path):
    of = task()
    first, second = SimilarityExit(at=(1,), train=True), SimilarityExit(at=(2, 4), risk=1.0, train=True)
    changed = first.apply(plan, of)
    assert [type(term) for term in changed.recovery] == [LayerwiseAnswers]
    assert changed.recovery[0].label_smoothing == 0.0
    assert str(training_form(Recipe((first,)))) == str(training_form(Recipe((second,))))
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=2, seconds=None, seed=0)
    one = recoverer.recover(Recipe((first,)), changed)
    two = recoverer.recover(Recipe((second,)), second.apply(plan, of))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    x = torch.from_numpy(of.fit.inputs(slice(0, 16)))  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(one.model(x)[-1], two.model(x)[-1])
        assert not torch.allclose(one.model(x)[-1], plan.model(x), atol=1e-3)
    # A place that a search would not try is trained when a recipe names it.
    named = SimilarityExit(at=(0,), train=True)
    assert exits_of(recoverer.recover(Recipe((named,)), named.apply(plan, of)).model).positions == ("blocks.0",)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
