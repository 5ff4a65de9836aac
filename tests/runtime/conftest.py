"""Artifacts made by hand: a graph of one matrix product, whose answers NumPy knows too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lissom.runtime.artifact import Artifact, new_artifact
from lissom.runtime.openvino_graph import import_openvino

SHAPE = (3, 4, 4)


def weights(classes: int = 5) -> np.ndarray:
    """float32 (48, classes)."""
    return np.random.default_rng(7).standard_normal((48, classes), dtype=np.float32)


def save_openvino(path: Path, batch: int = 1, convolutions: int = 0, classes: int = 5) -> None:
    """Images (batch, 3, 4, 4) times ``weights()``, after some convolutions that change nothing."""
    openvino = import_openvino()
    from openvino import opset13 as op

    x = op.parameter([batch, *SHAPE], np.float32, name="x")
    h: Any = x
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    kernel[range(3), range(3), 1, 1] = 1
    for i in range(convolutions):
        h = op.convolution(h, op.constant(kernel), [1, 1], [1, 1], [1, 1], [1, 1])
        h.set_friendly_name(f"conv{i}")
    flat = op.reshape(h, op.constant([batch, 48]), special_zero=False)
    out = op.matmul(flat, op.constant(weights(classes)), False, False)
    out.set_friendly_name("head")
    openvino.save_model(openvino.Model([out], [x], "hand-made"), path, compress_to_fp16=False)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Artifact]:
    """``make(name, batch=..., convolutions=..., **fields of plan.json)`` writes an OpenVINO artifact."""

    def write(name: str = "artifact", batch: int = 1, convolutions: int = 0, **fields: Any) -> Artifact:
        plan = {
            "runtime": "openvino",
            "stages": [{"graph": "stage0.xml", "options": {}}],
            "decisions": [],
            "input": {"shape": [batch, *SHAPE], "preprocessing": fields.pop("preprocessing", None)},
            "classes": ["ant", "bee", "cat", "dog", "eel"],
            "recipe": "",
            **fields,
        }
        with new_artifact(tmp_path / name, plan) as folder:
            save_openvino(folder / "stage0.xml", batch, convolutions)
        return Artifact.open(tmp_path / name)

    return write


@pytest.fixture
def want() -> Callable[[np.ndarray], np.ndarray]:
    """What those artifacts answer to float32 (n, 3, 4, 4), by NumPy."""
    return lambda x: x.reshape(len(x), 48) @ weights()
