"""Exporter to OpenVINO: torch.export, conversion, precision by module path with NNCF on the converted graph.

A node's friendly name begins with the name of the torch.export node it stems from ("linear_3/aten.linear.default/
MatMul"), which knows its module; so a policy keyed by module path reaches the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lissom.errors import LissomError
from lissom.export.capture import capture, module_paths
from lissom.export.conversions import Conversions
from lissom.export.exporting import Exported
from lissom.export.joint import JointOutputs, joint_of
from lissom.export.linear_as_conv import linear_as_conv
from lissom.export.openvino_cut import cut_graph, unshare_weights
from lissom.export.openvino_shared import share_weights
from lissom.export.plan import Plan, Precision
from lissom.export.telemetry import quiet
from lissom.registry import register
from lissom.runtime.openvino_graph import import_openvino
from lissom.runtime.target import Target

__all__ = ["ignored_nodes", "joint_graph", "quantise"]

_conversions = Conversions()


@register("exporter", "openvino")
def export_openvino(
    plan: Plan, target: Target, shape: tuple[int, ...], calibration: np.ndarray | None, folder: Path
) -> Exported:
    """``plan`` as OpenVINO IR with its weights in the precision they have: float32 is not halved on disk."""
    ov = import_openvino()
    precision = plan.precision
    graph, nodes = joint_graph(plan, target, shape, calibration)
    options = {"precision": "bf16"} if precision.options.get("float_bits") == 16 else {"precision": "f32"}
    stages = cut_graph(graph, JointOutputs.of(plan.decisions)) if plan.decisions else [graph]
    for i, stage in enumerate(stages):
        _name_by_place(stage)
        ov.save_model(stage, str(folder / f"stage{i}.xml"), compress_to_fp16=False)
    files = [folder / f"stage{i}.xml" for i in range(len(stages))]
    shared = share_weights(files) if plan.decisions else None
    options |= {"weights": shared} if shared else {}
    return Exported([{"graph": file.name, "options": options} for file in files], nodes)


def joint_graph(
    plan: Plan, target: Target, shape: tuple[int, ...], calibration: np.ndarray | None
) -> tuple[Any, dict[str, str]]:
    """The plan as one OpenVINO graph in its precision, not yet cut, and graph node name -> module path.

    With exits its outputs are those of ``lissom.export.joint.Joint``. ``calibration`` is float32 (N, C, H, W).
    """
    precision = plan.precision
    converted, nodes = _conversions.get(plan, shape, target.batch, lambda: _convert(plan, shape, target.batch))
    graph = converted.clone()
    if plan.decisions:
        unshare_weights(graph)
    if precision.options.get("linear") == "conv":
        inside = precision.options.get("linear_in") or ("",)
        linear_as_conv(graph, lambda name: nodes.get(name.partition("/")[0], "").startswith(tuple(inside)))
    if 8 in precision.bits.values():
        if calibration is None:
            raise LissomError("int8 needs images to calibrate on; the task has none to fit")
        graph = quantise(graph, nodes, precision, calibration, target.batch)
    return graph, nodes


# In a name, which may be several joined by "/" ("convolution/Multiply_2637/fq_weights_1"), what a counter made.
_COUNTED = re.compile(r"(?<![^/])([A-Z][A-Za-z]*)\w*_\d+(?![^/])")


def _name_by_place(graph: Any) -> None:
    """Give the nodes that OpenVINO named by a counter of the process ("Constant_90995") names by their place, so that
    the same model gives the same file, byte for byte, in whatever process it is exported."""
    graph.set_friendly_name("model")
    for place, node in enumerate(graph.get_ordered_ops()):
        node.set_friendly_name(_COUNTED.sub(rf"\g<1>_{place}", node.get_friendly_name()))


def _convert(plan: Plan, shape: tuple[int, ...], batch: int) -> tuple[Any, dict[str, str]]:
    """The OpenVINO graph of the plan's joint graph at a static shape, and graph node name -> module path in it."""
    ov = import_openvino()
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    program = _decompose(capture(joint_of(plan), shape, batch))
    with quiet():
        try:
            # Given the program itself, the converter would decompose it once more: a third of all this time.
            graph = ov.convert_model(TorchFXPythonDecoder(program.module(), dynamic_shapes=True))
            if len(graph.inputs) == 1:
                graph.reshape({graph.inputs[0]: [batch, *shape]})
        except Exception as error:  # the converter raises its own kinds, with pages of text
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise LissomError(f"OpenVINO cannot take the model: {lines[-1] if lines else error!r}") from error
    if len(graph.inputs) != 1 or len(graph.outputs) != JointOutputs.of(plan.decisions).count:
        raise LissomError(
            f"the model has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; "
            "one image in and one tensor of answers out is what can be exported"
        )
    _restore_names(graph, program)
    return graph, module_paths(program)


