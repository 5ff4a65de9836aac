"""Roofline and waterline against the published definitions' own figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lissom.meters.waterline import (
    Kernel,
    Machine,
    convfirst_block,
    convolution,
    efficiency,
    mbconv_block,
    roofline,
    waterline,
)


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return json.loads((Path(folder) / "convfirst" / "cases.json").read_text())


def test_convolutions_of_the_cases(cases: dict[str, Any]) -> None:
    assert len(cases["conv_layers"]) == 5
    for case in cases["conv_layers"]:
        kernel = convolution(
            case["N"], case["H"], case["W"], case["C"], case["K"], (case["R"], case["S"]),
            case["stride"], case["groups"], case["bytes_per_element"],
        )  # fmt: skip
        assert (kernel.ops, kernel.bytes) == (case["ops"], case["bytes"])
        assert kernel.intensity == pytest.approx(case["intensity"], rel=1e-6)


def test_waterlines_of_the_cases(cases: dict[str, Any]) -> None:
    assert len(cases["waterline"]) == 2
    for case in cases["waterline"]:
        machine = Machine(case["peak_ops_per_s"], case["bandwidth_bytes_per_s"])
        line = waterline([Kernel("", **kernel) for kernel in case["kernels"]], machine)
        assert machine.ridge == pytest.approx(case["ridge_op_per_byte"])
        assert line.ideal_s == pytest.approx(case["ideal_latency_s"])
        assert line.bound_s == pytest.approx(case["waterline_latency_s"])
        assert line.max_efficiency == pytest.approx(case["waterline_max_efficiency"], rel=1e-6)
        assert line.roofline_of_sums == pytest.approx(case["roofline_of_sums_max_efficiency"])
        assert list(line.memory_bound) == case["memory_bound"]


def test_blocks_of_the_cases(cases: dict[str, Any]) -> None:
    assert [case["kind"] for case in cases["blocks"]] == ["convfirst", "mbconv"]
    for case in cases["blocks"]:
        costs = {"convfirst": convfirst_block, "mbconv": mbconv_block}[case["kind"]]
        block = costs(
            case["N"], case["H"], case["C"], case["expansion"], case["group_width"], case["kernel"], element_bytes=2
        )
        assert [k.ops for k in block.layers] == case["layer_ops"]
        assert [k.bytes for k in block.layers] == case["layer_bytes_unfused"]
        assert block.fused.ops == block.unfused.ops == case["ops"]
        assert block.unfused.bytes == case["unfused_bytes"]
        assert block.fused.bytes == case["fused_bytes"]
        assert block.unfused.intensity == pytest.approx(case["unfused_intensity"], rel=1e-6)
        assert block.fused.intensity == pytest.approx(case["fused_intensity"], rel=1e-6)


def test_efficiency_of_the_cases(cases: dict[str, Any]) -> None:
    assert len(cases["efficiency"]) == 1
    for case in cases["efficiency"]:
        value = efficiency(case["ops"], case["latency_s"], Machine(case["peak_ops_per_s"], 1.0))
        assert value == pytest.approx(case["computational_efficiency"], rel=1e-6)
        assert value * case["latency_s"] == pytest.approx(case["ideal_latency_s"])


MACHINE = Machine(peak=100.0, bandwidth=10.0)  # ridge 10


def test_roofline_is_the_intensity_over_the_ridge_up_to_one() -> None:
    assert roofline(Kernel("", 50, 10), MACHINE) == pytest.approx(0.5)
    assert roofline(Kernel("", 200, 10), MACHINE) == 1
    assert roofline(Kernel("", 0, 10), MACHINE) == 0


def test_a_strided_convolution_writes_the_smaller_output() -> None:
    kernel = convolution(1, 7, 5, 2, 4, (3, 3), stride=2, element_bytes=4)
    assert kernel.ops == 2 * 4 * 3 * (4 * 2 * 9)
    assert kernel.bytes == 4 * (7 * 5 * 2 + 4 * 3 * 4 + 4 * 2 * 9)


def test_equal_to_the_roofline_of_sums_only_on_one_side_of_the_ridge() -> None:
    low, high = Kernel("", 10, 10), Kernel("", 1000, 10)
    same = waterline([low, Kernel("", 90, 10)], MACHINE)
    assert same.max_efficiency == pytest.approx(same.roofline_of_sums)
    mixed = waterline([low, high], MACHINE)
    assert mixed.max_efficiency < mixed.roofline_of_sums == 1
    assert mixed.ideal_s <= mixed.roofline_s < mixed.bound_s


def test_one_machine_a_kernel_where_precisions_differ() -> None:
    fast = Machine(peak=400.0, bandwidth=10.0, bits=8)
    kernel = Kernel("", 1000, 10)
    assert waterline([kernel, kernel], [MACHINE, fast]).bound_s == pytest.approx(10 + 2.5)
    with pytest.raises(ValueError, match="shorter"):
        waterline([kernel, kernel], [MACHINE])
