"""Back ends: the same answers from every runtime, and one clear sentence where one cannot run."""

from __future__ import annotations

import errno
import json
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Stages, inspect, last_stages, layer_times, open_graph
from lissom.runtime.bench import environment
from lissom.runtime.openvino_graph import import_openvino
from lissom.runtime.target import RUNTIMES

X = np.random.default_rng(1).standard_normal((2, 6), dtype=np.float32)
W = np.random.default_rng(2).standard_normal((6, 4), dtype=np.float32)


def save(runtime: str, folder: Path) -> Path:
    """A graph that answers twice: x @ W, and relu(x)."""
    if runtime == "openvino":
        openvino = import_openvino()
        from openvino import opset13 as op

        x = op.parameter([2, 6], np.float32)
        model = openvino.Model([op.matmul(x, op.constant(W), False, False), op.relu(x)], [x], "two")
        openvino.save_model(model, folder / "two.xml", compress_to_fp16=False)
        return folder / "two.xml"
    if runtime == "onnxruntime":
        import onnx
        from onnx import helper

        def value(name: str, *shape: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["x"], ["z"])],
            "two",
            [value("x", 2, 6)],
            [value("y", 2, 4), value("z", 2, 6)],
            [onnx.numpy_helper.from_array(W, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.save(model, str(folder / "two.onnx"))
        return folder / "two.onnx"
    import torch

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.from_numpy(W))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x @ self.weight, x.relu()

    with torch.no_grad():
        program = torch.export.export(Two().eval(), (torch.from_numpy(X),))
    torch.export.save(program, folder / "two.pt2")
    return folder / "two.pt2"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_are_the_callers_and_several_come_as_a_list(runtime: str, tmp_path: Path) -> None:
    graph = open_graph(save(runtime, tmp_path), runtime, {}, threads=1)
    first = graph.run(X)
    kept = [answer.copy() for answer in first]
    graph.run(np.zeros_like(X))
    for answer, before, want in zip(first, kept, (X @ W, X.clip(0)), strict=True):
        np.testing.assert_array_equal(answer, before)  # the second run has not written into the first's answer
        np.testing.assert_allclose(answer, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_without_a_path_the_smallest_graph(runtime: str) -> None:
    graph = open_graph(None, runtime, threads=1)
    assert graph.run(np.full((1, 1), -2, np.float32)).tolist() == [[0]]
    assert graph.run(np.full((1, 1), 3, np.float32)).tolist() == [[3]]
    assert graph.gpu is None


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_missing_runtime_says_what_to_install(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(LissomError, match=f"{runtime} is not installed here; install it with: pip install"):
        open_graph(None, runtime, threads=1)


@pytest.mark.parametrize(("runtime", "name"), [("openvino", "g.xml"), ("onnxruntime", "g.onnx"), ("torch", "g.pt2")])
def test_a_damaged_file_is_one_sentence(runtime: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 not a graph")
    with pytest.raises(LissomError, match=name) as caught:
        open_graph(tmp_path / name, runtime, threads=1)
    assert "\n" not in str(caught.value)


def test_an_unknown_runtime_and_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LissomError, match="known: openvino, onnxruntime, torch"):
        open_graph(None, "tensorrt")
    with pytest.raises(LissomError, match="not in 'int4'"):
        open_graph(None, "openvino", {"precision": "int4"})
    with pytest.raises(LissomError, match="takes no option precision"):
        open_graph(None, "onnxruntime", {"precision": "bf16"})
    with pytest.raises(LissomError, match="takes no option precision"):
        open_graph(None, "torch", {"precision": "bf16"})
    with pytest.raises(LissomError, match="not in 'int8'"):
        open_graph(None, "torch", {"dtype": "int8"})


def test_openvino_computes_in_float32_unless_told_otherwise() -> None:
    plain = open_graph(None, "openvino", {}, threads=1)
    told = open_graph(None, "openvino", {"precision": "bf16"}, threads=1)
    assert plain.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    # OpenVINO keeps to float32 where the processor has no bf16.
    able = "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert told.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == ("bf16" if able else "f32")
    assert plain.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert plain.compiled.get_property("NUM_STREAMS") == 1


def test_torch_in_bfloat16_answers_in_float32(tmp_path: Path) -> None:
    graph = open_graph(save("torch", tmp_path), "torch", {"dtype": "bfloat16"}, threads=1)
    product, _ = graph.run(X)
    assert product.dtype == np.float32
    assert np.abs(product - X @ W).max() > 1e-6  # it really was rounded
    np.testing.assert_allclose(product, X @ W, rtol=0.05, atol=0.05)


@pytest.mark.full
def test_torch_compile_answers_the_same(tmp_path: Path) -> None:
    graph = open_graph(save("torch", tmp_path), "torch", {"compile": True}, threads=1)
    np.testing.assert_allclose(graph.run(X)[0], X @ W, rtol=1e-5, atol=1e-6)


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def pickled_weights(data: bytes) -> bytes:
    config = json.loads(data)
    config["config"]["weight"]["use_pickle"] = True
    return json.dumps(config).encode()


HOSTILE = (
    "sample_inputs", "weights", "legacy", "expression", "escaped", "object", "library", "capitals", "twice", "module",
    "operator", "file", "other",
)  # fmt: skip


@pytest.mark.parametrize("where", HOSTILE)
def test_a_program_that_holds_code_is_refused_and_not_run(where: str, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    good, bad = save("torch", tmp_path), tmp_path / "bad.pt2"
    bomb = pickle.dumps(Bomb(str(planted)), protocol=2)
    hit = False
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one name twice
        weights = next(name for name in source.namelist() if name.endswith("weights_config.json"))
        if where in ("capitals", "twice"):  # PyTorch's reader takes the first of both for the list of weights
            name = weights if where == "twice" else weights.replace(".json", ".JSON")
            target.writestr(name, pickled_weights(source.read(weights)))
        for name in source.namelist():
            data = source.read(name)
            before = data
            if where == "sample_inputs" and "sample_inputs" in name:
                data = bomb
            if where == "weights" and name == weights:
                data = pickled_weights(data)
            if where in ("weights", "capitals", "twice") and name.endswith("weights/weight_0"):
                data = bomb
            if where == "object" and name.endswith("constants_config.json"):
                payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
                data = json.dumps({"config": {"o": payload}}).encode()
                target.writestr(name.replace("model_constants_config.json", "opaque_obj_0"), bomb)
            if name.endswith("models/model.json"):
                expression = b'{"as_expr": {"expr_str": "open(1)"}}'
                if where == "expression":
                    data = data.replace(b'{"as_int": 2}', expression)
                if where == "escaped":
                    data = data.replace(b'{"as_int": 2}', expression.replace(b"expr", b"\\u0065xpr"))
                if where == "module":  # a key of a dict that is said to be a member of an enumeration of a module
                    enum = r'"context\": \"[{\\\"__enum__\\\": true, \\\"fqn\\\": \\\"planted:X\\\"}]\"'
                    data = data.replace(rb'"context\": \"[]\"', enum.encode())
                if where == "operator":
                    data = re.sub(rb'"target": "torch[^"]*"', b'"target": "torch.hub.load"', data)
                if where == "file":
                    data = re.sub(rb'"target": "torch[^"]*"', b'"target": "torch.ops.aten.from_file.default"', data)
            hit = hit or data != before
            target.writestr(name, data)
        root = weights.partition("/")[0]
        for own, member in (
            ("legacy", "data/weights/model.pt"), ("library", "data/aotinductor/model/lib.so"), ("other", "../planted"),
        ):  # fmt: skip
            if where == own:
                target.writestr(f"{root}/{member}", bomb)
                hit = True
    assert hit
    with pytest.raises(LissomError, match="code that PyTorch would execute"):
        open_graph(bad, "torch", threads=1)
    assert not planted.exists()
    open_graph(good, "torch", threads=1)


def test_a_full_disk_is_not_taken_for_a_damaged_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    program = save("torch", tmp_path)
    monkeypatch.setattr("lissom.export.torch_graph.shutil.copyfileobj", full)
    with pytest.raises(LissomError, match=r"cannot open .*No space left on device"):
        open_graph(program, "torch", threads=1)


def test_inspect_names_reference_operators_and_conversions(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    openvino = import_openvino()
    from openvino import opset13 as op

    x = op.parameter([1, 8], np.float32)
    total = op.cum_sum(x, op.constant(1))  # OpenVINO has no optimised form of it
    total.set_friendly_name("running_total")
    openvino.save_model(openvino.Model([total], [x], "m"), tmp_path / "m.xml", compress_to_fp16=False)
    found = inspect(open_graph(tmp_path / "m.xml", "openvino", threads=1))
    assert found is not None
    assert found.reference == ["running_total"]
    assert found.conversions == []
    assert inspect(open_graph(None, "onnxruntime", threads=1)) is None

    convolved = inspect(open_graph(make("c", convolutions=1).graphs[0], "openvino", threads=1))
    assert convolved is not None
    assert convolved.reference == []


def test_layer_times_bear_the_names_of_the_graph(make) -> None:  # type: ignore[no-untyped-def]
    artifact = make(convolutions=2)
    times = layer_times(artifact.graphs[0], threads=1, runs=20)
    names = [name for layer in times for name in layer.names]
    assert {"conv0", "conv1", "head"} <= set(names)
    assert names.index("conv0") < names.index("conv1") < names.index("head")  # in order of execution
    assert all(layer.microseconds >= 0 and layer.kind and layer.implementation for layer in times)
    assert sum(layer.microseconds for layer in times) > 0


def test_stages_run_one_on_the_other(tmp_path: Path, make, want) -> None:  # type: ignore[no-untyped-def]
    openvino = import_openvino()
    from openvino import opset13 as op

    artifact = make()
    x = op.parameter([1, 5], np.float32)
    second = openvino.Model([op.relu(x)], [x], "second")
    openvino.save_model(second, artifact.path / "stage1.xml", compress_to_fp16=False)
    plan = {**artifact.plan, "stages": [*artifact.plan["stages"], {"graph": "stage1.xml", "options": {}}]}
    image = np.random.default_rng(3).standard_normal((1, 3, 4, 4), dtype=np.float32)
    answer = Stages(Artifact(artifact.path, plan), threads=1).run(image)
    np.testing.assert_allclose(answer, want(image).clip(0), rtol=1e-4, atol=1e-5)


def test_a_batch_that_cannot_be_gathered_runs_as_far_as_its_last_sample() -> None:
    plan: dict[str, Any] = {
        "input": {"shape": [4, 3]}, "decisions": [{"threshold": 0.5}] * 2, "exits": {"shares": [0.5, 0.3, 0.2]},
    }  # fmt: skip
    alone = last_stages(Artifact(Path(), plan))
    np.testing.assert_allclose(alone, [0.5**4, 0.8**4 - 0.5**4, 1 - 0.8**4])
    for same in ({**plan, "packs": True}, {**plan, "input": {"shape": [1, 3]}}):
        np.testing.assert_array_equal(last_stages(Artifact(Path(), same)), [0.5, 0.3, 0.2])
    np.testing.assert_array_equal(last_stages(Artifact(Path(), {**plan, "exits": {}})), [0, 0, 1])
    np.testing.assert_array_equal(last_stages(Artifact(Path(), {"input": {"shape": [4, 3]}})), [1])
    # Drawn: how far batches of four really run.
    left = np.random.default_rng(0).choice(3, p=[0.5, 0.3, 0.2], size=(100_000, 4)).max(1)
    np.testing.assert_allclose(np.bincount(left) / len(left), alone, atol=0.01)


def test_openvino_comes_without_its_telemetry() -> None:
    code = (
        "import sys; from lissom.runtime.openvino_graph import import_openvino; import_openvino()\n"
        "import openvino.tools.ovc.telemetry_utils as used\n"
        "assert used.tm.__name__.endswith('telemetry_stub'), used.tm\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
