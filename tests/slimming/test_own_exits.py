"""The main job on a network with exits of its own: through them, and as a plain model."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lissom
from lissom import slimming
from lissom.data.splits import ArraySplit
from lissom.layers.exits import exits_of, put_away_exits
from lissom.models.factory import create_model
from lissom.runtime.artifact import Artifact
from lissom.tasks.task import Task
from tests.models.tiny_perceiver import SHAPE, patterns, trained
from tests.slimming import standin


def task() -> Task:
    parts = {
        name: ArraySplit(name, *patterns(count, 900 + i))
        for i, (name, count) in enumerate({"fit": 64, "choose": 1200, "report": 300}.items())
    }
    return Task(**parts, shape=SHAPE, classes=tuple("abcd"), name="patterns")


@pytest.mark.full
def test_its_exits_are_used_as_they_were_trained(tmp_path: Path) -> None:
    net, of = trained(), task()
    result = standin.run(tmp_path / "r", net=net, task=of, recipe="early_exit(risk=5.0)")
    artifact = Artifact.open(result.artifact)
    places = [d["at"] for d in artifact.plan["decisions"]]
    assert places
    assert set(places) <= {"heads.early", "heads.late", "heads.maps"}
    assert all(d["threshold"] is not None for d in artifact.plan["decisions"])
    assert not (result.folder / "recovery").exists()  # nothing was trained
    baseline = next(t for t in result.trials if t.role == "baseline")
    given = next(t for t in result.trials if t.role == "given")
    assert given.metrics.macs < baseline.metrics.macs
    assert given.metrics.drop <= 5
    answers = lissom.load(result.artifact)(of.report.inputs(slice(0, 300)))
    assert (answers.argmax(-1) == of.report.labels).mean() > 0.6
    # The winner of a given recipe is known before its exits are fitted, so that all that may fail is theirs.
    assert (artifact.plan["exits"]["delta"], artifact.plan["exits"]["among"]) == (0.05, 1)
    assert result.json["exits"]["sure"] == pytest.approx(0.95)


@pytest.mark.full
def test_exits_that_are_searched_share_the_promise_with_all_that_may_be_chosen(tmp_path: Path) -> None:
    meter = standin.StandIn(slow=lambda recipe: "int8" in recipe)
    result = standin.run(tmp_path / "r", net=trained(), task=task(), techniques=("early_exit",), trials=4, meter=meter)
    exits = result.json["exits"]
    assert exits is not None, [t.reason for t in result.trials]
    among = 4 + slimming.TUNINGS + 1  # the trials, those trained by themselves, and one without the technique
    assert (exits["among"], exits["delta"]) == (among, pytest.approx(0.05 / among))
    assert exits["sure"] == pytest.approx(0.95)


def test_what_may_fail_is_shared_by_whatever_number_of_trials() -> None:
    """The first ``fits`` use up delta, those of a resumed run half of it more, then a quarter."""
    job = SimpleNamespace(given=None, on=SimpleNamespace(fits=10))
    shares = [1 / slimming._Job.fits_like(job, number) for number in range(60)]
    with_exits = shares[slimming.FIRST :]
    assert sum(with_exits[:10]) == pytest.approx(1)
    assert sum(with_exits[:22]) == pytest.approx(1.5)
    assert sum(with_exits) < 2
    assert slimming._Job.fits_like(SimpleNamespace(given=object()), 7) == 1


@pytest.mark.full
def test_as_a_plain_model_it_gives_its_merged_answer(tmp_path: Path) -> None:
    result = standin.run(
        tmp_path / "r", net=trained(), task=task(), recipe="fuse() + low_rank(ratio=2.0, skip=('heads',))"
    )
    given = next(t for t in result.trials if t.role == "given")
    assert given.ok, given.reason
    assert Artifact.open(result.artifact).plan["decisions"] == []
    assert given.metrics.params < next(t for t in result.trials if t.role == "baseline").metrics.params


@pytest.mark.full
def test_exits_that_a_model_arrived_with_are_used_as_they_were_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = create_model(
        "lgvit_vit_base", img_size=12, patch_size=3, embed_dim=32, num_heads=2, depth=4, num_classes=4, exits=(2, 3)
    ).eval()
    of = standin.task(put_away_exits(copy.deepcopy(net)))
    result = standin.run(tmp_path / "r", net=net, task=of, recipe="early_exit(risk=95.0)")
    assert exits_of(net) is not None  # the user's model stays as it is
    given = next(t for t in result.trials if t.role == "given")
    assert given.status in ("ok", "budget not met"), given.reason
    assert not (result.folder / "recovery").exists()  # nothing was trained
    baseline = next(t for t in result.trials if t.role == "baseline")
    assert given.metrics.params > baseline.metrics.params  # the heads are none of the baseline's
    artifact = Artifact.open(result.folder / given.artifact)
    assert {d["at"] for d in artifact.plan["decisions"]} <= {"blocks.1", "blocks.2"}
