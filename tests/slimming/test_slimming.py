"""The main job with a deterministic stand-in for the meter: rows, never slower, resuming, what a user gets wrong."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import lissom
from lissom import slimming
from lissom.errors import LissomError
from lissom.registry import parts, register
from lissom.runtime.artifact import Artifact
from lissom.techniques import recovering
from lissom.techniques.base import Technique
from tests.slimming import standin

PROGRAM = Path(__file__).parent / "standin.py"
EVERY = [part.name for part in parts("technique")]  # before this file plants its own


@register("technique", "slowpoke")
@dataclass(frozen=True)
class Slowpoke(Technique):
    """Planted: changes nothing but the recipe, and the stand-in calls it slow."""

    name: ClassVar[str] = "slowpoke"
    stage: ClassVar[str] = "structure"

    def apply(self, plan, task):
        return plan


@register("technique", "faulty")
@dataclass(frozen=True)
class Faulty(Technique):
    """Planted: fails in a way of its own."""

    name: ClassVar[str] = "faulty"
    stage: ClassVar[str] = "structure"

    def apply(self, plan, task):
        raise ZeroDivisionError("by design")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    meter = standin.StandIn(slow=lambda recipe: recipe == "slowpoke()")
    return standin.run(
        tmp_path_factory.mktemp("run") / "r",
        techniques=("fuse", "int8", "slowpoke", "faulty", "bf16"),
        trials=10,
        meter=meter,
        peers=True,
    )


def rows(result, role):
    return [t for t in result.trials if t.role == role]


def test_the_first_trials(result):
    assert [t.role for t in result.trials[:8]] == ["baseline", "plain int8", *["alone"] * 5, "together"]
    assert [t.recipe for t in rows(result, "alone")] == ["fuse()", "int8()", "slowpoke()", "faulty()", "bf16()"]


def test_what_fails_is_a_row_with_its_reason(result):
    by = {t.recipe: t for t in rows(result, "alone")}
    assert (by["faulty()"].status, by["faulty()"].reason) == ("failed", "ZeroDivisionError: by design")
    assert by["bf16()"].status == "not applicable"
    assert "bf16" in by["bf16()"].reason
    together = rows(result, "together")[0]
    assert together.status == "failed"  # the faulty one stands in it, and the run went on


def test_undecided_knobs_are_settled_by_measuring(result):
    alone = next(t for t in rows(result, "alone") if t.recipe == "int8()")
    assert re.search(r"model_type='(plain|transformer)'", alone.resolved)
    assert len([n for n in alone.notes if n.startswith("int8(")]) == 2


def test_the_result(result):
    assert result.met
    assert result.best.metrics.quality is not None
    assert result.best.metrics.drop is not None
    assert {p["name"]: p["status"] for p in result.json["peers"]} == {"PyTorch eager": "ok", "torch.compile": "ok"}
    assert result.report.is_file()
    written = json.loads((result.folder / "result.json").read_text())
    assert written == json.loads(json.dumps(result.json))
    for key in (
        "baseline",
        "plain_int8",
        "best",
        "pareto",
        "trials",
        "budget",
        "met",
        "environment",
        "seed",
        "seconds",
    ):
        assert key in written
    wanted = (
        "quality quality_ci latency_ms p95_ms speedup speedup_ci throughput memory_mb memory_above_empty_mb size_mb "
        "energy_mj params macs"
    )
    assert set(wanted.split()) <= set(written["best"]["metrics"])
    artifact = Artifact.open(result.best.artifact)
    assert artifact.plan["metrics"]["latency_ms"] == result.best.metrics.latency_ms
    assert (result.best.artifact / "card.md").is_file()


def test_every_reported_pareto_point_is_measured_and_not_beaten(result):
    for a in result.pareto:
        assert a.ok
        for b in result.trials:
            if b.ok and b.metrics.speedup > a.metrics.speedup:
                assert b.metrics.quality < a.metrics.quality


def test_the_artifact_answers_without_lissoms_other_rooms(result):
    answers = lissom.load(result.best.artifact)(standin.task(standin.model()).report.inputs(slice(0, 7)))
    assert answers.shape == (7, 4)


class Lucky(standin.StandIn):
    """Calls the planted technique fast in the search, and slow when it is measured against the recipe without it."""

    pair = False

    def milliseconds(self, artifact):
        if "slowpoke" in artifact.plan["recipe"]:
            return 3.0 if "int8" in artifact.plan["recipe"] and not self.pair else 14.0
        return super().milliseconds(artifact)

    def measure(self, artifacts, *, threads, seconds=2.0, memory=True):
        self.pair = not memory
        return super().measure(artifacts, threads=threads, seconds=seconds, memory=memory)


def test_a_technique_that_does_not_pay_is_removed(tmp_path):
    one = standin.run(tmp_path / "r", techniques=("int8", "slowpoke"), trials=5, meter=Lucky())
    (planted,) = [a for a in one.json["ablation"] if a["technique"] == "slowpoke()"]
    assert not planted["kept"]
    assert planted["ratio"] < 1
    assert "not slower without it" in planted["reason"]
    assert "slowpoke" not in one.best.recipe
    assert one.met


def test_never_slower_than_plain_int8(tmp_path):
    # Every recipe but the plain ones is slow: then plain int8 must be the answer.
    plain = ("", "int8(linear='matmul', products=8)")
    meter = standin.StandIn(
        slow=lambda r: not (r in plain or re.fullmatch(r"int8\(model_type='\w+', linear='matmul', products=8\)", r))
    )
    one = standin.run(tmp_path / "r", techniques=("int8",), trials=6, meter=meter)
    assert "keep" not in one.best.recipe
    assert one.best.metrics.latency_ms <= one.json["plain_int8"]["metrics"]["latency_ms"]


def test_one_recipe_without_a_search(tmp_path, result):
    again = standin.run(tmp_path / "r", recipe=result.best.recipe)
    assert [t.role for t in again.trials] == ["baseline", "plain int8", "given"]
    assert again.best.recipe == result.best.recipe
    assert again.best.metrics.quality == result.best.metrics.quality


def test_a_training_of_less_than_an_epoch_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(recovering, "BATCH", 16)  # five steps an epoch
    monkeypatch.setattr(slimming, "RECOVERY_STEPS", 2)
    recipe = "low_rank(skip=('head',))"
    result = standin.run(tmp_path / "r", net=standin.transformer(), recipe=recipe)
    (trial,) = rows(result, "given")
    (training,) = trial.trainings
    assert (training["steps"], training["passes"]) == (2, 0.4)
    (warning,) = result.json["warnings"]
    assert warning.startswith("1 of 1 trained recipes had less than one epoch of training")
    assert f"{trial.resolved} the least, 0.4 of one" in warning
    assert warning.endswith("2 steps are few for these data: give --recover MINUTES")
    assert "trained for 0.40 epochs" in result.report.read_text()
    again = standin.run(tmp_path / "r", net=standin.transformer(), recipe=recipe, resume=True)
    assert again.json["warnings"] == [warning]
    monkeypatch.setattr(slimming, "LONGEST", 2)  # epochs
    longer = standin.run(tmp_path / "l", net=standin.transformer(), recipe=recipe, recover=5)
    assert rows(longer, "given")[0].trainings[0]["passes"] == 2
    assert not longer.json["warnings"]


def test_a_recipe_that_does_not_apply(tmp_path):
    with pytest.raises(LissomError, match=r"bf16\(\) is not applicable: this processor"):
        standin.run(tmp_path / "r", recipe="bf16()")


def test_without_labels_quality_is_agreement(tmp_path):
    net = standin.model()
    one = standin.run(tmp_path / "r", task=standin.task(net, labelled=False), recipe="fuse()")
    assert one.json["task"]["metric"] == "agreement with the original"
    assert one.json["baseline"]["quality"] == 100.0
    assert one.best.metrics.quality == 100.0


def lines(folder):
    """trials.jsonl, times aside."""
    return re.sub(rb'"seconds": [\d.]+', b'"seconds": 0', (folder / "trials.jsonl").read_bytes())


WATCH = """
import os, socket
def watched(call):
    def connect(self, address, *rest):
        if self.family != socket.AF_UNIX:
            with open(os.environ["CONNECTIONS"], "a") as file:
                file.write(repr(address))
        return call(self, address, *rest)
    return connect
