"""A plan's joint graph and its stages in one runtime, opened by that runtime's own back end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lissom.export.joint import JointOutputs
from lissom.export.plan import Plan
from lissom.runtime.backends import Graph, open_graph
from lissom.runtime.target import Target

SUFFIX = {"openvino": "xml", "onnxruntime": "onnx", "torch": "pt2"}


def joint_and_stages(
    runtime: str, plan: Plan, shape: tuple[int, ...], folder: Path, inputs: np.ndarray | None = None, batch: int = 1
) -> tuple[Graph, list[Graph]]:
    """The joint graph, and the stages that the exporter cuts from it; both in files of ``folder``."""
    target, outputs = Target(runtime, "cpu", batch, 1), JointOutputs.of(plan.decisions)
    joint = folder / f"joint.{SUFFIX[runtime]}"
    stages: list[dict[str, Any]]
    if runtime == "openvino":
        import openvino as ov

        from lissom.export.openvino import joint_graph
        from lissom.export.openvino_cut import cut_graph
        from lissom.export.openvino_shared import share_weights

        graph, _ = joint_graph(plan, target, shape, inputs)
        ov.save_model(graph, str(joint), compress_to_fp16=False)
        files = []
        for number, stage in enumerate(cut_graph(graph, outputs)):
            files.append(folder / f"stage{number}.xml")
            ov.save_model(stage, str(files[-1]), compress_to_fp16=False)
        shared = share_weights(files)
        stages = [{"graph": file.name, "options": {"weights": shared} if shared else {}} for file in files]
    elif runtime == "onnxruntime":
        from lissom.export import onnx as exporter
        from lissom.export.onnx_cut import cut_graph as cut_onnx
        from lissom.export.onnx_cut import save_stages as save_onnx

        model, nodes = exporter.joint_graph(plan, target, shape, inputs)
        joint.write_bytes(model.SerializeToString())
        stages = [{"graph": name, "options": {}} for name in save_onnx(cut_onnx(model, outputs, nodes), folder)]
    else:
        import torch

        from lissom.export.torch_cut import cut_program, save_stages
        from lissom.export.torch_export import joint_program

        program, nodes = joint_program(plan, target, shape)
        torch.export.save(program, joint)
        stages = save_stages(*cut_program(program, outputs, nodes), folder)
    opened = [open_graph(folder / stage["graph"], runtime, stage["options"], 1) for stage in stages]
    return open_graph(joint, runtime, {}, 1), opened


class Compiled:
    """A graph of OpenVINO's as a back end, compiled under settings of the test's own."""

    gpu = None

    def __init__(self, graph: Any, config: dict[str, Any]) -> None:
        import openvino as ov

        self.model = ov.Core().compile_model(graph, "CPU", config)

    def run(self, x: np.ndarray | list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
        found = self.model(x if isinstance(x, list) else [x])
        answers = [np.array(found[i]) for i in range(len(found))]
        return answers[0] if len(answers) == 1 else answers


def differences(joint: Graph, stages: list[Graph], outputs: JointOutputs, x: np.ndarray) -> list[float]:
    """For every tensor that the stages hand out, its largest difference from the joint graph's, relative to the joint's
    largest number. Each stage runs on what the one before it carried."""
    want = joint.run(x)
    assert isinstance(want, list)
    assert len(want) == outputs.count
    found = []
    carried: np.ndarray | list[np.ndarray] = x
    for number, stage in enumerate(stages):
        got = stage.run(carried)
        places = [outputs.answer(number)]
        if number < outputs.exits:
            places += [outputs.score(number), *outputs.boundary(number)]
            assert isinstance(got, list)
            carried = got[2:]
        for tensor, place in zip(got if isinstance(got, list) else [got], places, strict=True):
            assert tensor.shape == want[place].shape
            largest = max(float(np.abs(want[place]).max()), 1e-30)
            found.append(float(np.abs(tensor.astype(np.float64) - want[place]).max()) / largest)
    return found
