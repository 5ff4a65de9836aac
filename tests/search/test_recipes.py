"""RecipeSpace with planted techniques: there and back, dead entries, refusals, subsets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from torch import nn

from lissom.errors import LissomError
from lissom.export.plan import Plan
from lissom.registry import _objects, load_part
from lissom.runtime.target import Target
from lissom.search.nsga2 import nsga2
from lissom.search.recipes import SUBSETS, RecipeSpace, agreeing
from lissom.techniques.base import Choices, Subset, Technique
from lissom.techniques.recipe import Recipe

PLAN = Plan.of(nn.Sequential(*(nn.Linear(4, 4) for _ in range(20))))
TARGET = Target()


@dataclass(frozen=True)
class Widened(Technique):
    """Planted: two searched knobs and one that is not."""

    name: ClassVar[str] = "widened"
    stage: ClassVar[str] = "structure"

    keep: float = 0.9
    form: str = "a"
    trace: bool = False

    def __post_init__(self) -> None:
        if self.keep == 0.3 and self.form == "b":
            raise ValueError("0.3 of b is nothing")

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset]:
        return {"keep": (0.3, 0.5, 0.7), "form": ("a", "b")}


@dataclass(frozen=True)
class Spared(Technique):
    """Planted: a subset of layers, late in the order."""

    name: ClassVar[str] = "spared"
    stage: ClassVar[str] = "precision"

    layers: tuple[str, ...] = ()

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset]:
        return {"layers": Subset(tuple(path for path, m in plan.model.named_modules() if isinstance(m, nn.Linear)))}


@dataclass(frozen=True)
class Sized(Technique):
    """Planted: a size for each of several layers."""

    name: ClassVar[str] = "sized"
    stage: ClassVar[str] = "structure"

    sizes: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        Choices.check("sizes", self.sizes)

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset | Choices]:
        paths = [path for path, m in plan.model.named_modules() if isinstance(m, nn.Linear)]
        return {"sizes": Choices(tuple((path, (1.0, 0.5, 0.25)) for path in paths))}


@dataclass(frozen=True)
class Jealous(Technique):
    """Planted: stands between the others and refuses one of each side."""

    name: ClassVar[str] = "jealous"
    stage: ClassVar[str] = "exits"
    refuses: ClassVar[Mapping[str, str]] = {"spared": "not with that one"}


@dataclass(frozen=True)
class Refusing(Technique):
    """Planted: refuses an earlier one from its own side."""

    name: ClassVar[str] = "refusing"
    stage: ClassVar[str] = "memory"
    refuses: ClassVar[Mapping[str, str]] = {"jealous": "no"}


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    for kind in (Widened, Spared, Sized, Jealous, Refusing):
        monkeypatch.setitem(_objects, ("technique", kind.name), kind)


def space(*names, seed=0):
    return RecipeSpace(names, PLAN, TARGET, seed)


def test_a_space_by_hand():
    found = space("spared", "widened")  # in the canonical order: structure before precision
    assert found.sizes.tolist() == [2, 3, 2, 2, SUBSETS]
    assert len(found) == 5
    assert str(found.decode([1, 1, 0, 0, 3])) == "widened(keep=0.5)"
    assert str(found.decode([0, 1, 0, 1, 0])) == "spared()"
    assert str(found.decode([1, 2, 1, 1, 0])) == "widened(keep=0.7, form='b') + spared()"
    assert found.decode([0, 2, 1, 0, 5]) == Recipe()
    assert found.live([1, 1, 0, 0, 3]) == (1, 2, 1, 0, 0)
    assert found.live([1, 1, 0, 0, 9]) == found.live([1, 1, 0, 0, 3])
    assert found.live([0, 1, 1, 1, 2]) == (0, 0, 0, 1, 3)
    assert found.features(np.array([[1, 1, 0, 0, 3], [0, 0, 0, 0, 0]])).tolist() == [[1, 2, 1, 0, 0], [0] * 5]
    assert found.features(np.empty((0, 5), np.int64)).shape == (0, 5)


def test_encode_undoes_decode_and_the_key_is_the_recipe():
    found = space("widened", "spared", "jealous", "refusing")
    generator = np.random.default_rng(0)
    by_key: dict[tuple[int, ...], str] = {}
    for _ in range(400):
        vector = generator.integers(0, found.sizes)
        recipe = found.decode(vector)
        assert found.decode(found.encode(recipe)) == recipe
        assert found.live(found.encode(recipe)) == found.live(vector)
        assert by_key.setdefault(found.live(vector), str(recipe)) == str(recipe)
    assert len(set(by_key.values())) == len(by_key) > 50


def test_knobs_that_are_not_searched_leave_no_trace_and_others_must_be_known():
    found = space("widened", "spared")
    assert found.encode(Recipe((Widened(keep=0.5, trace=True),))).tolist() == [1, 1, 0, 0, 0]
    assert found.encode(Recipe()).tolist() == [0] * 5
    for recipe, says in (
        (Recipe((Widened(),)), "keep=0.9.* not among"),
        (Recipe((Spared(layers=("3", "1", "2", "0", "7")),)), "not among the values"),
        (Recipe((Jealous(),)), "jealous is none of this space's techniques: widened, spared"),
        (Recipe((Widened(keep=0.5), Widened(keep=0.7))), "twice"),
    ):
        with pytest.raises(LissomError, match=says):
            found.encode(recipe)


def test_of_two_that_refuse_each_other_the_later_is_dropped():
    names = ("refusing", "jealous", "spared", "widened")
    found = space(*names)
    # Order: widened (structure), jealous (exits), spared (precision), refusing (memory).
    start = {"widened": 0, "jealous": 3, "spared": 4, "refusing": 6}
    kinds = {name: load_part("technique", name) for name in names}
    kept = {
        frozenset(): [],
        frozenset({"jealous", "spared"}): ["jealous"],  # refused by the earlier
        frozenset({"jealous", "refusing"}): ["jealous"],  # refuses the earlier itself
        frozenset({"spared", "refusing"}): ["spared", "refusing"],
        frozenset({"jealous", "spared", "refusing", "widened"}): ["widened", "jealous"],
    }
    for chosen, expected in kept.items():
        vector = np.zeros(7, np.int64)
        for name in chosen:
            vector[start[name]] = 1
        recipe = found.decode(vector)
        assert [t.name for t in recipe.techniques] == expected
        assert [kind.name for kind in agreeing([kinds[name] for name in names if name in chosen])] == expected
        alive = {name for name in names if found.live(vector)[start[name]]}
        assert alive == set(expected)
        recipe.check(PLAN, TARGET)


def test_every_vector_is_a_recipe_that_passes_its_check():
    found = space("widened", "jealous", "refusing")
    for vector in itertools.product(*(range(size) for size in found.sizes)):
        recipe = found.decode(vector)
        recipe.check(PLAN, TARGET)
        assert Recipe.parse(str(recipe)) == recipe


def test_a_combination_that_a_technique_refuses_leaves_it_out():
    found = space("widened")
    assert found.decode([1, 0, 0]) == Recipe((Widened(keep=0.3),))
    assert found.decode([1, 0, 1]) == Recipe()
    assert found.live([1, 0, 1]) == (0, 0, 0)


def test_subsets_are_few_fixed_and_hold_the_empty_one():
    found = space("spared")
    subsets = [found.decode([1, i]).techniques[0].layers for i in range(SUBSETS)]
    assert subsets[0] == ()
    assert len(set(subsets)) == SUBSETS
    assert all(set(subset) <= {str(n) for n in range(20)} for subset in subsets)
    again = space("spared", "widened")  # what else is searched changes nothing
    assert [again.decode([0, 0, 0, 1, i]).techniques[0].layers for i in range(SUBSETS)] == subsets
    other = space("spared", seed=1)
    assert [other.decode([1, i]).techniques[0].layers for i in range(SUBSETS)] != subsets
    random.seed(0)  # the global generator has no part in it
    assert [space("spared").decode([1, i]).techniques[0].layers for i in range(SUBSETS)] == subsets


def test_a_subset_of_nothing_is_empty():
    bare = RecipeSpace(("spared",), Plan.of(nn.Sequential(nn.ReLU())), TARGET)
    assert bare.sizes.tolist() == [2, 1]
    assert str(bare.decode([1, 0])) == "spared()"


def test_choices_for_many_items_are_few_fixed_and_hold_the_default():
    found = space("sized")
    assert found.sizes.tolist() == [2, SUBSETS]
    drawn = [found.decode([1, i]).techniques[0].sizes for i in range(SUBSETS)]
    assert drawn[0] == ()
    assert len(set(drawn)) == SUBSETS
    for sizes in drawn:
        names = [name for name, _ in sizes]
        assert names == sorted(names, key=int)  # the items' order
        assert {value for _, value in sizes} <= {0.5, 0.25}
    assert {len(sizes) for sizes in drawn} - {0, 1, 2}, "some change many items"
    recipe = found.decode([1, 5])
    assert Recipe.parse(str(recipe)) == recipe
    assert found.encode(recipe).tolist() == [1, 5]
    assert [space("sized", "spared").decode([1, i, 0, 0]).techniques[0].sizes for i in range(SUBSETS)] == drawn


def test_choices_draw_values_other_than_the_default_and_say_what_is_wrong():
    rng = random.Random(0)
    choices = Choices((("a", (1, 2, 3)), ("b", (8,)), ("c", (True, False))))
    drawn = {choices.draw(rng) for _ in range(300)}
    a, c = [(), (("a", 2),), (("a", 3),)], [(), (("c", False),)]
    assert drawn == {(*one, *other) for one in a for other in c} - {()}
    assert Choices((("b", (8,)),)).draw(rng) == ()
    for items in ((("a", (1,)), ("a", (2,))), (("a", ()),), (("a", (1, 1)),)):
        with pytest.raises(LissomError, match="'a' stands twice among the items of a knob, or its values"):
            Choices(items)
    for wrong in ("a", ("a",), (("a", 1, 2),), ((1, 2),), (["a", 1],)):
        with pytest.raises(ValueError, match=r"sizes is a tuple of \(name, value\)"):
            Sized(sizes=wrong)
    with pytest.raises(ValueError, match="names 'a' twice"):
        Sized(sizes=(("a", 1), ("a", 2)))


def test_a_search_moves_in_it():
    found = space("widened", "spared", "jealous", "refusing")

    def evaluate(vectors):
        recipes = [found.decode(vector) for vector in vectors]
        return np.array([[-sum(len(t.name) for t in r.techniques)] for r in recipes], float)

    vectors, objectives = nsga2(found, evaluate, 10, 300, 0, key=found.live)
    assert len({found.live(vector) for vector in vectors}) == 10
    assert objectives[0, 0] == -len("widened" + "spared" + "refusing")


def test_what_is_no_vector_and_no_space_is_told(monkeypatch):
    found = space("widened")
    for vector, says in (([1, 0], "3 entries"), ([2, 0, 0], "range"), ([1, -1, 0], "range"), ([1, 0.5, 0], "integer")):
        with pytest.raises(LissomError, match=says):
            found.decode(vector)
        with pytest.raises(LissomError, match=says):
            found.live(vector)
    with pytest.raises(LissomError, match="twice"):
        space("widened", "widened")
    with pytest.raises(LissomError, match="no technique is called 'unheard'"):
        space("unheard")
    monkeypatch.setattr(Widened, "space", classmethod(lambda cls, plan, target: {"keep": ()}))
    with pytest.raises(LissomError, match="no value for its knob 'keep'"):
        space("widened")
    empty = space()
    assert (len(empty), empty.decode([]), empty.live([])) == (0, Recipe(), ())


def test_the_real_int8_on_a_transformer():
    import timm

    plan = Plan.of(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=2))
    found = RecipeSpace(("int8", "fuse"), plan, TARGET)
    recipe = Recipe.parse("fuse() + int8(model_type='transformer', linear='conv', products=32)")
    assert found.decode(found.encode(recipe)) == recipe
    with pytest.raises(LissomError, match="model_type=None"):
        found.encode(Recipe.parse("int8()"))
