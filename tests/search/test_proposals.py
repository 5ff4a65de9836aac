"""Proposals: the fixed first ones, then those of a search, which depend on the seed and the trials alone."""

import dataclasses
import functools

import pytest
import timm

from lissom.errors import LissomError
from lissom.export.plan import Plan
from lissom.runtime.target import Target
from lissom.search import predictors, proposals
from lissom.search.proposals import batch_size, propose
from lissom.search.trials import Metrics, Trial
from lissom.techniques.recipe import Recipe

TARGET = Target()
PLAN = Plan.of(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=2))
NAMES = ("bf16", "fuse", "int8")
BASE = Metrics(quality=90.0, drop=0.0, latency_ms=10.0, speedup=1.0, size_mb=10.0)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """What is tested here is what is proposed, not how well."""
    monkeypatch.setattr(predictors, "COARSE_COSTS", (10.0,))
    monkeypatch.setattr(proposals, "INNER", 200)


def same(recipe):
    return BASE


def measured(recipe):
    """fuse and bf16 are each a little faster and int8 much; of its knobs only the form and the spared layers count."""
    seconds, lost = 10.0, 0.0
    for technique in recipe.techniques:
        if technique.name == "int8":
            seconds -= 4 if technique.linear == "conv" else 2
            seconds += 0.5 * len(technique.keep)
            lost += max(0.0, 3 - len(technique.keep))
        else:
            seconds -= 1
    return dataclasses.replace(BASE, quality=90 - lost, latency_ms=seconds, speedup=10 / seconds, size_mb=10 - lost)


def trial(number, role, recipe, metrics=same, failing=()):
    failed = bool(recipe.techniques) and recipe.techniques[0].name in failing
    if failed:
        return Trial(number, role, str(recipe), "not applicable")
    # As the main job settles undecided knobs.
    settled = tuple(
        dataclasses.replace(
            t,
            model_type=t.model_type or "transformer",
            linear=t.linear or "conv",
            products=t.products or 32,
        )
        if t.name == "int8"
        else t
        for t in recipe.techniques
    )
    resolved = Recipe(settled)
    return Trial(number, role, str(recipe), "ok", metrics=metrics(resolved), resolved=str(resolved))


def run(seed, count, failing=(), metrics=same, **options):
    """The trials of a run in which every trial is fine but those of ``failing`` techniques."""
    trials = []
    while len(trials) < count:
        proposal = propose(seed, trials, NAMES, PLAN, TARGET, trials[-1] if trials else None, **options)
        if proposal is None:
            break
        trials.append(trial(len(trials), *proposal, metrics=metrics, failing=failing))
    return trials


def walk(seed, count, **options):
    return [(t.role, t.recipe) for t in run(seed, count, **options)]


SEARCHES = ("linas", "nsga2", "random")


def test_first_baseline_then_plain_then_each_alone_then_together():
    for search in SEARCHES:
        assert walk(0, 7, search=search)[:6] == [
            ("baseline", ""),
            ("plain int8", "int8(linear='matmul', products=8)"),
            ("alone", "bf16()"),
            ("alone", "fuse()"),
            ("alone", "int8()"),
            ("together", "fuse() + bf16() + int8()"),
        ]
        assert walk(0, 7, search=search)[6][0] == search
    assert walk(0, 7)[6][0] == "linas"


@pytest.mark.parametrize("search", SEARCHES)
def test_what_does_not_apply_is_not_composed(search):
    rows = walk(0, 9, failing=("bf16", "fuse"), search=search)
    assert len(rows) == 9
    assert not any(role == "together" for role, _ in rows)
    assert all("bf16" not in recipe and "fuse" not in recipe for role, recipe in rows if role == search)


def test_what_fails_alone_is_not_searched():
    trials = run(0, 6)
    trials[3] = Trial(3, "alone", "fuse()", "failed")
    recipes = [propose(seed, trials, NAMES, PLAN, TARGET)[1] for seed in range(4)]
    assert not any("fuse" in str(recipe) for recipe in recipes)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_same_seed_gives_the_same_and_another_other(search):
    assert walk(3, 9, search=search) == walk(3, 9, search=search)
    assert walk(3, 9, search=search) != walk(4, 9, search=search)


