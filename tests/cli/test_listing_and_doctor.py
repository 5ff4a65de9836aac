"""``lissom list``, ``lissom doctor``, ``lissom --help`` and ``--version``."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess

import pytest

import lissom
import lissom.cli.doctor as doctor_file
from lissom.cli import main
from lissom.cli.doctor import Check, examine
from lissom.registry import KINDS, parts

COMMANDS = ("slim", "measure", "profile", "predict", "fit", "convert", "reproduce", "list", "doctor")


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in text] == []
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    assert main([command, "--help"]) == 0
    assert f"Usage: lissom {command}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lissom {lissom.__version__}\n"


def test_list_names_every_part(capsys):
    assert main(["list"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    known = [part.name for part in parts()]
    assert known
    assert [name for name in known if name not in lines] == []


@pytest.mark.parametrize("kind", ["technique", "Techniques"])
def test_list_of_one_kind_as_json(capsys, kind):
    assert main(["list", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"fuse", "bf16", "int8"} <= {row["name"] for row in rows}
    assert {row["kind"] for row in rows} == {"technique"}
    assert all(row["summary"] for row in rows)


def test_list_knows_every_kind(capsys):
    for kind in KINDS:
        assert main(["list", kind, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) == len(parts(kind))


@pytest.mark.last
def test_doctor_runs_what_is_installed(capsys):
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    found = {(check["group"], check["name"]): check for check in answer["checks"]}
    assert answer["works"] is True
    for runtime in ("openvino", "onnxruntime", "torch"):
        assert found["runtimes", runtime]["ok"], found["runtimes", runtime]
    assert found["privacy", "telemetry"]["ok"], found["privacy", "telemetry"]
    assert found["packages", "torch"]["detail"] == importlib.metadata.version("torch")
    assert ("packages", "pytest") not in found


@pytest.fixture
def quick(monkeypatch):
    """Probes that need no runtime: what is tested is how their end is read."""
    monkeypatch.setattr(doctor_file, "_RUN", "")
    fine = 'print(\'{"detail": "fine", "gpus": {"GPU-1": "a GPU"}}\')'
    monkeypatch.setattr(doctor_file, "_DETAIL", {"openvino": fine, "onnxruntime": fine, "torch": fine})
    monkeypatch.setattr(doctor_file, "_TELEMETRY", fine)
    return monkeypatch


def of(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name and check.group != "packages"]
    return check


def test_doctor_says_what_does_not_run(quick, capsys):
    probes = {
        "openvino": "import os; os.kill(os.getpid(), 11)",
        "onnxruntime": "from lissom.errors import LissomError; raise LissomError('not here; pip install it')",
        "torch": "import time; time.sleep(60)",
    }
    quick.setattr(doctor_file, "_DETAIL", probes)
    quick.setattr(doctor_file, "PROBE_SECONDS", 2)
    checks = examine()
    assert of(checks, "openvino").detail == "ended with code -11"
    assert of(checks, "onnxruntime").detail == "not here; pip install it"
    assert of(checks, "torch").detail == "no answer within 2 s"
    assert not any(of(checks, name).ok for name in probes)
    quick.setattr(doctor_file, "examine", lambda: checks)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no answer within 2 s" in out
    assert out.rstrip().splitlines()[-1].startswith("the core does not work here")


def test_doctor_says_what_to_install(quick, capsys):
    wanted = ["numpy>=1.26", "absent-a>=1", "absent-b>=2; extra == 'onnx'", "rich>=999", "absent-c>=1; extra == 'dev'"]
    quick.setattr(importlib.metadata, "requires", lambda name: wanted)
    checks = examine()
    found = {check.name: check for check in checks if check.group == "packages"}
    assert found["numpy"].ok
    assert found["absent-a"] == Check("packages", "absent-a", False, "not installed", "pip install lissom", True)
    assert found["absent-b"].remedy == "pip install 'lissom[onnx]'"
    assert not found["absent-b"].essential
    assert "older than 999" in found["rich"].detail
    assert "absent-c" not in found
    quick.setattr(doctor_file, "examine", lambda: checks)
    assert main(["doctor"]) == 1
    assert "pip install 'lissom[onnx]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ({"avx2"}, {"int8 products", "bf16 arithmetic", "matrix tiles"}),
        ({"avx2", "avx_vnni"}, {"bf16 arithmetic", "matrix tiles"}),
        ({"avx512f", "avx512_vnni", "amx_int8", "amx_bf16", "avx512_bf16"}, set()),
        ({"asimd", "asimddp", "bf16"}, {"matrix tiles"}),
        (set(), {"wide float32", "int8 products", "bf16 arithmetic", "matrix tiles"}),
    ],
)
def test_doctor_reads_instruction_sets(monkeypatch, flags, missing):
    import lissom.runtime.target

    monkeypatch.setattr(lissom.runtime.target, "cpu_flags", lambda: frozenset(flags))
    checks = list(doctor_file._instructions())
    assert {check.name for check in checks if not check.ok} == missing


def test_doctor_reads_energy_counters(quick, tmp_path):
    import lissom.runtime.energy as energy

    quick.setattr(energy, "POWERCAP", tmp_path)
    quick.setattr(energy, "rapl_counter", lambda: None)
    assert doctor_file._energy().remedy == ""
    (tmp_path / "intel-rapl:0").mkdir()
    assert "chmod" in doctor_file._energy().remedy
    quick.setattr(energy, "rapl_counter", lambda: lambda: lambda: 1.0)
    quick.setattr(energy, "_nvml_counter", lambda uuid: None)
    checks = examine()
    assert of(checks, "energy") == Check("meters", "energy", True, "of the processor, from RAPL")
    assert of(checks, "energy of the GPU").remedy == "pip install 'lissom[gpu]'"
    assert of(checks, "GPU").detail == "a GPU"


def test_doctor_tries_the_compiler(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "no headers" in doctor_file._compiler().detail
    assert not doctor_file._compiler().ok
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert not doctor_file._compiler().ok


def test_doctor_leaves_no_probe_behind(quick, tmp_path):
    quick.setattr(doctor_file, "_TELEMETRY", "import time; time.sleep(600)")
    started: list[subprocess.Popen] = []
    real = doctor_file._start

    def remember(code):
        started.append(real(code))
        return started[-1]

    def interrupt(*arguments):
        raise KeyboardInterrupt

    quick.setattr(doctor_file, "_start", remember)
    quick.setattr(doctor_file, "_finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        examine()
    assert len(started) == 4
    assert [process.wait(timeout=10) is not None for process in started] == [True] * 4
