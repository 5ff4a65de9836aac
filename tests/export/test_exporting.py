"""Exports agree with their models; a policy by module path reaches the graph's nodes; nothing is half written."""

import copy

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lissom.errors import LissomError
from lissom.export import onnx, openvino
from lissom.export.conversions import Conversions
from lissom.export.exporting import export_plan, run_artifact
from lissom.export.plan import Plan, Precision
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.recipe import Recipe

SHAPE = (3, 16, 16)
INPUTS = np.random.default_rng(0).standard_normal((24, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    for p in model.parameters():  # timm's small initial values would leave the answers nearly constant
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


def export(model, path, recipe="", runtime="openvino", **options):
    target = Target(runtime, threads=2, **options)
    made = Recipe.parse(recipe)
    plan = made.apply(Plan.of(model), Task(choose=None, report=None, shape=SHAPE), target)
    return export_plan(plan, target, path, shape=SHAPE, calibration=INPUTS, recipe=str(made), verify=INPUTS[:8])


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime", "torch"])
def test_float32_agrees_with_the_model(vit, tmp_path, runtime):
    artifact = export(vit, tmp_path / "a", runtime=runtime)
    want = vit(torch.from_numpy(INPUTS)).detach().numpy()
    np.testing.assert_allclose(run_artifact(artifact, INPUTS, 2), want, rtol=1e-3, atol=1e-4)
    assert artifact.plan["verification"]["relative_error"] < 1e-4
    # Weights in float32 on disk too: four bytes a parameter, and little besides.
    assert artifact.size > 4 * sum(p.numel() for p in vit.parameters())


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime", "torch"])
@pytest.mark.parametrize("part", ["parameter", "data", "buffer"])
def test_a_model_trained_on_since_is_exported_anew(tmp_path, runtime, part):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    images = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    target = Target(runtime, threads=1)
    before = run_artifact(export_plan(Plan.of(model), target, tmp_path / "before", shape=(3, 8, 8)), images, 1)
    with torch.no_grad():
        if part == "parameter":
            model[4].weight.mul_(-2)
        elif part == "data":
            model[4].weight.data = -2 * model[4].weight.data  # neither its version nor the parameter's identity change
        else:
            model[1].running_mean += 1
        expected = model(torch.from_numpy(images)).numpy()
    after = run_artifact(export_plan(Plan.of(model), target, tmp_path / "after", shape=(3, 8, 8)), images, 1)
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert np.abs(after - before).max() > 0.01


@pytest.mark.parametrize(("runtime", "module"), [("openvino", openvino), ("onnxruntime", onnx)])
def test_precisions_of_one_model_share_its_conversion(vit, tmp_path, monkeypatch, runtime, module):
    converted = []
    convert = module._convert
    monkeypatch.setattr(module, "_conversions", Conversions())
    monkeypatch.setattr(module, "_convert", lambda *given: converted.append(1) or convert(*given))
    export(vit, tmp_path / "float", runtime=runtime)
    export(vit, tmp_path / "int8", "int8()", runtime=runtime)
    assert len(converted) == 1
    export(copy.deepcopy(vit), tmp_path / "other", runtime=runtime)
    assert len(converted) == 2


def test_a_batch_that_does_not_divide(vit, tmp_path):
    artifact = export(vit, tmp_path / "a", batch=5)
    want = vit(torch.from_numpy(INPUTS)).detach().numpy()
    np.testing.assert_allclose(run_artifact(artifact, INPUTS, 2), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "recipe", ["", "int8(linear='matmul')", "int8(model_type='plain', linear='conv', products=32)"]
)
def test_the_same_model_gives_the_same_file(vit, tmp_path, recipe):
    """OpenVINO names nodes by a counter that runs on through a process; no file and no size may depend on it."""
    one, other = (export(copy.deepcopy(vit), tmp_path / name, recipe) for name in "ab")
    assert one.graphs[0].read_bytes() == other.graphs[0].read_bytes()
    assert one.size == other.size


def test_a_folded_norm_gives_the_same_file(tmp_path):
    """The converter names such a convolution by a counter, and NNCF what it puts in front of it by that name."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    recipe = "int8(model_type='plain', linear='matmul')"
    one, other = (export(copy.deepcopy(net), tmp_path / name, recipe) for name in "ab")
    assert one.graphs[0].read_bytes() == other.graphs[0].read_bytes()


def quantised_paths(artifact):
    """Module paths of the OpenVINO nodes whose weights are stored in 8 bits."""
    import openvino as ov

    paths = set()
    for node in ov.Core().read_model(artifact.graphs[0]).get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Convolution"):
            continue
        for value in node.input_values():
            source = value.get_node()
            while source.get_type_name() in ("Multiply", "Subtract", "Convert", "FakeQuantize"):
                source = source.input_value(0).get_node()
            if source.get_type_name() == "Constant" and source.get_element_type().get_type_name() in ("i8", "u8"):
                paths.add(artifact.plan["nodes"].get(node.get_friendly_name().partition("/")[0]))
    return paths


@pytest.mark.parametrize("linear", ["matmul", "conv"])
def test_int8_follows_the_policy(vit, tmp_path, linear):
    everything = quantised_paths(export(vit, tmp_path / "all", f"int8(linear={linear!r})"))
    linears = {path for path, m in vit.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert everything == linears
    kept = export(vit, tmp_path / "kept", f"int8(linear={linear!r}, keep=('blocks.0', 'head'))")
    assert quantised_paths(kept) == {p for p in linears if not p.startswith(("blocks.0", "head"))}
    assert kept.plan["precision"] == {"": 8, "blocks.0": 32, "head": 32}


def test_a_policy_reaches_convolutions_behind_which_a_norm_was_folded(tmp_path):
    # OpenVINO renames a convolution when it folds a norm or a layer scale into it: the path must survive that.
    def block(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.layer1, self.layer2, self.fc = block(3, 8), block(8, 8), block(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc((self.layer2(self.layer1(self.conv1(x))) + 1).mean((2, 3)))

    model = Net().eval()
    convolutions = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    everything = quantised_paths(export(model, tmp_path / "all", "int8()"))
    assert everything == convolutions | {"fc"}
    kept = quantised_paths(export(model, tmp_path / "kept", "int8(keep=('layer1', 'conv1', 'fc'))"))
    assert kept == {p for p in convolutions if not p.startswith(("layer1", "conv1"))}


def test_int8_on_onnx_follows_the_policy(vit, tmp_path):
    import onnx

    def quantised(artifact):
        graph = onnx.load(artifact.graphs[0]).graph
        made = {node.output[0]: node for node in graph.node}
        return {
            artifact.plan["nodes"].get(node.name)
            for node in graph.node
            if node.op_type in ("MatMul", "Gemm", "Conv")
            and (source := made.get(node.input[1])) is not None
            and source.op_type in ("DequantizeLinear", "Transpose")
        }

    everything = quantised(export(vit, tmp_path / "all", "int8(products=32)", "onnxruntime"))
    kept = quantised(export(vit, tmp_path / "kept", "int8(products=32, keep=('blocks.0', 'head'))", "onnxruntime"))
    linears = {path for path, m in vit.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert everything == linears
    assert kept == {p for p in linears if not p.startswith(("blocks.0", "head"))}


def test_keeping_everything_is_the_float_graph(vit, tmp_path):
    every = Precision({"": 32, "no.such.module": 8}, {"products": 32})  # the quantiser runs, and may touch nothing
    plan = Plan.of(vit).with_precision(every)
    artifact = export_plan(plan, Target(threads=2), tmp_path / "a", shape=SHAPE, calibration=INPUTS)
    plain = export(vit, tmp_path / "b")
    np.testing.assert_allclose(run_artifact(artifact, INPUTS, 2), run_artifact(plain, INPUTS, 2), atol=1e-4)


def test_products_in_float_leave_attention_whole(vit, tmp_path):
    import openvino as ov

    kinds = [
        node.get_type_name()
        for node in ov.Core().read_model(export(vit, tmp_path / "a", "int8(products=32)").graphs[0]).get_ordered_ops()
    ]
    assert kinds.count("ScaledDotProductAttention") == 2


def test_a_model_that_cannot_be_exported_is_one_sentence(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(LissomError, match="cannot be exported") as caught:
        export(Branching(), tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_in_its_mode(vit, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 5)).train()
    model[1].eval()
    export(model, tmp_path / "a")
    assert model.training
    assert not model[1].training


def test_an_artifact_of_an_interrupted_export_does_not_exist(vit, tmp_path, monkeypatch):
    import lissom.export.openvino as exporter

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "quantise", fails)
    with pytest.raises(KeyboardInterrupt):
        export(vit, tmp_path / "a", "int8()")
    assert not list(tmp_path.iterdir())
    with pytest.raises(LissomError, match="no artifact"):
        Artifact.open(tmp_path / "a")
