"""Exporter to ONNX, for ONNX Runtime: torch's exporter, precision by module path with NNCF on the ONNX graph."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lissom.errors import LissomError
from lissom.export.capture import capture, module_paths
from lissom.export.exporting import Exported
from lissom.export.plan import Plan, Precision
from lissom.export.telemetry import quiet
from lissom.registry import register
from lissom.runtime.target import Target

__all__: list[str] = []


@register("exporter", "onnxruntime")
def export_onnx(
    plan: Plan, target: Target, shape: tuple[int, ...], calibration: np.ndarray | None, folder: Path
) -> Exported:
    """``plan`` as an ONNX graph with its weights inside. Needs the extra ``onnx``."""
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter needs it and says so only in its own words)
    except ImportError as error:
        raise LissomError(f"exporting to ONNX needs {error.name}: pip install 'lissom[onnx]'") from error

    program = capture(plan.model, shape, target.batch)
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:  # torch's exporter raises its own kinds, with pages of text
            first = str(error).strip().splitlines()[0]
            raise LissomError(f"the model cannot be exported to ONNX: {first}") from error
    graph = exported.model_proto
    nodes = _nodes(graph, module_paths(program.run_decompositions()))
    if 8 in plan.precision.bits.values():
        if calibration is None:
            raise LissomError("int8 needs images to calibrate on; the task has none to fit")
        graph = _quantise(graph, nodes, plan.precision, calibration, target.batch)
    onnx.save(graph, str(folder / "stage0.onnx"))
    return Exported([{"graph": "stage0.onnx", "options": {}}], nodes)


def _nodes(graph: Any, captured: dict[str, str]) -> dict[str, str]:
    """ONNX node name -> module path, from the scopes torch's exporter leaves in each node's metadata."""
    paths: dict[str, str] = {}
    for node in graph.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
        # A list written as text: ['', 'blocks.0', 'blocks.0.attn', 'blocks.0.attn.qkv', 'linear'].
        names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
        inner = [name for name in names[:-1] if name]
        paths[node.name] = inner[-1] if inner else captured.get(node.name, "")
    return paths


def _quantise(graph: Any, nodes: dict[str, str], precision: Precision, calibration: np.ndarray, batch: int) -> Any:
    with quiet():
        import nncf

        weights = {tensor.name for tensor in graph.graph.initializer}
        keep_products = precision.options.get("products", 8) != 8
        ignored = [
            node.name
            for node in graph.graph.node
            if precision.at(nodes.get(node.name, "")) != 8
            or (keep_products and node.op_type == "MatMul" and not any(name in weights for name in node.input))
        ]
        name = graph.graph.input[0].name
        parts = [{name: calibration[i : i + batch]} for i in range(0, len(calibration) - batch + 1, batch)]
        kinds = {"transformer": nncf.ModelType.TRANSFORMER, None: None}
        try:
            return nncf.quantize(
                graph,
                nncf.Dataset(parts),
                model_type=kinds[precision.options.get("model_type")],
                ignored_scope=nncf.IgnoredScope(names=ignored, validate=False) if ignored else None,
                subset_size=max(1, len(parts)),
            )
        except Exception as error:  # NNCF raises its own kinds
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LissomError(f"NNCF cannot quantise the graph: {first}") from error
