"""Plans with exits in ONNX Runtime and PyTorch, cut as OpenVINO's are: stages answer what the joint graph does, to the
last bit; weights lie on the disk once; what cannot be cut is refused with the way past the cut."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.exporting import export_plan, run_stages
from lissom.export.joint import JointOutputs
from lissom.export.plan import Exit, Plan
from lissom.images import Preprocessing
from lissom.layers.exits import Exits, attach_exits
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Stages, open_graph
from lissom.runtime.predictor import load
from lissom.runtime.target import RUNTIMES, Target
from lissom.tasks.task import Task
from lissom.techniques.bf16 import Bf16
from lissom.techniques.early_exit import EarlyExit
from lissom.techniques.int8 import Int8
from lissom.techniques.recipe import Recipe
from tests.export.cutting import differences, joint_and_stages
from tests.export.test_joint_cut import CASES, FEW, Mean, with_exits
from tests.models.tiny_perceiver import SHAPE as TINY
from tests.models.tiny_perceiver import patterns, tiny

OTHERS = ("onnxruntime", "torch")
full = pytest.mark.full


@pytest.mark.parametrize("runtime", OTHERS)
@pytest.mark.parametrize(
    ("name", "size", "at", "arguments"),
    [*FEW, *(pytest.param(*case, marks=full) for case in CASES if case not in FEW)],
)
def test_cut_equals_joint(
    runtime: str, name: str, size: int, at: tuple[str, ...], arguments: dict[str, object], tmp_path: Path
) -> None:
    plan = with_exits(name, size, at, **arguments)
    joint, stages = joint_and_stages(runtime, plan, (3, size, size), tmp_path)
    outputs = JointOutputs.of(plan.decisions)
    for x in np.random.default_rng(0).standard_normal((3, 1, 3, size, size)).astype(np.float32):
        found = differences(joint, stages, outputs, x)
        if name == "convnext_atto" and runtime == "onnxruntime":
            # A sum joins the convolution before it where both its terms lie in blocks of channels, which the first of a
            # stage's do not: one rounding less. With tensors left in their own layout the two are the same again.
            assert max(found) < 1e-6
            found = differences(*plain_layout(tmp_path, len(stages)), outputs, x)
        assert found == [0.0] * 7
        with torch.no_grad():
            for own, other in zip(joint.run(x), plan.model(torch.from_numpy(x)), strict=False):
                np.testing.assert_allclose(own, other.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("runtime", OTHERS)
@pytest.mark.parametrize(
    "recipe", ["similarity_exit(at=(2, 4))", pytest.param("cascade(first=(low_rank()))", marks=pytest.mark.full)]
)
def test_similarity_exits_and_cascades_are_cut_too(runtime: str, recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 6, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    inputs = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    split = ArraySplit("noise", inputs, np.arange(8) % 4)
    task = Task(split, split, split, (3, 32, 32), tuple("abcd"))
    plan = Recipe.parse(recipe).apply(Plan.of(model, (3, 32, 32)), task, Target(runtime, threads=1))
    joint, stages = joint_and_stages(runtime, plan, (3, 32, 32), tmp_path)
    outputs = JointOutputs.of(plan.decisions)
    assert len(stages) == len(plan.decisions) + 1 > 1
    for x in inputs[:3]:
        assert max(differences(joint, stages, outputs, x[None])) < 1e-6


class PlainLayout:
    """An ONNX graph with all of ONNX Runtime's optimisations but those that change the layout of tensors."""

    gpu = None

    def __init__(self, path: Path) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self.session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def run(self, x: np.ndarray | list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
        names = [given.name for given in self.session.get_inputs()]
        found = self.session.run(None, dict(zip(names, x if isinstance(x, list) else [x], strict=True)))
        return found[0] if len(found) == 1 else found


def plain_layout(folder: Path, stages: int) -> tuple[PlainLayout, list[PlainLayout]]:
    return PlainLayout(folder / "joint.onnx"), [PlainLayout(folder / f"stage{n}.onnx") for n in range(stages)]


@full
@pytest.mark.parametrize(("name", "size", "at", "arguments"), CASES)
def test_cut_equals_joint_in_int8_on_onnx(
    name: str, size: int, at: tuple[str, ...], arguments: dict[str, object], tmp_path: Path
) -> None:
    plan = with_exits(name, size, at, **arguments)
    plan = Int8(model_type="plain", products=8).apply(plan, None)  # type: ignore[arg-type]
    inputs = np.random.default_rng(0).standard_normal((8, 3, size, size)).astype(np.float32)
    joint, stages = joint_and_stages("onnxruntime", plan, (3, size, size), tmp_path, inputs)
    kinds = Counter(node.op_type for node in loaded(tmp_path / "stage1.onnx").graph.node)
    assert kinds["DequantizeLinear"] > 2
    outputs = JointOutputs.of(plan.decisions)
    for x in inputs[:4]:
        assert differences(joint, stages, outputs, x[None]) == [0.0] * 7


def loaded(path: Path):  # type: ignore[no-untyped-def]
    import onnx

    return onnx.load(str(path))


@pytest.mark.full
@pytest.mark.parametrize("runtime", OTHERS)
def test_a_boundary_of_several_tensors(runtime: str, tmp_path: Path) -> None:
    """On a network with exits of its own; some tensors are carried over two boundaries, one is an answer as well."""
    task = Task(None, None, shape=TINY, classes=tuple("abcd"))  # type: ignore[arg-type]
    plan = EarlyExit().apply(Plan.of(tiny().eval(), TINY), task)
    assert max(len(exit.boundary) for exit in plan.decisions) > 1
    joint, stages = joint_and_stages(runtime, plan, TINY, tmp_path, batch=4)
    x = patterns(8, 3)[0]
    for part in (x[:4], x[4:]):
        found = differences(joint, stages, JointOutputs.of(plan.decisions), part)
        assert found == [0.0] * len(found)


class Again(nn.Module):
    """Reads its input a second time behind the first module, so that it cannot be cut there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x)) + self.side(x)).mean((2, 3))


@pytest.mark.parametrize("runtime", OTHERS)
def test_a_stage_that_needs_the_input_again_is_refused(runtime: str, tmp_path: Path) -> None:
    model = Again().eval()
    attach_exits(model, Exits(["first"], [Mean(torch.Size((2, 3, 9, 8)))]))
    plan = replace(Plan.of(model, (3, 9, 8)), decisions=(Exit("first"),))
    with pytest.raises(NotApplicable, match="stage 1 cannot stand alone: it still reads the input through side"):
        export_plan(plan, Target(runtime, threads=1), tmp_path / "a", shape=(3, 9, 8))
    assert not list(tmp_path.iterdir())


class Writes(nn.Module):
    """Writes in place, into what an exit reads too, and counts its runs in a buffer where it is told to."""

    count: torch.Tensor

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.register_buffer("count", torch.zeros(()))
        self.counts = counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(x.clone().relu_())
        y += 1
        if self.counts:
            self.count += 1
            y = y + self.count
        return self.head(y.relu_().mean((2, 3)))


def test_what_is_written_in_place_is_seen_and_a_model_with_memory_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for counts in (False, True):
        model = Writes(counts).eval()
        attach_exits(model, Exits(["first"], [Mean(torch.Size((2, 4, 7, 6)))]))
        plan = replace(Plan.of(model, (3, 9, 8)), decisions=(Exit("first"),))
        if counts:
            with pytest.raises(NotApplicable, match="changes its own buffers while it answers"):
                export_plan(plan, Target("torch", threads=1), tmp_path / "b", shape=(3, 9, 8))
            return
        x = np.random.default_rng(0).standard_normal((1, 3, 9, 8)).astype(np.float32)
        artifact = export_plan(plan, Target("torch", threads=1), tmp_path / "a", shape=(3, 9, 8), verify=x)
        assert artifact.plan["verification"]["relative_error"] < 1e-5


def test_bf16_is_handed_on_without_loss(tmp_path: Path) -> None:
    """NumPy has no bfloat16: what is carried goes through float32, and comes back as it was."""
    plan = with_exits("vit_tiny_patch16_224", 32, ("blocks.0", "blocks.1"), img_size=32, depth=3, embed_dim=48)
    plan = Bf16().apply(plan, None)  # type: ignore[arg-type]
    joint, stages = joint_and_stages("torch", plan, (3, 32, 32), tmp_path)
    assert {dtype for stage in stages[1:] for dtype in stage.inputs} == {torch.bfloat16}  # type: ignore[attr-defined]
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    assert differences(joint, stages, JointOutputs.of(plan.decisions), x) == [0.0] * 7
    with torch.no_grad():
        for own, other in zip(joint.run(x), plan.model(torch.from_numpy(x)), strict=False):
            assert own.dtype == np.float32
            np.testing.assert_allclose(own, other.numpy(), atol=0.05 * float(other.abs().max()))


class Looped(nn.Module):
    """One block and one table for the whole depth, as in networks that share weights or position tables."""

    table: torch.Tensor

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.block = nn.Conv2d(32, 32, 3, padding=1)
        self.other = self.block if tied else nn.Conv2d(32, 32, 3, padding=1)
        self.places = nn.ModuleList(nn.Identity() for _ in range(3))
        self.register_buffer("table", torch.randn(1, 32, 8, 8))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for number, place in enumerate(self.places):
            block = self.block if number < 2 else self.other
            x = place(block((x + self.table).tanh()))
        return self.head(x.mean((2, 3)))


def looped(tied: bool = True) -> Plan:
    torch.manual_seed(0)
    model = Looped(tied).eval()
    at = ("places.0", "places.1")
    attach_exits(model, Exits(at, [Mean(torch.Size((2, 32, 8, 8))) for _ in at]))
    return replace(Plan.of(model, (3, 8, 8)), decisions=tuple(Exit(path) for path in at))


def tensors(runtime: str, folder: Path, graph: str, shared: bool = True) -> list[bytes]:
    """Hashes of the weights of a kilobyte and more that a graph's own file holds, or of those it shares too."""
    arrays: list[np.ndarray] = []
    if runtime == "onnxruntime":
        import onnx

        for tensor in onnx.load(str(folder / graph), load_external_data=False).graph.initializer:
            inside = tensor.data_location != onnx.TensorProto.EXTERNAL
            if inside or shared:
                arrays.append(onnx.numpy_helper.to_array(tensor, base_dir=str(folder)))
    elif runtime == "torch":
        program = torch.export.load(folder / graph)
        arrays += [t.detach().numpy() for t in (*program.state_dict.values(), *program.constants.values())]
    else:
        import openvino as ov

        weights = folder / "stages.bin"
        own = (folder / graph).with_suffix(".bin")
        model = ov.Core().read_model(str(folder / graph), str(own if own.exists() else weights))
        arrays += [op.data.copy() for op in model.get_ops() if op.get_type_name() == "Constant"]
    return [hashlib.sha256(a.tobytes()).digest() for a in arrays if a.nbytes >= 1024]


@pytest.mark.parametrize("runtime", [pytest.param("openvino", marks=full), *OTHERS])
def test_weights_end_in_one_stage_each(runtime: str, tmp_path: Path) -> None:
    plan = with_exits("vit_tiny_patch16_224", 32, ("blocks.0", "blocks.1"), img_size=32, depth=3, embed_dim=48)
    joint_and_stages(runtime, plan, (3, 32, 32), tmp_path)
    suffix = {"openvino": "xml", "onnxruntime": "onnx", "torch": "pt2"}[runtime]
    whole = Counter(tensors(runtime, tmp_path, f"joint.{suffix}"))
    parts = [Counter(tensors(runtime, tmp_path, f"stage{n}.{suffix}")) for n in range(3)]
    assert len(whole) >= 16
    assert sum(parts, Counter()) == whole  # each once, and none lost
    assert not list(tmp_path.glob("shared.*")) + list(tmp_path.glob("stages.*"))
    size = sum(f.stat().st_size for f in tmp_path.iterdir() if f.name.startswith("joint"))
    cut = sum(f.stat().st_size for f in tmp_path.iterdir() if f.name.startswith("stage"))
    weights = 4 * sum(p.numel() for p in plan.model.parameters())
    assert weights < cut < size + 0.2 * weights


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_of_several_stages_lie_in_one_file(runtime: str, tmp_path: Path) -> None:
    plan = looped()
    joint, stages = joint_and_stages(runtime, plan, (3, 8, 8), tmp_path)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    found = differences(joint, stages, JointOutputs.of(plan.decisions), x)
    assert found == [0.0] * len(found)
    (shared,) = [*tmp_path.glob("shared.*"), *tmp_path.glob("stages.*")]
    block = 4 * 32 * 32 * 9
    assert block + 4 * 32 * 64 <= shared.stat().st_size < 2 * block
    own = [f for f in tmp_path.iterdir() if f.name.startswith("stage") and f != shared]
    assert sum(f.stat().st_size for f in own if f.suffix != ".xml") < (block if runtime != "torch" else 2 * block)
    if runtime != "openvino":  # there all weights lie in the one file
        every = [digest for f in own for digest in tensors(runtime, tmp_path, f.name, shared=False)]
        assert len(every) == len(set(every))


@full
def test_stages_run_compiled(tmp_path: Path) -> None:
    plan = looped()  # the shared weights are inputs of the compiled stages too
    artifact = export_plan(plan, Target("torch", threads=1), tmp_path / "a", shape=(3, 8, 8))
    for stage in artifact.plan["stages"]:
        stage["options"]["compile"] = True
    stages = Stages(artifact.with_metrics({}), 1)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        for own, other in zip(stages.run_all(x)[0], plan.model(torch.from_numpy(x)), strict=True):
            np.testing.assert_allclose(own, other.numpy(), atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_artifact_with_shared_weights_vouches_for_them(runtime: str, tmp_path: Path) -> None:
    plan = looped()
    artifact = export_plan(plan, Target(runtime, threads=1), tmp_path / "a", shape=(3, 8, 8))
    (name,) = set(artifact.plan["files"]) & {"shared.bin", "shared.safetensors", "stages.bin"}
    x = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(load(artifact.path)(x), plan.model(torch.from_numpy(x))[-1].numpy(), atol=1e-5)
    data = bytearray((artifact.path / name).read_bytes())
    data[-1] ^= 1
    (artifact.path / name).write_bytes(data)
    with pytest.raises(LissomError, match=rf"{name} was altered since its export"):
        load(artifact.path)


@pytest.mark.parametrize(("runtime", "options"), [("openvino", {"weights": "../w.bin"}), ("torch", {"shared": ["w"]})])
def test_weights_are_looked_for_beside_the_graph_only(runtime: str, options: dict[str, object], tmp_path: Path) -> None:
    artifact = export_plan(looped(False), Target(runtime, threads=1), tmp_path / "a", shape=(3, 8, 8))
    (tmp_path / "w.bin").write_bytes(bytes(64))
    (artifact.path / "shared.safetensors").unlink(missing_ok=True)
    with pytest.raises(LissomError, match="lacks its file"):
        open_graph(artifact.graphs[1], runtime, options, 1)


@pytest.mark.parametrize("runtime", [*(pytest.param(r, marks=full) for r in ("openvino", "onnxruntime")), "torch"])
def test_a_batch_answers_as_each_alone_and_stages_are_gathered(runtime: str, tmp_path: Path) -> None:
    plan = with_exits("resnet18", 32, ("layer1", "layer3"))
    inputs = np.random.default_rng(1).standard_normal((23, 3, 32, 32)).astype(np.float32)
    made: dict[int, Artifact] = {}
    for batch in (1, 4):
        target = Target(runtime, "cpu", batch, 1)
        made[batch] = export_plan(plan, target, tmp_path / str(batch), shape=(3, 32, 32))
    assert made[4].plan["packs"] is True
    _, scores = run_stages(made[1], inputs, 1)
    # Thresholds in the middle of a gap between scores: batches may differ in the last bits.
    limits = [float(np.sort(column)[[11, 12]].mean()) for column in scores.T]
    answers = {}
    for batch, artifact in made.items():
        decisions = [{**d, "threshold": t} for d, t in zip(artifact.plan["decisions"], limits, strict=True)]
        artifact.with_decisions(decisions, {})
        predictor = load(artifact.path, threads=1)
        runs = counted(predictor)
        answers[batch] = predictor.answer(inputs)
        left = answers[batch][1]
        assert [len(r) for r in runs] == [-(-int((left >= stage).sum()) // batch) for stage in range(3)]
    assert set(answers[1][1]) == {0, 1, 2}
    np.testing.assert_array_equal(answers[4][1], answers[1][1])
    np.testing.assert_allclose(answers[4][0], answers[1][0], rtol=1e-3, atol=1e-4)


def counted(predictor) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """One list a stage, which grows by one with each run of it."""
    runs: list[list[int]] = []
    for graph in predictor._stages.graphs:
        times: list[int] = []

        def run(x, own=graph.run, times=times):  # type: ignore[no-untyped-def]
            times.append(1)
            return own(x)

        graph.run = run
        runs.append(times)
    return runs


def test_images_are_prepared_some_batches_at_a_time_so_that_they_gather(tmp_path: Path) -> None:
    plan = looped()
    of = Preprocessing(8, 8, 3)
    artifact = export_plan(plan, Target("openvino", "cpu", 4, 1), tmp_path / "a", shape=(3, 8, 8), preprocessing=of)
    images = list(np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3), dtype=np.uint8))
    _, scores = run_stages(artifact, of.normalise(np.stack(images)), 1)
    limit = float(np.sort(scores[:, 0])[[10, 11]].mean())
    first, second = artifact.plan["decisions"]
    artifact.with_decisions([{**first, "threshold": limit}, second], {})
    predictor = load(artifact.path, threads=1)
    runs = counted(predictor)
    found = predictor.predict(images)
    assert [p.exit for p in found] == [0 if score > limit else 2 for score in scores[:, 0]]
    assert [len(r) for r in runs] == [6, 3, 3]  # 21, 11 and 11 images in batches of four
    assert [p.label for p in found] == list(predictor(of.normalise(np.stack(images))).argmax(-1))  # type: ignore[union-attr]


class Folded(nn.Module):
    """Hands on its rows folded into the batch, (2 B, ...), which cannot be told apart by rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.second = nn.Conv2d(3, 4, 3), nn.Identity(), nn.Conv2d(2, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(self.first(x).unflatten(1, (2, 2)).flatten(0, 1))
        return self.second(x).unflatten(0, (-1, 2)).mean((1, 3, 4))


class Unfold(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, 2)).mean((3, 4)).flatten(1)


def test_what_has_no_batch_in_front_is_not_gathered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Folded().eval()
    attach_exits(model, Exits(["inside"], [Unfold()]))
    plan = replace(Plan.of(model, (3, 8, 8)), decisions=(Exit("inside"),))
    artifact = export_plan(plan, Target("openvino", "cpu", 4, 1), tmp_path / "a", shape=(3, 8, 8))
    assert artifact.plan["packs"] is False
    inputs = np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)
    every, scores = run_stages(artifact, inputs, 1)
    limit = float(np.sort(scores[:, 0])[[4, 5]].mean())
    artifact.with_decisions([{**artifact.plan["decisions"][0], "threshold": limit}], {})
    got, left = load(artifact.path).answer(inputs)
    np.testing.assert_array_equal(left, np.where(scores[:, 0] > limit, 0, 1))
    np.testing.assert_array_equal(got, np.stack(every)[left, np.arange(10)])
