"""token_clustering on other people's models: what it makes of them, what it refuses, what is exported."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.exporting import export_plan, run_artifact
from lissom.export.plan import Plan, Precision
from lissom.layers.exits import exits_of
from lissom.layers.token_clustering import token_clusters_of, token_grid
from lissom.models.factory import create_model
from lissom.runtime.backends import inspect, open_graph
from lissom.runtime.target import Target
from lissom.tasks.segmentation import SegmentationTask
from lissom.tasks.task import Task
from lissom.techniques.recipe import Recipe
from lissom.techniques.token_clustering import ClusterTokens

SHAPE = (3, 32, 32)
TARGET = Target("openvino", threads=1)
TASK = Task(choose=None, report=None, shape=SHAPE)
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5}
INPUTS = np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float32)


def spread_out(model: nn.Module) -> nn.Module:
    """timm's small initial values would leave the answers nearly constant."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def vit():
    return spread_out(VisionTransformer(**{**SMALL, "depth": 3}))


@pytest.fixture(scope="module")
def segmenter():
    return create_model("vit_segmenter", img_size=32, patch_size=4, embed_dim=24, depth=3, num_classes=5).eval()


def applied(model, text="token_clustering()", task=TASK):
    return Recipe.parse(text).apply(Plan.of(model, task.shape), task, TARGET)


@torch.no_grad()
def answers(model):
    return model(torch.from_numpy(INPUTS))


def test_defaults_and_the_original_stays(vit):
    before = copy.deepcopy(vit.state_dict())
    plan = applied(vit)
    found = token_clusters_of(plan.model)
    assert (found.after, found.grid_out, found.clustering.iterations, found.reconstruction) == (1, (6, 6), 5, None)
    assert found.clustering.temperature == "auto"
    assert plan.notes == ("token_clustering: 8 x 8 tokens become 6 x 6 after 1 of 3 blocks",)
    assert token_clusters_of(vit) is None
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert plan.model.state_dict().keys() == before.keys()
    assert not torch.equal(answers(plan.model), answers(vit))
    # Resolved by the depth alone: a third of the blocks.
    deep = applied(VisionTransformer(**{**SMALL, "depth": 12}))
    assert token_clusters_of(deep.model).after == 4


def test_the_knobs_reach_the_layers(vit):
    text = "token_clustering(after=2, grid=(4, 7), iterations=3, window=3, temperature=0.5, k=9, reconstruct=True)"
    assert str(Recipe.parse(text)) == text
    plan = applied(vit, text)
    found = token_clusters_of(plan.model)
    clustering, reconstruction = found.clustering, found.reconstruction
    assert (found.after, found.grid_out, clustering.iterations, clustering.window) == (2, (4, 7), 3, 3)
    assert (clustering.temperature, reconstruction.temperature, reconstruction.k) == (0.5, 0.5, 9)
    assert reconstruction.normalize == "l1"
    assert "rebuilt behind the last block" in plan.notes[0]


def test_tokens_are_rebuilt_where_the_task_wants_maps(segmenter):
    task = SegmentationTask(choose=None, report=None, shape=SHAPE, classes=tuple("abcde"))
    plan = applied(segmenter, task=task)
    found = token_clusters_of(plan.model)
    assert found.rebuilt == "blocks.2"
    assert token_grid(plan.model, "blocks.2") == (8, 8)
    assert answers(plan.model).shape == (4, 5, 32, 32)
    logits = applied(segmenter, "token_clustering(reconstruct='head')", task)
    assert "in the output of head" in logits.notes[0]
    assert answers(logits.model).shape == (4, 5, 32, 32)
    with pytest.raises(NotApplicable, match="reconstruct=True rebuilds all tokens"):
        applied(segmenter, "token_clustering(reconstruct=False)", task)
    with pytest.raises(NotApplicable, match=r"'decoder\.scale', and the model has no such module"):
        applied(segmenter, "token_clustering(reconstruct='decoder.scale')", task)