@pytest.mark.parametrize("search", SEARCHES)
def test_nothing_is_tried_twice_and_everything_parses(search):
    recipes = [recipe for role, recipe in walk(1, 18, search=search) if role != "plain int8"]
    assert len(recipes) == 17
    assert len(set(recipes)) == len(recipes)
    assert [str(Recipe.parse(recipe)) for recipe in recipes] == recipes


@pytest.mark.parametrize("search", ["linas", "nsga2"])
def test_a_batch_is_fixed_where_it_begins(search):
    """What its members measure changes the next batch, and nothing in this one: a killed run goes on as it would."""
    trials = run(0, 14, metrics=measured, search=search)
    ask = functools.partial(propose, 0, techniques=NAMES, plan=PLAN, target=TARGET, search=search)
    for count in (6, 8, 9, 10, 13):
        role, recipe = ask(trials=trials[:count])
        assert (role, str(recipe)) == (trials[count].role, trials[count].recipe)
    other = [
        dataclasses.replace(t, metrics=dataclasses.replace(BASE, quality=10.0 + 7 * i % 50, speedup=0.5 + i / 9))
        for i, t in enumerate(trials)
    ]
    for count in (7, 8, 9):
        assert str(ask(trials=[*trials[:6], *other[6:count]])[1]) == trials[count].recipe
    assert str(ask(trials=[*trials[:6], *other[6:10]])[1]) != trials[10].recipe


def test_a_failed_trial_counts_as_tried_and_the_batch_goes_on():
    trials = run(0, 10, metrics=measured)
    failed = [*trials[:6], *(dataclasses.replace(t, status="failed", resolved="") for t in trials[6:8])]
    role, recipe = propose(0, failed, NAMES, PLAN, TARGET)
    assert (role, str(recipe)) == ("linas", trials[8].recipe)
    failed += [dataclasses.replace(t, status="failed", resolved="") for t in trials[8:10]]
    role, recipe = propose(0, failed, NAMES, PLAN, TARGET)
    assert str(recipe) not in {t.recipe for t in failed}


def test_predictors_find_the_good_recipes():
    def best(search, seed):
        found = run(seed, 22, metrics=measured, search=search)
        return min(t.metrics.latency_ms for t in found if t.role == search and t.metrics.quality >= 88)

    # Three techniques, int8 as convolutions, one layer spared: 10 - 2 - 4 + 0.5.
    assert [best("linas", seed) for seed in range(2)] == [4.5] * 2


def test_a_joint_search_moves_layer_by_layer():
    """The baseline's trials first; then sizes and spared layers one by one, each new, each as a killed run finds it."""
    plan = Plan.of(PLAN.model, (3, 32, 32))
    names = ("int8", "subnet")

    def cheap(recipe):
        seconds, lost = 10.0, 0.0
        for technique in recipe.techniques:
            if technique.name == "subnet":
                seconds -= len(technique.as_searched(plan).sizes)
            else:
                seconds -= 2 - 0.1 * len(technique.keep)
        return dataclasses.replace(BASE, quality=90 - lost, latency_ms=seconds, speedup=10 / seconds)

    trials = []
    while len(trials) < 14:
        role, recipe = propose(0, trials, names, plan, TARGET, search="joint")
        trials.append(trial(len(trials), role, recipe, metrics=cheap))
    assert [(t.role, t.recipe) for t in trials[:6]] == [
        ("baseline", ""),
        ("plain int8", "int8(linear='matmul', products=8)"),
        ("alone", "int8()"),
        ("alone", "subnet(shared=True)"),
        ("together", "subnet(shared=True) + int8()"),
        ("together", "subnet(width=1.0, depth=0.5, shared=True) + int8()"),
    ]  # of two blocks half and a quarter are one
    assert {t.role for t in trials[6:]} == {"joint"}
    recipes = [Recipe.parse(t.recipe) for t in trials[6:]]
    assert len({str(recipe) for recipe in recipes}) == 8
    found = [t for recipe in recipes for t in recipe.techniques]
    assert all(t.shared for t in found if t.name == "subnet")
    assert len({t.sizes for t in found if t.name == "subnet"}) > 2
    assert len({t.keep for t in found if t.name == "int8"}) > 2
    for count in (6, 7, 9, 10, 13):
        assert str(propose(0, trials[:count], names, plan, TARGET, search="joint")[1]) == trials[count].recipe


