"""Whether two forms of a plan say the same: an artifact beside the torch model it was made from, or beside another.

Of an input two things are compared: the class that is answered, and the stage that answers. Runtimes add in different
orders and round differently, so that a score next to a threshold may fall on its other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lissom.errors import LissomError
from lissom.export.capture import run_eager
from lissom.export.joint import JointOutputs, joint_of
from lissom.export.plan import Plan
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Stages
from lissom.runtime.decisions import first_exit
from lissom.runtime.pooling import filled

__all__ = ["Agreement", "Said", "agreement", "compare", "said_by_artifact", "said_by_plan"]

PART = 64  # inputs at a time: torch hands over all boundaries too


@dataclass(frozen=True)
class Said:
    """What was answered: the class of each input, int64 (N,), and the stage that answered, int64 (N,)."""

    classes: np.ndarray
    exits: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """Of ``count`` inputs the shares with the same class, the same exit, and both."""

    count: int
    same_class: float
    same_exit: float
    same: float


def compare(first: Said, second: Said) -> Agreement:
    """Two forms' answers to the same inputs. Raises LissomError where they are not of the same number."""
    if len(first.classes) != len(second.classes) or not len(first.classes):
        raise LissomError(f"{len(first.classes)} and {len(second.classes)} answers are not to the same inputs")
    classes, exits = first.classes == second.classes, first.exits == second.exits
    return Agreement(len(classes), *(float(same.mean()) for same in (classes, exits, classes & exits)))


def said_by_artifact(artifact: Artifact, inputs: np.ndarray, threads: int) -> Said:
    """What an artifact answers to float32 (N, C, H, W), leaving where its thresholds say."""
    stages, batch = Stages(artifact, threads), artifact.input_shape[0]
    if stages.thresholds:
        answers, exits = stages.run_many(inputs, batch)
        return Said(answers.argmax(-1), exits)
    answers = np.concatenate([np.asarray(stages.run(part)) for part in filled(inputs, batch)])[: len(inputs)]
    return Said(answers.argmax(-1), np.zeros(len(inputs), np.int64))


def said_by_plan(plan: Plan, thresholds: Sequence[float | None], inputs: np.ndarray) -> Said:
    """What the plan's modules answer in PyTorch, in float32 whatever precision the plan asks for, leaving by
    ``thresholds`` (one an exit; None is never)."""
    outputs = JointOutputs.of(plan.decisions)
    if len(thresholds) != outputs.exits:
        raise LissomError(f"the plan has {outputs.exits} exits, and there are {len(thresholds)} thresholds")
    joint = joint_of(plan)
    limits = np.array([np.inf if threshold is None else threshold for threshold in thresholds])
    classes, exits = [], []
    for part in torch.from_numpy(np.ascontiguousarray(inputs, np.float32)).split(PART):
        found = run_eager(joint, part)
        tensors = [found] if isinstance(found, torch.Tensor) else found
        best = np.stack([tensors[outputs.answer(stage)].numpy().argmax(-1) for stage in range(outputs.exits + 1)])
        scores = [tensors[outputs.score(exit)].reshape(-1).numpy() for exit in range(outputs.exits)]
        left = first_exit(np.stack(scores, -1) if scores else np.empty((len(part), 0)), limits)
        classes.append(best[left, np.arange(len(part))])
        exits.append(left)
    return Said(np.concatenate(classes), np.concatenate(exits))


def agreement(artifact: Artifact, plan: Plan, inputs: np.ndarray, threads: int) -> Agreement:
    """An artifact beside the torch float plan it was made from, on float32 ``inputs`` (N, C, H, W), with the artifact's
    own thresholds in both."""
    thresholds = [d["threshold"] for d in artifact.plan.get("decisions") or []]
    return compare(said_by_plan(plan, thresholds, inputs), said_by_artifact(artifact, inputs, threads))
