"""A run on disk: whole lines only, one writer, the same settings on resuming."""

import json
import subprocess
import sys

import pytest

from lissom.errors import LissomError
from lissom.search.runs import Run
from lissom.search.trials import Metrics, Trial

SETTINGS = {"model": "m", "seed": 0}


def trial(number):
    metrics = Metrics(quality=90.0, quality_ci=(89.0, 91.0))
    trainings = ({"steps": 7, "passes": 0.5, "seconds": 3.0},)
    return Trial(number, "random", "int8()", "ok", metrics=metrics, notes=("n",), trainings=trainings)


def test_trials_come_back_as_they_were(tmp_path):
    with Run(tmp_path / "run", SETTINGS) as run:
        run.add(trial(0))
        run.add(trial(1))
    with Run(tmp_path / "run", SETTINGS, resume=True) as run:
        assert run.trials == [trial(0), trial(1)]


def test_a_line_cut_short_is_cut_off(tmp_path):
    with Run(tmp_path, SETTINGS) as run:
        run.add(trial(0))
    whole = (tmp_path / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(whole + whole[:40])
    (tmp_path / "artifacts" / ".001-0.abc").mkdir()
    with Run(tmp_path, SETTINGS, resume=True) as run:
        assert run.trials == [trial(0)]
    assert (tmp_path / "trials.jsonl").read_bytes() == whole
    assert not list((tmp_path / "artifacts").iterdir())


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    with Run(tmp_path, SETTINGS):
        pass
    with pytest.raises(LissomError, match="--resume"), Run(tmp_path, SETTINGS):
        pass


def test_other_settings_are_named(tmp_path):
    with Run(tmp_path, SETTINGS):
        pass
    with pytest.raises(LissomError, match="seed = 0, not 1"), Run(tmp_path, {**SETTINGS, "seed": 1}, resume=True):
        pass


def test_what_a_promise_is_shared_among_stays(tmp_path):
    """A run that is resumed with more trials keeps the number that its first trials had their shares of."""
    with Run(tmp_path, SETTINGS, fits=12) as run:
        assert run.fits == 12
    with Run(tmp_path, SETTINGS, resume=True, fits=200) as run:
        assert run.fits == 12
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS))  # one of before it was kept
    with Run(tmp_path, SETTINGS, resume=True, fits=200) as run:
        assert run.fits == 200


def test_the_winner_that_a_kill_left_aside_is_swept(tmp_path):
    with Run(tmp_path, SETTINGS):
        pass
    (tmp_path / ".best.abc" / "old").mkdir(parents=True)
    with Run(tmp_path, SETTINGS, resume=True):
        pass
    assert not (tmp_path / ".best.abc").exists()


def test_damage_is_said(tmp_path):
    with Run(tmp_path, SETTINGS):
        pass
    (tmp_path / "trials.jsonl").write_text("{}\n")
    with pytest.raises(LissomError, match="damaged"), Run(tmp_path, SETTINGS, resume=True):
        pass


def test_a_second_process_is_refused(tmp_path):
    code = (
        "import sys; from lissom.search.runs import Run\n"
        f"Run({str(tmp_path)!r}, {json.dumps(SETTINGS)}, resume=True).__enter__()"
    )
    with Run(tmp_path, SETTINGS):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode != 0
    assert "another run is writing" in other.stderr


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LissomError, match="cannot be written"), Run(tmp_path / "file" / "run", SETTINGS):
        pass
