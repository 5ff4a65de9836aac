"""Decision: what a stage's score must exceed for its answer to stand; and the published rules of early exit.

At run time there is one rule: an exit answers when ``score > threshold`` and no earlier exit did. The score is computed
in the graph, and a higher one always means a surer answer. ``plan.json`` keeps the decisions in order of execution::

    [{"rule": "confidence", "threshold": 0.87}, {"rule": "entropy", "threshold": -0.41},
     {"rule": "confidence", "threshold": null}]

The score of ``entropy`` is the NEGATIVE entropy, so that its thresholds are at most 0; that of ``similarity`` is the
cosine of a block's output and its input (MuE, Tang et al. 2023, arXiv 2211.11152); that of ``patience`` is how many
exits in a row agree, that of ``patient_and_confident`` minus the largest entropy of the last ``patience`` exits (a
field of the decision). ``null`` is an exit that is never taken.

``difference`` is the best class's share less the second's, ``normalised_entropy`` minus the entropy over ln(classes),
in [-1, 0]: the scores of cascades (Kinnas et al. 2025, arXiv 2412.01039), whose search and run time share them.

The rules by which LGViT (Xu et al. 2023, arXiv 2308.00255) and its baselines read the exits' logits are here too, for
analysis and as what graphs are checked against: ``confidence_exit``, ``entropy_exit``, ``patience_exit`` and
``patient_and_confident_exit``. The last two look at several exits; in a graph the score carries what it must know of
those before it (``lissom.export.joint``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lissom.errors import LissomError

__all__ = [
    "RULES",
    "Decision",
    "confidence",
    "confidence_exit",
    "difference",
    "entropy",
    "entropy_exit",
    "first_exit",
    "normalised_entropy",
    "patience_exit",
    "patient_and_confident_exit",
    "similarity",
]

RULES = (
    "confidence", "entropy", "difference", "normalised_entropy", "similarity", "patience", "patient_and_confident",
)  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """One decision: ``rule`` says what the score is, ``threshold`` what it must exceed (inf: the exit is never taken).

    ``details`` are further fields of the entry in ``plan.json``, which are kept as they are. Raises LissomError where
    the rule is not known or the threshold is no number above -inf.
    """

    rule: str = "confidence"
    threshold: float = math.inf
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise LissomError(f"no exit rule is called {self.rule!r}; known: {', '.join(RULES)}")
        number = isinstance(self.threshold, int | float | np.number) and not isinstance(self.threshold, bool)
        if not number or not self.threshold > -math.inf:
            raise LissomError(f"a threshold is a number, or none for an exit never taken, not {self.threshold!r}")
        reserved = {"rule", "threshold"} & set(self.details)
        if reserved:
            raise LissomError(f"the details of a decision cannot replace its {reserved.pop()}")
        object.__setattr__(self, "threshold", float(self.threshold))

    @classmethod
    def from_json(cls, entry: Any) -> Decision:
        """A decision from its entry in ``plan.json``. Raises LissomError where the entry is not one."""
        if not isinstance(entry, Mapping) or not {"rule", "threshold"} <= set(entry):
            raise LissomError(f"a decision is an object with a rule and a threshold, not {entry!r}")
        threshold = entry["threshold"]
        details = {key: value for key, value in entry.items() if key not in ("rule", "threshold")}
        return cls(entry["rule"], math.inf if threshold is None else threshold, details)

    def to_json(self) -> dict[str, Any]:
        """The entry for ``plan.json``; infinity, which JSON lacks, is written as null."""
        return {"rule": self.rule, "threshold": None if math.isinf(self.threshold) else self.threshold, **self.details}

    def leaves(self, score: float) -> bool:
        """Whether a sample with this score leaves here. A NaN never does."""
        return float(score) > self.threshold


def first_exit(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The first exit whose score exceeds its threshold, for ``scores`` (..., K) and ``thresholds`` (K,): int64 (...).

    K where none does. A score that equals the threshold does not exceed it, and neither does a NaN. Scores are compared
    at their own precision or a higher one, never rounded. Raises LissomError where the last axis is not K long.
    """
    scores, thresholds = np.asarray(scores), np.asarray(thresholds, dtype=np.float64)
    if thresholds.ndim != 1 or scores.ndim < 1 or scores.shape[-1] != len(thresholds):
        raise LissomError(f"scores (..., exits) and thresholds (exits,) do not fit: {scores.shape}, {thresholds.shape}")
    return _first(scores > thresholds)


