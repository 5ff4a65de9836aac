"""How early exits do on images that are not what they were fitted on: a table over blur, noise and brightness.

The promise of exits (``lissom.export.calibration``) is of samples drawn from where the fitted ones were. Elsewhere it
may break: a spoilt image may make an exit sure and wrong. What is compared are the same artifact's answers with its
exits and without, on the same images, so that what the images do to the model itself is not counted as the exits' harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lissom.data.corruptions import EVERY, corrupted
from lissom.data.splits import PixelSplit
from lissom.export.exporting import run_stages
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Stages
from lissom.runtime.decisions import first_exit
from lissom.tasks.task import Task, batches

__all__ = ["ShiftRow", "paired_drop", "shift_row", "shift_table"]

SAMPLES = 1000


@dataclass(frozen=True)
class ShiftRow:
    """One kind of images (``kind`` and ``strength``; "none" and 0 are the images as they are).

    ``shares``: of the K + 1 stages, how often each is the last one. ``quality`` is that with exits and ``without`` that
    of the last stage alone, both in points; ``drop`` is what the exits cost, ``drop_ci`` its 95 % interval. ``kept``:
    whether the promised risk is kept; None where the interval holds both.
    """

    kind: str
    strength: int
    count: int
    shares: tuple[float, ...]
    quality: float
    without: float
    drop: float
    drop_ci: tuple[float, float]
    kept: bool | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shares": list(self.shares), "drop_ci": list(self.drop_ci)}


def paired_drop(before: np.ndarray, after: np.ndarray, z: float = 1.959964) -> tuple[float, float, float]:
    """How much lower the second share is than the first, of truth values (N,) of the same N samples, and its interval.

    The interval is Wald's after half a pair is added to each of the four cells of the 2 x 2 table (Agresti and Min
    2005, Statistics in Medicine 24, 729-740), which holds its 95 % for few discordant pairs too. Shares in [-1, 1].
    """
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    count, b, c = len(before) + 2, lost + 0.5, won + 0.5
    middle = (b - c) / count
    half = z * math.sqrt((b + c) - (b - c) ** 2 / count) / count
    drop = (lost - won) / max(1, len(before))
    return drop, max(-1.0, middle - half), min(1.0, middle + half)


def shift_row(
    kind: str,
    strength: int,
    answers: list[np.ndarray],
    scores: np.ndarray,
    thresholds: np.ndarray,
    risk: float,
    right: Callable[[np.ndarray], np.ndarray] | None = None,
) -> ShiftRow:
    """A row from every stage's answers (K + 1 arrays (N, classes)), scores (N, K) and thresholds (K,).

    ``risk`` is the promised share. ``right`` says which answers (N, classes) are right, as truth values (N,); without
    it an answer is right where it is the last stage's.
    """
    last = answers[-1]
    if right is None:
        best = last.argmax(-1)

        def right(answer: np.ndarray) -> np.ndarray:
            return answer.argmax(-1) == best

    left = first_exit(scores, thresholds)
    chosen = np.stack(answers)[left, np.arange(len(last))]
    without, found = right(last), right(chosen)
    drop, low, high = paired_drop(without, found)
    kept = True if high <= risk else False if low > risk else None
    shares = np.bincount(left, minlength=len(answers)) / max(1, len(left))
    return ShiftRow(
        kind, strength, len(last), tuple(float(s) for s in shares), 100 * float(np.mean(found)),
        100 * float(np.mean(without)), 100 * drop, (100 * low, 100 * high), kept,
    )  # fmt: skip


def shift_table(
    artifact: Artifact, task: Task, threads: int, *, samples: int = SAMPLES, seed: int = 0
) -> list[ShiftRow] | None:
    """The rows of an artifact with exits on at most ``samples`` images of ``report``: as they are, then spoilt in every
    way of ``lissom.data.corruptions``, the same images each time. None where the data are no images or no exits were
    fitted: then there is nothing to say."""
    decisions = artifact.plan.get("decisions") or []
    fitted = artifact.plan.get("exits") or {}
    if not decisions or "risk" not in fitted or type(task.report) is not PixelSplit:
        return None
    thresholds = np.array([np.inf if d["threshold"] is None else d["threshold"] for d in decisions])
    risk = float(fitted["risk"])
    images = task.report.sample(samples, seed)
    opened = Stages(artifact, threads)
    rows = []
    for corruption in (None, *EVERY):
        part = images if corruption is None else corrupted(images, corruption, seed)
        answers, scores = run_stages(artifact, batches(part, 64 * artifact.input_shape[0]), threads, opened=opened)
        labels = part.labels

        def right(answer: np.ndarray, labels: np.ndarray | None = labels) -> np.ndarray:
            return task.scores(answer, labels) > 0.5  # type: ignore[arg-type]  # asked only where there are labels

        kind, strength = ("none", 0) if corruption is None else (corruption.kind, corruption.strength)
        rows.append(shift_row(kind, strength, answers, scores, thresholds, risk, None if labels is None else right))
    return rows
