"""The main job with exits in every runtime, and on images: the report says how the exits do where they are spoilt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lissom
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.images import Preprocessing
from lissom.runtime.artifact import Artifact
from lissom.tasks.task import Task
from tests.models.tiny_perceiver import SHAPE, patterns, trained
from tests.slimming import standin

SIZES = {"fit": 64, "choose": 1200, "report": 300}


def task(images: bool) -> Task:
    """The patterns as tensors; or as images, of whose values 32 are one of the network's units, 96 its nought."""
    preprocessing = Preprocessing(16, 16, 3, mean=(96 / 255,) * 3, std=(32 / 255,) * 3)
    splits = {}
    for number, (name, count) in enumerate(SIZES.items()):
        x, y = patterns(count, 900 + number)
        if images:
            pixels = np.rint(96 + 32 * x).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
            splits[name] = PixelSplit(Images.of(name, list(pixels), y), preprocessing)
        else:
            splits[name] = ArraySplit(name, x, y)
    return Task(**splits, shape=SHAPE, classes=tuple("abcd"), name="patterns",
                preprocessing=preprocessing if images else None)  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(
    ("runtime", "recipe"), [("onnxruntime", "early_exit(risk=5.0) + int8()"), ("torch", "early_exit(risk=5.0)")]
)
def test_exits_in_the_other_runtimes(runtime: str, recipe: str, tmp_path: Path) -> None:
    of = task(images=False)
    result = standin.run(tmp_path / "r", net=trained(), task=of, recipe=recipe, runtime=runtime, batch=4)
    artifact = Artifact.open(result.best.artifact)
    assert artifact.runtime == runtime
    assert artifact.plan["decisions"]
    assert artifact.plan["packs"] is True
    given = next(t for t in result.trials if t.role == "given")
    assert given.metrics.drop is not None
    assert given.metrics.drop <= 5
    inputs = of.report.inputs(slice(0, 300))
    answers, left = lissom.load(result.best.artifact).answer(inputs)
    assert (answers.argmax(-1) == of.report.labels).mean() > 0.6
    assert len(set(left)) > 1
    assert result.json["shift"] is None  # tensors cannot be blurred


@pytest.mark.full
def test_the_report_tells_how_exits_do_on_spoilt_images(tmp_path: Path) -> None:
    result = standin.run(tmp_path / "r", net=trained(), task=task(images=True), recipe="early_exit(risk=5.0)")
    rows = result.json["shift"]
    assert len(rows) == 10
    assert all(row["count"] == 300 for row in rows)
    plain = rows[0]
    assert (plain["kind"], plain["strength"]) == ("none", 0)
    # The first row is the winner on report, whose quality the report tells too.
    assert plain["quality"] == pytest.approx(result.best.metrics.quality)
    page = result.report.read_text(encoding="utf-8")
    assert "On spoilt images" in page
    assert "brightness 3" in page