def _first(leaves: np.ndarray) -> np.ndarray:
    """The first index that is true along the last axis of bool (..., K), or K."""
    count = leaves.shape[-1]
    if count == 0:
        return np.zeros(leaves.shape[:-1], dtype=np.int64)
    return np.where(leaves.any(-1), leaves.argmax(-1), count)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def confidence(logits: np.ndarray) -> np.ndarray:
    """The probability of the best class: the largest softmax of ``logits`` (..., classes), float64 (...) in (0, 1]."""
    return np.exp(_log_softmax(logits).max(-1))


def entropy(logits: np.ndarray) -> np.ndarray:
    """The entropy of the softmax of ``logits`` (..., classes) in nats, float64 (...) in [0, ln classes]."""
    logs = _log_softmax(logits)
    shares = np.exp(logs)
    # A class at -inf has probability 0 and adds nothing, though 0 * -inf is no number.
    return -(shares * np.where(shares > 0, logs, 0.0)).sum(-1)


def difference(logits: np.ndarray) -> np.ndarray:
    """The best class's probability less the second best's: softmax of ``logits`` (..., classes), float64 (...) in
    [0, 1]. Raises LissomError where there are fewer than two classes."""
    shares = np.exp(_log_softmax(logits))
    if shares.shape[-1] < 2:
        raise LissomError(f"a difference is of two classes; the logits have the shape {shares.shape}")
    second, best = np.moveaxis(np.partition(shares, -2, axis=-1)[..., -2:], -1, 0)
    return best - second


def normalised_entropy(logits: np.ndarray) -> np.ndarray:
    """``entropy`` over that of no idea at all, ln(classes): float64 (...) in [0, 1]; 0 where there is one class."""
    classes = np.shape(logits)[-1]
    return entropy(logits) / math.log(classes) if classes > 1 else np.zeros(np.shape(logits)[:-1])


def similarity(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The cosine of each sample's two tensors (N, ...), flattened: float64 (N,) in [-1, 1]; 0 beside all zeros."""
    a, b = (np.asarray(t, dtype=np.float64).reshape(len(t), -1) for t in (before, after))
    norms = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return np.clip((a * b).sum(1) / np.where(norms > 0, norms, 1.0), -1, 1)


def confidence_exit(logits: np.ndarray, threshold: float) -> np.ndarray:
    """LGViT's confidence rule: the first exit whose ``confidence`` is above ``threshold``.

    ``logits`` (..., K, classes) of the K exits in order; the answer is int64 (...), K for the final head. No threshold
    of 1 or more is ever exceeded; any below 1 / classes always is.
    """
    return _first(confidence(_exits(logits)) > threshold)


def entropy_exit(logits: np.ndarray, threshold: float) -> np.ndarray:
    """LGViT's entropy rule: the first exit whose ``entropy`` is below ``threshold`` nats. Shapes as above."""
    return _first(entropy(_exits(logits)) < threshold)


def patience_exit(logits: np.ndarray, patience: int) -> np.ndarray:
    """PABEE's rule (Zhou et al. 2020, arXiv 2006.04152) as in LGViT: ``patience`` exits in a row agree on the class.

    The counter is 1 at the first exit, grows by 1 where the best class is that of the exit before, and is 1 again where
    it is not. Shapes as in ``confidence_exit``; raises LissomError where patience is less than 1.
    """
    best = _exits(logits).argmax(-1)
    same = np.ones(best.shape, dtype=bool)
    same[..., 1:] = best[..., 1:] == best[..., :-1]
    return _first(_run_lengths(same, restart=1) >= _patience(patience))


def patient_and_confident_exit(logits: np.ndarray, threshold: float, patience: int) -> np.ndarray:
    """LGViT's patient-and-confident rule: ``patience`` exits in a row with an ``entropy`` below ``threshold`` nats.

    The exits need not agree on the class. Shapes and errors as in ``patience_exit``.
    """
    sure = entropy(_exits(logits)) < threshold
    return _first(_run_lengths(sure, restart=0) >= _patience(patience))


def _exits(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise LissomError(f"exits' logits have the shape (..., exits, classes), not {logits.shape}")
    return logits


def _patience(patience: int) -> int:
    if patience < 1:
        raise LissomError(f"patience counts exits and is at least 1, not {patience}")
    return patience


def _run_lengths(goes_on: np.ndarray, restart: int) -> np.ndarray:
    """Along the last axis of bool (..., K): a counter that grows by 1 where true and is ``restart`` where false."""
    counts = np.zeros(goes_on.shape, dtype=np.int64)
    counter = np.zeros(goes_on.shape[:-1], dtype=np.int64)
    for k in range(goes_on.shape[-1]):
        counter = np.where(goes_on[..., k], counter + 1, restart)
        counts[..., k] = counter
    return counts
