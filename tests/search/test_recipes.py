"""RecipeSpace with planted techniques: there and back, dead entries, refusals, subsets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
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
    stage: ClassVar[str] = "precision"
    turn: ClassVar[int] = 1
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
    # Order: widened (structure), jealous (exits), spared (precision), refusing (its second turn).
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


# The fine form


@dataclass(frozen=True)
class Shortened(Technique):
    """Planted: the sizes of blocks, and which of two is left out; () keeps all, which it refuses."""

    name: ClassVar[str] = "shortened"
    stage: ClassVar[str] = "structure"
    turn: ClassVar[int] = -1

    sizes: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("nothing is left out")

    def left_out(self, plan: Plan) -> tuple[str, ...]:
        return {0: (), -1: ("4",), -2: ("4", "5")}[dict(self.sizes).get("depth", 0)]

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset | Choices]:
        return {"sizes": Choices((("4.width", (1.0, 0.5)), ("5.width", (1.0, 0.5)), ("depth", (0, -1, -2))))}


def fine(*names, seed=0):
    return RecipeSpace(names, PLAN, TARGET, seed, fine=True)


@pytest.fixture
def shortened(monkeypatch):
    monkeypatch.setitem(_objects, ("technique", "shortened"), Shortened)


def test_in_the_fine_form_every_item_is_an_entry():
    found = fine("spared", "widened")
    assert found.sizes.tolist() == [2, 3, 2, 2, *[2] * 20]
    assert found.names[:4] == (
        ("widened", "", ""),
        ("widened", "keep", ""),
        ("widened", "form", ""),
        ("spared", "", ""),
    )
    assert found.names[4:] == tuple(("spared", "layers", str(n)) for n in range(20))
    vector = np.zeros(24, np.int64)
    vector[[3, 4 + 7, 4 + 12]] = 1
    assert str(found.decode(vector)) == "spared(layers=('7', '12'))"
    assert found.encode(Recipe((Spared(layers=("12", "7")),))).tolist() == vector.tolist()
    assert found.live(vector) == (0, 0, 0, 1, *(1 + int(n in (7, 12)) for n in range(20)))
    vector[3] = 0
    assert found.live(vector) == (0,) * 24  # what is switched off counts as one
    with pytest.raises(LissomError, match="not among the values"):
        found.encode(Recipe((Spared(layers=("nowhere",)),)))
    sized = fine("sized")
    assert sized.sizes.tolist() == [2, *[3] * 20]
    recipe = Recipe((Sized(sizes=(("3", 0.25), ("8", 0.5))),))
    assert sized.decode(sized.encode(recipe)) == recipe
    assert sized.encode(recipe)[[1 + 3, 1 + 8]].tolist() == [2, 1]
    with pytest.raises(LissomError, match="not among the values"):
        sized.encode(Recipe((Sized(sizes=(("3", 0.3),)),)))


def test_entries_of_what_is_left_out_are_dead(shortened):
    found = fine("spared", "shortened")
    names = list(found.names)
    assert names[0] == ("shortened", "", "")
    place = {item: i for i, (_, _, item) in enumerate(names) if item}
    vector = np.zeros(len(found), np.int64)
    vector[[0, 4, place["depth"], place["7"]]] = 1
    assert str(found.decode(vector)) == "shortened(sizes=(('depth', -1),)) + spared(layers=('7',))"
    other = vector.copy()
    other[[place["4"], place["4.width"]]] = 1  # of the block that is left out
    assert found.decode(other) == found.decode(vector)
    assert found.live(other) == found.live(vector)
    row = found.features(other[None])[0]
    assert row[[place["4"], place["4.width"]]].tolist() == [0, 0]
    assert row[[place["5"], place["5.width"], place["7"], place["depth"]]].tolist() == [1, 1, 2, 2]
    other[[place["5"]]] = 1
    assert found.live(other) != found.live(vector)
    other[0] = 0  # without it the block is there
    assert str(found.decode(other)) == "spared(layers=('4', '5', '7'))"
    other[[0, place["depth"]]] = 1, 2
    assert str(found.decode(other)) == "shortened(sizes=(('depth', -2),)) + spared(layers=('7',))"
    refused = np.zeros(len(found), np.int64)
    refused[0] = 1  # the whole network: as without it
    assert found.decode(refused) == Recipe()
    assert found.live(refused) == (0,) * len(found)
    # In the coarse form the drawn values are what they are.
    assert space("spared", "shortened").decode([1, 3, 1, 0]).techniques[0].name == "shortened"


def test_behind_another_change_nothing_is_known_to_be_left_out(shortened, monkeypatch):
    monkeypatch.setattr(Widened, "turn", -2)
    found = fine("shortened", "spared", "widened")
    place = {item or knob or name: i for i, (name, knob, item) in enumerate(found.names)}
    vector = np.zeros(len(found), np.int64)
    vector[[place["shortened"], place["depth"], place["spared"], place["4"]]] = 1
    assert str(found.decode(vector)) == "shortened(sizes=(('depth', -1),)) + spared()"
    vector[[place["widened"], place["keep"]]] = 1
    assert str(found.decode(vector)).endswith("shortened(sizes=(('depth', -1),)) + spared(layers=('4',))")


def test_in_the_fine_form_the_key_is_the_recipe_too(shortened):
    found = fine("widened", "spared", "jealous", "shortened")
    by_key: dict[tuple[int, ...], str] = {}
    for vector in found.draw(400, np.random.default_rng(0)):
        recipe = found.decode(vector)
        assert Recipe.parse(str(recipe)) == recipe
        assert found.decode(found.encode(recipe)) == recipe
        assert found.live(found.encode(recipe)) == found.live(vector)
        assert by_key.setdefault(found.live(vector), str(recipe)) == str(recipe)
    assert len(set(by_key.values())) == len(by_key) > 100


def test_draws_reach_from_few_items_to_many():
    found = fine("spared", "sized")
    vectors = found.draw(2000, np.random.default_rng(0))
    assert vectors.shape == (2000, len(found))
    assert (vectors >= 0).all()
    assert (vectors < found.sizes).all()
    sized, spared = (vectors[:, 1:21] > 0).mean(1), (vectors[:, 22:] > 0).mean(1)
    assert abs(sized.mean() - 1 / 2) < 0.03
    assert abs(spared.mean() - 1 / 3) < 0.03  # of the square of an even share
    for shares in (sized, spared):
        assert shares.min() < 0.06
        assert shares.max() > 0.94
    assert set(np.unique(vectors[:, 1:21])) == {0, 1, 2}
    again = found.draw(2000, np.random.default_rng(0))
    assert (again == vectors).all()
    coarse = space("spared", "widened")  # every entry evenly, as without a draw of its own
    want = np.random.default_rng(3).integers(0, coarse.sizes, (5, len(coarse)))
    assert (coarse.draw(5, np.random.default_rng(3)) == want).all()


def test_what_is_always_to_be_tried_stands_behind_the_empty_one(monkeypatch):
    always = ((("3", 0.5),), (("3", 0.5), ("8", 0.5)))
    items = tuple((str(n), (1.0, 0.5, 0.25)) for n in range(20))
    monkeypatch.setattr(Sized, "space", classmethod(lambda cls, plan, target: {"sizes": Choices(items, always)}))
    found = space("sized")
    assert found.sizes.tolist() == [2, SUBSETS]
    assert [found.decode([1, i]).techniques[0].sizes for i in range(3)] == [(), *always]
    drawn = [Choices(items, always).draw(random.Random(n)) for n in range(400)]
    assert 60 < sum(value in always for value in drawn) < 140


def test_a_technique_may_be_written_in_two_ways(monkeypatch):
    monkeypatch.setattr(Widened, "as_searched", lambda self, plan: Widened(keep=0.7) if self.keep == 0.9 else self)
    assert space("widened").encode(Recipe((Widened(),))).tolist() == [1, 2, 0]


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


def test_a_real_sub_network_with_a_precision_for_every_layer():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, num_heads=2, depth=4)
    with torch.no_grad():  # it changes nothing, and goes first
        model.blocks[1].attn.proj.weight.zero_()
        model.blocks[1].mlp.fc2.weight.zero_()
    plan = Plan.of(model.eval(), (3, 16, 16))
    found = RecipeSpace(("int8", "subnet"), plan, TARGET, fine=True)
    place = {item or knob or name: i for i, (name, knob, item) in enumerate(found.names)}
    assert [found.sizes[place[f"blocks.1.{n}"]] for n in ("mlp.fc1.width", "attn.heads", "mlp.fc1")] == [3, 2, 2]
    vector = np.zeros(len(found), np.int64)
    vector[[place["subnet"], place["int8"], place["blocks.depth"]]] = 1
    want = "subnet(shared=True, sizes=(('blocks.depth', -1),)) + int8(model_type='plain', linear='matmul', products=8)"
    assert str(found.decode(vector)) == want
    dead = [i for name, i in place.items() if name.startswith("blocks.1.")]
    assert len(dead) == 6  # a width, heads, and four layers
    for i in dead:
        other = vector.copy()
        other[i] = 1
        assert found.live(other) == found.live(vector)
        assert str(found.decode(other)) == want
    vector[place["blocks.depth"]] = 0
    vector[dead] = 1
    assert "('blocks.1.mlp.fc1.width', 0.75)" in str(found.decode(vector))
    assert "'blocks.1.mlp.fc1'" in str(found.decode(vector))
    # A uniform setting is a vector of the space, however it is written.
    short = Recipe.parse("subnet(shared=True, width=0.5, depth=0.75)")
    spelled = found.decode(found.encode(short))
    assert found.live(found.encode(spelled)) == found.live(found.encode(short))
    assert "('blocks.depth', -1)" in str(spelled)
    with pytest.raises(LissomError, match="shared=False"):
        found.encode(Recipe.parse("subnet()"))


def test_the_real_int8_on_a_transformer():
    import timm

    plan = Plan.of(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=2))
    found = RecipeSpace(("int8", "fuse"), plan, TARGET)
    recipe = Recipe.parse("fuse() + int8(model_type='transformer', linear='conv', products=32)")
    assert found.decode(found.encode(recipe)) == recipe
    with pytest.raises(LissomError, match="model_type=None"):
        found.encode(Recipe.parse("int8()"))
