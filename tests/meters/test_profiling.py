"""profile: every layer's time found, shares that sum to one, bounds, warnings; not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.export.exporting import export_plan
from lissom.export.plan import Plan, Precision
from lissom.meters import profiling
from lissom.meters.costs import LayerCost, layer_costs
from lissom.meters.plots import GapPoint, draw_efficiency_gap
from lissom.meters.profiling import UNATTRIBUTED, Profile, profile
from lissom.meters.waterline import Machine
from lissom.registry import load_part
from lissom.runtime.backends import LayerTime
from lissom.runtime.target import Target

MACHINE = Machine(peak=1e15, bandwidth=1e15)  # out of reach, so that no warning depends on this processor


class Net(nn.Module):
    """Convolution and BatchNorm, a layer scale, a shortcut, functional calls: what the converter merges and renames."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 16, 1)
        self.scale = nn.Parameter(torch.full((1, 16, 1, 1), 0.5))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.bn(self.conv(x)) + x)
        x = self.point(x) * self.scale + x
        return self.head(x.mean((2, 3)))


LAYERS = {"stem.0", "conv", "point", "head"}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "SECONDS", 0.02)


@pytest.fixture(scope="module")
def result() -> Profile:
    return profile(Net(), (3, 16, 16), threads=1, batch=2, machine=MACHINE, name="net")


def test_every_layer_that_multiplies_has_its_time(result: Profile) -> None:
    rows = {row.path: row for row in result.rows}
    assert {path for path, row in rows.items() if row.macs} == LAYERS
    for path in LAYERS:
        assert rows[path].ms is not None, path
        assert rows[path].bits == 32
    assert rows["conv"].efficiency
    assert result.rows[-1].path == UNATTRIBUTED
    assert sum(row.share for row in result.rows) == pytest.approx(1)
    assert sum(row.ms or 0 for row in result.rows) == pytest.approx(result.nodes_ms)
    assert result.fused > 0  # BatchNorm and ReLU run inside the convolutions


def test_totals_are_the_models(result: Profile) -> None:
    costs = [cost for cost in layer_costs(Net(), (3, 16, 16), batch=2) if cost.macs]
    assert result.ops == sum(cost.ops for cost in costs)
    assert result.bound_ms == pytest.approx(1000 * sum(MACHINE.seconds(cost) for cost in costs))
    assert result.line.ideal_s <= result.line.roofline_s <= result.line.bound_s
    assert result.efficiency == pytest.approx(result.ops / MACHINE.peak / (result.measured_ms / 1000))
    assert result.shape == (2, 3, 16, 16)


def test_json_has_what_the_report_draws(result: Profile) -> None:
    read = json.loads(json.dumps(result.to_json()))
    assert read["measured_ms"] == result.measured_ms
    assert read["machine"]["peak"] == MACHINE.peak
    assert {"path", "kind", "macs", "bytes", "intensity", "ms", "efficiency"} <= set(read["rows"][0])


def test_the_table_is_aligned_and_names_every_row(result: Profile) -> None:
    lines = str(result).splitlines()
    table = lines[2 : 2 + len(result.rows)]
    assert [line.split()[0] for line in table] == [row.path for row in result.rows]
    column = lines[0].index("bound")
    assert all(line[column - 2 : column] == "  " for line in table)
    assert "net in openvino, input 2x3x16x16, 1 threads" in str(result)


def test_an_efficiency_above_one_is_a_warning_not_hidden() -> None:
    slow = profile(Net(), (3, 16, 16), threads=1, machine=Machine(peak=1e3, bandwidth=1e15))
    conv = next(row for row in slow.rows if row.path == "conv")
    assert conv.efficiency is not None
    assert conv.efficiency > 1
    assert conv.bound == "compute"
    assert conv.warning == profiling.ABOVE_PEAK
    assert any(profiling.ABOVE_PEAK in warning for warning in slow.warnings)
    assert any("faster than its bound" in warning for warning in slow.warnings)
    assert "!" in next(line for line in str(slow).splitlines() if line.startswith("conv "))


def test_faster_than_memory_allows_says_caches() -> None:
    narrow = profile(Net(), (3, 16, 16), threads=1, machine=Machine(peak=1e15, bandwidth=1e3))
    conv = next(row for row in narrow.rows if row.path == "conv")
    assert conv.bound == "memory"
    assert conv.warning == profiling.ABOVE_ROOFLINE


def test_an_artifact_is_profiled_at_its_own_batch(tmp_path: Path) -> None:
    model = Net()
    layers = [cost.to_json() for cost in layer_costs(model, (3, 16, 16))]
    artifact = export_plan(Plan.of(model), Target(batch=4), tmp_path / "net", shape=(3, 16, 16), layers=layers)
    by_path = profile(str(artifact.path), threads=1, machine=MACHINE)
    assert by_path.shape == (4, 3, 16, 16)
    assert by_path.ops == 4 * sum(2 * layer["macs"] for layer in layers)
    assert {row.path for row in by_path.rows if row.ms is not None} >= LAYERS
    with pytest.raises(LissomError, match="a batch of its own"):
        profile(artifact, batch=2)


