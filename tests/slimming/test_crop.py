"""The main job with crop: what activations say is settled before a trial, stands in its recipe, and comes back."""

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
def test_a_users_network_goes_through_all_of_it(tmp_path):
    """Concatenation, depthwise convolution, a module called twice: cropped, thinned, quantised, exported."""
    net, task = tangled()
    recipe = (
        "fuse() + crop(keep=0.6) + low_rank(skip=('head',)) + int8(model_type='plain', linear='matmul', products=8)"
    )
    trial = given(standin.run(tmp_path / "r", net=net, task=task, recipe=recipe))
    assert trial.ok, trial.reason
    assert set(Artifact.open(tmp_path / "r" / trial.artifact).plan["precision"].values()) == {8}


class Shuffled(torch.nn.Module):
    """Its only inner channels are shuffled by a number that its forward holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x.reshape(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(x).mean((2, 3))


def test_an_operator_that_breaks_it_is_a_reason_and_the_run_goes_on(tmp_path):
    net = Shuffled().eval()
    result = standin.run(
        tmp_path / "r", net=net, task=standin.task(net), techniques=("crop", "int8"), trials=4
    )  # fmt: skip
    alone = next(t for t in result.trials if t.role == "alone" and t.recipe.startswith("crop"))
    assert alone.status == "not applicable"
    assert "no channels of Shuffled can be removed" in alone.reason
    assert any(t.ok and "int8" in t.recipe for t in result.trials)


@pytest.mark.full
def test_without_anything_to_train_on_it_says_so(tmp_path):
    net, task = tangled()
    x = np.zeros((0, 3, 16, 16), np.float32)
    task = replace(task, fit=ArraySplit("fit", x, np.zeros(0, np.int64)))
    result = standin.run(tmp_path / "r", net=net, task=task, techniques=("crop", "int8"), trials=4)
    alone = next(t for t in result.trials if t.role == "alone" and t.recipe.startswith("crop"))
    assert alone.status == "not applicable"
    assert "nothing to train on" in alone.reason