def test_rungs_stand_alone_where_nothing_works_beside_them():
    plan = Plan.of(PLAN.model, (3, 32, 32))
    names = ("int8", "subnet")
    trials = []
    while len(trials) < 6:
        role, recipe = propose(0, trials, names, plan, TARGET)
        made = trial(len(trials), role, recipe)
        trials.append(dataclasses.replace(made, status="failed") if role == "together" else made)
    assert (trials[5].role, trials[5].recipe) == ("alone", "subnet(width=1.0, depth=0.5, shared=True)")
    assert propose(0, trials, names, plan, TARGET)[0] == "linas"
    trials[3] = dataclasses.replace(trials[3], status="failed")  # without a super-network there are no rungs
    assert propose(0, trials[:5], names, plan, TARGET)[0] == "linas"


def test_objectives_are_the_quantities(monkeypatch):
    seen = []
    original = proposals.next_batch

    def spy(space, records, objectives, **options):
        seen.append((records, objectives))
        return original(space, records, objectives, **options)

    monkeypatch.setattr(proposals, "next_batch", spy)
    trials = run(0, 6, metrics=measured)
    trials.append(dataclasses.replace(trials[-1], number=6, role="given", metrics=Metrics(quality=80.0, size_mb=5.0)))
    propose(0, trials, NAMES, PLAN, TARGET, quantities=("latency", "size"), population=5)
    records, objectives = seen[-1]
    assert objectives == ("error", "latency", "size")
    assert len(records) == 7
    assert records[0].measured == pytest.approx({"error": 0.1, "latency": 1.0, "size": 1.0})
    int8 = records[4].measured  # as it was settled: linear layers as convolutions
    assert int8 == pytest.approx({"error": 0.13, "latency": 0.6, "size": 0.7})
    assert records[6].measured is None  # no latency is known of it
    other = Metrics(quality=50.0, latency_ms=20.0, size_mb=20.0)
    propose(0, trials, NAMES, PLAN, TARGET, quantities=("size",), baseline=other)
    assert seen[-1][0][0].measured == pytest.approx({"error": 0.1, "size": 0.5})


def test_a_small_space_is_tried_whole_and_then_nothing_is_left():
    names = ("bf16", "fuse")
    for search in SEARCHES:
        trials = []
        while (proposal := propose(0, trials, names, PLAN, TARGET, search=search)) is not None:
            trials.append(trial(len(trials), *proposal))
        assert {t.recipe for t in trials if t.role != "plain int8"} == {"", "bf16()", "fuse()", "fuse() + bf16()"}


def test_nothing_works_alone():
    trials = [trial(0, "baseline", Recipe()), Trial(1, "plain int8", "int8(linear='matmul', products=8)", "failed")]
    trials += [Trial(2 + i, "alone", f"{name}()", "failed") for i, name in enumerate(NAMES)]
    trials += [Trial(5, "together", "fuse() + bf16() + int8()", "failed")]
    for search in SEARCHES:
        assert propose(0, trials, NAMES, PLAN, TARGET, search=search) is None


def test_batches_are_a_fifth_of_the_trials():
    assert [batch_size(n) for n in (1, 12, 24, 25, 100, 1000)] == [4, 4, 4, 5, 20, 50]


def test_what_cannot_be_searched_is_told():
    with pytest.raises(LissomError, match="no search 'annealing'"):
        propose(0, [], NAMES, PLAN, TARGET, search="annealing")
    with pytest.raises(LissomError, match="needs a quantity"):
        propose(0, [], NAMES, PLAN, TARGET, quantities=())
