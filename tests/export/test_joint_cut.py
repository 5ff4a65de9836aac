"""The cut artifact answers what the joint graph answers, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.exporting import export_plan, run_artifact, run_stages
from lissom.export.joint import Joint, JointOutputs, Score
from lissom.export.openvino import joint_graph
from lissom.export.openvino_cut import cut_graph
from lissom.export.plan import Exit, Plan
from lissom.layers.exits import Exits, attach_exits
from lissom.runtime.backends import Stages
from lissom.runtime.decisions import Decision, entropy, first_exit, patience_exit, patient_and_confident_exit
from lissom.runtime.openvino_graph import import_openvino
from lissom.runtime.predictor import load
from lissom.runtime.target import Target
from lissom.techniques.int8 import Int8

TARGET = Target("openvino", "cpu", 1, 1)
CONFIG = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}


class Mean(nn.Module):
    """A head for any output: the mean over all but the batch and the channels, and a linear layer."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        last = len(shape) == 3 or shape[1] == shape[2]  # tokens, or a map with its channels last
        self.over = tuple(range(1, len(shape) - 1)) if last else (2, 3)
        self.linear = nn.Linear(shape[-1] if last else shape[1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean(self.over))


def with_exits(name: str, size: int, at: tuple[str, ...], **arguments: object) -> Plan:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments)
    shapes: dict[str, torch.Size] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: shapes.update({path: o.shape}))
        for path in at
    ]
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))  # BatchNorm has seen data
    for handle in handles:
        handle.remove()
    attach_exits(model.eval(), Exits(at, [Mean(shapes[path]) for path in at]))
    return replace(Plan.of(model, (3, size, size)), decisions=tuple(Exit(path) for path in at))


CASES = [
    ("resnet18", 64, ("layer1.0", "layer3"), {}),
    ("mobilenetv3_small_100", 64, ("blocks.1", "blocks.3"), {}),
    ("convnext_atto", 64, ("stages.1", "stages.2.blocks.2"), {}),
    ("regnety_002", 64, ("s2", "s3"), {}),
    ("vit_tiny_patch16_224", 64, ("blocks.1", "blocks.2"), {"img_size": 64, "depth": 4}),
    ("swin_tiny_patch4_window7_224", 56, ("layers.1", "layers.2.blocks.2"), {"img_size": 56}),
]
FEW = [CASES[0], CASES[4]]
rest = [pytest.param(*case, marks=pytest.mark.full) for case in CASES if case not in FEW]


@pytest.mark.parametrize(("name", "size", "at", "arguments"), [*FEW, *rest])
def test_cut_equals_joint(name: str, size: int, at: tuple[str, ...], arguments: dict[str, object]) -> None:
    ov = import_openvino()
    plan = with_exits(name, size, at, **arguments)
    plan = Int8(model_type="plain", linear="matmul", products=8).apply(plan, None)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((8, 3, size, size)).astype(np.float32)
    graph, _ = joint_graph(plan, TARGET, (3, size, size), inputs)
    assert "FakeQuantize" in {op.get_type_name() for op in graph.get_ops()}
    outputs = JointOutputs.of(plan.decisions)
    core = ov.Core()
    joint = core.compile_model(graph, "CPU", CONFIG)
    stages = [core.compile_model(stage, "CPU", CONFIG) for stage in cut_graph(graph, outputs)]
    for x in inputs[:4]:
        want = [np.array(joint([x[None]])[i]) for i in range(outputs.count)]
        carried = x[None]
        for number, stage in enumerate(stages):
            result = stage([carried])
            got = [np.array(result[i]) for i in range(len(result))]
            np.testing.assert_array_equal(got[0], want[outputs.answer(number)])
            if number < len(at):
                np.testing.assert_array_equal(got[1], want[outputs.score(number)])
                (carried_place,) = outputs.boundary(number)
                np.testing.assert_array_equal(got[2], want[carried_place])
                carried = got[2]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, np.ndarray]:
    plan = with_exits("resnet18", 32, ("layer1", "layer3"))
    inputs = np.random.default_rng(1).standard_normal((12, 3, 32, 32)).astype(np.float32)
    target = replace(TARGET, batch=4)
    path = tmp_path_factory.mktemp("staged") / "artifact"
    export_plan(plan, target, path, shape=(3, 32, 32), verify=inputs, classes=[f"c{i}" for i in range(10)])
    return plan, path, inputs


