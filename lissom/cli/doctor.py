"""``lissom doctor``: what is installed, what works on this machine, and what to install or do for the rest.

Nothing is believed because it imports: each runtime computes a tiny graph in a process of its own, so that one that
crashes or hangs costs a line, not the answer.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

__all__ = ["Check", "doctor", "examine"]

_NVIDIA = Path("/dev/nvidiactl")  # there where the driver is
PROBE_SECONDS = 120  # a cold import of a large package on a slow disk takes half a minute

# Each prints one JSON object, and fails where an answer is wrong. They use lissom's own back ends.
_RUN = """
import json, numpy
from lissom.runtime.backends import open_graph
graph = open_graph(None, {runtime!r}, threads=1)
for value, wanted in ((-1, 0), (2, 2)):
    answer = graph.run(numpy.full((1, 1), value, numpy.float32))
    assert answer.tolist() == [[wanted]], f"max(0, {{value}}) gave {{answer}}"
"""
_DETAIL = {
    "openvino": """
import openvino
core = openvino.Core()
devices = ", ".join(core.available_devices)
precisions = ", ".join(sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
print(json.dumps({"detail": f"devices {devices}; computes in {precisions}"}))
""",
    "onnxruntime": """
import onnxruntime
print(json.dumps({"detail": f"providers {', '.join(onnxruntime.get_available_providers())}"}))
""",
    "torch": """
import torch
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
gpus = {f"GPU-{gpu.uuid}": gpu.name for gpu in found} if torch.cuda.is_available() else {}
print(json.dumps({"detail": f"computes in {torch.backends.cpu.get_cpu_capability()}", "gpus": gpus}))
""",
}
# Who reports over the network keeps an identifier of the user in his home: an empty home shows whether one is made.
_TELEMETRY = """
import os, tempfile
with tempfile.TemporaryDirectory() as home:
    os.environ["HOME"] = home
    from lissom.export.telemetry import quiet
    from lissom.runtime.openvino_graph import import_openvino
    import_openvino()
    with quiet():
        import nncf
    kept = os.listdir(home)
assert not kept, f"an identifier was kept in {kept}"
print('{"detail": "off: OpenVINO and NNCF keep no identifier and send nothing when lissom calls them"}')
"""

# Name, the processor's flags of which one is enough, what it means to have it, and to lack it.
_INSTRUCTIONS = (
    ("wide float32", {"avx2", "avx512f", "asimd"}, "float32 products run eight numbers or more at a time",
     "everything runs slowly here; measure on the device you mean with --device"),
    ("int8 products", {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"},
     "int8 multiplies and adds in one instruction: the int8 technique pays in time",
     "no VNNI: int8 matrix products gain little time over float32; weights still shrink to a quarter"),
    ("bf16 arithmetic", {"avx512_bf16", "amx_bf16", "bf16"},
     "bf16 products are computed as such: the bf16 technique pays in time",
     "bf16 would be emulated and no faster, so the bf16 technique is not applicable here"),
    ("matrix tiles", {"amx_int8", "amx_bf16"}, "AMX multiplies whole tiles", "no AMX; nothing needs it"),
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of the answer. ``essential``: without it the main job does not run here. ``remedy``: what would do."""

    group: str
    name: str
    ok: bool
    detail: str
    remedy: str = ""
    essential: bool = False


def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Say what works on this machine, and what to install for the rest. Exit code 1 where the core does not work."""
    if not as_json:
        from lissom.cli.console import remarks

        remarks().print("trying each runtime; this takes ten to forty seconds")
    checks = examine()
    works = all(check.ok for check in checks if check.essential)
    if as_json:
        typer.echo(json.dumps({"works": works, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        _show(checks, works)
    if not works:
        raise typer.Exit(1)


def examine() -> list[Check]:
    """Every check of this machine, grouped; about ten seconds, most of them torch's import."""
    codes = {name: _RUN.format(runtime=name) + code for name, code in _DETAIL.items()}
    probes = {name: _start(code) for name, code in {**codes, "telemetry": _TELEMETRY}.items()}
    try:
        runtimes = {name: _finish("runtimes", name, probes[name]) for name in codes}
        telemetry, _ = _finish("privacy", "telemetry", probes["telemetry"])
    finally:
        for process in probes.values():
            process.kill()
    gpus = runtimes["torch"][1].get("gpus", {})
    return [
        *_machine(),
        *_packages(),
        *(check for check, _ in runtimes.values()),
        *_instructions(),
        *_meters(gpus),
        *_tools(gpus),
        telemetry,
    ]


def _machine() -> Iterator[Check]:
    from lissom import __version__
    from lissom.runtime.target import local_capabilities

    found = local_capabilities()
    yield Check("machine", "lissom", True, __version__)
    yield Check("machine", "python", sys.version_info >= (3, 11), found["python"], "Python 3.11 or newer", True)
    yield Check("machine", "system", True, found["system"])
    yield Check("machine", "processor", True, f"{found['cpu']}, {found['processors']} usable")


def _packages() -> Iterator[Check]:
    """What lissom's own metadata ask for, so that no second list can go stale."""
    try:
        wanted = importlib.metadata.requires("lissom") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "lissom", False, "not installed, only found on the path", "pip install -e .", True)
        return
    for line in wanted:
        match = re.match(r"([\w.-]+)>=([\d.]+)(?:; extra == [\"'](\w+)[\"'])?$", line)
        if match is None:
            raise ValueError(f"lissom's metadata hold a requirement of another form: {line}")
        name, least, extra = match.groups()
        if extra == "dev":
            continue
        if extra == "gpu" and not _NVIDIA.exists():
            continue
        install = f"pip install 'lissom[{extra}]'" if extra else "pip install lissom"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check("packages", name, False, "not installed", install, extra is None)
            continue
        old = _numbers(version) < _numbers(least)
        detail = f"{version}, older than {least}" if old else version
        yield Check("packages", name, not old, detail, f"{install} --upgrade" if old else "", extra is None)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", code],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _finish(group: str, name: str, process: subprocess.Popen[str]) -> tuple[Check, dict[str, Any]]:
    """The check that a probe stands for, and what it printed."""
    essential = name in ("openvino", "torch")
    try:
        output, errors = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Check(group, name, False, f"no answer within {PROBE_SECONDS} s", "", essential), {}
    if process.returncode == 0:
        found = json.loads(output.splitlines()[-1])
        return Check(group, name, True, found["detail"], "", essential), found
    why = errors.strip().splitlines()[-1] if errors.strip() else f"ended with code {process.returncode}"
    # A LissomError's sentence says itself what is missing and what would do.
    return Check(group, name, False, why.removeprefix("lissom.errors.LissomError: "), "", essential), {}


