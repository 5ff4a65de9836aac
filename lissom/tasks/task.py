"""Task: data in three splits, loss, quality metric, input shape; and Quality, a measured metric with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lissom.errors import LissomError
from lissom.images import Preprocessing

if TYPE_CHECKING:
    import torch

__all__ = ["Quality", "Split", "Task", "batches", "wilson"]


class Split(Protocol):
    """One split of a data set, ready for the model.

    ``labels`` is int64 (N,), masks of class indices uint8 (N, H, W), or None where the data have none; ``skipped``
    names what was left out and why.
    """

    name: str
    skipped: list[tuple[str, str]]

    @property
    def labels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def inputs(self, indices: np.ndarray | slice) -> np.ndarray:
        """float32 (n, C, H, W), normalised as the model wants it."""
        ...

    def sample(self, count: int, seed: int) -> Split:
        """At most ``count`` rows, drawn without replacement; the same for the same seed. Only they are decoded."""
        ...


def batches(split: Split, size: int) -> Iterator[np.ndarray]:
    """The split's inputs in order, ``size`` rows at a time (the last may be shorter)."""
    for start in range(0, len(split), size):
        yield split.inputs(slice(start, min(start + size, len(split))))


def wilson(right: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share, as two shares (95 % for the default z)."""
    if total == 0:
        return 0.0, 1.0
    p = right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Quality:
    """A metric in points (0 to 100) with its 95 % interval, over ``count`` samples."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Task:
    """Image classification, and the base of other kinds: override ``loss`` and ``scores``.

    ``fit`` trains (None where there is nothing to train on), ``choose`` decides, ``report`` is read once for the
    finalists. ``shape`` is one input's (C, H, W). ``preprocessing`` turns an image file into an input; it is None for
    data that arrive as tensors. Without labels, quality is agreement with the original model.
    """

    choose: Split
    report: Split
    fit: Split | None = None
    shape: tuple[int, ...] = (3, 32, 32)
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    name: str = "data"
    kind: str = "classification"

    @property
    def labelled(self) -> bool:
        return self.choose.labels is not None and self.report.labels is not None

    @property
    def metric(self) -> str:
        """What ``quality`` measures, in words."""
        return "top-1 accuracy" if self.labelled else "agreement with the original"

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Training loss of a batch: output (B, classes), target int64 (B,)."""
        from torch.nn import functional

        return functional.cross_entropy(output, target)

    def scores(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """One score in [0, 1] a sample: outputs (N, classes), targets int64 (N,)."""
        return (outputs.argmax(-1) == targets).astype(np.float64)

    def reduce(self, outputs: np.ndarray) -> np.ndarray:
        """What is kept of a part's answers (n, ...): here all of them.

        Called on each part before a split's answers are put together, by whoever collects them; ``targets``,
        ``scores`` and ``quality`` take what it returns. A task whose answers are large keeps less: their best classes.
        """
        return outputs

    def targets(self, split: Split, original: np.ndarray) -> np.ndarray:
        """What ``scores`` compares with: the labels, or the original model's own answers where there are none."""
        return split.labels if split.labels is not None else original.argmax(-1)

    def quality(self, outputs: np.ndarray, targets: np.ndarray) -> Quality:
        """The metric over a split, in points, with its interval (Wilson's)."""
        scores = self.scores(outputs, targets)
        low, high = wilson(float(scores.sum()), len(scores))
        return Quality(100 * float(scores.mean()), 100 * low, 100 * high, len(scores))

    def check_outputs(self, outputs: int) -> None:
        """Raise LissomError where a model with ``outputs`` answers cannot serve this task."""
        known = len(self.classes)
        if known and outputs != known:
            raise LissomError(
                f"the model has {outputs} outputs and the data have {known} classes; "
                f"give a model with {known} outputs, or --train EPOCHS to train a new head"
            )

    def check_answer(self, shape: tuple[int, ...]) -> None:
        """Raise LissomError where a model whose answers are of ``shape`` (B, ...) cannot serve this task."""
        if self.kind == "classification" and len(shape) == 2:
            self.check_outputs(shape[1])

    def with_splits(self, **splits: Any) -> Task:
        """The same task on other splits."""
        return replace(self, **splits)
