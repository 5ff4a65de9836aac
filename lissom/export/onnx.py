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
from lissom.export.capture import capture
from lissom.export.conversions import Conversions
from lissom.export.exporting import Exported
from lissom.export.joint import JointOutputs, joint_of
from lissom.export.onnx_cut import cut_graph, save_stages
from lissom.export.plan import Plan, Precision
from lissom.export.telemetry import quiet
from lissom.registry import register
from lissom.runtime.target import Target

__all__ = ["joint_graph"]

_conversions = Conversions()


@register("exporter", "onnxruntime")
def export_onnx(
    plan: Plan, target: Target, shape: tuple[int, ...], calibration: np.ndarray | None, folder: Path
) -> Exported:
    """``plan`` as an ONNX graph with its weights inside, or one for each stage. Needs the extra ``onnx``."""
    graph, nodes = joint_graph(plan, target, shape, calibration)
    stages = cut_graph(graph, JointOutputs.of(plan.decisions), nodes) if plan.decisions else [graph]
    names = save_stages(stages, folder)
    return Exported([{"graph": name, "options": {}} for name in names], nodes)


def joint_graph(
    plan: Plan, target: Target, shape: tuple[int, ...], calibration: np.ndarray | None
) -> tuple[Any, dict[str, str]]:
    """The plan as one ``onnx.ModelProto`` in its precision, not yet cut, and graph node name -> module path.

    With exits its outputs are those of ``lissom.export.joint.Joint``. ``calibration`` is float32 (N, C, H, W).
    """
    try:
        import onnxscript  # noqa: F401 (torch's exporter needs it and says so only in its own words)
    except ImportError as error:
        raise LissomError(f"exporting to ONNX needs {error.name}: pip install 'lissom[onnx]'") from error

    converted, nodes = _conversions.get(plan, shape, target.batch, lambda: _convert(plan, shape, target.batch))
    graph = type(converted)()
    graph.CopyFrom(converted)
    if 8 in plan.precision.bits.values():
        if calibration is None:
            raise LissomError("int8 needs images to calibrate on; the task has none to fit")
        graph = _quantise(graph, nodes, plan.precision, calibration, target.batch)
    return graph, nodes


def _convert(plan: Plan, shape: tuple[int, ...], batch: int) -> tuple[Any, dict[str, str]]:
    """The ONNX graph of the plan's joint graph at a static shape, and graph node name -> module path in it."""
    program = capture(joint_of(plan), shape, batch)
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:  # torch's exporter raises its own kinds, with pages of text
            first = str(error).strip().splitlines()[0]
            raise LissomError(f"the model cannot be exported to ONNX: {first}") from error
    graph = exported.model_proto
    inputs, outputs = len(graph.graph.input), len(graph.graph.output)
    if inputs != 1 or (plan.decisions and outputs != JointOutputs.of(plan.decisions).count):
        raise LissomError(f"the model's ONNX graph has {inputs} inputs and {outputs} outputs; one image in is exported")
    return graph, _paths(graph)


def _paths(graph: Any) -> dict[str, str]:
    """ONNX node name -> module path, from the scopes torch's exporter leaves in each node's metadata."""
    paths: dict[str, str] = {}
    for node in graph.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
        # A list written as text: ['', 'blocks.0', 'blocks.0.attn', 'blocks.0.attn.qkv', 'linear'].
        names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
        paths[node.name] = next((name for name in reversed(names[:-1]) if name), "")
    return paths


def _float(path: str, precision: Precision) -> bool:
    """Whether what the module at ``path`` computes stays in float. An exit's score decides by a comparison: it does."""
    return precision.at(path) != 8 or path.partition(".")[0] == "score"


def _quantise(graph: Any, nodes: dict[str, str], precision: Precision, calibration: np.ndarray, batch: int) -> Any:
    with quiet():
        import nncf

        weights = {tensor.name for tensor in graph.graph.initializer}
        keep_products = precision.options.get("products", 8) != 8
        ignored = [
            node.name
            for node in graph.graph.node
            if _float(nodes.get(node.name, ""), precision)
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
