"""``export_plan``: from a Plan to an Artifact, verified on real inputs against the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.export.capture import run_eager
from lissom.export.joint import JointOutputs, joint_of
from lissom.export.plan import Plan
from lissom.images import Preprocessing
from lissom.registry import load_part, register
from lissom.runtime.artifact import Artifact, new_artifact
from lissom.runtime.backends import Stages
from lissom.runtime.pooling import filled
from lissom.runtime.target import Target

__all__ = ["Exported", "Exporter", "Verification", "export_plan", "run_artifact", "run_stages"]


@dataclass
class Exported:
    """What an exporter wrote: for each stage its graph's file name and options; graph node -> module path."""

    stages: list[dict[str, Any]]
    nodes: dict[str, str] = field(default_factory=dict)


class Exporter(Protocol):
    """One a runtime: writes a plan's graphs into a folder. Registered under the runtime's name."""

    def __call__(
        self, plan: Plan, target: Target, shape: tuple[int, ...], calibration: np.ndarray | None, folder: Path
    ) -> Exported: ...


@dataclass(frozen=True)
class Verification:
    """An artifact beside its model on ``count`` real inputs: largest difference, the same relative to the largest
    answer, and the share of inputs with the same top answer."""

    count: int
    max_error: float
    relative_error: float
    agreement: float


def export_plan(
    plan: Plan,
    target: Target,
    path: Path,
    *,
    shape: tuple[int, ...],
    calibration: np.ndarray | None = None,
    recipe: str = "",
    classes: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    verify: np.ndarray | None = None,
    layers: Sequence[dict[str, Any]] = (),
) -> Artifact:
    """Write ``plan`` to the folder ``path`` for ``target``: whole, or not at all.

    ``shape`` is one input's (C, H, W); ``calibration`` and ``verify`` are float32 (N, C, H, W). Verification compares
    with the plan's own modules in float32; a plan in float32 must agree to 1 % of its largest answer. ``layers`` is
    kept in the artifact for the profile. Raises LissomError where the model cannot be exported or does not verify.
    """
    exporter: Exporter = load_part("exporter", target.runtime)
    fields: dict[str, Any] = {
        "runtime": target.runtime,
        "recipe": recipe,
        # Nobody leaves before the thresholds are fitted on the exported graphs' own scores (lissom.export.exits).
        "decisions": [{"at": e.at, "rule": e.rule, "threshold": None} for e in plan.decisions],
        "precision": dict(plan.precision.bits),
        "precision_options": dict(plan.precision.options),
        "input": {
            "shape": [target.batch, *shape],
            "preprocessing": preprocessing.to_json() if preprocessing else None,
        },
        "classes": list(classes),
        "layers": list(layers),
        "metrics": {},
    }
    with new_artifact(path, fields) as folder:
        exported = exporter(plan, target, shape, calibration, folder)
        fields["stages"] = exported.stages
        fields["nodes"] = exported.nodes
        if plan.decisions and target.batch > 1:
            fields["packs"] = _packs(plan, shape, target.batch)
        if verify is not None and len(verify):
            fields["verification"] = vars(_verify(plan, target, exported, folder, verify))
    return Artifact.open(path)


@torch.no_grad()
def _packs(plan: Plan, shape: tuple[int, ...], batch: int) -> bool:
    """Whether all that is carried from stage to stage has its batch in front, so that the runtime may put rows of
    several batches together. Found by running one sample more."""
    joint, outputs = joint_of(plan), JointOutputs.of(plan.decisions)
    training = {module: module.training for module in joint.modules()}
    device = next((p.device for p in joint.parameters()), None)
    try:
        some, more = (joint.eval()(torch.zeros(n, *shape, device=device)) for n in (batch, batch + 1))
    except Exception:  # a forward written for one batch size alone, in whatever words it says so
        return False
    finally:
        for module, mode in training.items():
            module.training = mode
    pairs = ((some[place], more[place]) for exit in range(outputs.exits) for place in outputs.boundary(exit))
    return all(
        tuple(a.shape) == (batch, *a.shape[1:]) and tuple(b.shape) == (batch + 1, *a.shape[1:]) for a, b in pairs
    )


