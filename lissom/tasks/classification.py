"""Image classification: which rows train, which decide, and which are read once for the report."""

from __future__ import annotations

import numpy as np

from lissom.data.sources import DataSet, stratified
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.tasks.task import Split, Task

__all__ = ["make_task"]

CHOOSE_SHARE = 0.1  # of the training data, where lissom trains the baseline


def make_task(data: DataSet, *, preprocessing: Preprocessing | None, trained_here: bool, seed: int = 0) -> Task:
    """The task of ``data``: its splits by where the baseline was trained.

    Where lissom trains it, ``choose`` is a tenth of the training data, kept out of ``fit``, and ``report`` is ``test``
    (``val`` without one). A model that arrives trained may know its training data by heart: then ``choose`` is
    ``val`` and ``report`` is ``test``; where there is only one of the two, each is a half of it; and ``fit`` is the
    training data. Images without labels in a single split are divided into ``fit``, ``choose`` and ``report``
    (50 : 25 : 25). Divisions are seeded, and keep the share of every class.

    ``preprocessing`` is how the model wants its images; it is not used for data that arrive as tensors. Raises
    LissomError where a split is missing or too small to divide.
    """
    train, held = data.train, [s for s in (data.val, data.test) if s is not None]
    if not held:
        raise LissomError("the data have no val and no test; a model cannot be judged on what it was trained on")
    if trained_here:
        if train is None or train.labels is None:
            missing = "have no training split" if train is None else "have no training labels"
            raise LissomError(f"the data {missing}, so that no baseline can be trained; bring a model with weights")
        choose, fit = _divide(train, CHOOSE_SHARE, seed)
        parts = {"fit": fit, "choose": choose, "report": held[-1]}
    elif train is None and len(held) == 1 and held[0].labels is None:
        fit, judged = _divide(held[0], 0.5, seed)
        choose, report = _divide(judged, 0.5, seed + 1)
        parts = {"fit": fit, "choose": choose, "report": report}
    else:
        choose, report = held if len(held) == 2 else _divide(held[0], 0.5, seed)
        parts = {"choose": choose, "report": report} if train is None else {
            "fit": train, "choose": choose, "report": report}  # fmt: skip

    splits: dict[str, Split] = {name: _ready(part, name, preprocessing) for name, part in parts.items()}
    first = held[0]
    if isinstance(first, ArraySplit):
        shape, preprocessing = first.shape, None
    else:
        assert preprocessing is not None  # _ready has refused None
        shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    return Task(
        choose=splits["choose"],
        report=splits["report"],
        fit=splits.get("fit"),
        shape=shape,
        classes=data.classes,
        preprocessing=preprocessing,
        name=data.name,
    )


def _divide(part: Images | ArraySplit, share: float, seed: int) -> tuple[Images | ArraySplit, Images | ArraySplit]:
    first, second = stratified(part.labels, len(part), share, seed)
    if not len(first) or not len(second):
        raise LissomError(f"{len(part)} rows in {part.name} are too few to divide; give at least {_least(share)}")
    return part.take(first), part.take(second)


def _least(share: float) -> int:
    """The smallest number of rows whose division leaves neither part empty."""
    return next(n for n in range(2, 100) if 0 < round(n * share) < n)


def _ready(part: Images | ArraySplit, name: str, preprocessing: Preprocessing | None) -> Split:
    if isinstance(part, ArraySplit):
        return part.take(np.arange(len(part)), name)
    if preprocessing is None:
        raise LissomError("the data are images, and how the model wants them is unknown: give preprocessing")
    return PixelSplit(part.take(np.arange(len(part)), name), preprocessing)
