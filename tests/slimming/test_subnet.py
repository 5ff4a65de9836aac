"""The main job with subnet: a given recipe, a user's tangled CNN through all of it, and an operator that breaks it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lissom import slimming
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target
from lissom.search.budget import Budget
from lissom.search.trials import Metrics, Trial
from lissom.techniques.recipe import Recipe
from tests.layers.tangled import Tangled
from tests.slimming import standin


def given(result: Any) -> Any:
    return next(t for t in result.trials if t.role == "given")


@pytest.mark.full
def test_a_given_recipe(tmp_path: Path) -> None:
    net = standin.transformer()
    recipe = "subnet(width=0.5, depth=0.75)"
    result = standin.run(tmp_path / "r", net=net, recipe=recipe)
    trial = given(result)
    assert trial.ok, trial.reason
    base = result.trials[0].metrics
    assert trial.metrics.macs < 0.6 * base.macs
    assert trial.metrics.params < 0.6 * base.params
    assert any(note.startswith("subnet kept 4 hidden layers narrower") for note in trial.notes)
    assert list((tmp_path / "r" / "recovery").glob("*.safetensors"))  # it was trained
    assert Artifact.open(result.folder / trial.artifact).plan["recipe"] == trial.resolved
    again = standin.run(tmp_path / "r", net=net, recipe=recipe, resume=True)
    assert again.trials == result.trials


@pytest.mark.last
def test_a_users_network_goes_through_all_of_it(tmp_path: Path) -> None:
    """Concatenation, depthwise convolution, a module called twice: cut, thinned, quantised, exported."""
    torch.manual_seed(0)
    net = Tangled(width=16, classes=4).eval()
    task = standin.task(net, shape=(3, 16, 16))
    recipe = "subnet(width=0.6) + low_rank(skip=('head',)) + int8(model_type='plain', linear='matmul', products=8)"
    trial = given(standin.run(tmp_path / "r", net=net, task=task, recipe=recipe))
    assert trial.ok, trial.reason
    assert set(Artifact.open(tmp_path / "r" / trial.artifact).plan["precision"].values()) == {8}


class Shuffled(nn.Module):
    """Its only hidden channels are shuffled by numbers that its forward holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x.reshape(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(x).mean((2, 3))


def test_an_operator_that_breaks_it_is_a_reason_and_the_run_goes_on(tmp_path: Path) -> None:
    net = Shuffled().eval()
    result = standin.run(tmp_path / "r", net=net, task=standin.task(net), techniques=("subnet", "int8"), trials=4)
    alone = next(t for t in result.trials if t.role == "alone" and t.recipe.startswith("subnet"))
    assert alone.status == "not applicable"
    assert "nothing of Shuffled can be made elastic" in alone.reason
    assert any(t.ok for t in result.trials if "int8" in t.recipe)


@pytest.mark.full
def test_a_joint_search_trains_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slimming, "TUNINGS", 0)  # trainings that follow a search are another test's
    net = standin.transformer()
    options: dict[str, Any] = {"net": net, "techniques": ("subnet", "int8"), "search": "joint"}
    standin.run(tmp_path / "r", trials=10, **options)
    again = standin.run(tmp_path / "r", trials=15, resume=True, **options)
    whole = standin.run(tmp_path / "other", trials=15, **options)
    found = [t for t in again.trials if t.role == "joint"]
    assert len(found) >= 4
    assert all(t.ok for t in found), [t.reason for t in found]
    # A run of fifteen trials has batches of as many members as one of ten.
    assert [t.recipe for t in again.trials if t.role == "joint"] == [
        t.recipe for t in whole.trials if t.role == "joint"
    ]
    assert any("sizes=" in t.recipe and "keep=" in t.recipe for t in found)
    assert len(list((tmp_path / "r" / "recovery").rglob("*.safetensors"))) == 1


@pytest.mark.last
def test_what_lacks_little_quality_is_trained_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On eighty images nothing is near a budget: what is promising is said here, all else is the run's own."""
    monkeypatch.setattr(
        slimming, "promising", lambda trials, *_: [t for t in trials if t.recipe == "subnet(shared=True)"]
    )
    net = standin.transformer()
    options: dict[str, Any] = {"net": net, "techniques": ("subnet",), "trials": 3}
    result = standin.run(tmp_path / "r", **options)
    (tuned,) = [t for t in result.trials if t.role == "tuned"]
    (shared,) = [t for t in result.trials if t.recipe == "subnet(shared=True)"]
    assert [t.recipe for t in result.trials if t.role == "alone"] == [
        shared.recipe, "subnet(width=1.0, depth=0.5, shared=True)", "subnet(width=1.0, depth=0.25, shared=True)",
    ]  # fmt: skip
    assert tuned.ok, tuned.reason
    assert tuned.recipe == shared.recipe.replace("shared=True", "shared=True, tuned=True")
    assert tuned.metrics.macs == shared.metrics.macs
    assert Artifact.open(result.folder / tuned.artifact).plan["recipe"] == tuned.resolved
    again = standin.run(tmp_path / "r", resume=True, **options)
    assert again.trials == result.trials


def test_which_are_tuned_is_found_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = slimming._Job(
        Budget.parse("drop<=1"), (), None, Target("openvino", "cpu", 1, 1), 9, None, 0, tmp_path, False, None, ""
    )
    within = 4  # of nine, the first so many can be brought within the budget
    shared = [
        Trial(n, "linas", f"subnet(shared=True, width={1 - n / 20})", "ok", metrics=Metrics(quality=90))
        for n in range(1, 10)
    ]
    shared = [replace(t, resolved=t.recipe) for t in shared]
    tried: list[int] = []

    def trial(role: str, recipe: Recipe) -> Trial:
        n = next(i for i, t in enumerate(shared) if Recipe.parse(t.recipe).finished() == recipe)
        tried.append(n)
        made = Trial(10 + len(tried), role, str(recipe), "ok", metrics=Metrics(drop=0.5 if n < within else 1.5))
        job.on.trials.append(made)
        return made

    job.on = SimpleNamespace(trials=[Trial(0, "baseline", "", "ok", metrics=Metrics(quality=90, drop=0.0)), *shared])
    job.trial = trial  # type: ignore[method-assign]
    monkeypatch.setattr(slimming, "promising", lambda trials, *_: shared)
    job.tune()
    assert tried == [4, 2, 3]
    job.tune()  # resumed: what is known is not made again
    assert tried == [4, 2, 3]
    job.given = Recipe.parse("int8()")
    job.tune()
    assert tried == [4, 2, 3]
