"""The main job with a cascade: from a recipe to an artifact of two stages, and what its result says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import lissom
from lissom.errors import LissomError
from lissom.runtime.artifact import Artifact
from lissom.techniques.recipe import Recipe
from tests.slimming import standin

PLAIN = "int8(model_type='plain', linear='matmul', products=8)"


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("cascade(first=(low_rank(skip=('head',))), risk=30.0)", marks=pytest.mark.full),
        pytest.param(f"cascade(first=(low_rank(skip=('head',))), risk=30.0) + {PLAIN}", marks=pytest.mark.full),
        pytest.param("cascade(first=(low_rank(skip=('head',)) + int8()), second=(int8()), risk=30.0)",
                     marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_a_cascade_is_slimmed_to(tmp_path: Path, recipe: str) -> None:
    net = standin.transformer()
    one = standin.run(tmp_path / "r", net=net, recipe=recipe, recover=0.05)
    # A recipe of two techniques has its beginning measured too.
    assert len(one.trials) == (4 if recipe.endswith(PLAIN) else 3)
    assert all(t.ok for t in one.trials), [t.reason for t in one.trials]
    assert re.sub(r"int8\(.*?\)(?=[ ),]|$)", "int8()", one.best.recipe) == re.sub(
        r"int8\(.*?\)(?=[ ),]|$)", "int8()", recipe
    )
    assert str(Recipe.parse(one.best.recipe)) == one.best.recipe
    artifact = Artifact.open(one.best.artifact)
    (decision,) = artifact.plan["decisions"]
    assert (decision["at"], decision["rule"]) == ("first", "difference")
    assert decision["threshold"] is not None
    shares = one.json["exits"]["shares"]
    assert 0 < shares[0] <= 1
    # Operations are the members', by how often each runs.
    low, high = (one.json["baseline"]["macs"] * share for share in (0.3, 2.0))
    assert low < one.best.metrics.macs < high
    predictor = lissom.load(artifact.path, 1)
    answers, stages = predictor.answer(standin.task(net).report.inputs(slice(0, 40)))
    assert answers.shape == (40, 4)
    assert np.isin(stages, (0, 1)).all()


def test_a_recipe_out_of_a_file_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef net(): ...\n")
    saved = tmp_path / "plan.json"
    saved.write_text(f'{{"recipe": "cascade(second_model=\'{tmp_path}/evil.py:net\')"}}')
    with pytest.raises(LissomError, match="give the recipe's text yourself"):
        standin.run(tmp_path / "r", net=standin.transformer(), recipe=saved)
    assert not (tmp_path / "ran").exists()
