"""Energy of a run, from the hardware's own counters: RAPL of the processor packages, NVML of the GPU. Or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["NOT_AVAILABLE", "energy_counter", "rapl_counter"]

NOT_AVAILABLE = "not available"
POWERCAP = Path("/sys/class/powercap")
Counter = Callable[[], Callable[[], float]]


def energy_counter(gpu: str | None = None) -> tuple[str, Counter | None]:
    """The source's name and its counter, for a graph on the GPU of that UUID, or on the processor (None).

    A counter, called, starts; what it returns, called, gives the millijoules since then. It covers the whole package
    or GPU, whatever else runs there. ("not available", None) where nothing can be read.
    """
    counter = rapl_counter() if gpu is None else _nvml_counter(gpu)
    source = "rapl" if gpu is None else "nvml"
    return (source, counter) if counter else (NOT_AVAILABLE, None)


def rapl_counter(root: Path = POWERCAP) -> Counter | None:
    """The sum over the processor packages' RAPL counters; None where there are none or they may not be read."""
    packages: list[tuple[Path, int]] = []
    try:
        for zone in sorted(root.glob("intel-rapl:*")):  # AMD's packages bear this name too
            if (zone / "name").read_text().startswith("package"):
                int((zone / "energy_uj").read_text())  # only root may, on many a system
                packages.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
    except (OSError, ValueError):
        return None
    if not packages:
        return None

    def start() -> Callable[[], float]:
        before = [int(path.read_text()) for path, _ in packages]

        def stop() -> float:
            total = 0
            for (path, limit), first in zip(packages, before, strict=True):
                used = int(path.read_text()) - first
                total += used if used >= 0 else used + limit  # the counter has wrapped around
            return total / 1000

        return stop

    return start


def _nvml_counter(gpu: str) -> Counter | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def start() -> Callable[[], float]:
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before)

    return start
