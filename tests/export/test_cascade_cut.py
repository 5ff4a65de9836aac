"""A cascade's artifact: the cut answers what the joint graph answers, and thresholds send images to the second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.export.exits import fit_exits
from lissom.export.exporting import export_plan, run_artifact, run_stages
from lissom.export.joint import JointOutputs, Score
from lissom.export.openvino import joint_graph
from lissom.export.openvino_cut import cut_graph
from lissom.export.plan import Exit, Plan
from lissom.layers.cascade import Cascade as Both
from lissom.layers.cascade import Member, PostCheck
from lissom.runtime.decisions import confidence, difference, normalised_entropy
from lissom.runtime.openvino_graph import import_openvino
from lissom.runtime.predictor import load
from lissom.runtime.target import Target
from lissom.techniques.recipe import Recipe

TARGET = Target("openvino", "cpu", 1, 1)
CONFIG = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
SIZE = 32
SHAPE = (3, SIZE, SIZE)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=48, num_heads=3, depth=2, num_classes=10
        )
    else:
        model = timm.create_model(name, num_classes=10)
        with torch.no_grad():
            model.train()(torch.randn(8, *SHAPE))  # BatchNorm has seen data
    return model.eval()


def plan_of(name: str, recipe: str) -> Plan:
    class Classification:
        kind, shape, preprocessing = "classification", SHAPE, None

    return Recipe.parse(recipe).apply(Plan.of(network(name), SHAPE), Classification(), TARGET)  # type: ignore[arg-type]


PLAIN = "int8(model_type='plain', linear='matmul', products=8)"
CONV = "int8(model_type='plain', linear='conv', products=32)"
CASES = [
    ("resnet18", "cascade(first=(low_rank(skip=())))"),
    ("vit", "cascade(first=(low_rank()), score='entropy')"),
    ("vit", "cascade(first=(low_rank()), postcheck=False, score='confidence')"),
]
INT8 = [
    ("resnet18", f"cascade(first=(low_rank(skip=())), score='entropy') + {PLAIN}"),
    ("resnet18", f"fuse() + cascade(first=({PLAIN}))"),
    ("mobilenetv3_small_100", f"cascade(first=({PLAIN}), second=(low_rank(skip=())), score='confidence')"),
    ("vit", f"cascade(first=(low_rank() + {PLAIN}), second=({PLAIN}))"),
    ("vit", f"cascade(first=({CONV}))"),
    ("vit", f"cascade(first=(low_rank()), postcheck=False) + {CONV}"),
    ("convnext_atto", f"cascade() + {PLAIN}"),
]
cases = [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in INT8)]


@pytest.mark.parametrize(("name", "recipe"), cases)
def test_cut_equals_joint(name: str, recipe: str) -> None:
    ov = import_openvino()
    plan = plan_of(name, recipe)
    inputs = np.random.default_rng(0).standard_normal((8, *SHAPE)).astype(np.float32)
    graph, _ = joint_graph(plan, TARGET, SHAPE, inputs)
    fake = {op.get_friendly_name() for op in graph.get_ops() if op.get_type_name() == "FakeQuantize"}
    assert bool(fake) == ("int8" in recipe)
    outputs = JointOutputs.of(plan.decisions)
    core = ov.Core()
    joint = core.compile_model(graph, "CPU", CONFIG)
    first, second = (core.compile_model(stage, "CPU", CONFIG) for stage in cut_graph(graph, outputs))
    with torch.no_grad():
        eager = plan.model(torch.from_numpy(inputs))
    for number, x in enumerate(inputs):
        want = [np.array(joint([x[None]])[i]) for i in range(outputs.count)]
        got = [np.array(first([x[None]])[i]) for i in range(len(first.outputs))]
        np.testing.assert_array_equal(got[0], want[outputs.answer(0)])
        np.testing.assert_array_equal(got[1], want[outputs.score(0)])
        carried = got[2:]
        np.testing.assert_array_equal(carried[0], x[None])  # the image itself
        for mine, place in zip(carried, outputs.boundary(0), strict=True):
            np.testing.assert_array_equal(mine, want[place])
        np.testing.assert_array_equal(np.array(second(carried)[0]), want[outputs.answer(1)])
        if not fake:
            for mine, other in zip(want[:2], eager, strict=True):
                np.testing.assert_allclose(mine[0], other[number].numpy(), rtol=1e-3, atol=1e-4)


def quantised(plan: Plan) -> set[str]:
    """Members with a layer whose weights are in 8 bits, as far as node names tell."""
    inputs = np.random.default_rng(0).standard_normal((8, *SHAPE)).astype(np.float32)
    graph, nodes = joint_graph(plan, TARGET, SHAPE, inputs)
    found = set()
    for op in graph.get_ordered_ops():
        if op.get_type_name() in ("Convolution", "MatMul", "GroupConvolution"):
            source = op.input_value(1).get_node()
            while source.get_type_name() in ("Reshape", "Convert", "Transpose"):
                source = source.input_value(0).get_node()
            if source.get_type_name() in ("FakeQuantize", "Multiply", "Subtract"):
                found.add(nodes.get(op.get_friendly_name().partition("/")[0], "?").partition(".")[0])
    return found


@pytest.mark.full
def test_int8_of_one_member_leaves_the_other_in_float() -> None:
    assert quantised(plan_of("resnet18", f"cascade(first=({PLAIN}))")) == {"first"}
    assert quantised(plan_of("resnet18", f"cascade(first=(low_rank(skip=())), second=({PLAIN}))")) == {"second"}
    assert quantised(plan_of("resnet18", f"cascade(first=(low_rank(skip=()))) + {PLAIN}")) == {"first", "second"}


def test_linear_layers_become_convolutions_in_one_member_only() -> None:
    from lissom.export.linear_as_conv import linear_as_conv

    plan = plan_of("vit", "cascade(first=(low_rank()))")
    graph, nodes = joint_graph(plan, TARGET, SHAPE, None)
    path = {op.get_friendly_name(): nodes.get(op.get_friendly_name().partition("/")[0], "") for op in graph.get_ops()}
    linear_as_conv(graph, lambda name: path.get(name, "").startswith("first."))
    made = [op.get_friendly_name().removesuffix("/conv") for op in graph.get_ops()
            if op.get_friendly_name().endswith("/conv")]  # fmt: skip
    assert made
    assert all(path[name].startswith("first.network.") for name in made)


def trained_pair(seed: int, n: int) -> tuple[Plan, np.ndarray, np.ndarray]:
    """Two small networks that know different things, and images with labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    x = rng.standard_normal((n, 3, 8, 8)).astype(np.float32)
    x[np.arange(n), 0, y, 0] += 4.0 * (y < 3)  # the first class of pixels tells three of the classes
    x[np.arange(n), 1, y, 1] += 4.0 * (y > 0)

    def member(channel: int) -> nn.Module:
        linear = nn.Linear(192, 4)
        with torch.no_grad():
            linear.weight.zero_()
            linear.bias.zero_()
            for label in range(4):
                linear.weight[label, 64 * channel + 8 * label + channel] = 1.5
        return nn.Sequential(nn.Flatten(), linear)

    model = Both(Member(member(0)), Member(member(1))).eval()
    leaving = Exit("first", "difference", 2.0, cost=1.0, heads=1.0, carries=model.carries)
    return replace(Plan.of(model, (3, 8, 8)), decisions=(leaving,)), x, y


