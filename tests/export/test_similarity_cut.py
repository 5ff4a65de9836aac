"""Exits by similarity, exported: the cut artifact answers and scores as the joint graph does, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError
from lissom.export.exits import fit_exits
from lissom.export.exporting import export_plan, run_stages
from lissom.export.joint import Joint, JointOutputs, Score
from lissom.export.openvino import ignored_nodes, joint_graph
from lissom.export.openvino_cut import cut_graph
from lissom.export.plan import Plan
from lissom.layers.saturation import similarity
from lissom.runtime import decisions
from lissom.runtime.openvino_graph import import_openvino
from lissom.runtime.predictor import load
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.int8 import Int8
from lissom.techniques.low_rank import LowRank
from lissom.techniques.mue import SimilarityExit
from lissom.techniques.recipe import Recipe
from lissom.techniques.token_clustering import ClusterTokens
from lissom.training.loop import fit
from lissom.training.methods.layerwise_loss import LayerwiseTaskLoss

TARGET = Target("openvino", "cpu", 2, 1)
CONFIG = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
SHAPE = (3, 32, 32)


def vit(**other: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 5, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **other}).eval()


def task(count: int = 16, seed: int = 0) -> Task:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, count)
    shift = (y - 1.5) * rng.uniform(0.4, 1.0, count)  # clearer in some images than in others
    x = (0.5 * rng.standard_normal((count, *SHAPE)) + shift[:, None, None, None]).astype(np.float32)
    split = ArraySplit("made", x, y.astype(np.int64))
    return Task(choose=split, report=split, fit=split, shape=SHAPE, classes=tuple("abcd"), name="made")


RECIPES = {
    "blocks in a row": (SimilarityExit(at=(1, 2, 3)),),
    "low rank and clustered tokens": (
        LowRank(ratio=2.0), ClusterTokens(after=2, grid=(2, 3)), SimilarityExit(at=(1, 2)),
    ),
}  # fmt: skip
INT8 = [Int8(model_type=m, linear=form, products=8) for m, form in (("plain", "matmul"), ("transformer", "conv"))]
CASES = [pytest.param(name, None, id=name, marks=[pytest.mark.full] * n) for n, name in enumerate(RECIPES)] + [
    pytest.param(name, number, id=f"{name}, int8 {number}", marks=pytest.mark.full)
    for name in RECIPES
    for number in range(len(INT8))
]  # fmt: skip


@pytest.mark.parametrize(("name", "quantised"), CASES)
def test_cut_equals_joint(name: str, quantised: int | None) -> None:
    ov = import_openvino()
    of = task()
    techniques = RECIPES[name] if quantised is None else (*RECIPES[name], INT8[quantised])
    plan = Recipe(techniques).apply(Plan.of(vit(), SHAPE), of, TARGET)
    inputs = of.choose.inputs(slice(0, 8))
    graph, nodes = joint_graph(plan, TARGET, SHAPE, inputs)
    assert ("FakeQuantize" in {op.get_type_name() for op in graph.get_ops()}) == (quantised is not None)
    if quantised is not None:
        # Similarities stay in float, and the ends that exits share with the model are in the model's precision.
        spared = {nodes.get(n.partition("/")[0]) for n in ignored_nodes(graph, nodes, plan.precision)}
        assert {f"score.{i}" for i in range(len(plan.decisions))} <= spared
        assert "head" not in spared
    outputs = JointOutputs.of(plan.decisions)
    core = ov.Core()
    joint = core.compile_model(graph, "CPU", CONFIG)
    cut = cut_graph(graph, outputs)
    assert [len(stage.inputs) for stage in cut] == [1] * len(cut)
    stages = [core.compile_model(stage, "CPU", CONFIG) for stage in cut]
    for x in (inputs[:2], inputs[2:4], inputs[4:6]):
        found = joint([x])
        want = [np.array(found[i]) for i in range(outputs.count)]
        carried = x
        for number, stage in enumerate(stages):
            result = stage([carried])
            got = [np.array(result[i]) for i in range(len(result))]
            np.testing.assert_array_equal(got[0], want[outputs.answer(number)])
            if number < outputs.exits:
                np.testing.assert_array_equal(got[1], want[outputs.score(number)])
                (place,) = outputs.boundary(number)
                np.testing.assert_array_equal(got[2], want[place])
                carried = got[2]


@torch.no_grad()
def test_the_joint_graphs_scores_are_cosines_of_block_and_input() -> None:
    model = vit()
    plan = SimilarityExit(at=(0, 2)).apply(Plan.of(model, SHAPE), task())
    x = torch.randn(3, *SHAPE)
    outputs = JointOutputs.of(plan.decisions)
    found = Joint(plan.model, plan.decisions)(x)
    h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    states = [h]
    for block in model.blocks:
        states.append(block(states[-1]))
    for number, block in enumerate((0, 2)):
        torch.testing.assert_close(found[outputs.boundary(number)[0]], states[block + 1])
        want = similarity(states[block], states[block + 1])
        torch.testing.assert_close(found[outputs.score(number)], want)
        own = decisions.similarity(states[block].numpy(), states[block + 1].numpy())
        np.testing.assert_allclose(found[outputs.score(number)].numpy(), own, rtol=1e-5)
    with pytest.raises(LissomError, match="by confidence, entropy, difference"):
        Score("mood")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, Task]:
    """A network whose exits were trained with it, exported."""
    of = task(512)
    plan = SimilarityExit(at=(2, 3), risk=5.0).apply(Plan.of(vit(), SHAPE), of)
    fit(plan.model, of, method=LayerwiseTaskLoss(label_smoothing=0.0), epochs=6, batch=32, lr=2e-3, augment=False)
    path = tmp_path_factory.mktemp("similar") / "artifact"
    export_plan(plan, TARGET, path, shape=SHAPE, verify=of.choose.inputs(slice(0, 8)), classes=list("abcd"))
    return plan, path, of


@pytest.mark.full
def test_samples_leave_by_their_similarity_with_a_promise(staged: tuple[Plan, Path, Task]) -> None:
    plan, path, _ = staged
    artifact = load(path).artifact
    assert [d["rule"] for d in artifact.plan["decisions"]] == ["similarity"] * 2
    assert artifact.plan["verification"]["relative_error"] < 1e-4
    of = task(800, seed=1)
    inputs, labels = of.choose.inputs(slice(0, 800)), of.choose.labels
    answers, scores = run_stages(artifact, inputs, 1)
    assert scores.shape == (800, 2)
    assert float(np.abs(scores).max()) <= 1.0
    fitted, chosen, calibration = fit_exits(
        artifact, plan.decisions, answers, scores, lambda a: of.scores(a, labels), seed=0
    )
    right = [float((answer.argmax(-1) == labels).mean()) for answer in answers]
    assert right[-1] > 0.7
    assert sum(calibration.shares[:-1]) > 0.1, right
    got, left = load(path).answer(inputs)
    np.testing.assert_array_equal(got, chosen)
    np.testing.assert_allclose(np.bincount(left, minlength=3) / len(left), calibration.shares)
    assert right[-1] - float((got.argmax(-1) == labels).mean()) <= 0.05
    assert load(path).place(0).endswith("after blocks.2")
    assert fitted.plan["decisions"][0]["rule"] == "similarity"


@pytest.mark.full
def test_cut_equals_joint_in_an_artifact_of_one_input(tmp_path: Path) -> None:
    """At the batch that is measured, one, stage by stage as the runtime runs them."""
    of = task()
    plan = SimilarityExit(at=(1, 3)).apply(Plan.of(vit(), SHAPE), of)
    artifact = export_plan(plan, replace(TARGET, batch=1), tmp_path / "a", shape=SHAPE)
    inputs = of.choose.inputs(slice(0, 6))
    answers, scores = run_stages(artifact, inputs, 1)
    with torch.no_grad():
        found = Joint(plan.model, plan.decisions)(torch.from_numpy(inputs))
    for mine, other in zip(answers, found[:3], strict=True):
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-4)
    np.testing.assert_allclose(scores, torch.stack(found[3:5], 1).numpy(), atol=1e-5)