def test_an_artifact_without_costs_is_refused(tmp_path: Path) -> None:
    artifact = load_part("exporter", "float32")(Net(), (3, 16, 16), "openvino", 1, tmp_path / "net")
    with pytest.raises(LissomError, match="does not say what its layers cost"):
        profile(artifact)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LissomError, match="does not say its input's size"):
        profile(Net())
    with pytest.raises(LissomError, match="onnxruntime does not tell the time of each layer"):
        profile(Net(), (3, 16, 16), runtime="onnxruntime")
    with pytest.raises(LissomError, match="is no artifact"):
        profile(tmp_path)


@pytest.mark.full
def test_layers_are_judged_at_the_precision_they_ran_in(tmp_path: Path) -> None:
    model = Net()
    layers = [cost.to_json() for cost in layer_costs(model, (3, 32, 32))]
    plan = Plan(stages=(model,), precision=Precision({"": 8, "conv": 32}))
    calibration = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    artifact = export_plan(plan, Target(), tmp_path / "net", shape=(3, 32, 32), calibration=calibration, layers=layers)
    mixed = profile(artifact, threads=1, machine={8: Machine(4e15, 1e15, bits=8), 32: MACHINE})
    bits = {row.path: row.bits for row in mixed.rows if row.macs}
    assert bits["conv"] == 32
    assert bits["point"] == 8
    assert set(mixed.machines) == {8, 32}
    float_bytes = {layer["path"]: LayerCost.from_json(layer).bytes for layer in layers}
    assert {row.path: row.bytes for row in mixed.rows}["point"] == float_bytes["point"] // 4


def cost(path: str, macs: int, size: int = 100) -> LayerCost:
    return LayerCost(path, "conv", macs, 0, size, 0, 0)


def test_time_of_a_fused_kernel_goes_to_the_layer_that_multiplies_most() -> None:
    costs = [cost("wide", 1000), cost("deep", 10), cost("act", 0), cost("apart", 5)]
    nodes = {"conv": "wide", "conv_1": "deep", "relu": "act", "linear": "apart"}
    times = [
        LayerTime(("conv/x", "conv_1/y", "relu/z", "linear/bias"), "Convolution", "jit_avx2_I8", 3000.0),
        LayerTime(("linear/product",), "FullyConnected", "brgemm_avx2_f32", 500.0),
        LayerTime((), "Reorder", "jit_uni_f32", 1500.0),
        LayerTime(("Constant_7",), "Reorder", "jit_uni_f32", 1000.0),
    ]
    work = profiling._attribute(times, nodes, costs)
    assert work.ms == {"wide": 3.0, "apart": 0.5}
    assert work.unattributed == {"Reorder": 2.5}
    assert work.joined["wide"] == {"deep"}
    assert work.bits == {"wide": 8, "deep": 8, "apart": 32}
    rows = {row.path: row for row in profiling._rows(costs, work, {32: MACHINE})}
    assert rows["wide"].efficiency == pytest.approx(2 * 1010 / MACHINE.peak / 3e-3)
    assert (rows["deep"].ms, rows["deep"].inside) == (None, "wide")
    assert "act" not in rows
    assert rows[UNATTRIBUTED].share == pytest.approx(2.5 / 6)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots_are_images(result: Profile, tmp_path: Path, suffix: str) -> None:
    start = {".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    result.save_plot(tmp_path / f"waterline{suffix}")
    points = [GapPoint("a", f"a{i}", 70 + i, 1e-3 * i, 3e-3 * i) for i in (1, 2)]
    draw_efficiency_gap(points, tmp_path / f"gap{suffix}", "two cores, float32, batch 1")
    for name in ("waterline", "gap"):
        assert (tmp_path / f"{name}{suffix}").read_bytes().startswith(start)


def test_an_unknown_kind_of_image_is_one_sentence(result: Profile, tmp_path: Path) -> None:
    with pytest.raises(LissomError, match=r"end its name in \.png"):
        result.save_plot(tmp_path / "waterline.jpg2")


def test_command_line_prints_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lissom.cli.profile import profile as command

    def measure(runtime: str, bits: int, threads: int) -> Machine:
        return MACHINE

    monkeypatch.setattr(profiling, "measure_machine", measure)
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n")
    options: dict[str, Any] = {"weights": None, "arch": None, "batch": 1, "threads": 1}
    command(f"{file}:net", shape="3,8,8", plot=tmp_path / "plot.png", as_json=True, **options)
    assert json.loads(capsys.readouterr().out)["macs"] == 6 * 6 * 4 * 27
    assert (tmp_path / "plot.png").is_file()
    with pytest.raises(LissomError, match="'3,8,x' is no input shape"):
        command(f"{file}:net", shape="3,8,x", plot=None, as_json=False, **options)
    with pytest.raises(LissomError, match="no kind of image"):
        command(f"{file}:net", shape="3,8,8", plot=tmp_path / "plot.txt", as_json=False, **options)
