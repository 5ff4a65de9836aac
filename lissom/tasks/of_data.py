"""The task that a data set is for: ``task_of``."""

from __future__ import annotations

from lissom.data.sources import DataSet
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.tasks.classification import make_task
from lissom.tasks.segmentation import make_segmentation_task
from lissom.tasks.task import Task

__all__ = ["task_of"]

MAKERS = {"classification": make_task, "segmentation": make_segmentation_task}


def task_of(
    data: DataSet,
    *,
    preprocessing: Preprocessing | None,
    trained_here: bool,
    seed: int = 0,
    kind: str | None = None,
) -> Task:
    """The task of ``data``: segmentation where they have masks, else classification.

    ``kind`` decides for data without labels, which may be for either. The rest is as in
    ``lissom.tasks.classification.make_task``. Raises LissomError for labels of another kind, and what the task's own
    maker refuses.
    """
    if kind is None:
        kind = data.kind
    elif kind not in MAKERS:
        raise LissomError(f"there is no task {kind!r}; known: {', '.join(MAKERS)}")
    elif kind != data.kind and any(split.labelled for split in data.splits.values()):
        raise LissomError(f"the data {data.name!r} have labels for {data.kind}, and the task is {kind}")
    return MAKERS[kind](data, preprocessing=preprocessing, trained_here=trained_here, seed=seed)