def _verify(plan: Plan, target: Target, exported: Exported, folder: Path, inputs: np.ndarray) -> Verification:
    opened = Stages.of(
        [folder / stage["graph"] for stage in exported.stages], target.runtime, exported.stages, target.threads
    )
    got, _ = _run_all(opened, inputs, target.batch)
    want = run_eager(plan.model, torch.from_numpy(inputs))
    answers = [w.numpy() for w in (want if isinstance(want, list) else [want])]
    error = relative = 0.0
    for mine, other in zip(got, answers, strict=True):
        if mine.shape != other.shape or not np.isfinite(mine).all():
            raise LissomError(
                f"the exported graph answers {mine.shape}, the model {other.shape}, or not with finite numbers"
            )
        error = max(error, float(np.abs(mine - other).max()))
        relative = max(relative, float(np.abs(mine - other).max()) / max(float(np.abs(other).max()), 1e-12))
    if plan.precision.float32 and relative > 1e-2:
        raise LissomError(f"the exported graph differs from the model by {relative:.2%} of its largest answer")
    same = got[-1].argmax(1) == answers[-1].argmax(1)  # over classes: of a map, at every place
    return Verification(len(inputs), error, relative, float(same.mean()))


def run_artifact(
    artifact: Artifact,
    inputs: np.ndarray | Iterable[np.ndarray],
    threads: int,
    *,
    reduce: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> np.ndarray:
    """The artifact's answers to float32 (N, C, H, W), or to such parts one after the other, at its own batch size.

    ``reduce`` is applied to each batch's answers before they are put together (``Task.reduce``).
    """
    graph = Stages(artifact, threads)
    parts = [inputs] if isinstance(inputs, np.ndarray) else inputs
    return np.concatenate([_run(graph, part, artifact.input_shape[0], reduce) for part in parts])


def run_stages(
    artifact: Artifact, inputs: np.ndarray | Iterable[np.ndarray], threads: int, *, opened: Stages | None = None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Every stage's answers to float32 (N, C, H, W), or to parts of it, nobody leaving early: K + 1 arrays (N, ...),
    and the scores (N, K) of the K exits. ``opened``: the artifact's stages, where they are open already."""
    graph = opened or Stages(artifact, threads)
    parts = [inputs] if isinstance(inputs, np.ndarray) else inputs
    found = [_run_all(graph, part, artifact.input_shape[0]) for part in parts]
    answers = [np.concatenate(stage) for stage in zip(*(a for a, _ in found), strict=True)]
    return answers, np.concatenate([scores for _, scores in found])


def _run(stages: Stages, inputs: np.ndarray, batch: int, reduce: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if stages.thresholds:
        return np.array(reduce(stages.run_many(inputs, batch)[0]))
    answers = []
    for part in filled(inputs, batch):
        answer = stages.run(part)
        answers.append(np.array(reduce(answer[0] if isinstance(answer, list) else answer)))
    return np.concatenate(answers)[: len(inputs)]


def _run_all(graph: Stages, inputs: np.ndarray, batch: int) -> tuple[list[np.ndarray], np.ndarray]:
    found = [graph.run_all(part) for part in filled(inputs, batch)]
    answers = [np.concatenate(stage)[: len(inputs)] for stage in zip(*(a for a, _ in found), strict=True)]
    return answers, np.concatenate([scores for _, scores in found])[: len(inputs)]


@register("exporter", "float32")
def export_float32(model: nn.Module, shape: tuple[int, ...], runtime: str, batch: int, path: Path) -> Artifact:
    """The model as it is, in float32, for meters that are handed a model instead of an artifact."""
    return export_plan(Plan.of(model), Target(runtime, batch=batch), path, shape=shape)