def test_the_space_is_spread_over_depth_and_tokens():
    wide = VisionTransformer(**{**SMALL, "img_size": (32, 64), "depth": 12})
    space = ClusterTokens.space(Plan.of(wide), TARGET)
    assert space["after"] == (2, 4, 6, 8)
    shares = [h * w / 128 for h, w in space["grid"]]
    np.testing.assert_allclose(sorted(shares), (0.25, 0.36, 0.5, 0.75), atol=0.1)
    assert all(w == pytest.approx(2 * h, abs=1) for h, w in space["grid"])
    assert ClusterTokens.space(Plan.of(nn.Linear(3, 3)), TARGET) == {}
    for after in space["after"]:
        for grid in space["grid"]:
            ClusterTokens(after=after, grid=grid).check(Plan.of(wide), TARGET)


class Windowed(VisionTransformer):
    """Blocks that attend in windows, and say so."""

    def __init__(self) -> None:
        super().__init__(**SMALL)
        self.blocks[4].window_size = 4


class SizedBlock(nn.Module):
    def forward(self, x, height, width):
        return x


class Sized(VisionTransformer):
    """A block that must be told the map's size."""

    def __init__(self) -> None:
        super().__init__(**SMALL)
        self.blocks[5] = SizedBlock()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "Sequential has none that is known"),
        (lambda: create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), "has none that is known"),
        (lambda: Beit(**SMALL, use_rel_pos_bias=True), r"8 x 8 grid \(blocks\.2\.attn\.relative_position"),
        (lambda: Beit(**SMALL, use_shared_rel_pos_bias=True), r"\(rel_pos_bias\)"),
        (lambda: Eva(**SMALL, use_rot_pos_emb=True), r"\(rope\)"),
        (
            lambda: create_model("sam_encoder_b", img_size=64, embed_dim=32, depth=3, num_heads=2),
            r"\(blocks\.1\.attn\.rel_pos_h\)",
        ),
        (Sized, r"blocks\.5 takes x, height, width; blocks that take the tokens"),
        (Windowed, "attends within windows of 4 x 4"),
        (lambda: VisionTransformer(**{**SMALL, "depth": 1}), "has one block"),
    ],
)
def test_models_it_cannot_serve(build, says):
    with pytest.raises(NotApplicable, match=says):
        ClusterTokens().check(Plan.of(build()), TARGET)


def test_positions_before_the_clustering_do_not_matter():
    model = Beit(**SMALL, use_rel_pos_bias=True)
    for block in model.blocks[2:]:
        del block.attn.relative_position_bias_table, block.attn.relative_position_index
    ClusterTokens(after=2).check(Plan.of(model), TARGET)
    with pytest.raises(NotApplicable, match=r"blocks\.1"):
        ClusterTokens(after=1).check(Plan.of(model), TARGET)
    absolute = Beit(**SMALL, use_abs_pos_emb=True, use_rel_pos_bias=False)
    assert token_clusters_of(applied(absolute).model).grid_out == (6, 6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("token_clustering(after=3)", "after 3 of 3 blocks leaves nothing to save; after=1 to 2 would do"),
        ("token_clustering(grid=(8, 8))", "8 x 8 centres: the model has 8 x 8 tokens; give a smaller grid"),
        ("token_clustering(grid=(4, 9))", "4 x 9 centres"),
    ],
)
def test_knobs_that_do_not_fit_the_model(vit, text, says):
    with pytest.raises(NotApplicable, match=says):
        Recipe.parse(text).check(Plan.of(vit), TARGET)


