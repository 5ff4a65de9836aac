"""The main job with converting: small grey images, the whole way from plan to artifact, and killed on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lissom
from lissom.runtime.artifact import Artifact
from tests.slimming import standin
from tests.techniques.test_converting import cnn, task, trained

RECIPE = "converting(hidden=(48,), code=8)"


@pytest.mark.full
def test_from_the_recipe_to_the_artifact(tmp_path: Path) -> None:
    net, of = trained(cnn), task()
    result = standin.run(tmp_path / "r", net=net, task=of, recipe=f"{RECIPE} + int8(model_type='plain')")
    given = next(t for t in result.trials if t.role == "given")
    assert given.ok, given.reason
    assert any(note.startswith("converting: an autoencoder") for note in given.notes)
    baseline = next(t for t in result.trials if t.role == "baseline")
    assert given.metrics.macs < baseline.metrics.macs
    artifact = Artifact.open(result.artifact)
    assert artifact.plan["recipe"] == given.resolved
    assert artifact.plan["decisions"] == []
    answers = lissom.load(result.artifact)(of.report.inputs(slice(0, 160)))
    assert answers.shape == (160, 4)
    assert (answers.argmax(-1) == of.report.labels).mean() > 0.5
    again = lissom.load(result.artifact)(of.report.inputs(slice(0, 160)))
    assert np.array_equal(again, answers)


def test_what_it_is_not_for_is_a_row_with_its_reason(tmp_path: Path) -> None:
    result = standin.run(tmp_path / "r", techniques=("converting", "fuse"), trials=4)
    trial = next(t for t in result.trials if t.role == "alone" and t.recipe == "converting()")
    assert trial.status == "not applicable"
    assert "grey images" in trial.reason


PROGRAM = """
import os, signal, sys
from pathlib import Path
from tests.slimming.test_converting import RECIPE, cnn, standin, task, trained
seen = []
def progress(event):
    seen.append(event.kind)
    if event.kind == "epoch" and seen.count("epoch") == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
standin.run(folder, net=trained(cnn), task=task(), recipe=RECIPE, resume=folder.exists(), progress=progress)
"""


@pytest.mark.full
def test_a_run_killed_in_each_phase_goes_on_as_it_would_have(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent

    def start(folder: str, kill: int = 0) -> int:
        environment = {**os.environ, "PYTHONPATH": str(root), "KILL_AT": str(kill)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / folder)], cwd=root, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode in (0, -9), done.stderr[-800:]
        return done.returncode

    def weights(folder: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted((tmp_path / folder / "recovery").glob("*.safetensors"))]

    assert start("whole") == 0
    # Epochs of the head, the autoencoder and the light network: 5, 15, 1. Each start counts those it trains itself.
    for kill in (3, 9, 9):
        assert start("killed", kill) == -9
    assert start("killed") == 0
    assert len(weights("whole")) == 1
    assert weights("killed") == weights("whole")
