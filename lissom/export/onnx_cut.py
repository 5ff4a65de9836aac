"""An ONNX joint graph, cut at its boundaries into one graph a stage; weights of several stages lie in one file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lissom.export.joint import JointOutputs
from lissom.export.walking import needed

__all__ = ["SHARED", "SMALL", "cut_graph", "save_stages"]

SHARED = "shared.bin"
SMALL = 1024  # bytes: what is smaller (scales, axes) may lie in several stages
ALIGNED = 64  # bytes


def cut_graph(model: Any, outputs: JointOutputs, nodes: Mapping[str, str]) -> list[Any]:
    """The stages of a joint model (an ``onnx.ModelProto``), in order, as models of their own; ``model`` stays as it is.

    Stage 0 takes the input, a later one what its predecessor carried over, one input a tensor. Each but the last gives
    (answer, score, carried...), the last its answer. ``nodes``: node name -> module path, for the words of an error.
    Raises NotApplicable where a stage would still need something from before its cut.
    """
    return [_stage(model, stage, outputs, nodes) for stage in range(outputs.exits + 1)]


def _stage(model: Any, stage: int, outputs: JointOutputs, nodes: Mapping[str, str]) -> Any:
    import onnx

    graph = model.graph
    wanted = [graph.output[outputs.answer(stage)]]
    if stage < outputs.exits:
        wanted += [graph.output[outputs.score(stage)], *(graph.output[i] for i in outputs.boundary(stage))]
    given = [graph.output[i] for i in outputs.boundary(stage - 1)] if stage else list(graph.input)
    makers = {name: node for node in graph.node for name in node.output if name}
    # The exporter may let what lies behind read a carried tensor by its older name, in front of an Identity.
    same = {_origin(value.name, makers): value.name for value in given} if stage else {}
    known = {value.name for value in given} | set(same) if stage else set()
    names = needed(
        [value.name for value in wanted],
        lambda name: _read(makers[name]) if name in makers else (),
        known,
        {value.name for value in graph.input},
        stage,
        lambda name: nodes.get(makers[name].name, "") if name in makers else "",
    )
    made = names - {value.name for value in given} - known
    part = onnx.GraphProto(name=f"stage{stage}")
    for origin, name in same.items():
        if origin != name and origin in names:
            part.node.append(onnx.helper.make_node("Identity", [name], [origin], name=f"{origin}_again"))
    part.node.extend(node for node in graph.node if made.intersection(node.output))
    part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in names)
    part.sparse_initializer.extend(tensor for tensor in graph.sparse_initializer if tensor.values.name in names)
    for number, value in enumerate(given):
        again = any(value.name == known.name for known in part.input)
        part.input.append(value)
        if again:  # two places of a boundary that are one tensor: it comes twice, and is read once
            part.input[-1].name = f"{value.name}_{number}_again"
    _hand_over(part, wanted)
    cut = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name, graph=part)
    cut.opset_import.extend(model.opset_import)
    cut.functions.extend(model.functions)
    return cut


def _origin(name: str, makers: Mapping[str, Any]) -> str:
    """The first name of a tensor that Identity nodes named anew."""
    while name in makers and makers[name].op_type == "Identity":
        name = makers[name].input[0]
    return name


def _hand_over(part: Any, wanted: Sequence[Any]) -> None:
    """Make ``wanted`` the outputs of a graph, each under a name of its own and none under an input's: a tensor that is
    answer and carried, or carried on as it came, is named anew by an Identity."""
    import onnx

    taken = {value.name for value in part.input}
    for number, value in enumerate(wanted):
        output = part.output.add()
        output.CopyFrom(value)
        if value.name in taken:
            output.name = f"{value.name}_{number}_out"
            part.node.append(onnx.helper.make_node("Identity", [value.name], [output.name], name=output.name))
        taken.add(output.name)


def _read(node: Any) -> Iterator[str]:
    """Names of the tensors that a node reads, those that the graphs inside it take from around them too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {value.name for value in (*inner.input, *inner.initializer)}
            own |= {name for each in inner.node for name in each.output}
            for each in inner.node:
                yield from (name for name in _read(each) if name not in own)
            yield from (value.name for value in inner.output if value.name not in own)


def save_stages(stages: Sequence[Any], folder: Path) -> list[str]:
    """Write ``stage0.onnx``, ``stage1.onnx``, ... and return their names. A weight that several stages read is written
    once, to ``shared.bin`` beside them, as ONNX's external data; no other weight is in two of them, the joint graph's
    own sharing being kept."""
    for stage in stages:
        _gather_weights(stage)
    held = [{name: _digest(tensor) for name, tensor in _weights(stage)} for stage in stages]
    counts: dict[bytes, int] = {}
    for digests in held:
        for digest in set(digests.values()):
            counts[digest] = counts.get(digest, 0) + 1
    places: dict[bytes, tuple[int, int]] = {}
    blobs: list[bytes] = []
    end = 0
    for stage, digests in zip(stages, held, strict=True):
        for name, tensor in _weights(stage):
            digest = digests[name]
            if counts[digest] < 2:
                continue
            if digest not in places:
                blob = tensor.raw_data
                places[digest] = end, len(blob)
                blobs.append(blob + bytes(-len(blob) % ALIGNED))
                end += len(blobs[-1])
            _point(tensor, *places[digest])
    if blobs:
        (folder / SHARED).write_bytes(b"".join(blobs))
    names = [f"stage{number}.onnx" for number in range(len(stages))]
    for name, stage in zip(names, stages, strict=True):
        (folder / name).write_bytes(stage.SerializeToString())
    return names


def _gather_weights(model: Any) -> None:
    """Have a graph's weights among its initializers, with their numbers in ``raw_data``."""
    import onnx

    graph = model.graph
    for tensor in graph.initializer:
        if not tensor.HasField("raw_data") and tensor.data_type != onnx.TensorProto.STRING:
            array = onnx.numpy_helper.to_array(tensor)
            if array.nbytes >= SMALL:
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        for tensor in [attribute.t for attribute in node.attribute if attribute.name == "value"]:
            array = onnx.numpy_helper.to_array(tensor)
            if array.nbytes >= SMALL and array.dtype != object:
                graph.initializer.append(onnx.numpy_helper.from_array(array, node.output[0]))
                graph.node.remove(node)


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a graph that count as weights."""
    yield from ((tensor.name, tensor) for tensor in model.graph.initializer if len(tensor.raw_data) >= SMALL)


def _digest(tensor: Any) -> bytes:
    return hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)} ".encode() + tensor.raw_data).digest()


def _point(tensor: Any, offset: int, length: int) -> None:
    """Let a tensor's numbers lie in the shared file."""
    import onnx

    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", SHARED), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
