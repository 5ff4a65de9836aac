"""What exits cost on other images than they were fitted on: the interval holds what it says, a row says where samples
leave, and the table compares the same images with exits and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lissom.data.corruptions import Corruption, corrupt
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.export.exporting import export_plan, run_stages
from lissom.export.plan import Plan
from lissom.images import Preprocessing
from lissom.report.page import render
from lissom.report.shift import paired_drop, shift_row, shift_table
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.early_exit import EarlyExit
from tests.models.tiny_perceiver import SHAPE, patterns, trained


@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.004, 0.0), (0.03, 0.01), (0.1, 0.2)])
def test_the_interval_of_a_drop_holds_its_95_percent(lost: float, won: float) -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        cells = rng.choice(4, 300, p=[lost, won, 0.5, 0.5 - lost - won])  # lost, won, right twice, wrong twice
        drop, low, high = paired_drop((cells == 0) | (cells == 2), (cells == 1) | (cells == 2))
        assert drop == pytest.approx(np.mean(cells == 0) - np.mean(cells == 1))
        inside += low <= lost - won <= high
    assert inside >= 940


def test_an_interval_is_never_a_point_and_narrows() -> None:
    same = np.ones(50, bool)
    drop, low, high = paired_drop(same, same)
    assert drop == 0.0
    assert low < 0.0 < high
    wide, narrow = (paired_drop(np.ones(n, bool), np.ones(n, bool)) for n in (50, 5000))
    assert narrow[2] - narrow[1] < (wide[2] - wide[1]) / 20


def one_hot(classes: np.ndarray) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[classes]


def test_a_row_with_labels_and_without() -> None:
    # Eight samples: the first exit takes four, of which it has one wrong that the end has right, and one right that
    # the end has wrong.
    labels = np.zeros(8, int)
    early, end = np.array([1, 0, 0, 0, 2, 2, 2, 2]), np.array([0, 2, 0, 0, 0, 0, 1, 0])
    scores = np.array([[0.9], [0.9], [0.9], [0.9], [0.1], [0.1], [0.1], [0.5]], np.float32)
    answers, limits = [one_hot(early), one_hot(end)], np.array([0.5])
    row = shift_row("blur", 1, answers, scores, limits, 0.01, lambda a: a.argmax(-1) == labels)
    assert row.shares == (0.5, 0.5)
    assert (row.quality, row.without, row.drop) == (75.0, 75.0, 0.0)
    alone = shift_row("blur", 1, answers, scores, limits, 0.01)
    assert (alone.quality, alone.without, alone.drop) == (75.0, 100.0, 25.0)
    assert alone.drop_ci[0] < 25.0 < alone.drop_ci[1]
    assert alone.to_json()["shares"] == [0.5, 0.5]


def test_the_promise_is_kept_broken_or_not_decided() -> None:
    def verdict(wrong: int, count: int) -> bool | None:
        early = np.zeros(count, int)
        early[:wrong] = 1
        answers = [one_hot(early), one_hot(np.zeros(count, int))]
        return shift_row("noise", 1, answers, np.ones((count, 1)), np.array([0.5]), 0.01).kept

    assert verdict(0, 2000) is True
    assert verdict(60, 2000) is False
    assert verdict(18, 2000) is None
    assert verdict(0, 20) is None


def pixels(count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The patterns as images: 32 of a pixel's values are one of the network's units, 96 is its nought."""
    x, labels = patterns(count, seed)
    return list(np.rint(96 + 32 * x).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)), labels


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Task]:
    mean, std = (96 / 255,) * 3, (32 / 255,) * 3
    preprocessing = Preprocessing(16, 16, 3, mean=mean, std=std)
    images, labels = pixels(120, 5)
    split = PixelSplit(Images.of("report", images, labels), preprocessing)
    task = Task(choose=split, report=split, shape=SHAPE, classes=tuple("abcd"), preprocessing=preprocessing)
    plan = EarlyExit(at=(1, 3), risk=5.0).apply(Plan.of(trained(), SHAPE), task)
    path = tmp_path_factory.mktemp("shift") / "a"
    artifact = export_plan(plan, Target(threads=1), path, shape=SHAPE, classes=tuple("abcd"))
    decisions = [{**d, "threshold": t} for d, t in zip(artifact.plan["decisions"], (0.9, None), strict=True)]
    return artifact.with_decisions(decisions, {"risk": 0.05, "shares": [0.5, 0.0, 0.5]}), task


