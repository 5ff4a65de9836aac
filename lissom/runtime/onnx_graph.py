"""ONNX Runtime back end: sequential execution on the processor, threads that sleep while they wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.registry import register
from lissom.runtime.backends import Answer, Shape, missing

__all__ = ["OnnxGraph"]


@register("backend", "onnxruntime")
class OnnxGraph:
    """An ``.onnx`` file with one input, opened by ONNX Runtime. It takes no options."""

    gpu = None

    def __init__(self, path: Path | None, options: dict[str, Any], threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing("onnxruntime") from error
        if options:
            raise LissomError(f"ONNX Runtime takes no option {', '.join(options)}")
        onnxruntime.disable_telemetry_events()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        # Threads that spin while they wait would disturb whatever is measured next on the same processor.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = _empty() if path is None else str(path)
        try:
            self.session = onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base of their own
            raise LissomError(f"ONNX Runtime cannot open {path}: {str(error).strip().splitlines()[0]}") from error
        inputs = self.session.get_inputs()
        self.inputs = [given.name for given in inputs]
        self.takes = [_shape(given.shape) for given in inputs]
        self.gives = [_shape(given.shape) for given in self.session.get_outputs()]

    def run(self, x: np.ndarray | list[np.ndarray]) -> Answer:
        answers = self.session.run(None, dict(zip(self.inputs, x if isinstance(x, list) else [x], strict=True)))
        return answers[0] if len(answers) == 1 else answers


def _shape(sizes: list[Any]) -> Shape:
    """ONNX Runtime gives an open size by its name, or as None."""
    return tuple(sizes) if all(isinstance(size, int) for size in sizes) else None


def _field(number: int, value: bytes | int) -> bytes:
    """One protobuf field: bytes with their length, or an integer below 128."""
    if isinstance(value, int):
        return bytes((number << 3, value))
    return bytes((number << 3 | 2, len(value))) + value


def _empty() -> bytes:
    """A model of one Relu on float32 (1, 1), in protobuf by hand: the package onnx need not be installed.

    Field numbers are those of onnx.proto3.
    """
    size = _field(1, 1)  # Dimension.dim_value
    shape = _field(1, size) + _field(1, size)  # TensorShapeProto.dim
    kind = _field(1, _field(1, 1) + _field(2, shape))  # TypeProto.tensor_type: elem_type FLOAT, shape
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Relu")  # NodeProto.input, output, op_type
    graph = _field(1, node) + _field(2, b"empty")  # GraphProto.node, name
    graph += _field(11, _field(1, b"x") + _field(2, kind)) + _field(12, _field(1, b"y") + _field(2, kind))
    opset = _field(2, 13)  # OperatorSetIdProto.version
    return _field(1, 8) + _field(7, graph) + _field(8, opset)  # ModelProto.ir_version, graph, opset_import