socket.socket.connect = watched(socket.socket.connect)
socket.socket.connect_ex = watched(socket.socket.connect_ex)
"""


def start(folder, *words):
    """One run in a process of its own; a connection that it or a child of it opens is written to ``connections``."""
    watch = folder.parent / "watch"
    watch.mkdir(exist_ok=True)
    (watch / "sitecustomize.py").write_text(WATCH)
    home = {"HOME": str(watch), "CONNECTIONS": str(folder.parent / "connections"), "PYTHONPATH": str(watch)}
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "NNCF_CI")} | home
    command = [sys.executable, str(PROGRAM), str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def forked(folder, *words):
    """One run in a process that need not import anything first: whether it came to its end (it was killed if not)."""
    code = standin.forked(folder, *words)
    assert code in (-9, 0), (folder.parent / "log").read_text()[-800:]
    return code == 0


def kill_and_resume(one, folder, kills, *words, surely=True):
    """Start, be killed as each of ``kills`` says, ``surely`` or perhaps, and resume until done."""

    def go_on(*kill):
        return one(folder, *(["--resume"] if (folder / "run.json").exists() else []), *kill, *words)

    for kill in kills:
        ended = go_on(*kill)
        assert not (ended and surely), f"the run ended before {kill}"
    assert go_on()


@pytest.mark.last
def test_a_killed_run_goes_on_as_it_would_have(tmp_path):
    def one(folder, *words):
        done = start(folder, *words)
        assert done.returncode in (-9, 0), done.stderr[-800:]
        return done.returncode == 0

    assert one(tmp_path / "whole")
    kill_and_resume(one, tmp_path / "killed", [["--kill", "done 4:"]])
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    # Nothing asked for the network, in a home without any consent or refusal and outside continuous integration.
    assert not (tmp_path / "connections").exists()


@pytest.mark.full
def test_ten_kills_at_random(tmp_path):
    assert forked(tmp_path / "first")  # starts the server
    begun = time.monotonic()
    assert forked(tmp_path / "whole")
    length = time.monotonic() - begun
    rng = random.Random(0)
    for n in range(10):
        folder = tmp_path / f"killed{n}"
        kill_and_resume(forked, folder, [["--after", f"{rng.uniform(0, length):.1f}"]], surely=False)
        assert lines(folder) == lines(tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize("name", EVERY)
def test_every_technique_survives_kills(tmp_path, name):
    assert forked(tmp_path / "whole", "--only", name)
    # Killed as the technique's own trial begins and, where it trains, twice within the training.
    trains = any((tmp_path / "whole" / "recovery").rglob("*.safetensors"))
    places = ["alone: ", *(["epoch 2: recovery", "epoch 4: recovery"] if trains else [])]
    kill_and_resume(forked, tmp_path / "killed", [["--kill", place] for place in places], "--only", name)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


# Those that other tests, here or in a file beside, take through the main job in make test come in make test-full only.
ELSEWHERE = ("bf16", "crop", "fuse", "int8", "subnet")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in ELSEWHERE else n for n in EVERY])
def test_every_technique_makes_a_model_or_says_why_not(tmp_path, name):
    result = standin.run(tmp_path / "r", net=standin.transformer(), techniques=(name,), trials=3)
    (trial,) = rows(result, "alone")
    assert trial.status in ("ok", "not applicable"), trial.reason
    if trial.ok:
        artifact = Artifact.open(result.folder / trial.artifact)
        assert artifact.plan["recipe"] == trial.resolved
        assert trial.metrics.quality is not None
        assert trial.metrics.speedup is not None
        assert trial.metrics.macs > 0
        assert trial.metrics.params > 0
    else:
        assert len(trial.reason) > 20
    # Whatever it did, what is handed back is not slower than the model as it was.
    assert result.best.metrics.speedup >= 1.0


def test_a_second_run_in_the_folder_is_refused(result):
    with pytest.raises(LissomError, match="--resume"):
        standin.run(result.folder)


def test_a_finished_run_resumed_measures_no_trial_again(tmp_path):
    first = standin.run(tmp_path / "r", techniques=("fuse", "int8"), trials=5)
    events = []
    again = standin.run(tmp_path / "r", techniques=("fuse", "int8"), trials=5, resume=True, progress=events.append)
    assert [e for e in events if e.kind == "trial"] == []
    assert again.trials == first.trials


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path, monkeypatch):
    import errno

    from lissom.search.runs import Run

    add = Run.add

    def full(self, trial):
        if trial.number == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, trial)

    monkeypatch.setattr(Run, "add", full)
    with pytest.raises(LissomError, match="is full; free some space"):
        standin.run(tmp_path / "r", techniques=("fuse",), trials=4)
    monkeypatch.undo()
    assert len((tmp_path / "r" / "trials.jsonl").read_text().splitlines()) == 2
    standin.run(tmp_path / "r", techniques=("fuse",), trials=4, resume=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": "latncy<=1ms"}, "did you mean"),
        ({"runtime": "tflite"}, "no runtime 'tflite'"),
        ({"techniques": "int9"}, "no technique int9"),
        ({"threads": 0}, "at least 1"),
        ({"budget": "energy<=1mJ"}, "not available"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, options, says):
    net = standin.model()
    settings = {"task": standin.task(net), "meter": standin.StandIn(), "out": tmp_path / "r", **options}
    with pytest.raises(LissomError) as caught:
        lissom.slim(net, **settings)
    assert says in str(caught.value)


def test_a_model_with_other_outputs_than_classes(tmp_path):
    net = standin.model()
    task = dataclasses.replace(standin.task(net), classes=("a", "b"))
    with pytest.raises(LissomError, match="4 outputs and the data have 2 classes"):
        lissom.slim(net, task=task, out=tmp_path / "r", meter=standin.StandIn())
    assert not (tmp_path / "r").exists()


def test_broken_images_are_counted_named_and_left_out(tmp_path):
    import io

    import numpy as np
    from PIL import Image

    from lissom.data.splits import Images, PixelSplit
    from lissom.images import Preprocessing

    rng = np.random.default_rng(0)
    files = []
    for i in range(1000):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(data, "png")
        files.append(data.getvalue()[:60] if i in (10, 500, 999) else data.getvalue())
    images = Images.of("choose", files, rng.integers(0, 4, 1000))
    split = PixelSplit(images, Preprocessing(12, 12))
    task = dataclasses.replace(standin.task(standin.model()), choose=split)
    with pytest.warns(UserWarning, match="3 of 1000"):
        one = standin.run(tmp_path / "r", task=task, recipe="fuse()")
    assert any(warning.startswith("3 images could not be read") for warning in one.json["warnings"])
    assert one.json["task"]["splits"]["choose"] == 997
