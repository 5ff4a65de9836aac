"""make_task: which rows train, which decide, which are read once."""

from __future__ import annotations

import numpy as np
import pytest

from lissom.data.sources import DataSet
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.tasks.classification import make_task

P = Preprocessing(4, 4)


def images(name: str, count: int, first: int = 0, labels: bool = True) -> Images:
    """Images whose pixel value is their number, so that a row can be told after any division; 5 classes."""
    pixels = [np.full((4, 4), first + i, np.uint8) for i in range(count)]
    return Images.of(name, pixels, np.arange(count) % 5 if labels else None)


def rows(split) -> set[int]:
    return set(split.pixels[:, 0, 0, 0].tolist()) if split is not None else set()


CLASSES = tuple("abcde")
TRAIN, VAL, TEST = images("train", 100), images("val", 40, 100), images("test", 20, 200)


def test_trained_here_with_test():
    task = make_task(DataSet("d", CLASSES, TRAIN, VAL, TEST), preprocessing=P, trained_here=True)
    assert len(task.choose) == 10
    np.testing.assert_array_equal(np.bincount(task.choose.labels), [2] * 5)
    assert not rows(task.fit) & rows(task.choose)
    assert rows(task.fit) | rows(task.choose) == set(range(100))
    assert rows(task.report) == set(range(200, 220))
    np.testing.assert_array_equal([r % 5 for r in sorted(rows(task.choose))], task.choose.labels)
    assert (task.shape, task.classes, task.preprocessing, task.name) == ((3, 4, 4), CLASSES, P, "d")
    assert [s.name for s in (task.fit, task.choose, task.report)] == ["fit", "choose", "report"]
    assert task.labelled


def test_trained_here_without_test_reports_on_val():
    task = make_task(DataSet("d", CLASSES, TRAIN, VAL), preprocessing=P, trained_here=True)
    assert rows(task.report) == set(range(100, 140))
    assert rows(task.choose) < set(range(100))


def test_trained_elsewhere_with_val_and_test():
    task = make_task(DataSet("d", CLASSES, TRAIN, VAL, TEST), preprocessing=P, trained_here=False)
    assert rows(task.choose) == set(range(100, 140))
    assert rows(task.report) == set(range(200, 220))
    assert rows(task.fit) == set(range(100))


@pytest.mark.parametrize("held", ["val", "test"])
def test_trained_elsewhere_halves_the_only_one(held):
    data = DataSet("d", CLASSES, TRAIN, **{held: VAL})
    task = make_task(data, preprocessing=P, trained_here=False)
    assert len(task.choose) == len(task.report) == 20
    assert rows(task.choose) | rows(task.report) == set(range(100, 140))
    np.testing.assert_array_equal(np.bincount(task.choose.labels), [4] * 5)
    assert rows(task.choose) == rows(make_task(data, preprocessing=P, trained_here=False).choose)
    assert rows(task.choose) != rows(make_task(data, preprocessing=P, trained_here=False, seed=1).choose)


def test_a_trained_model_needs_no_training_data():
    assert make_task(DataSet("d", CLASSES, val=VAL), preprocessing=P, trained_here=False).fit is None


def test_unlabelled_images_are_divided_in_three():
    task = make_task(DataSet("d", val=images("images", 40, labels=False)), preprocessing=P, trained_here=False)
    assert [len(s) for s in (task.fit, task.choose, task.report)] == [20, 10, 10]
    assert rows(task.fit) | rows(task.choose) | rows(task.report) == set(range(40))
    assert task.choose.labels is None
    assert task.metric == "agreement with the original"
    task.check_outputs(1000)


def test_tensors_need_no_preprocessing():
    split = ArraySplit("val", np.random.default_rng(0).normal(size=(20, 1, 6, 6)).astype(np.float32), np.arange(20) % 5)
    task = make_task(DataSet("d", CLASSES, val=split), preprocessing=P, trained_here=False)
    assert task.preprocessing is None
    assert task.shape == (1, 6, 6)
    assert len(task.choose) == len(task.report) == 10


def test_nothing_is_decoded_by_making_a_task():
    class Untouched(list):
        def __getitem__(self, i):
            raise AssertionError("an image was read")

    data = DataSet("d", CLASSES, val=Images.of("val", Untouched([b""] * 20), np.arange(20) % 5))
    task = make_task(data, preprocessing=P, trained_here=False)
    assert isinstance(task.choose, PixelSplit)


def test_a_hundred_outputs_on_ten_classes_is_one_sentence():
    task = make_task(DataSet("d", CLASSES, val=VAL), preprocessing=P, trained_here=False)
    with pytest.raises(LissomError, match="the model has 100 outputs and the data have 5 classes"):
        task.check_outputs(100)


@pytest.mark.parametrize(
    ("data", "trained_here", "message"),
    [
        (DataSet("d", CLASSES, val=VAL), True, "have no training split, so that no baseline can be trained"),
        (DataSet("d", val=images("val", 9, labels=False)), True, "have no training split"),
        (DataSet("d", CLASSES, images("train", 9, labels=False), VAL), True, "have no training labels"),
        (DataSet("d", CLASSES, TRAIN), True, "have no val and no test"),
        (DataSet("d", CLASSES, val=images("val", 1)), False, "1 rows in val are too few to divide; give at least 2"),
        (
            DataSet("d", CLASSES, images("train", 5), VAL),
            True,
            "5 rows in train are too few to divide; give at least 6",
        ),
        (DataSet("d", val=images("images", 2, labels=False)), False, "1 rows in images are too few"),
    ],
)
def test_one_sentence_for_each_fault(data, trained_here, message):
    with pytest.raises(LissomError, match=message):
        make_task(data, preprocessing=P, trained_here=trained_here)


def test_images_without_preprocessing():
    with pytest.raises(LissomError, match="how the model wants them is unknown"):
        make_task(DataSet("d", CLASSES, val=VAL), preprocessing=None, trained_here=False)
