"""``measure``: artifacts and models side by side. What a run costs is scripted here; tests/runtime measures really."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import lissom
from lissom.errors import LissomError
from lissom.meters import comparing
from lissom.meters.measurement import Measurement
from lissom.runtime.artifact import Artifact, new_artifact
from lissom.runtime.predictor import load


class Scripted:
    """The n-th artifact takes n milliseconds; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Artifact], int]] = []
        self.answers: list[Any] = []

    def capabilities(self, runtime: str) -> dict[str, Any]:
        return {"processors": 7}

    def measure(
        self, artifacts: Sequence[Artifact], *, threads: int, seconds: float = 2.0, memory: bool = True
    ) -> list[Measurement]:
        self.asked.append((list(artifacts), threads))
        for artifact in artifacts:  # exports live in a temporary folder: they must be there now
            if artifact.graphs[0].stat().st_size > 100:
                self.answers.append(load(artifact.path, 1)(np.ones((1, *artifact.input_shape[1:]), np.float32)))
        return [
            Measurement(float(n), n + 0.5, 1000 / n, 1 / n, (0.9 / n, 1.1 / n) if n > 1 else (1.0, 1.0), 100, 10)
            for n in range(1, len(artifacts) + 1)
        ]


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(comparing, "meter_for", lambda device: scripted)
    return scripted


def artifact(path: Path, batch: int = 1) -> Artifact:
    plan = {
        "runtime": "openvino",
        "stages": [{"graph": "stage0.xml", "options": {}}],
        "input": {"shape": [batch, 3, 8, 8], "preprocessing": None},
    }
    with new_artifact(path, plan) as folder:
        (folder / "stage0.xml").write_text("not run here")
    return Artifact.open(path)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Any) -> Any:
        return self.body(x)


def test_artifacts_by_folder_by_plan_and_as_objects(tmp_path: Path, meter: Scripted) -> None:
    a, b, c = (artifact(tmp_path / name) for name in "abc")
    comparison = lissom.measure(str(a.path), b.path / "plan.json", c)
    assert [name for name, _ in comparison.rows] == [str(one.path) for one in (a, b, c)]
    assert meter.asked == [([a, b, c], 7)]
    assert comparison.threads == 7
    rows = comparison.to_json()["rows"]
    assert rows[1]["name"] == str(b.path)
    assert rows[1]["latency_ms"] == 2.0
    assert rows[1]["speedup_ci"] == (0.45, 0.55)


def test_the_table_shows_every_row_aligned(tmp_path: Path, meter: Scripted) -> None:
    table = str(lissom.measure(artifact(tmp_path / "a"), artifact(tmp_path / "longer"), threads=2)).splitlines()
    assert "0.50x [0.45, 0.55]" in table[2]
    assert "1.00x" in table[1]
    assert "[" not in table[1]  # the reference has no interval
    assert len(table[0]) == len(table[1]) == len(table[2])
    assert "threads 2, batch 1" in table[3]
    assert "energy: not available" in table[3]


def test_a_module_is_exported_in_float32_for_the_shape_beside_it(tmp_path: Path, meter: Scripted) -> None:
    import torch

    model = Small()
    comparison = lissom.measure(artifact(tmp_path / "a"), model, threads=1)
    assert comparison.rows[1][0] == "Small"
    exported = meter.asked[0][0][1]
    assert exported.input_shape == (1, 3, 8, 8)
    with torch.no_grad():
        np.testing.assert_allclose(meter.answers[0], model.eval()(torch.ones(1, 3, 8, 8)).numpy(), rtol=1e-4, atol=1e-5)
    assert not exported.path.exists()  # nothing is left behind
    assert lissom.measure(model, shape=(3, 16, 16), batch=2, threads=1).batch == 2
    assert meter.asked[1][0][0].input_shape == (2, 3, 16, 16)


def test_a_users_function_by_name(tmp_path: Path, meter: Scripted) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())\n")
    comparison = lissom.measure(f"{file}:net", shape=(3, 8, 8), threads=1)
    assert comparison.rows[0][0] == f"{file}:net"


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, meter: Scripted) -> None:
    one, four = artifact(tmp_path / "one"), artifact(tmp_path / "four", batch=4)
    assert lissom.measure(four, threads=1).batch == 4
    with pytest.raises(LissomError, match="was exported for batch 4, not 1"):
        lissom.measure(one, four)
    with pytest.raises(LissomError, match="was exported for batch 1, not 8"):
        lissom.measure(one, batch=8)
    with pytest.raises(LissomError, match="name at least one"):
        lissom.measure()
    with pytest.raises(LissomError, match="input size of Small is not known"):
        lissom.measure(Small())
    with pytest.raises(LissomError, match="not int"):
        lissom.measure(3)
    with pytest.raises(LissomError, match="holds no plan"):
        lissom.measure(tmp_path)
    with pytest.raises(LissomError, match="no runtime is called 'abacus'"):
        lissom.measure(one, runtime="abacus")
    with pytest.raises(LissomError, match="positive"):
        lissom.measure(one, threads=0)
    assert len(meter.asked) == 1
