"""Energy is read from counters or not given at all."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from lissom.runtime import energy
from lissom.runtime.energy import energy_counter, rapl_counter


def zone(root: Path, name: str, kind: str, microjoules: int, limit: int = 1_000_000) -> Path:
    (root / name).mkdir()
    (root / name / "name").write_text(f"{kind}\n")
    (root / name / "energy_uj").write_text(f"{microjoules}\n")
    (root / name / "max_energy_range_uj").write_text(f"{limit}\n")
    return root / name / "energy_uj"


def test_packages_are_summed_and_a_wrapped_counter_counts_on(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 900_000)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 0)
    counter = rapl_counter(tmp_path)
    assert counter is not None
    stop = counter()
    first.write_text("103000")
    second.write_text("2000")  # 100,000 up to the limit, and 2,000 more
    part.write_text("999999")  # a part of a package is in it already, and psys holds the packages
    whole.write_text("999999")
    assert stop() == pytest.approx(3 + 102)


def test_no_counter_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rapl_counter(tmp_path) is None
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("secret")
    assert rapl_counter(tmp_path) is None
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # cannot be read, as where only root may
    assert rapl_counter(tmp_path) is None
    monkeypatch.setattr(energy, "rapl_counter", lambda: None)
    assert energy_counter() == ("not available", None)


def test_a_gpu_is_read_by_nvml_and_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([1000, 1000, 1250])

    class NVMLError(Exception):
        pass

    def handle(uuid: str) -> str:
        if uuid != "GPU-1":
            raise NVMLError
        return uuid

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(readings),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    source, counter = energy_counter("GPU-1")
    assert source == "nvml"
    assert counter is not None
    assert counter()() == 250
    assert energy_counter("GPU-2") == ("not available", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter("GPU-1") == ("not available", None)
