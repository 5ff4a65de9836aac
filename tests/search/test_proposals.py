"""Proposals: the fixed first ones, then random ones that depend on the seed and the trials alone."""

import timm

from lissom.export.plan import Plan
from lissom.runtime.target import Target
from lissom.search.proposals import propose
from lissom.search.trials import Metrics, Trial
from lissom.techniques.recipe import Recipe

TARGET = Target()
PLAN = Plan.of(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=2))
NAMES = ("bf16", "fuse", "int8")


def walk(seed, count, failing=()):
    """The proposals of a run in which every trial is fine but those of ``failing`` techniques."""
    trials = []
    while len(trials) < count:
        proposal = propose(seed, trials, NAMES, PLAN, TARGET, trials[-1] if trials else None)
        if proposal is None:
            break
        role, recipe = proposal
        status = "not applicable" if recipe.techniques and recipe.techniques[0].name in failing else "ok"
        metrics = Metrics(quality=90.0, drop=0.0, latency_ms=1.0, speedup=1.0)
        trials.append(Trial(len(trials), role, str(recipe), status, metrics=metrics, resolved=str(recipe)))
    return [(t.role, t.recipe) for t in trials]


def test_first_baseline_then_plain_then_each_alone_then_together():
    assert walk(0, 6) == [
        ("baseline", ""),
        ("plain int8", "int8(linear='matmul', products=8)"),
        ("alone", "bf16()"),
        ("alone", "fuse()"),
        ("alone", "int8()"),
        ("together", "fuse() + bf16() + int8()"),
    ]


def test_what_does_not_apply_is_not_composed():
    rows = walk(0, 12, failing=("bf16", "fuse"))
    assert not any(role == "together" for role, _ in rows)
    assert all("bf16" not in recipe and "fuse" not in recipe for role, recipe in rows if role == "random")


def test_the_same_seed_gives_the_same_and_another_other():
    assert walk(3, 12) == walk(3, 12)
    assert walk(3, 12) != walk(4, 12)


def test_nothing_is_tried_twice_and_everything_parses():
    recipes = [recipe for role, recipe in walk(1, 30) if role != "plain int8"]
    assert len(set(recipes)) == len(recipes)
    assert [str(Recipe.parse(recipe)) for recipe in recipes] == recipes