def _decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The decomposition that the converter applies itself, made here so that its node names are ours to read."""
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
    from torch.export.decomp_utils import CustomDecompTable

    table = CustomDecompTable()
    for operator in ops_to_not_decompose():
        table.pop(operator, None)
    return program.run_decompositions(table)


# Words in the names of torch's operators that multiply by weights or multiply activations.
_PRODUCTS = ("conv", "linear", "mm", "matmul", "attention", "einsum")


def _restore_names(graph: Any, program: torch.export.ExportedProgram) -> None:
    """Give the nodes that the converter merged, and renamed, the name of the torch.export node they stem from.

    A convolution takes the name of the scale that is folded into it: none of torch's for a BatchNorm
    ("Multiply_5134"), that of the product for a layer scale. Names of its output tensor stay, and from there the way
    leads back to the convolution, whose module a policy and a profile mean.
    """
    known = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    for node in graph.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        if kind in ("Constant", "Parameter", "Result"):
            continue
        source = named = next((known[n] for n in _names(node) if n in known), None)
        if kind in ("Convolution", "GroupConvolution", "MatMul"):
            follower = node
            while source is None and (follower := _only_addition(follower)) is not None:  # its bias has the names
                source = next((known[n] for n in _names(follower) if n in known), None)
            while source is not None and not any(word in str(source.target) for word in _PRODUCTS):
                before = source.args[0] if source.args else None
                source = known.get(getattr(before, "name", ""))
        source = source or named
        if source is not None and source.name != name.partition("/")[0]:
            node.set_friendly_name(f"{source.name}/{name}")


def _names(node: Any) -> list[str]:
    """Names that a node of the graph has or gives to its outputs, as torch.export would know them."""
    tensors = sorted(tensor.partition(":")[0] for output in node.outputs() for tensor in output.get_names())
    return [node.get_friendly_name().partition("/")[0], *tensors]


def _only_addition(node: Any) -> Any:
    """The addition or scaling that alone consumes the node's output, or None."""
    consumers = list(node.output(0).get_target_inputs())
    follower = consumers[0].get_node() if len(consumers) == 1 else None
    return follower if follower is not None and follower.get_type_name() in ("Add", "Multiply") else None


def ignored_nodes(graph: Any, nodes: dict[str, str], precision: Precision) -> list[str]:
    """Friendly names of the operations that the policy leaves in float."""
    products = precision.options.get("products", 8)
    ignored = []
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        if kind in ("Constant", "Parameter", "Result"):
            continue
        name = node.get_friendly_name()
        path = nodes.get(name.partition("/")[0])
        # An exit's score decides by a comparison; it stays in float, cheap as it is.
        outside = path is not None and (precision.at(path) != 8 or path.partition(".")[0] == "score")
        product = products != 8 and (kind == "ScaledDotProductAttention" or (kind == "MatMul" and not _weighted(node)))
        if outside or product:
            ignored.append(name)
    return ignored


def _weighted(node: Any) -> bool:
    """Whether one of a MatMul's operands is a constant (perhaps behind a conversion or a fake quantisation)."""
    for value in node.input_values():
        source = value.get_node()
        while source.get_type_name() in ("Convert", "FakeQuantize", "Reshape", "Transpose"):
            source = source.input_value(0).get_node()
        if source.get_type_name() == "Constant":
            return True
    return False


def quantise(graph: Any, nodes: dict[str, str], precision: Precision, calibration: np.ndarray, batch: int) -> Any:
    """NNCF's post-training quantisation of the converted graph, following the policy.

    ``precision.options``: ``model_type`` ("transformer" or None), ``products`` (8 or 32: matrix products of two
    activations), ``preset`` ("mixed" or None).
    """
    with quiet():
        import nncf

        ignored = ignored_nodes(graph, nodes, precision)
        kinds = {"transformer": nncf.ModelType.TRANSFORMER, None: None}
        try:
            return nncf.quantize(
                graph,
                nncf.Dataset(list(_batches(calibration, batch))),
                model_type=kinds[precision.options.get("model_type")],
                ignored_scope=nncf.IgnoredScope(names=ignored, validate=False) if ignored else None,
                subset_size=max(1, len(calibration) // batch),
            )
        except Exception as error:  # NNCF raises its own kinds
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LissomError(f"NNCF cannot quantise the graph: {first}") from error


def _batches(inputs: np.ndarray, batch: int) -> Iterable[np.ndarray]:
    for start in range(0, len(inputs) - batch + 1, batch):
        yield inputs[start : start + batch]
