"""Graph: one compiled graph that runs; ``open_graph`` opens it with the back end of its runtime, by name."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lissom.errors import LissomError
from lissom.registry import load_part
from lissom.runtime.artifact import Artifact
from lissom.runtime.pooling import filled, run_pooled
from lissom.runtime.target import RUNTIMES, default_threads

__all__ = ["Answer", "Graph", "Inspection", "LayerTime", "Stages", "beside", "inspect",
           "layer_times", "missing", "open_graph"]  # fmt: skip

Answer = np.ndarray | list[np.ndarray]
Shape = tuple[int, ...] | None  # of a tensor; None where the graph leaves a size open

INSTALL = {"openvino": "openvino", "onnxruntime": "lissom[onnx]", "torch": "torch"}


class Graph(Protocol):
    """A graph ready to run. ``gpu`` is the UUID of the GPU that it runs on, None on a processor; ``takes`` and
    ``gives`` are the shapes of its inputs and its outputs, in order."""

    gpu: str | None
    takes: Sequence[Shape]
    gives: Sequence[Shape]

    def run(self, x: np.ndarray | list[np.ndarray]) -> Answer:
        """Run float32 ``x`` of the graph's own static shape; one array, or a list where it has several outputs.
        A graph with several inputs takes a list.

        The answer is the caller's to keep: the next run does not write into it.
        """
        ...


class Inspection(NamedTuple):
    """What a runtime made of a graph, by the graph's own names.

    ``reference``: operators without an optimised form, which run as plain reference code. ``conversions``: changes of
    layout or precision, most of them inserted by the runtime, as ``name (f32 to bf16)`` or ``name (layout)``.
    """

    reference: list[str]
    conversions: list[str]


class LayerTime(NamedTuple):
    """One executed node: the names of the original layers fused into it (none for one that the runtime inserted), its
    type, the implementation that ran, and its mean time in microseconds."""

    names: tuple[str, ...]
    kind: str
    implementation: str
    microseconds: float


def open_graph(
    path: str | Path | None, runtime: str, options: Mapping[str, Any] | None = None, threads: int | None = None
) -> Graph:
    """Open a graph file with the back end ``runtime``, on ``threads`` threads (None: all that this process may use).

    Without a path: the smallest graph, of shape (1, 1), whose cost is the runtime's own. Raises LissomError where the
    runtime is not installed or cannot read the file.
    """
    if runtime not in RUNTIMES:
        raise LissomError(f"no runtime is called {runtime!r}; known: {', '.join(RUNTIMES)}")
    backend = load_part("backend", runtime)
    return backend(None if path is None else Path(path), dict(options or {}), threads or default_threads())


def missing(runtime: str) -> LissomError:
    """The error for a runtime that is not installed."""
    return LissomError(f"{runtime} is not installed here; install it with: pip install {INSTALL[runtime]!r}")


def beside(path: Path | None, name: Any) -> Path:
    """The file ``name``, which options of the graph ``path`` name, in the graph's own folder and nowhere else."""
    if path is None or not isinstance(name, str) or Path(name).name != name or not (path.parent / name).is_file():
        raise LissomError(f"{path} lacks its file {name!r}; export it anew")
    return path.parent / name


def inspect(graph: Graph) -> Inspection | None:
    """What the runtime made of the graph; None where the runtime does not tell (all but OpenVINO)."""
    look = getattr(graph, "inspect", None)
    return look() if look else None


def layer_times(
    path: str | Path, options: Mapping[str, Any] | None = None, threads: int | None = None, *, runs: int = 50
) -> list[LayerTime]:
    """Where the time of an OpenVINO graph goes, in order of execution: means over ``runs`` runs after a warm-up.

    The inputs are seeded normal numbers. Counting costs a little itself, so that the sum exceeds an ordinary run.
    """
    graph: Any = open_graph(path, "openvino", {**(options or {}), "count": True}, threads)
    return graph.layer_times(runs)


