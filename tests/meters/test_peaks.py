"""The machine's peak and bandwidth: that the right kernels ran, not how fast."""

from __future__ import annotations

import pytest

from lissom.errors import LissomError
from lissom.meters import peaks
from lissom.meters.peaks import kernel_bits, measure_bandwidth, measure_machine
from lissom.runtime.target import local_capabilities


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment on two graphs and a small copy: enough to see which kernels run."""
    names = ("3x3 convolution, 64 channels, 28x28", "matrix product, 128 x 512 x 512")
    monkeypatch.setattr(peaks, "SECONDS", 0.02)
    monkeypatch.setattr(peaks, "_GRAPHS", {name: peaks._GRAPHS[name] for name in names})
    monkeypatch.setattr(peaks, "_last_level_cache", lambda: 2**20)


@pytest.mark.parametrize("bits", [32, 8])
def test_peak_and_bandwidth_at_a_precision(short: None, bits: int) -> None:
    machine = measure_machine(bits=bits, threads=1)
    assert (machine.bits, machine.threads) == (bits, 1)
    assert machine.peak > 1e6
    assert machine.bandwidth > 1e6
    assert f"{bits} bits" in machine.notes[0]
    assert "read and written" in machine.notes[1]
    assert machine.to_json()["ridge"] == machine.peak / machine.bandwidth


def test_a_graph_that_runs_in_another_precision_does_not_count(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "kernel_bits", lambda kernel: 32)  # as if the runtime had left the graph in float
    with pytest.raises(LissomError, match="no kernels of 8 bits"):
        measure_machine(bits=8, threads=1)


@pytest.mark.skipif("bf16" in local_capabilities()["precisions"], reason="this processor computes in bf16")
def test_bf16_is_refused_where_the_processor_lacks_it(short: None) -> None:
    with pytest.raises(LissomError, match="no kernels of 16 bits"):
        measure_machine(bits=16, threads=1)


def test_bytes_read_and_written_both_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_last_level_cache", lambda: 2**20)
    monkeypatch.setattr(peaks, "_best", lambda runs, seconds: {name: 2.0 for name, run in runs.items() if run()})
    bandwidth, size = measure_bandwidth(threads=2, seconds=0)
    assert size == 64 * 2**20
    assert bandwidth == 2 * size / 2.0


def test_what_cannot_be_measured_is_one_sentence() -> None:
    with pytest.raises(LissomError, match="'onnxruntime' cannot be measured"):
        measure_machine("onnxruntime")
    with pytest.raises(LissomError, match="no kernels of 4 bits"):
        measure_machine(bits=4)


def test_precision_by_the_name_of_a_kernel() -> None:
    names = {"jit_avx2_I8": 8, "brgconv_avx2_f32": 32, "brgemm_avx512_amx_bf16": 16, "jit_gemm_u8": 8, "undef": None}
    assert {name: kernel_bits(name) for name in names} == names