def test_thresholds_are_fitted_and_the_surer_answer_stands(tmp_path: Path) -> None:
    plan, x, y = trained_pair(0, 2000)
    target = replace(TARGET, batch=4)
    artifact = export_plan(plan, target, tmp_path / "a", shape=(3, 8, 8), verify=x[:32], classes=list("abcd"))
    assert artifact.plan["verification"]["relative_error"] < 1e-4
    answers, scores = run_stages(artifact, x, 1)
    first = answers[0]
    with torch.no_grad():
        alone = plan.model.second(torch.from_numpy(x)).numpy()  # type: ignore[operator]
    np.testing.assert_allclose(scores[:, 0], difference(first), atol=1e-5)
    clear = np.abs(difference(alone) - difference(first)) > 1e-5
    want = np.where((difference(alone) > difference(first))[:, None], alone, first)
    np.testing.assert_allclose(answers[1][clear], want[clear], atol=1e-4)
    fitted, chosen, found = fit_exits(artifact, plan.decisions, answers, scores, lambda a: (a.argmax(-1) == y) * 1.0)
    assert 0 < found.shares[0] < 1
    right = [(a.argmax(-1) == y).mean() for a in (answers[0], alone, answers[1], chosen)]
    assert right[2] > max(right[:2]) + 0.02  # they make up for each other
    assert right[3] >= right[2] - 0.02
    # At run time: the first's answer above the threshold, the surer of both below it.
    predictor = load(fitted.path, 1)
    got, stages = predictor.answer(x[:201])
    above = scores[:201, 0] > fitted.plan["decisions"][0]["threshold"]
    np.testing.assert_array_equal(stages, np.where(above, 0, 1))
    np.testing.assert_array_equal(got, np.where(above[:, None], answers[0][:201], answers[1][:201]))
    np.testing.assert_array_equal(run_artifact(fitted, x[:201], 1), got)
    assert predictor.place(0) == "left at exit 1 of 1, after first"


def test_answers_that_are_both_quite_sure_do_not_hang_on_the_runtimes_last_bit(tmp_path: Path) -> None:
    """Scores of 1 in float32 on both sides: the export still verifies, since doubts are compared."""
    plan, x, _ = trained_pair(1, 64)
    for place in ("first", "second"):
        network = plan.model.get_submodule(f"{place}.network.1")
        with torch.no_grad():
            network.weight.mul_(9)  # type: ignore[operator,union-attr]
    with torch.no_grad():
        sure = difference(plan.model(torch.from_numpy(x))[1].numpy())
    assert (1 - sure < 1e-7).mean() > 0.3
    artifact = export_plan(plan, TARGET, tmp_path / "a", shape=(3, 8, 8), verify=x)
    assert artifact.plan["verification"]["relative_error"] < 1e-3


def test_the_scores_in_the_graph_are_those_of_the_search() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3
    known = {"difference": difference, "confidence": confidence, "normalised_entropy": lambda z: -normalised_entropy(z)}
    for rule, score in known.items():
        np.testing.assert_allclose(Score(rule)(logits).numpy(), score(logits.numpy()), atol=1e-6)
    assert PostCheck("entropy").score == "entropy"