def _instructions() -> Iterator[Check]:
    from lissom.runtime.target import cpu_flags

    flags = cpu_flags()
    for name, enough, have, lack in _INSTRUCTIONS:
        found = sorted(flags & enough)
        yield Check("instruction sets", name, bool(found), f"{', '.join(found)}: {have}" if found else lack)


def _meters(gpus: dict[str, str]) -> Iterator[Check]:
    yield Check("meters", "latency", True, "the process's own clock, interleaved with the baseline")
    yield _memory()
    yield _energy()
    for uuid, name in gpus.items():
        yield _gpu_energy(uuid, name)


def _memory() -> Check:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found is None:
        return Check("meters", "memory", False, "the system does not report VmHWM; Linux does")
    return Check("meters", "memory", True, "VmHWM of the process that runs the artifact")


def _energy() -> Check:
    from lissom.runtime.energy import POWERCAP, energy_counter

    source, counter = energy_counter()
    if counter is not None:
        return Check("meters", "energy", True, f"of the processor, from {source.upper()}")
    if any(POWERCAP.glob("intel-rapl:*")):
        remedy = "as root, to read the energy of the processor: chmod a+r /sys/class/powercap/intel-rapl*/energy_uj"
        return Check("meters", "energy", False, "RAPL's counter may not be read by this user", remedy)
    return Check("meters", "energy", False, "no RAPL counter: virtual machines hide it, and ARM has none")


def _gpu_energy(uuid: str, name: str) -> Check:
    from lissom.runtime.energy import energy_counter

    source, counter = energy_counter(uuid)
    if counter is None:
        why = f"NVML does not give that of {name}, or nvidia-ml-py is not installed"
        return Check("meters", "energy of the GPU", False, why, "pip install 'lissom[gpu]'")
    return Check("meters", "energy of the GPU", True, f"of {name}, from {source.upper()}")


def _tools(gpus: dict[str, str]) -> Iterator[Check]:
    yield _compiler()
    yield Check("tools", "GPU", bool(gpus), ", ".join(gpus.values()) or "torch sees none; none is needed")


def _compiler() -> Check:
    """torch.compile writes C++ that includes Python.h: the same is asked of the compiler here."""
    import shutil
    import sysconfig

    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    remedy = "install g++ and Python's headers (build-essential and python3-dev, or the like)"
    if compiler is None:
        return Check("tools", "C++ compiler", False, "none found: torch.compile is left out of reports", remedy)
    command = [compiler, "-x", "c++", "-std=c++17", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-"]
    try:
        done = subprocess.run(
            command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("tools", "C++ compiler", False, f"{compiler} does not run: {error}", remedy)
    if done.returncode:
        why = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"code {done.returncode}"
        return Check("tools", "C++ compiler", False, f"{compiler} fails: {why}", remedy)
    return Check("tools", "C++ compiler", True, f"{compiler} compiles what torch.compile writes")


def _show(checks: list[Check], works: bool) -> None:
    from rich.text import Text

    from lissom.cli.console import clean, results

    console = results()
    width = max(len(check.name) for check in checks)
    for group in dict.fromkeys(check.group for check in checks):
        console.print(Text(group, style="bold"))
        for check in (c for c in checks if c.group == group):
            mark = Text("  ok  ", "green") if check.ok else Text("  no  ", "red" if check.essential else "yellow")
            line = Text.assemble(mark, f"{check.name:<{width}}  ", clean(check.detail))
            console.print(line, soft_wrap=True)
    todo = {check.remedy: None for check in checks if not check.ok and check.remedy}
    if todo:
        console.print(Text("to add what is missing", style="bold"))
        for remedy in todo:
            console.print(Text(f"  {remedy}"), soft_wrap=True)
    console.print("the core works here" if works else "the core does not work here: see the lines marked no")