def test_nobody_leaves_before_thresholds_are_fitted(staged: tuple[Plan, Path, np.ndarray]) -> None:
    plan, path, inputs = staged
    artifact = load(path).artifact
    assert [d["threshold"] for d in artifact.plan["decisions"]] == [None, None]
    assert artifact.plan["verification"]["relative_error"] < 1e-4
    with torch.no_grad():
        want = plan.model(torch.from_numpy(inputs))
    answers, scores = run_stages(artifact, inputs, 1)
    for mine, other in zip(answers, want, strict=True):
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-4)
    np.testing.assert_allclose(scores[:, 0], want[0].softmax(-1).amax(-1).numpy(), atol=1e-5)
    np.testing.assert_array_equal(run_artifact(artifact, inputs, 1), answers[-1])


def test_samples_leave_where_their_score_is_above_the_threshold(staged: tuple[Plan, Path, np.ndarray]) -> None:
    _, path, inputs = staged
    artifact = load(path).artifact
    answers, scores = run_stages(artifact, inputs, 1)
    low, high = float(np.median(scores[:, 0])), float(np.quantile(scores[:, 1], 0.7))
    decisions = [{**d, "threshold": t} for d, t in zip(artifact.plan["decisions"], (low, high), strict=True)]
    changed = artifact.with_decisions(decisions, {"shares": [0.5, 0.2, 0.3]})
    assert changed.digest != artifact.digest
    want = np.where(scores[:, 0] > low, 0, np.where(scores[:, 1] > high, 1, 2))
    assert set(want) == {0, 1, 2}
    predictor = load(path)
    got, stages = predictor.answer(inputs)
    np.testing.assert_array_equal(stages, want)
    np.testing.assert_array_equal(got, np.stack(answers)[want, np.arange(len(inputs))])
    np.testing.assert_array_equal(run_artifact(changed, inputs, 1), got)
    rows = predictor.read(got, [str(i) for i in range(len(inputs))], 1, stages)
    assert [row.exit for row in rows] == list(want)
    assert predictor.place(1) == "left at exit 2 of 2, after layer3"
    assert predictor.place(2) == "ran to the end"
    times = Stages(changed, 1).time_exits(inputs[:4])
    assert len(times) == 3
    assert times == sorted(times)


def test_the_rules_score() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    shares = logits.softmax(-1)
    torch.testing.assert_close(Score("confidence")(logits), shares.amax(-1))
    torch.testing.assert_close(Score("entropy")(logits), (shares * shares.log()).sum(-1))


def decided(rule: str, patience: int = 2, quantised: bool = False) -> tuple[Plan, Any, JointOutputs]:
    """A network with four exits, all by one rule, and its joint graph; its exits agree and disagree."""
    places = ("layer1.0", "layer1.1", "layer2.0", "layer3")
    plan = with_exits("resnet18", 32, places)
    with torch.no_grad():
        answers = plan.model(torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2)
        for head, answer in zip(plan.model.exits.heads, answers, strict=False):
            # Logits that differ from input to input more than from class to class.
            head.linear.weight.mul_(3 / answer.std(0).mean())
            head.linear.bias.copy_(3 / answer.std(0).mean() * (head.linear.bias - answer.mean(0)))
    exits = tuple(replace(e, rule=rule, patience=patience) for e in plan.decisions)
    plan = replace(plan, decisions=exits)
    if quantised:
        plan = Int8(model_type="plain", linear="matmul", products=8).apply(plan, None)  # type: ignore[arg-type]
    inputs = np.random.default_rng(2).standard_normal((16, 3, 32, 32)).astype(np.float32) * 2
    graph, _ = joint_graph(plan, replace(TARGET, batch=4), (3, 32, 32), inputs)
    return plan, graph, JointOutputs.of(exits)


