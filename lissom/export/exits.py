"""The thresholds of a plan's exits, fitted on the exported graphs' own scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lissom.errors import LissomError
from lissom.export.calibration import Calibration, fit_thresholds
from lissom.export.calibration import apply as first_exits
from lissom.export.plan import Exit
from lissom.runtime.artifact import Artifact

__all__ = ["fit_exits"]


def fit_exits(
    artifact: Artifact,
    exits: Sequence[Exit],
    answers: Sequence[np.ndarray],
    scores: np.ndarray,
    quality: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    seed: int = 0,
    among: int = 1,
) -> tuple[Artifact, np.ndarray, Calibration]:
    """Fit the thresholds of ``artifact``'s exits, write them into its plan, and return it with its answers.

    ``answers`` (K + 1 arrays (N, classes)) and ``scores`` (N, K) are what ``run_stages`` found on data that nothing was
    trained on. ``quality`` gives each answer's own score in [0, 1] (right or wrong), (N, classes) -> (N,); without it,
    an exit is right where it agrees with the model's last answer. The promise: with probability 1 - delta the exits
    cost at most ``risk`` points of quality over the model without them. Where one of several artifacts fitted on the
    same data will be chosen, ``among`` is their number: each then has its share of delta, and the promise holds for
    whichever it is. That is exact for candidates decided on beforehand. A search that proposes the next ones by what it
    saw of this data chooses among more than it fits, which the number does not count. Raises LissomError for scores
    that are no numbers and for exits that disagree on what they promise.
    """
    promises = {(e.risk, e.delta) for e in exits}
    if len(promises) != 1:
        raise LissomError("all exits of a plan share one promise, and theirs differ in risk or delta")
    ((risk, delta),) = promises
    full = answers[-1]
    if quality is not None:
        harm = np.stack([quality(full) > quality(answer) for answer in answers[:-1]], 1)
    else:
        harm = np.stack([answer.argmax(-1) != full.argmax(-1) for answer in answers[:-1]], 1)
    # The last stage costs the model's own operations and those of all heads; the heads' share is what exits add.
    costs = np.array([*(e.cost for e in exits), 1.0 + _heads(exits)])
    # The first exits cannot have been sure so many times in a row: there nobody leaves, whatever the score.
    able = [i for i, e in enumerate(exits) if e.rule != "patient_and_confident" or i + 1 >= e.patience]
    if not able:
        raise LissomError(f"{len(exits)} exits cannot be sure {exits[0].patience} times in a row; add exits")
    calibration = fit_thresholds(
        scores[:, able], harm[:, able], costs[[*able, -1]], risk=risk / 100, delta=delta / among, seed=seed
    )
    if len(able) < len(exits):
        thresholds, shares = np.full(len(exits), np.inf), np.zeros(len(exits) + 1)
        thresholds[able], shares[[*able, -1]] = calibration.thresholds, calibration.shares
        calibration = replace(calibration, thresholds=tuple(thresholds.tolist()), shares=tuple(shares.tolist()))
    decisions = [
        {"at": e.at, "rule": e.rule, "threshold": None if np.isinf(t) else float(t), **_patience(e)}
        for e, t in zip(exits, calibration.thresholds, strict=True)
    ]
    known = {
        **calibration.to_json(),
        "among": among,
        "against": "labels" if quality is not None else "the model without exits",
    }
    known["shares"] = [float(share) for share in calibration.shares]
    left = first_exits(scores, np.asarray(calibration.thresholds))
    chosen = np.stack(list(answers))[left, np.arange(len(full))]
    return artifact.with_decisions(decisions, known), chosen, calibration


def _patience(exit: Exit) -> dict[str, int]:
    return {"patience": exit.patience} if exit.rule == "patient_and_confident" else {}


def _heads(exits: Sequence[Exit]) -> float:
    return max((e.heads for e in exits), default=0.0)