def test_the_table_is_of_the_same_images_spoilt_in_nine_ways(fitted: tuple[Artifact, Task]) -> None:
    artifact, task = fitted
    rows = shift_table(artifact, task, 1, samples=100, seed=3)
    assert rows is not None
    assert [(row.kind, row.strength) for row in rows] == [
        ("none", 0), *((kind, s) for kind in ("blur", "noise", "brightness") for s in (1, 2, 3))
    ]  # fmt: skip
    assert all(row.count == 100 and sum(row.shares) == pytest.approx(1) and row.shares[1] == 0 for row in rows)
    assert rows[0].without > 80
    # One row by hand.
    drawn = task.report.sample(100, 3)
    labels, chosen = drawn.labels, drawn._images.rows  # type: ignore[attr-defined]
    images, _ = pixels(120, 5)
    spoilt = [corrupt(images[n], Corruption("noise", 3), (3, int(n))) for n in chosen]
    answers, scores = run_stages(artifact, task.preprocessing.normalise(np.stack(spoilt)), 1)  # type: ignore[union-attr]
    left = scores[:, 0] > 0.9
    got = np.where(left, answers[0].argmax(1), answers[2].argmax(1)) == labels
    row = next(row for row in rows if (row.kind, row.strength) == ("noise", 3))
    assert row.quality == pytest.approx(100 * got.mean())
    assert row.shares[0] == pytest.approx(left.mean())
    assert row.without == pytest.approx(100 * (answers[2].argmax(1) == labels).mean())
    assert shift_table(artifact, task, 1, samples=100, seed=3) == rows


def test_there_is_nothing_to_say_of_tensors_or_without_exits(fitted: tuple[Artifact, Task], tmp_path: Path) -> None:
    artifact, task = fitted
    arrays = ArraySplit("report", *patterns(4, 0))
    assert shift_table(artifact, task.with_splits(report=arrays), 1) is None
    unfitted = Artifact(artifact.path, {**artifact.plan, "exits": {}})
    assert shift_table(unfitted, task, 1) is None
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4)).eval()
    assert shift_table(export_plan(Plan.of(model), Target(threads=1), tmp_path / "b", shape=SHAPE), task, 1) is None


def test_the_page_shows_the_table(make_result, fitted: tuple[Artifact, Task]) -> None:  # type: ignore[no-untyped-def]
    artifact, task = fitted
    result = make_result()
    assert "On spoilt images" not in render(result)
    rows = shift_table(artifact, task, 1, samples=50)
    assert rows is not None
    rows[4] = replace(rows[4], kept=False, drop=12.345)
    hostile = "<b>heads</b>"
    decisions = [{**d, "at": hostile} for d in artifact.plan["decisions"]]
    exits = {"decisions": decisions, "shares": [0.5, 0.0, 0.5], "delta": 0.05, "among": 1, "risk": 0.05, "n_test": 90}
    page = render({**result, "exits": exits, "shift": [row.to_json() for row in rows]})
    assert "On spoilt images" in page
    assert "The same 50 images" in page
    for said in ("as they are", "blur 1", "noise 3", "brightness 2", "12.3", "broken"):
        assert said in page
    assert "With a probability of 95 % the exits cost at most 5 points" in page
    assert hostile not in page
    assert "&lt;b&gt;heads&lt;/b&gt;" in page
    # What is said is no more than what was proved.
    page = render({**result, "exits": {**exits, "risk": 0.0125, "sure": 0.9349}})
    assert "With a probability of 93 % the exits cost at most 1.25 points" in page
