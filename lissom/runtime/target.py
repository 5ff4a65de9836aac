"""Target: where a model is to run, and how; and what this machine can do."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RUNTIMES", "Target", "cpu_flags", "cpu_name", "default_threads", "local_capabilities"]

RUNTIMES = ("openvino", "onnxruntime", "torch")


@dataclass(frozen=True)
class Target:
    """Runtime, device (``cpu`` or ``ssh://HOST``), batch size, threads, and the device's capabilities.

    ``capabilities`` holds instruction sets and the runtime's own precisions, e.g. ``{"avx2", "bf16"}``.
    """

    runtime: str = "openvino"
    device: str = "cpu"
    batch: int = 1
    threads: int = 1
    capabilities: frozenset[str] = field(default_factory=frozenset)

    def can(self, capability: str) -> bool:
        return capability in self.capabilities


def processors() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """As many threads as there are processors for this process, or fewer where OMP_NUM_THREADS says so, as numerical
    libraries have it: more than their share slows down whatever runs beside."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(processors(), int(asked)) if asked.isdecimal() and int(asked) > 0 else processors()


def _cpuinfo(key: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return ""


def cpu_flags() -> frozenset[str]:
    """The instruction sets that matter for inference, of those the processor reports."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    wanted = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
              "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
    return frozenset(flag for flag in wanted if flag in flags)


def cpu_name() -> str:
    """The processor as it calls itself, or its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def local_capabilities(runtime: str = "openvino") -> dict[str, Any]:
    """What this machine offers: processor, instruction sets, and the precisions the runtime computes in."""
    flags = cpu_flags()
    # A runtime emulates bf16 where the processor lacks it: only real arithmetic counts as a capability.
    precisions = {"fp32", "int8"}
    if flags & {"avx512_bf16", "amx_bf16", "bf16"} and runtime in ("openvino", "torch"):
        precisions.add("bf16")
    return {
        "cpu": cpu_name(),
        "processors": processors(),
        "flags": sorted(flags),
        "precisions": sorted(precisions),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
