"""SegmentationTask: mIoU against a count by hand, ignored pixels, intervals, and the splits of data with masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from lissom.data.masks import MaskedImages, MaskSplit
from lissom.data.sources import DataSet
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.tasks.of_data import task_of
from lissom.tasks.segmentation import SegmentationTask, make_segmentation_task
from lissom.tasks.task import Task

RANDOM = np.random.default_rng(0)
P = Preprocessing(4, 6, crop=0.9)
CLASSES = ("sky", "road", "car")


def arrays(name: str = "choose", count: int = 4, masks: bool = True) -> ArraySplit:
    x = RANDOM.normal(size=(count, 3, 4, 6)).astype(np.float32)
    return ArraySplit(name, x, RANDOM.integers(0, 3, (count, 4, 6), np.uint8) if masks else None)


def made(classes: int = 3, ignore: int = 255, shape=(3, 4, 6)) -> SegmentationTask:
    split = arrays()
    return SegmentationTask(split, split, shape=shape, classes=tuple(map(str, range(classes))), ignore=ignore)


def by_hand(answers, targets, classes, ignore) -> float:
    """mIoU over the classes that the masks have, one pixel after the other."""
    both, either = [0] * classes, [0] * classes
    seen = set()
    for a, t in zip(answers.ravel(), targets.ravel(), strict=True):
        if t == ignore:
            continue
        seen.add(int(t))
        for c in range(classes):
            both[c] += a == c == t
            either[c] += c in (a, t)
    return 100 * sum(both[c] / either[c] for c in seen) / len(seen)


@pytest.mark.parametrize("ignore", [3, 255])
def test_miou_is_that_of_a_count_by_hand(ignore):
    task = made(ignore=ignore)
    for _ in range(5):
        targets = RANDOM.choice(np.array([0, 1, 2, ignore], np.uint8), (6, 4, 6))
        answers = RANDOM.integers(0, 3, (6, 4, 6), np.uint8)
        quality = task.quality(answers, targets)
        assert quality.value == pytest.approx(by_hand(answers, targets, 3, ignore))
        assert quality.low < quality.value < quality.high
        assert quality.count == 6
        one = [by_hand(a, t, 3, ignore) / 100 for a, t in zip(answers, targets, strict=True)]
        np.testing.assert_allclose(task.scores(answers, targets), one)


def test_absent_classes_are_left_out_and_answering_them_costs_the_true_class():
    task = made(5)
    targets = np.zeros((1, 4, 6), np.uint8)
    targets[0, :2] = 1
    assert task.quality(targets, targets).value == 100
    answers = targets.copy()
    answers[0, 0] = 4  # 6 of the 12 pixels of class 1
    assert task.quality(answers, targets).value == pytest.approx((100 + 50) / 2)


def test_ignored_pixels_count_nowhere():
    task = made(ignore=255)
    targets = np.zeros((2, 4, 6), np.uint8)
    targets[:, :2] = 1
    answers = targets.copy()
    answers[:, 0] = 2
    targets[:, 0] = 255
    assert task.quality(answers, targets).value == 100
    targets[0] = 255
    np.testing.assert_array_equal(task.scores(answers, targets), [1, 1])
    with pytest.raises(LissomError, match="every pixel of the masks is ignored"):
        task.quality(answers, np.full_like(targets, 255))


def test_the_interval_is_seeded_and_narrows_with_the_number_of_images():
    task = made(2)
    targets = RANDOM.integers(0, 2, (200, 4, 6), np.uint8)
    answers = np.where(RANDOM.random(targets.shape) < 0.8, targets, 1 - targets).astype(np.uint8)
    few, many = task.quality(answers[:20], targets[:20]), task.quality(answers, targets)
    assert task.quality(answers, targets) == many
    assert many.high - many.low < 0.6 * (few.high - few.low)
    # Against the plain way: resample images, count again.
    random = np.random.default_rng(5)
    draws = [random.integers(200, size=200) for _ in range(300)]
    shares = [task._areas(answers[d], targets[d]).sum(0) for d in draws]
    values = [np.mean(a[0] / (a[1] + a[2] - a[0])) * 100 for a in shares]
    assert (many.low, many.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=0.5)
    single = task.quality(answers[:1], targets[:1])
    assert (single.low, single.high, single.count) == (0, 100, 1)


def test_a_class_in_one_image_alone_leaves_the_value_in_the_interval():
    targets = np.zeros((30, 4, 6), np.uint8)
    targets[0, 0, 0] = 1
    answers = np.zeros_like(targets)
    quality = made(2).quality(answers, targets)
    assert quality.low <= quality.value <= quality.high
    assert quality.value == pytest.approx(50, abs=0.1)


def test_reduce_keeps_the_best_class_of_each_pixel():
    task = made()
    logits = RANDOM.normal(size=(3, 3, 4, 6)).astype(np.float32)
    kept = task.reduce(logits)
    assert kept.dtype == np.uint8
    np.testing.assert_array_equal(kept, logits.argmax(1))
    assert task.reduce(kept) is kept
    assert task.quality(logits, kept).value == 100
    small = RANDOM.normal(size=(2, 3, 2, 3)).astype(np.float32)
    large = functional.interpolate(torch.from_numpy(small), size=(4, 6), mode="bilinear")
    np.testing.assert_array_equal(task.reduce(small), large.argmax(1).numpy())
    with pytest.raises(LissomError, match="answers with 4 maps and the data have 3 classes"):
        task.reduce(np.zeros((1, 4, 4, 6), np.float32))
    with pytest.raises(LissomError, match=r"answers with shape \(1, 3\); for segmentation"):
        task.reduce(np.zeros((1, 3), np.float32))
    assert Task(task.choose, task.report).reduce(logits) is logits


def test_answers_and_masks_of_different_sizes_are_told():
    with pytest.raises(LissomError, match=r"shape \(1, 4, 6\) and the masks of shape \(1, 8, 8\)"):
        made().quality(np.zeros((1, 4, 6), np.uint8), np.zeros((1, 8, 8), np.uint8))


def test_the_loss_is_cross_entropy_of_the_pixels_that_count():
    task = made(ignore=3)
    logits = torch.randn(2, 3, 4, 6, requires_grad=True)
    target = torch.randint(0, 4, (2, 4, 6), dtype=torch.uint8)
    loss = task.loss(logits, target)
    known = target != 3
    expected = functional.cross_entropy(logits.permute(0, 2, 3, 1)[known], target[known].long())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert not logits.grad.permute(0, 2, 3, 1)[~known].any()
    small = torch.randn(2, 3, 2, 3)
    large = functional.interpolate(small, size=(4, 6), mode="bilinear")
    assert float(task.loss(small, target)) == pytest.approx(float(task.loss(large, target)), rel=1e-5)
    assert task.loss(logits, torch.full_like(target, 3)).item() == 0


# Splits


def pairs(name: str, count: int, first: int = 0) -> MaskedImages:
    """Images of 8 x 12 whose pixel value is their number; the left half of a mask is class 1, else 0."""
    mask = np.zeros((8, 12), np.uint8)
    mask[:, :6] = 1
    return MaskedImages.pairs(name, [np.full((8, 12, 3), first + i, np.uint8) for i in range(count)], [mask] * count)


def rows(split) -> set[int]:
    return set(split.pixels[:, 0, 0, 0].tolist())


def data(**splits) -> DataSet:
    return DataSet("d", CLASSES, **splits, ignore=9)


def test_trained_here():
    found = data(train=pairs("train", 50), val=pairs("val", 10, 100), test=pairs("test", 8, 200))
    task = task_of(found, preprocessing=P, trained_here=True)
    assert isinstance(task, SegmentationTask)
    assert (task.kind, task.metric, task.ignore, task.classes) == ("segmentation", "mean IoU", 9, CLASSES)
    assert (task.shape, task.preprocessing.resize, task.preprocessing.crop) == ((3, 4, 6), "squash", 1.0)
    assert [len(s) for s in (task.fit, task.choose, task.report)] == [45, 5, 8]
    assert rows(task.fit) | rows(task.choose) == set(range(50))
    assert rows(task.report) == set(range(200, 208))
    assert rows(task.choose) == rows(task_of(found, preprocessing=P, trained_here=True).choose)
    assert rows(task.choose) != rows(task_of(found, preprocessing=P, trained_here=True, seed=1).choose)
    assert task.choose.labels.shape == (5, 4, 6)
    assert task.choose.labels.dtype == np.uint8
    np.testing.assert_array_equal(task.choose.labels[0], [[1, 1, 1, 0, 0, 0]] * 4)


def test_trained_elsewhere():
    task = task_of(data(val=pairs("val", 10)), preprocessing=P, trained_here=False)
    assert [len(s) for s in (task.choose, task.report)] == [5, 5]
    assert task.fit is None
    assert isinstance(task.choose, MaskSplit)


def test_tensors():
    found = data(train=arrays("train", 20), val=arrays("val", 6))
    assert (found.kind, found.labelled, found.trainable) == ("segmentation", True, True)
    task = task_of(found, preprocessing=None, trained_here=True)
    assert (task.preprocessing, task.shape) == (None, (3, 4, 6))
    assert task.fit.labels.shape == (18, 4, 6)


def test_without_labels_quality_is_agreement():
    bare = DataSet("d", val=Images.of("images", [np.full((8, 12, 3), i, np.uint8) for i in range(8)]))
    assert task_of(bare, preprocessing=P, trained_here=False).kind == "classification"
    task = task_of(bare, preprocessing=P, trained_here=False, kind="segmentation")
    assert task.metric == "agreement with the original"
    assert isinstance(task.choose, PixelSplit)
    logits = RANDOM.normal(size=(2, 5, 4, 6)).astype(np.float32)
    targets = task.targets(task.choose, logits)
    np.testing.assert_array_equal(targets, logits.argmax(1))
    assert task.quality(task.reduce(logits), targets).value == 100


def test_one_sentence_for_each_fault():
    masked = data(val=pairs("val", 10))
    with pytest.raises(LissomError, match="how the model wants them is unknown"):
        make_segmentation_task(masked, preprocessing=None, trained_here=False)
    with pytest.raises(LissomError, match="no training split"):
        make_segmentation_task(masked, preprocessing=P, trained_here=True)
    with pytest.raises(LissomError, match="have labels for segmentation, and the task is classification"):
        task_of(masked, preprocessing=P, trained_here=False, kind="classification")
    with pytest.raises(LissomError, match="known: classification, segmentation"):
        task_of(masked, preprocessing=P, trained_here=False, kind="counting")
    labelled = DataSet("d", CLASSES, val=Images.of("val", [np.zeros((4, 4), np.uint8)] * 9, np.arange(9) % 3))
    with pytest.raises(LissomError, match=r"labels of choose are of shape \(4,\); for segmentation, masks"):
        make_segmentation_task(labelled, preprocessing=P, trained_here=False)
    wrong = ArraySplit("val", np.zeros((4, 3, 4, 6), np.float32), np.full((4, 4, 6), 7, np.uint8))
    with pytest.raises(LissomError, match="holds the index 7, and there are 3 classes and the ignored index 9"):
        make_segmentation_task(data(val=wrong), preprocessing=None, trained_here=False)
