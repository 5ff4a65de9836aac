"""Which rows of a data set train, which decide, and which are read once for the report. The same for every kind."""

from __future__ import annotations

from lissom.data.sources import DataSet, stratified
from lissom.data.splits import ArraySplit, Images
from lissom.errors import LissomError

__all__ = ["divided"]

CHOOSE_SHARE = 0.1  # of the training data, where lissom trains the baseline


def divided(data: DataSet, trained_here: bool, seed: int) -> dict[str, Images | ArraySplit]:
    """The rows of ``fit`` (where there are any to train on), ``choose`` and ``report``, by where the baseline trains.

    Where lissom trains it, ``choose`` is a tenth of the training data, kept out of ``fit``, and ``report`` is ``test``
    (``val`` without one). A model that arrives trained may know its training data by heart: then ``choose`` is
    ``val`` and ``report`` is ``test``; where there is only one of the two, each is a half of it; and ``fit`` is the
    training data. Data without labels in a single split are divided into ``fit``, ``choose`` and ``report``
    (50 : 25 : 25). Divisions are seeded, and keep the share of every class where each row has one.

    Raises LissomError where a split is missing or too small to divide.
    """
    train, held = data.train, [s for s in (data.val, data.test) if s is not None]
    if not held:
        raise LissomError("the data have no val and no test; a model cannot be judged on what it was trained on")
    if trained_here:
        if train is None or not train.labelled:
            missing = "have no training split" if train is None else "have no training labels"
            raise LissomError(f"the data {missing}, so that no baseline can be trained; bring a model with weights")
        choose, fit = _divide(train, CHOOSE_SHARE, seed)
        return {"fit": fit, "choose": choose, "report": held[-1]}
    if train is None and len(held) == 1 and not held[0].labelled:
        fit, judged = _divide(held[0], 0.5, seed)
        choose, report = _divide(judged, 0.5, seed + 1)
        return {"fit": fit, "choose": choose, "report": report}
    choose, report = held if len(held) == 2 else _divide(held[0], 0.5, seed)
    return {"choose": choose, "report": report} if train is None else {"fit": train, "choose": choose, "report": report}


def _divide(part: Images | ArraySplit, share: float, seed: int) -> tuple[Images | ArraySplit, Images | ArraySplit]:
    labels = part.labels
    if labels is not None and labels.ndim > 1:
        labels = None  # a mask has no one class whose share could be kept
    first, second = stratified(labels, len(part), share, seed)
    if not len(first) or not len(second):
        raise LissomError(f"{len(part)} rows in {part.name} are too few to divide; give at least {_least(share)}")
    return part.take(first), part.take(second)


def _least(share: float) -> int:
    """The smallest number of rows whose division leaves neither part empty."""
    return next(n for n in range(2, 100) if 0 < round(n * share) < n)
