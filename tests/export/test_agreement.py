"""Two forms of a plan beside each other: the shares with the same class and the same exit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.export.agreement import Agreement, Said, agreement, compare, said_by_artifact, said_by_plan
from lissom.export.exporting import export_plan, run_stages
from lissom.export.plan import Plan
from lissom.runtime.target import RUNTIMES, Target
from tests.export.test_joint_cut import with_exits


def test_shares_are_counted() -> None:
    first = Said(np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1]))
    second = Said(np.array([0, 1, 2, 0]), np.array([0, 1, 1, 0]))
    assert compare(first, second) == Agreement(4, 0.75, 0.5, 0.5)
    with pytest.raises(LissomError, match="not to the same inputs"):
        compare(first, Said(np.zeros(3, int), np.zeros(3, int)))
    with pytest.raises(LissomError, match="not to the same inputs"):
        compare(Said(np.zeros(0, int), np.zeros(0, int)), Said(np.zeros(0, int), np.zeros(0, int)))


@pytest.mark.parametrize("runtime", [RUNTIMES[0], *(pytest.param(r, marks=pytest.mark.full) for r in RUNTIMES[1:])])
def test_every_runtime_says_what_the_plan_says(runtime: str, tmp_path: Path) -> None:
    plan = with_exits("resnet18", 32, ("layer1", "layer3"))
    inputs = np.random.default_rng(1).standard_normal((70, 3, 32, 32)).astype(np.float32)
    artifact = export_plan(plan, Target(runtime, threads=1), tmp_path / "a", shape=(3, 32, 32))
    _, scores = run_stages(artifact, inputs, 1)
    limits = [float(np.sort(column)[[34, 35]].mean()) for column in scores.T]
    decisions = [{**d, "threshold": t} for d, t in zip(artifact.plan["decisions"], limits, strict=True)]
    artifact = artifact.with_decisions(decisions, {})
    assert agreement(artifact, plan, inputs, 1) == Agreement(70, 1.0, 1.0, 1.0)
    said = said_by_artifact(artifact, inputs, 1)
    assert set(said.exits) == {0, 1, 2}
    # Other thresholds are another plan: it is seen.
    other = said_by_plan(plan, [None, limits[1]], inputs)
    assert set(other.exits) == {1, 2}
    assert compare(said, other).same_exit < 0.6
    with pytest.raises(LissomError, match="2 exits, and there are 1"):
        said_by_plan(plan, [0.5], inputs)


def test_a_plan_without_exits_has_one_place_to_answer(tmp_path: Path) -> None:
    plan = with_exits("resnet18", 32, ("layer1",))
    from lissom.layers.exits import remove_exits

    bare = replace(Plan.of(remove_exits(plan.model), (3, 32, 32)))
    inputs = np.random.default_rng(1).standard_normal((5, 3, 32, 32)).astype(np.float32)
    artifact = export_plan(bare, Target(batch=2, threads=1), tmp_path / "a", shape=(3, 32, 32))
    assert agreement(artifact, bare, inputs, 1) == Agreement(5, 1.0, 1.0, 1.0)
    assert said_by_plan(bare, [], inputs).exits.tolist() == [0] * 5
