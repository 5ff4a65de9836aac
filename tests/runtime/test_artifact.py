"""Artifacts on disk: replaced whole or not at all, and opened only where they are what they say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lissom
from lissom.cli import main
from lissom.errors import LissomError
from lissom.export.exporting import export_plan
from lissom.export.plan import Plan
from lissom.images import Preprocessing
from lissom.runtime import artifact as module
from lissom.runtime import bench
from lissom.runtime.artifact import Artifact, new_artifact, replace_folder
from lissom.runtime.backends import Stages
from lissom.runtime.openvino_graph import import_openvino
from lissom.runtime.target import RUNTIMES, Target

PREPARED = Preprocessing(4, 4, 3).to_json()
HUGE = 10**400  # which JSON can hold, and no float


def held(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.txt").write_text(name)
    return tmp_path / "old", tmp_path / "new"


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupted_replacement_leaves_one_of_the_two_whole(
    number: int, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before or after each of the two renames."""
    old, new = two_folders(tmp_path)
    was, comes, replace = held(old), held(new), os.replace
    calls: list[Any] = []

    def interrupted(*names: Any) -> None:
        calls.append(names)
        if before and len(calls) == number + 1:
            raise KeyboardInterrupt
        replace(*names)
        if not before and len(calls) == number + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(new, old)
    assert held(old) == (comes if number == 1 and not before else was)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_old_folder_is_deleted_after_the_new_one_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two_folders(tmp_path)
    comes, remove = held(new), shutil.rmtree

    def interrupted(path: Any, *arguments: Any, **options: Any) -> None:
        (Path(path) / "old" / "0.txt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(new, old)
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert held(old) == comes
    left = [p for p in tmp_path.iterdir() if p not in (old, new)]
    assert all(p.name.startswith(".old.") for p in left)  # which a run sweeps away


def test_a_folder_takes_an_empty_place_and_no_files(tmp_path: Path) -> None:
    old, new = two_folders(tmp_path)
    comes = held(new)
    replace_folder(new, tmp_path / "third")
    assert held(tmp_path / "third") == comes
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        replace_folder(old, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "old", "third"]


def test_an_interrupted_export_leaves_the_artifact_that_was_there(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make(recipe="first")
    replace = os.replace

    def interrupted(source: Any, target: Any) -> None:
        if Path(target) == artifact.path:
            monkeypatch.setattr(os, "replace", replace)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_artifact(artifact.path, {**artifact.plan, "recipe": "second"}) as folder:
        shutil.copytree(artifact.path, folder, dirs_exist_ok=True)
    assert Artifact.open(artifact.path).plan == artifact.plan
    assert list(artifact.path.parent.iterdir()) == [artifact.path]


def spoilt(artifact: Artifact, **fields: Any) -> Artifact:
    """The artifact with other fields in its plan, which nobody has looked at."""
    plan = {**artifact.plan, **fields}
    (artifact.path / "plan.json").write_text(json.dumps(plan))
    return Artifact(artifact.path, plan)


def refusal(path: Path, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command says in the one sentence with which it refuses an artifact."""
    assert main([*(command or ("predict",)), str(path), *([] if command else ["a.png"]), "--threads", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("lissom: ")
    return err


STAGES = [{"graph": "stage0.xml", "options": {}}] * 2


@pytest.mark.parametrize(
    "fields",
    [
        {"stages": STAGES, "decisions": [{"threshold": HUGE}]},
        {"stages": STAGES, "decisions": [{"threshold": 0.5, "at": 3}]},
        {"stages": STAGES, "exits": {"shares": [0.5, HUGE]}},
        {"input": {"shape": []}},
        {"input": {"shape": [True, 3, 4, 4]}},
        {"input": {"shape": [1, 3, 4, 4], "preprocessing": {**PREPARED, "mean": [HUGE] * 3}}},
        {"input": {"shape": [1, 3, 4, 4], "preprocessing": {**PREPARED, "std": [0.0] * 3}}},
        {"input": {"shape": [1, 3, 4, 4], "preprocessing": {**PREPARED, "crop": HUGE}}},
        {"input": {"shape": [1, 3, 4, 4], "preprocessing": {**PREPARED, "height": 4.0}}},
        {"classes": 5},
        {"classes": [5]},
        {"recipe": 5},
        {"files": {"stage0.xml": 5}},
        {"files": {"stage0\0.xml": "0"}},
        {"stages": [{"graph": "stage0.xml\0", "options": {}}]},
        {"stages": [{"graph": "stage0.xml", "options": {"weights": ["stage0.bin"]}}]},
        {"layers": [1]},
        {"layers": 1},
        {"nodes": [1]},
        {"nodes": {"head": [1]}},
    ],
)
def test_a_damaged_plan_is_one_sentence(
    fields: dict[str, Any],
    make: Callable[..., Artifact],
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = spoilt(make(), **fields)
    assert any(words in refusal(artifact.path, capsys) for words in ("damaged", "outside itself"))


def test_a_graph_is_named_by_where_it_lies_in_the_folder(
    make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make()
    for name in (str(artifact.path / "stage0.xml"), "../artifact/stage0.xml", ""):
        spoilt(artifact, stages=[{"graph": name, "options": {}}])
        assert "may be a file outside itself" in refusal(artifact.path, capsys)


def test_a_plan_beyond_depth_or_size_is_one_sentence(
    make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make()
    plan = (artifact.path / "plan.json").read_text()
    (artifact.path / "plan.json").write_text("[" * 100_000)
    assert "plan.json is damaged" in refusal(artifact.path, capsys)
    (artifact.path / "plan.json").write_text(plan)
    monkeypatch.setattr(module, "PLAN_BYTES", len(plan) - 1)
    with pytest.raises(LissomError, match="is damaged: it is larger than"):
        Artifact.open(artifact.path)
    monkeypatch.setattr(module, "PLAN_BYTES", len(plan))
    Artifact.open(artifact.path)


def staged(path: Path, decisions: int, after: int = 48, score: tuple[int, ...] = (1,), **fields: Any) -> Artifact:
    """Two stages by hand: the first gives (answer, score, carried) to one that takes (1, ``after``)."""
    openvino = import_openvino()
    from openvino import opset13 as op

    plan = {
        "runtime": "openvino",
        "stages": [{"graph": f"stage{number}.xml", "options": {}} for number in range(2)],
        "decisions": [{"at": "blocks.0", "rule": "confidence", "threshold": 0.5}] * decisions,
        "input": {"shape": [1, 3, 4, 4], "preprocessing": None},
        **fields,
    }
    with new_artifact(path, plan) as folder:
        x = op.parameter([1, 3, 4, 4], np.float32)
        flat = op.reshape(x, op.constant([1, 48]), special_zero=False)
        answer = op.matmul(flat, op.constant(np.ones((48, 5), np.float32)), False, False)
        sure = op.constant(np.full(score, 0.25, np.float32))
        first = openvino.Model([answer, op.relu(sure), op.relu(flat)], [x], "first")
        y = op.parameter([1, after], np.float32)
        second = openvino.Model(
            [op.matmul(y, op.constant(np.ones((after, 5), np.float32)), False, False)], [y], "second"
        )
        for number, model in enumerate((first, second)):
            openvino.save_model(model, folder / f"stage{number}.xml", compress_to_fp16=False)
    return Artifact.open(path)


def test_stages_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    x = np.ones((1, 3, 4, 4), np.float32)
    assert lissom.load(staged(tmp_path / "good", 1).path, 1).answer(x)[1].tolist() == [1]
    for artifact, words in (
        (staged(tmp_path / "undecided", 0), "stage 1 hands on .* and .* and .*, the next one takes"),
        (staged(tmp_path / "sizes", 1, after=47), r"stage 1 hands on \(1, 48\), the next one takes \(1, 47\)"),
        (staged(tmp_path / "scores", 1, score=(2,)), "stage 1 gives .*, not an answer, a score and what is carried"),
    ):
        with pytest.raises(LissomError, match=f"is damaged: {words}"):
            lissom.load(artifact.path, 1)


def test_a_decision_on_a_stage_with_one_output_is_refused(
    make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = spoilt(make(), stages=STAGES, decisions=[{"at": "head", "threshold": 0.5}])
    assert "not an answer, a score and what is carried" in refusal(artifact.path, capsys)


LAYER = {"path": "head", "kind": "linear", "macs": 1, "params": 1, "read_bytes": 1, "write_bytes": 1, "weight_bytes": 1}


@pytest.mark.parametrize(
    "layers", [[1], None, [{"path": "head"}], [{**LAYER, "macs": "x"}], [{**LAYER, "batch": 0}], [{**LAYER, "path": 1}]]
)
def test_damaged_layers_are_one_sentence_in_a_profile(
    layers: Any, make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = spoilt(make(), layers=layers, nodes={"head": "head"})
    said = refusal(artifact.path, capsys, "profile")
    assert "damaged" in said if layers else "does not say what its layers cost" in said


@pytest.mark.parametrize("shape", [[1, 3, 8, 8], [1, 48], [4, 3, 4, 4], [10**9, 3, 4, 4], [1, 3, 2000, 2000]])
def test_a_plan_of_another_shape_than_its_graph_is_refused(
    shape: list[int], make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    preprocessing = {**PREPARED, "height": shape[-2], "width": shape[-1]}
    artifact = spoilt(make(), input={"shape": shape, "preprocessing": preprocessing})
    assert "its graph takes (1, 3, 4, 4)" in refusal(artifact.path, capsys)
    assert bench.main([str(artifact.path), "--threads", "1", "--seconds", "0"]) == 2
    assert "its graph takes (1, 3, 4, 4)" in capsys.readouterr().err


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_graph_tells_its_shapes_in_every_runtime(runtime: str, tmp_path: Path) -> None:
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 5)).eval()
    artifact = export_plan(Plan.of(model), Target(runtime, batch=2, threads=1), tmp_path / "a", shape=(3, 4, 4))
    (graph,) = Stages(artifact, 1).graphs
    assert (list(graph.takes), list(graph.gives)) == ([(2, 3, 4, 4)], [(2, 5)])
    spoilt(artifact, input={"shape": [2, 3, 8, 8], "preprocessing": None})
    with pytest.raises(LissomError, match=r"says inputs of shape \(2, 3, 8, 8\), its graph takes \(2, 3, 4, 4\)"):
        lissom.load(artifact.path, 1)


def test_preprocessing_is_tried_out_on_one_pixel(
    make: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    normalise = Preprocessing.normalise
    monkeypatch.setattr(Preprocessing, "normalise", lambda self, x: (seen.append(x.shape), normalise(self, x))[1])
    lissom.load(make(preprocessing=PREPARED).path, 1)
    assert seen == [(1, 1, 1, 3)]


def refused_by_all(artifact: Artifact, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Predicting, measuring and profiling refuse an artifact alike."""
    with pytest.raises(LissomError, match=words):
        lissom.load(artifact.path, 1)
    assert bench.main([str(artifact.path), "--threads", "1", "--seconds", "0"]) == 2
    assert words in json.loads(capsys.readouterr().out)["error"]
    assert words in refusal(artifact.path, capsys, "profile")


def test_weights_that_nobody_vouches_for_are_not_opened(
    tmp_path: Path, make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make()
    files = {name: digest for name, digest in artifact.plan["files"].items() if name != "stage0.bin"}
    spoilt(artifact, files=files)
    refused_by_all(artifact, "does not vouch for stage0.bin", capsys)
    os.replace(artifact.path / "stage0.bin", artifact.path / "weights")
    stage = {"graph": "stage0.xml", "options": {"weights": "weights"}}
    spoilt(artifact, files=files, stages=[stage])
    refused_by_all(artifact, "does not vouch for its weights weights", capsys)


@pytest.mark.parametrize("listed", [True, False])
def test_links_are_refused(
    listed: bool, tmp_path: Path, make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make()
    os.replace(artifact.path / "stage0.bin", tmp_path / "secret")
    (artifact.path / "stage0.bin").symlink_to(tmp_path / "secret")
    if not listed:
        spoilt(artifact, files={"stage0.xml": artifact.plan["files"]["stage0.xml"]})
    refused_by_all(artifact, "stage0.bin, which is a link or no file", capsys)
    (artifact.path / "stage0.xml").unlink()
    (artifact.path / "stage0.xml").symlink_to("stage0.xml")
    assert "lacks its graph stage0.xml" in refusal(artifact.path, capsys)


def test_a_pipe_is_refused_and_not_read(make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make()
    (artifact.path / "stage0.bin").unlink()
    os.mkfifo(artifact.path / "stage0.bin")
    refused_by_all(artifact, "stage0.bin, which is a link or no file", capsys)
    os.replace(artifact.path / "stage0.bin", artifact.path / "plan.json")
    assert "holds no plan.json" in refusal(artifact.path, capsys)


def test_an_altered_file_is_refused_by_all(make: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make()
    data = bytearray((artifact.path / "stage0.bin").read_bytes())
    data[-1] ^= 1
    (artifact.path / "stage0.bin").write_bytes(data)
    refused_by_all(artifact, "stage0.bin was altered since its export", capsys)


def test_openvino_opens_no_format_whose_weights_nobody_knows(make: Callable[..., Artifact]) -> None:
    artifact = make()
    os.replace(artifact.path / "stage0.xml", artifact.path / "stage0")
    digest = hashlib.sha256((artifact.path / "stage0").read_bytes()).hexdigest()
    files = {"stage0": digest, "stage0.bin": artifact.plan["files"]["stage0.bin"]}
    spoilt(artifact, files=files, stages=[{"graph": "stage0", "options": {}}])
    with pytest.raises(LissomError, match=r"OpenVINO opens \.xml and \.onnx files here, not .*stage0"):
        lissom.load(artifact.path, 1)


def test_files_beside_the_graphs_that_nothing_opens_may_be_there(make: Callable[..., Artifact]) -> None:
    artifact = make(preprocessing=PREPARED)
    (artifact.path / "card.md").write_text("made by hand")
    (artifact.path / ".plan.json.x").write_text("left by a process that was killed")
    predictor = lissom.load(artifact.path, 1)
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    assert predictor.predict([image])[0].name in predictor.classes
