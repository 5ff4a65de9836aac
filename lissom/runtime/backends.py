"""Graph: one compiled graph that runs; ``open_graph`` opens it with the back end of its runtime, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lissom.errors import LissomError
from lissom.registry import load_part
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import RUNTIMES, default_threads

__all__ = ["Answer", "Graph", "Inspection", "LayerTime", "Stages", "inspect", "layer_times", "missing", "open_graph"]

Answer = np.ndarray | list[np.ndarray]

INSTALL = {"openvino": "openvino", "onnxruntime": "lissom[onnx]", "torch": "torch"}


class Graph(Protocol):
    """A graph ready to run. ``gpu`` is the UUID of the GPU that it runs on, None on a processor."""

    gpu: str | None

    def run(self, x: np.ndarray) -> Answer:
        """Run float32 ``x`` of the graph's own static shape; one array, or a list where it has several outputs.

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


class Stages:
    """An artifact's stages, opened; itself a Graph: each stage runs on what the stage before it answered."""

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        stages = zip(artifact.graphs, artifact.plan["stages"], strict=True)
        self.graphs = [open_graph(path, artifact.runtime, stage.get("options"), threads) for path, stage in stages]
        self.gpu = self.graphs[0].gpu

    def run(self, x: np.ndarray) -> Answer:
        """Run float32 ``x`` of the artifact's input shape through all the stages."""
        answer: Answer = x
        for graph in self.graphs:
            answer = graph.run(answer)  # type: ignore[arg-type]  # a boundary of several tensors comes with decisions
        return answer