@pytest.mark.parametrize(
    ("knob", "says"),
    [
        ("after=0", "a number of blocks"),
        ("grid=7", r"grid is \(rows, columns\)"),
        ("grid=(3, 0)", r"grid is \(rows, columns\)"),
        ("iterations=-1", "0 or more"),
        ("window=4", "an odd number"),
        ("temperature=0", "above 0 or 'auto'"),
        ("temperature='warm'", "above 0 or 'auto'"),
        ("k=-2", r"0 \(all centres\) or more"),
        ("reconstruct=3", "True, False or a module's path"),
    ],
)
def test_knobs_that_make_no_sense(knob, says):
    with pytest.raises(LissomError, match=says):
        Recipe.parse(f"token_clustering({knob})")


def test_once_is_enough(vit):
    with pytest.raises(NotApplicable, match="clustered already"):
        applied(applied(vit).model)


def test_grids_of_another_size_than_the_model_was_built_for():
    model = VisionTransformer(**SMALL, dynamic_img_size=True).eval()
    task = Task(choose=None, report=None, shape=(3, 48, 24))
    found = token_clusters_of(applied(model, task=task).model)
    assert (found.grid_in, found.grid_out) == ((12, 6), (8, 4))
    # A class token that joins behind the blocks is none of theirs.
    late = Cait(**{**SMALL, "depth": 3})
    found = token_clusters_of(applied(late).model)
    assert (found.prefix, found.grid_in) == (0, (8, 8))


@pytest.fixture(scope="module")
def rebuilt(vit):
    return applied(vit, "token_clustering(grid=(5, 6), reconstruct=True)")


def test_the_exported_graph(vit, rebuilt, tmp_path):
    """Equal to torch; attention as fused as before; static; no more reference kernels; a policy finds the layers."""
    import openvino

    fused, reference, layers = [], [], []
    for name, plan in (("before", Plan.of(vit, SHAPE)), ("behind", rebuilt)):
        artifact = export_plan(plan, TARGET, tmp_path / name, shape=SHAPE)
        want = answers(plan.model).numpy()
        np.testing.assert_allclose(run_artifact(artifact, INPUTS, 1), want, rtol=1e-3, atol=1e-3 * abs(want).max())
        nodes = openvino.Core().read_model(artifact.graphs[0]).get_ordered_ops()
        fused.append(sum(node.get_type_name() == "ScaledDotProductAttention" for node in nodes))
        assert all(output.get_partial_shape().is_static for node in nodes for output in node.outputs())
        reference.append(len(inspect(open_graph(artifact.graphs[0], "openvino", {}, 1)).reference))
        layers.append({path for path in artifact.plan["nodes"].values() if path.startswith("token_clusters.")})
    assert fused == [3, 3]
    assert reference[1] <= reference[0]
    assert layers == [set(), {"token_clusters.clustering", "token_clusters.reconstruction"}]


def test_both_layers_stay_in_float_under_int8(rebuilt, tmp_path):
    import openvino

    assert rebuilt.precision.at("token_clusters.clustering") == 32
    precision = Precision({**rebuilt.precision.bits, "": 8})
    artifact = export_plan(
        rebuilt.with_precision(precision), TARGET, tmp_path / "a", shape=SHAPE, calibration=INPUTS
    )  # fmt: skip
    want, got = answers(rebuilt.model).numpy(), run_artifact(artifact, INPUTS, 1)
    assert np.corrcoef(want.ravel(), got.ravel())[0, 1] > 0.8  # random weights: the plain network reaches 0.9
    for node in openvino.Core().read_model(artifact.graphs[0]).get_ordered_ops():
        path = artifact.plan["nodes"].get(node.get_friendly_name().partition("/")[0], "")
        if node.get_type_name() == "MatMul" and path.startswith("token_clusters"):
            kinds = {value.get_node().get_type_name() for value in node.input_values()}
            assert "FakeQuantize" not in kinds


def test_exits_behind_it_read_the_clusters_grid(vit):
    plan = applied(vit, "token_clustering(after=1, grid=(5, 6)) + early_exit(at=(1,))")
    (head,) = exits_of(plan.model).heads
    assert head.grid == (5, 6)
    assert [tuple(answer.shape) for answer in answers(plan.model)] == [(4, 5), (4, 5)]
