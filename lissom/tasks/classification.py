"""Image classification: a data set's rows as the splits of a task."""

from __future__ import annotations

import numpy as np

from lissom.data.sources import DataSet
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.tasks.division import divided
from lissom.tasks.task import Split, Task

__all__ = ["make_task"]


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
    parts = divided(data, trained_here, seed)
    splits: dict[str, Split] = {name: _ready(part, name, preprocessing) for name, part in parts.items()}
    first = parts["report"]
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


def _ready(part: Images | ArraySplit, name: str, preprocessing: Preprocessing | None) -> Split:
    if isinstance(part, ArraySplit):
        return part.take(np.arange(len(part)), name)
    if preprocessing is None:
        raise LissomError("the data are images, and how the model wants them is unknown: give preprocessing")
    return PixelSplit(part.take(np.arange(len(part)), name), preprocessing)