@pytest.mark.parametrize(
    ("rule", "patience", "quantised"),
    [("patience", 2, False), ("patient_and_confident", 3, False),
     pytest.param("patience", 2, True, marks=pytest.mark.full),
     pytest.param("patient_and_confident", 2, True, marks=pytest.mark.full)],
)  # fmt: skip
def test_rules_of_patience_are_cut_exactly_and_are_the_published_ones(
    rule: str, patience: int, quantised: bool
) -> None:
    ov = import_openvino()
    _, graph, outputs = decided(rule, patience, quantised)
    assert [len(outputs.boundary(i)) for i in range(4)] == [2, 2, 2, 1]  # the last stage decides nothing
    cut = cut_graph(graph, outputs)
    assert [len(stage.inputs) for stage in cut] == [1, 2, 2, 2, 1]
    core = ov.Core()
    joint, *stages = (core.compile_model(g, "CPU", CONFIG) for g in (graph, *cut))
    inputs = np.random.default_rng(3).standard_normal((32, 3, 32, 32)).astype(np.float32) * 2
    logits, scores = [], []
    for start in range(0, len(inputs), 4):
        carried = [inputs[start : start + 4]]
        found = joint(carried)
        want = [np.array(found[i]) for i in range(outputs.count)]
        logits.append(np.stack(want[:4], 1))
        scores.append(np.stack(want[5:9], 1))
        for number, stage in enumerate(stages):
            result = stage(carried)
            got = [np.array(result[i]) for i in range(len(result))]
            places = (outputs.answer(number),)
            if number < 4:
                places += (outputs.score(number), *outputs.boundary(number))
            for tensor, place in zip(got, places, strict=True):
                np.testing.assert_array_equal(tensor, want[place])
            carried = got[2:]
    every, score = np.concatenate(logits), np.concatenate(scores)
    if rule == "patience":
        for count in (1, 2, 3, 4):
            np.testing.assert_array_equal(first_exit(score, np.full(4, count - 0.5)), patience_exit(every, count))
        assert len(set(score[:, 3].tolist())) > 1  # runs of several lengths were met
    else:
        for threshold in np.quantile(entropy(every), (0.2, 0.5, 0.8)):
            left = first_exit(score, np.full(4, -threshold))
            np.testing.assert_array_equal(left, patient_and_confident_exit(every, threshold, patience))
        assert (score[:, : patience - 1] == score[0, 0]).all()  # nobody can have been sure so often yet


def test_a_rule_of_patience_is_one_of_all_exits() -> None:
    plan = with_exits("resnet18", 32, ("layer1", "layer3"))
    with pytest.raises(LissomError, match="one of all exits"):
        Joint(plan.model, [Exit("layer1"), Exit("layer3", "patience")])
    with pytest.raises(LissomError, match="patience, patient_and_confident, not 'mood'"):
        Joint(plan.model, [Exit("layer1", "mood"), Exit("layer3", "mood")])


def test_artifacts_leave_by_patience(tmp_path: Path) -> None:
    plan, _, _ = decided("patience")
    inputs = np.random.default_rng(4).standard_normal((12, 3, 32, 32)).astype(np.float32) * 2
    artifact = export_plan(plan, replace(TARGET, batch=4), tmp_path / "a", shape=(3, 32, 32))
    answers, scores = run_stages(artifact, inputs, 1)
    decisions = [{**d, "threshold": 1.5} for d in artifact.plan["decisions"]]
    changed = artifact.with_decisions(decisions, {"shares": [0.0, 0.5, 0.2, 0.1, 0.2]})
    want = patience_exit(np.stack(answers[:4], 1), 2)
    assert len(set(want)) > 1
    predictor = load(changed.path)
    got, stages = predictor.answer(inputs)
    np.testing.assert_array_equal(stages, want)
    np.testing.assert_array_equal(got, np.stack(answers)[want, np.arange(len(inputs))])
    assert Decision.from_json(changed.plan["decisions"][0]).rule == "patience"
    assert scores[:, 0].tolist() == [1.0] * 12


def test_a_stage_that_needs_the_input_again_is_refused() -> None:
    """The cut looks for itself, whatever the analysis of the model said."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.second(self.first(x)) + x).mean((2, 3))

    model = Again().eval()
    attach_exits(model, Exits(["first"], [Mean(torch.Size((2, 3, 9, 8)))]))
    plan = replace(Plan.of(model, (3, 9, 8)), decisions=(Exit("first"),))
    graph, _ = joint_graph(plan, TARGET, (3, 9, 8), None)
    with pytest.raises(NotApplicable, match="stage 1 cannot stand alone: it still reads the input through"):
        cut_graph(graph, JointOutputs.of(plan.decisions))
