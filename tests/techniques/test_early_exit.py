"""early_exit: where exits stand, what is refused, and that heads trained once serve every choice of places."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import NotApplicable
from lissom.export.plan import Plan
from lissom.layers.exits import exits_of
from lissom.models.factory import create_model
from lissom.runtime.target import RUNTIMES, Target
from lissom.tasks.task import Task
from lissom.techniques.early_exit import EarlyExit, positions
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer, adopt, training_form

TARGET = Target("openvino", "cpu", 1, 1)


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=6, num_classes=4
    ).eval()


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(6):
        layers += [nn.Conv2d(8 if i else 3, 8, 3, 2 if i == 2 else 1, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def stemmed_vit() -> nn.Module:
    """With a convolutional stem so dear that an exit may stand behind it, on maps."""
    torch.manual_seed(0)
    return create_model("cifar_vit", embed_dim=32, num_heads=2, depth=6, num_classes=4).eval()


def task(count: int = 64) -> Task:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, count)
    x = (rng.standard_normal((count, 3, 32, 32)) * 0.3 + y[:, None, None, None]).astype(np.float32)
    split = ArraySplit("made", x, y.astype(np.int64))
    return Task(choose=split, report=split, fit=split, shape=(3, 32, 32), classes=tuple("abcd"), name="made")


def test_places_of_a_vit_are_its_blocks_from_a_third_on() -> None:
    assert positions(small_vit(), (3, 32, 32)) == tuple(f"blocks.{i}" for i in (1, 2, 3, 4))


def test_places_of_a_cnn_hand_on_few_numbers() -> None:
    known = positions(small_cnn(), (3, 32, 32))
    assert 2 <= len(known) <= 8
    # Behind the activation nothing is handed on that the convolution's output would not be; the first of them stands.
    assert all(path.isdigit() for path in known)
    assert [int(p) for p in known] == sorted(int(p) for p in known)


@pytest.mark.parametrize("make", [small_vit, small_cnn])
def test_the_plan_answers_at_every_exit_and_leaves_the_model_alone(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = Plan.of(model, (3, 32, 32))
    changed = EarlyExit(risk=1.0).apply(plan, task())
    assert exits_of(model) is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        answers = changed.model(x)
        torch.testing.assert_close(answers[-1], model(x))
    assert len(answers) == len(changed.decisions) + 1
    assert all(a.shape == (2, 4) for a in answers)
    costs = [e.cost for e in changed.decisions]
    assert costs == sorted(costs)
    assert 0 < costs[0] < 1.2
    assert all(0 < e.heads < 1 and e.risk == 1.0 for e in changed.decisions)
    assert len(changed.recovery) == 1


def test_numbers_are_blocks_and_paths_are_paths() -> None:
    plan = Plan.of(small_vit(), (3, 32, 32))
    by_number = EarlyExit(at=(3, 1)).apply(plan, task())
    by_path = EarlyExit(at=("blocks.1", "blocks.3")).apply(plan, task())
    assert [e.at for e in by_number.decisions] == ["blocks.1", "blocks.3"] == [e.at for e in by_path.decisions]
    assert str(EarlyExit(at=(1, 3))) == "early_exit(at=(1, 3))"
    assert Recipe.parse("early_exit(at=(1, 3)) + int8()").techniques[0] == EarlyExit(at=(1, 3))


def test_what_is_refused() -> None:
    plan = Plan.of(small_vit(), (3, 32, 32))
    for at in ((9,), ("nowhere",)):
        with pytest.raises(NotApplicable, match="no module"):
            EarlyExit(at=at).apply(plan, task())
    with pytest.raises(NotApplicable, match=r"cannot be cut behind 'blocks\.1\.mlp'"):
        EarlyExit(at=("blocks.1.mlp",)).apply(plan, task())
    for runtime in RUNTIMES:
        EarlyExit().check(plan, Target(runtime, "cpu", 1, 1))  # all of them cut
    once = EarlyExit().apply(plan, task())
    with pytest.raises(NotApplicable, match="exits already"):
        EarlyExit().check(once, TARGET)
    shallow = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(NotApplicable, match="no place in its middle"):
        EarlyExit().apply(Plan.of(shallow, (3, 32, 32)), task())
    for wrong in ({"at": "blocks.1"}, {"at": ()}, {"rule": "mood"}, {"risk": 0}, {"risk": 100}):
        with pytest.raises(ValueError, match=r"at is|rule is|risk is"):
            EarlyExit(**wrong)


def test_the_space_offers_places_and_risks() -> None:
    space = EarlyExit.space(Plan.of(small_vit(), (3, 32, 32)), TARGET)
    assert ("blocks.1",) in space["at"]
    assert tuple(f"blocks.{i}" for i in (1, 2, 3, 4)) in space["at"]
    assert len(space["at"]) == len(set(space["at"]))
    assert set(space["risk"]) == {0.25, 0.5, 1.0, 2.0}


@pytest.mark.parametrize(("make", "early"), [(small_vit, "blocks.1"), (stemmed_vit, "patch_embed.layers.12")])
def test_heads_trained_once_serve_every_choice(tmp_path, make, early) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(make(), (3, 32, 32)), task()
    assert {early, "blocks.2", "blocks.4"} <= set(positions(plan.model, (3, 32, 32)))
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=2, seconds=None, seed=0)
    first, second = EarlyExit(at=("blocks.2",)), EarlyExit(at=(early, "blocks.4"), risk=1.0)
    assert str(training_form(Recipe((first,)))) == str(training_form(Recipe((second,))))
    one = recoverer.recover(Recipe((first,)), first.apply(plan, of))
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    two = recoverer.recover(Recipe((second,)), second.apply(plan, of))
    assert list(tmp_path.glob("*.safetensors")) == files
    assert files[0].stat().st_mtime_ns == stamp
    # The backbone is frozen, and the heads have learnt: they answer otherwise than untrained ones.
    x = torch.from_numpy(of.fit.inputs(slice(0, 16)))  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(two.model(x)[-1], plan.model(x))
        fresh = second.apply(plan, of).model(x)
        assert not torch.allclose(two.model(x)[0], fresh[0], atol=1e-3)
    # Every place's head is the same wherever it stands in the recipe.
    both = EarlyExit(at=(early, "blocks.2"))
    three = recoverer.recover(Recipe((both,)), both.apply(plan, of))
    with torch.no_grad():
        torch.testing.assert_close(three.model(x)[1], one.model(x)[0])
        torch.testing.assert_close(three.model(x)[0], two.model(x)[0])


@pytest.mark.parametrize("make", [small_vit, stemmed_vit])
def test_heads_serve_clustered_tokens_too(tmp_path, make) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(make(), (3, 32, 32)), task()
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    plain = Recipe.parse("early_exit(at=(2, 4))")
    fewer = Recipe.parse("token_clustering(after=3) + early_exit(at=(2, 4))")
    one = recoverer.recover(plain, plain.apply(plan, of, TARGET)).model
    two = recoverer.recover(fewer, fewer.apply(plan, of, TARGET)).model
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    x = torch.from_numpy(of.choose.inputs(slice(0, 4)))
    with torch.no_grad():
        first, second = one(x), two(x)
    torch.testing.assert_close(second[0], first[0])  # before the clustering nothing differs
    assert not torch.allclose(second[1], first[1], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_places_that_a_search_would_not_try_are_trained_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(small_vit(), (3, 32, 32)), task()
    last = f"blocks.{len(plan.model.blocks) - 1}"  # type: ignore[arg-type]
    assert last not in positions(plan.model, (3, 32, 32))
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    given = EarlyExit(at=("blocks.2", last))
    fresh = given.apply(plan, of)
    trained = recoverer.recover(Recipe((given,)), fresh)
    before, after = (exits_of(p.model).state_dict() for p in (fresh, trained))  # type: ignore[union-attr]
    for head in ("heads.0.", "heads.1."):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(head))
    alone = EarlyExit(at=(last,))
    assert alone.apply(plan, of).decisions[0].at == last
    recoverer.recover(Recipe((alone,)), alone.apply(plan, of))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_without_training_data_it_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(small_vit(), (3, 32, 32)), task().with_splits(fit=None)
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    with pytest.raises(NotApplicable, match="nothing to train on"):
        recoverer.recover(Recipe((EarlyExit(),)), EarlyExit().apply(plan, of))
    assert recoverer.recover(Recipe(), plan) is plan


def test_adopting_takes_heads_by_their_place() -> None:
    plan, of = Plan.of(small_vit(), (3, 32, 32)), task()
    every = EarlyExit(at=("*",)).apply(plan, of).model
    with torch.no_grad():
        for i, head in enumerate(exits_of(every).heads):  # type: ignore[union-attr]
            head.classifier.bias.fill_(float(i))
    some = EarlyExit(at=("blocks.3",)).apply(plan, of).model
    taken = adopt(some, every)
    assert exits_of(taken).heads[0].classifier.bias.tolist() == [2.0] * 4  # type: ignore[union-attr]
    assert exits_of(some).heads[0].classifier.bias.tolist() != [2.0] * 4  # type: ignore[union-attr]
