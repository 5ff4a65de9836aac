"""A pair out of a pool of recipes: each trained once, its right answers recorded, the cascade finding both trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.cascades import complementarity
from lissom.export.plan import Plan
from lissom.runtime.target import Target
from lissom.search.pairing import Pool, pair_recipes, record_pool
from lissom.tasks.task import Task
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer

TARGET = Target("openvino", "cpu", 1, 1)
SHAPE = (3, 16, 16)
POOL = ["low_rank()", "low_rank(ratio=4.0)", "token_clustering(after=1)", ""]


@pytest.fixture(scope="module")
def recoverer(tmp_path_factory: pytest.TempPathFactory) -> Recoverer:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, num_heads=2, depth=3, num_classes=4
    ).eval()
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 80)
    x = (rng.standard_normal((80, *SHAPE)) + 0.5 * y[:, None, None, None]).astype(np.float32)
    split = ArraySplit("made", x, y.astype(np.int64))
    task = Task(choose=split, report=split, fit=split, shape=SHAPE, classes=tuple("abcd"), name="made")
    folder = tmp_path_factory.mktemp("weights")
    return Recoverer(Plan.of(model, SHAPE), task, TARGET, folder, epochs=1, seconds=None, seed=0)


def test_a_pool_is_trained_and_recorded_once(recoverer: Recoverer) -> None:
    pool = record_pool(POOL, recoverer)
    assert [str(r) for r in pool.recipes] == POOL
    assert pool.correct.shape == (4, 80)
    assert pool.macs[1] < pool.macs[0] < pool.macs[3]
    with torch.no_grad():
        own = recoverer.plan.model(torch.from_numpy(recoverer.task.choose.inputs(slice(0, 80)))).argmax(1).numpy()
    np.testing.assert_array_equal(pool.correct[3], own == recoverer.task.choose.labels)
    assert pool.accuracy[3] == pytest.approx(100 * (own == recoverer.task.choose.labels).mean())
    kept = {file: file.stat().st_mtime_ns for file in recoverer.folder.iterdir()}
    assert sum(file.suffix == ".safetensors" for file in kept) == 2
    assert sum(file.suffix == ".npy" for file in kept) == 4
    again = record_pool(POOL, recoverer)
    np.testing.assert_array_equal(again.correct, pool.correct)
    cascade, pair = pair_recipes(pool, risk=1.0)
    assert (cascade.recipe("first"), cascade.recipe("second")) == (pool.recipes[pair.first], pool.recipes[pair.second])
    assert cascade.risk == 1.0
    assert pool.macs[pair.first] <= pool.macs[pair.second]
    assert pair.complementarity == max(
        complementarity(a, b) for i, a in enumerate(pool.correct) for b in pool.correct[:i]
    )
    recipe = Recipe((cascade,))
    recoverer.recover(recipe, recipe.apply(recoverer.plan, recoverer.task, TARGET))
    assert {file: file.stat().st_mtime_ns for file in recoverer.folder.iterdir()} == kept


def test_what_is_kept_is_of_one_model_and_its_data(recoverer: Recoverer, tmp_path: Path) -> None:
    def recorded(model: nn.Module, split: ArraySplit) -> np.ndarray:
        task = replace(recoverer.task, choose=split)
        own = Recoverer(Plan.of(model, SHAPE), task, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
        return record_pool([""], own).correct[0]

    def right(model: nn.Module, split: ArraySplit) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(split.inputs(slice(None)))).argmax(1).numpy() == split.labels

    model, split = recoverer.plan.model, recoverer.task.choose
    torch.manual_seed(1)
    other = timm.create_model("resnet10t", num_classes=4).eval()
    turned = copy.deepcopy(model)
    with torch.no_grad():
        turned.head.weight.neg_()
    moved = ArraySplit("made", split.inputs(slice(None))[::-1].copy(), split.labels)
    relabelled = ArraySplit("made", split.inputs(slice(None)), (split.labels + 1) % 4)
    made = [(model, split), (turned, split), (other, split), (model, moved), (model, relabelled)]
    for _ in "ab":  # recorded, then read
        for of in made:
            np.testing.assert_array_equal(recorded(*of), right(*of))
    kept = sorted(tmp_path.glob("*.npy"))
    assert len(kept) == len(made)
    # Damaged files are recorded anew.
    for damage in (b"", b"\x93NUM", b"other", kept[0].read_bytes()[:-10]):
        for file in kept:
            file.write_bytes(damage)
        np.testing.assert_array_equal(recorded(model, split), right(model, split))


def test_what_is_refused(recoverer: Recoverer) -> None:
    with pytest.raises(LissomError, match="a pool without recipes"):
        record_pool([], recoverer)
    with pytest.raises(LissomError, match="stands twice in the pool"):
        record_pool(["low_rank(ratio=2.0)", "low_rank(ratio=2.0)"], recoverer)
    with pytest.raises(NotApplicable, match="answers several times"):
        record_pool(["early_exit()", ""], recoverer)
    pool = Pool((Recipe(), Recipe.parse("fuse()")), np.ones((2, 5), bool), np.array([5, 6]))
    with pytest.raises(LissomError, match="cost 3 or less together"):
        pair_recipes(pool, budget=3)


def test_the_more_accurate_goes_first_on_request() -> None:
    right = np.array([[1, 1, 1, 0], [0, 0, 1, 1]], bool)
    pool = Pool((Recipe(), Recipe.parse("fuse()")), right, np.array([6, 5]))
    cheaper, pair = pair_recipes(pool)
    accurate, other = pair_recipes(pool, order="accurate")
    assert (pair.first, pair.second) == (other.second, other.first) == (1, 0)
    assert (str(cheaper.recipe("first")), str(accurate.recipe("first"))) == ("fuse()", "")