def last_stages(artifact: Artifact) -> np.ndarray:
    """How often each of K + 1 stages is the last one to run, (K + 1,): what a measurement weighs them by.

    Samples leave as they were counted to do on the choose split. A batch whose rows cannot be put together with others'
    (``packs``) runs on until the last of its samples leaves.
    """
    decisions = artifact.plan.get("decisions") or []
    known = (artifact.plan.get("exits") or {}).get("shares")
    shares = np.array(known if known else [0.0] * len(decisions) + [1.0])
    if artifact.plan.get("packs") is True or artifact.input_shape[0] == 1:
        return shares
    return np.diff(np.minimum(np.cumsum(shares), 1.0) ** artifact.input_shape[0], prepend=0.0)


class Stages:
    """An artifact's stages, opened; itself a Graph.

    Without decisions each stage runs on what the stage before it answered. With K decisions there are K + 1 stages;
    each but the last answers (answer, score, carried...), and the next runs, on what was carried, only where the
    decision between them does not let a sample leave: where score > threshold it does. ``packs``: rows of what is
    carried are those of the batch, so that rows of several batches may run together.

    Raises LissomError where a graph cannot be opened, and where the graphs do not fit the plan or each other.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        self._open(artifact.graphs, artifact.runtime, artifact.plan["stages"], threads)
        decisions = artifact.plan.get("decisions") or []
        self._decide([math.inf if d["threshold"] is None else d["threshold"] for d in decisions])
        self.packs = artifact.plan.get("packs") is True
        self._check(artifact)
        self.shares = last_stages(artifact)

    def _check(self, artifact: Artifact) -> None:
        """Raise LissomError where the graphs take or give something else than the plan says: before anything of the
        size that the plan says is made."""

        def refused(what: str) -> LissomError:
            return LissomError(f"{artifact.path} is damaged: {what}; export it anew")

        shape, takes = artifact.input_shape, self.graphs[0].takes
        if list(takes) != [shape]:
            raise refused(f"its plan says inputs of shape {shape}, its graph takes {_shown(takes)}")
        for number, (graph, after) in enumerate(pairwise(self.graphs), 1):
            if self.thresholds and not self._decides(graph, shape[0]):
                raise refused(f"stage {number} gives {_shown(graph.gives)}, not an answer, a score and what is carried")
            carried = graph.gives[2:] if self.thresholds else graph.gives
            if None in carried or list(carried) != list(after.takes):
                raise refused(f"stage {number} hands on {_shown(carried)}, the next one takes {_shown(after.takes)}")

    def _decides(self, graph: Graph, batch: int) -> bool:
        """Whether a graph gives what a stage with a decision behind it does."""
        if len(graph.gives) < 3:
            return False
        answer, score, *carried = graph.gives
        rows = [answer, *(carried if self.packs else [])]
        return (
            answer == self.graphs[-1].gives[0]
            and score is not None
            and math.prod(score) == batch
            and all(shape is not None and shape[:1] == (batch,) for shape in rows)
        )

    def _decide(self, thresholds: Sequence[float]) -> None:
        self.thresholds = [float(threshold) for threshold in thresholds]
        # An array of float32 is compared with these in float64: neither of the two is rounded.
        self._exact = [np.float64(threshold) for threshold in thresholds]

    def _open(
        self, paths: Sequence[Path], runtime: str, stages: Sequence[Mapping[str, Any]], threads: int | None
    ) -> None:
        self.graphs = [
            open_graph(path, runtime, stage.get("options"), threads) for path, stage in zip(paths, stages, strict=True)
        ]
        self.gpu = self.graphs[0].gpu

    @classmethod
    def of(
        cls, paths: Sequence[Path], runtime: str, stages: Sequence[Mapping[str, Any]], threads: int | None
    ) -> Stages:
        """Graph files that are no artifact yet, with their options; nobody leaves early."""
        opened = cls.__new__(cls)
        opened._open(paths, runtime, stages, threads)
        opened._decide([math.inf] * (len(paths) - 1))
        opened.packs = False
        opened.shares = np.array([0.0] * (len(paths) - 1) + [1.0])
        return opened

    def run(self, x: np.ndarray | list[np.ndarray]) -> Answer:
        """Run float32 ``x`` of the artifact's input shape through the stages."""
        if self.thresholds:
            assert isinstance(x, np.ndarray)  # the input of stage 0 is one
            return self.run_exits(x)[0]
        answer: Answer = x
        for graph in self.graphs:
            answer = graph.run(answer)
        return answer

    def run_exits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(answers (B, ...), the stage that gave each answer, int64 (B,)). A batch runs on until all have left."""
        if len(x) == 1:
            return self._run_alone(x)
        carried: np.ndarray | list[np.ndarray] = x
        answers, left = np.empty(0), np.empty(0)
        for stage, graph in enumerate(self.graphs):
            found = graph.run(carried)
            answer = found[0] if isinstance(found, list) else found
            if stage == 0:
                answers, left = np.array(answer), np.full(len(answer), len(self.graphs) - 1)
            waiting = left >= stage
            answers[waiting] = answer[waiting]
            if stage < len(self.thresholds):
                assert isinstance(found, list)
                left[waiting & (found[1].reshape(-1) > self._exact[stage])] = stage
                if (left <= stage).all():
                    break
                carried = found[2:]
        return answers, left

    def _run_alone(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for one sample, for which a decision is one comparison of two numbers."""
        carried: Any = x
        for stage, threshold in enumerate(self.thresholds):
            found = self.graphs[stage].run(carried)
            if found[1].item() > threshold:
                return found[0], np.array([stage])
            carried = found[2:]
        answer = self.graphs[-1].run(carried)
        return (answer[0] if isinstance(answer, list) else answer), np.array([len(self.thresholds)])

    def run_many(self, x: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Float32 (n, ...) of any n, ``batch`` being the graphs' own: (answers (n, ...), the stage that gave each
        answer, int64 (n,)), in the order of ``x``.

        With decisions, inputs that wait for a stage are gathered over batches (``lissom.runtime.pooling``).
        """
        if self.packs and batch > 1:
            return run_pooled(self.graphs, self._exact, x, batch)
        found = [self.run_exits(part) for part in filled(x, batch)]
        answers, left = (np.concatenate(each)[: len(x)] for each in zip(*found, strict=True))
        return answers, left

    def run_all(self, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Every stage's answer, nobody leaving: K + 1 arrays (B, ...), and the scores (B, K)."""
        carried: np.ndarray | list[np.ndarray] = x
        answers, scores = [], []
        for graph in self.graphs:
            found = graph.run(carried)
            if isinstance(found, list):
                answers.append(found[0])
                scores.append(found[1].reshape(-1))
                carried = found[2:]
            else:
                answers.append(found)
        return answers, np.stack(scores, 1) if scores else np.empty((len(answers[0]), 0))

    def run_to(self, x: np.ndarray, last: int) -> None:
        """Run the stages 0 to ``last``, whatever the scores."""
        carried: np.ndarray | list[np.ndarray] = x
        for graph in self.graphs[: last + 1]:
            found = graph.run(carried)
            carried = found[2:] if isinstance(found, list) else found

    def time_exits(self, x: np.ndarray) -> list[float]:
        """Seconds until each stage's decision is made, in one pass that nobody leaves."""
        carried: np.ndarray | list[np.ndarray] = x
        times = []
        start = time.perf_counter()
        for stage, graph in enumerate(self.graphs):
            found = graph.run(carried)
            if stage < len(self.thresholds):
                assert isinstance(found, list)
                # The decision is part of the cost.
                if len(x) == 1:
                    bool(found[1].item() > self.thresholds[stage])
                else:
                    bool((found[1].reshape(-1) > self._exact[stage]).all())
                carried = found[2:]
            times.append(time.perf_counter() - start)
        return times


def _shown(shapes: Sequence[Shape]) -> str:
    return " and ".join("an open shape" if shape is None else str(shape) for shape in shapes) or "nothing"
