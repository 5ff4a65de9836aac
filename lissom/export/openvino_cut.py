"""An OpenVINO joint graph, cut at its boundaries into one graph a stage."""

from __future__ import annotations

from typing import Any

from lissom.errors import NotApplicable
from lissom.export.joint import JointOutputs

__all__ = ["cut_graph", "unshare_weights"]


def cut_graph(graph: Any, outputs: JointOutputs) -> list[Any]:
    """The stages of a joint graph, in order, as graphs of their own; ``graph`` stays as it is.

    Stage 0 takes the input, a later one what its predecessor carried over, one input a tensor. Each but the last gives
    (answer, score, carried...), the last its answer. Raises NotApplicable where a stage would still need something from
    before its cut.
    """
    return [_stage(graph.clone(), stage, outputs) for stage in range(outputs.exits + 1)]


def _stage(graph: Any, stage: int, outputs: JointOutputs) -> Any:
    import openvino as ov
    from openvino import opset13 as op

    results = graph.get_results()
    wanted = [results[outputs.answer(stage)]]
    if stage < outputs.exits:
        # Results of their own: what is carried may be an answer too.
        carried = [op.result(_unquantised(results[place])) for place in outputs.boundary(stage)]
        wanted += [results[outputs.score(stage)], *carried]
    parameters = graph.get_parameters()
    if stage:
        given = [_unquantised(results[place]) for place in outputs.boundary(stage - 1)]
        kept = {result.get_name() for result in wanted}
        parameters = []
        for number, source in enumerate(given):
            name = f"carried_{stage}_{number}" if len(given) > 1 else f"carried_{stage}"
            parameter = op.parameter(list(source.get_shape()), source.get_element_type(), name=name)
            for consumer in source.get_target_inputs():
                # Results of other stages stay behind; one of this stage hands on what it was given.
                if consumer.get_node().get_type_name() != "Result" or consumer.get_node().get_name() in kept:
                    consumer.replace_source_output(parameter.output(0))
            parameters.append(parameter)
        _check_alone(wanted, graph.get_parameters(), stage)
    return ov.Model([result.input_value(0) for result in wanted], parameters, f"stage{stage}")


def unshare_weights(graph: Any) -> None:
    """Give every consumer of a float32 weight a constant of its own, in place.

    Exits that answer by the model's own end share its weights. A quantised weight that several layers read is scaled
    back in another order than one that a single layer reads, so that the last bit of an answer would depend on which
    other exits stand in the graph, and the stages would differ from it.
    """
    from openvino import opset13 as op

    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32":
            continue
        if len(node.get_output_shape(0)) < 2:
            continue
        for number, consumer in enumerate(list(node.output(0).get_target_inputs())[1:], 1):
            copy = op.constant(node.data.copy())
            copy.set_friendly_name(f"{node.get_friendly_name()}_{number}")
            consumer.replace_source_output(copy.output(0))


def _unquantised(result: Any) -> Any:
    """The tensor behind a boundary's Result as it was before the quantiser rounded it for its consumers. What rounds it
    then stands in the stages that read it, and rounds the same numbers the same way."""
    source = result.input_value(0)
    while source.get_node().get_type_name() == "FakeQuantize":
        source = source.get_node().input_value(0)
    return source


def _check_alone(results: list[Any], inputs: list[Any], stage: int) -> None:
    """Raise NotApplicable, with the operations on the way, where a result still depends on the joint graph's input."""
    names = {node.get_name() for node in inputs}
    todo = list(results)
    seen: set[str] = set()
    after: dict[str, Any] = {}
    while todo:
        node = todo.pop()
        for value in node.input_values():
            source = value.get_node()
            if source.get_name() in seen:
                continue
            seen.add(source.get_name())
            after[source.get_name()] = node
            if source.get_name() in names:
                way = [node]
                while way[-1].get_name() in after:
                    way.append(after[way[-1].get_name()])
                path = " > ".join(n.get_friendly_name() for n in way[:6])
                raise NotApplicable(f"stage {stage} cannot stand alone: it still reads the input through {path}")
            todo.append(source)
