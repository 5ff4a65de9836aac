"""The main job with crop: what activations say is settled before a trial, stands in its recipe, and comes back.

``test_users_networks.py`` beside this file takes it further, and breaks it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lissom.data.splits import ArraySplit
from lissom.runtime.artifact import Artifact
from lissom.tasks.task import Task
from lissom.techniques.recipe import Recipe
from tests.layers.tangled import Tangled
from tests.slimming import standin


def tangled() -> tuple[torch.nn.Module, Task]:
    torch.manual_seed(0)
    net = Tangled(width=16, classes=4).eval()
    return net, standin.task(net, shape=(3, 16, 16))


def given(result):
    return next(t for t in result.trials if t.role == "given")


@pytest.mark.parametrize("importance", ["magnitude", pytest.param("activation", marks=pytest.mark.full)])
def test_a_given_recipe(tmp_path, importance):
    net, task = tangled()
    recipe = f"fuse() + crop(keep=0.6, importance={importance!r})"
    result = standin.run(tmp_path / "r", net=net, task=task, recipe=recipe)
    trial = given(result)
    assert trial.ok, trial.reason
    (crop,) = (t for t in Recipe.parse(trial.resolved).techniques if t.name == "crop")
    assert (crop.kept is not None) == (importance == "activation")
    artifact = Artifact.open(result.folder / trial.artifact)
    assert artifact.plan["recipe"] == trial.resolved
    base = result.trials[0].metrics
    assert trial.metrics.macs < 0.62 * base.macs
    assert trial.metrics.params < base.params
    assert any(note.startswith("crop removed") for note in trial.notes)
    again = standin.run(tmp_path / "r", net=net, task=task, recipe=recipe, resume=True)
    assert again.trials == result.trials


@pytest.mark.full
def test_without_anything_to_train_on_it_says_so(tmp_path):
    net, task = tangled()
    x = np.zeros((0, 3, 16, 16), np.float32)
    task = replace(task, fit=ArraySplit("fit", x, np.zeros(0, np.int64)))
    result = standin.run(tmp_path / "r", net=net, task=task, techniques=("crop", "int8"), trials=4)
    alone = next(t for t in result.trials if t.role == "alone" and t.recipe.startswith("crop"))
    assert alone.status == "not applicable"
    assert "nothing to train on" in alone.reason
