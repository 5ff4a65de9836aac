"""Meters of devices. The machine behind ssh is a script that runs what it is told in a home of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.meters import devices
from lissom.meters.devices import LocalMeter, SshMeter, meter_for
from lissom.meters.measurement import Measurement
from lissom.runtime.artifact import Artifact, new_artifact
from lissom.runtime.openvino_graph import import_openvino

# Options are those of ssh that the meter uses; the last two words are the host and the command.
SSH = """#!/bin/sh
echo "$*" >> "$FAKE/log"
while [ "$1" != -- ]; do shift; done
[ "$2" = nowhere ] && { echo "ssh: Could not resolve hostname nowhere" >&2; exit 255; }
echo "Welcome to $2"
HOME="$FAKE/home" exec sh -c "$3"
"""


def build(path: Path, value: float = 1.0, damaged: bool = False) -> Artifact:
    openvino = import_openvino()
    from openvino import opset13 as op

    x = op.parameter([1, 3, 4, 4], np.float32)
    model = openvino.Model([op.multiply(x, op.constant(np.full((1, 1, 1, 1), value, np.float32)))], [x], "m")
    plan = {
        "runtime": "openvino",
        "stages": [{"graph": "stage0.xml", "options": {}}],
        "decisions": [],
        "input": {"shape": [1, 3, 4, 4], "preprocessing": None},
    }
    with new_artifact(path, plan) as folder:
        openvino.save_model(model, folder / "stage0.xml", compress_to_fp16=False)
        if damaged:
            (folder / "stage0.xml").write_text("<net>")
    return Artifact.open(path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the fake device: its home, the log of ssh's calls."""
    folder = tmp_path / "fake device"
    (folder / "home").mkdir(parents=True)
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("LISSOM_SSH", f"'{folder}/ssh' -F none")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return folder


def uploads(fake: Path) -> int:
    return (fake / "log").read_text().count("tar -xf")


def check(measurements: list[Measurement]) -> None:
    first, second = measurements
    assert first.speedup == 1.0
    assert second.speedup is not None
    assert second.speedup_ci is not None
    assert second.speedup_ci[0] <= second.speedup <= second.speedup_ci[1]
    for measurement in measurements:
        assert 0 < measurement.latency_ms <= measurement.p95_ms
        assert measurement.memory_above_empty_mb is None


def test_this_machine(tmp_path: Path) -> None:
    artifacts = [build(tmp_path / "a b", 1), build(tmp_path / "c", 2)]
    meter = meter_for("cpu")
    check(meter.measure(artifacts, threads=1, seconds=0, memory=False))
    assert meter.capabilities("openvino")["processors"] >= 1
    with pytest.raises(LissomError, match="d does not run here: OpenVINO cannot open"):
        meter.measure([build(tmp_path / "d", damaged=True)], threads=1, seconds=0, memory=False)
    (tmp_path / "c" / "stage0.xml").write_text("<net>")
    with pytest.raises(LissomError, match=r"stage0\.xml was altered since its export"):
        meter.measure(artifacts[1:], threads=1, seconds=0, memory=False)


def test_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def refuse(arguments: list[str], **_: Any) -> None:
        asked.append(arguments)
        raise LissomError("enough")

    monkeypatch.setattr(devices, "_run", refuse)
    for memory in (True, False):
        with pytest.raises(LissomError, match="enough"):
            LocalMeter().measure([build(tmp_path / "a")], threads=3, memory=memory)
    assert [("--memory" in arguments) for arguments in asked] == [True, False]
    assert asked[0][asked[0].index("--threads") + 1] == "3"


def test_behind_ssh_artifacts_are_copied_once_and_measured(tmp_path: Path, fake: Path) -> None:
    artifacts = [build(tmp_path / "a b", 1), build(tmp_path / "c", 2)]
    meter = meter_for(f"ssh://me@board:2222/python={sys.executable}")
    assert meter.capabilities("openvino")["processors"] >= 1
    check(meter.measure(artifacts, threads=1, seconds=0, memory=False))
    cache = fake / "home" / ".cache" / "lissom" / "artifacts"
    assert sorted(path.name for path in cache.iterdir()) == sorted(artifact.digest for artifact in artifacts)
    assert uploads(fake) == 2
    meter._copy(artifacts)  # type: ignore[attr-defined]
    assert uploads(fake) == 2
    log = (fake / "log").read_text()
    assert "-F none -o BatchMode=yes" in log
    assert "-p 2222 -- me@board" in log


def test_errors_there_bear_the_names_here(tmp_path: Path, fake: Path) -> None:
    artifact = build(tmp_path / "mine", damaged=True)
    with pytest.raises(LissomError, match=rf"^{artifact.path} does not run on board: OpenVINO cannot open"):
        meter_for(f"ssh://board/python={sys.executable}").measure([artifact], threads=1, seconds=0, memory=False)


def test_a_device_keeps_the_youngest_artifacts_only(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "KEPT", 2)
    meter = SshMeter("board")
    artifacts = [build(tmp_path / str(i), i) for i in range(4)]
    cache = fake / "home" / ".cache" / "lissom" / "artifacts"
    for artifact in artifacts[1:]:
        meter._copy([artifacts[0], artifact])
    assert {path.name for path in cache.iterdir()} == {artifacts[0].digest, artifacts[3].digest}
    assert uploads(fake) == 4
    meter._copy(artifacts)  # more than are kept: all that are wanted are there
    assert {path.name for path in cache.iterdir()} == {artifact.digest for artifact in artifacts}
    for name in ("plan.json", "stage0.xml", "stage0.bin"):
        assert (cache / artifacts[2].digest / name).read_bytes() == (artifacts[2].path / name).read_bytes()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        (lambda _: "ssh://nowhere", "nowhere cannot be reached by ssh: ssh: Could not resolve hostname nowhere"),
        (lambda _: "ssh://board/python=no-such-python", "board lacks a program .* name its Python as"),
        (
            lambda folder: (
                "ssh://board/python=" + script(folder / "bare", "echo \"No module named 'lissom'\" >&2; exit 1")
            ),
            "lissom is not installed for .*bare on board",
        ),
        (
            lambda folder: "ssh://board/python=" + script(folder / "odd", "echo gibberish; echo oops >&2"),
            "measuring on board failed: oops",
        ),
        (
            lambda folder: "ssh://board/python=" + script(folder / "old", "echo '{\"lissom\": 0}'"),
            "board has another version of lissom",
        ),
        (lambda folder: "ssh://board/python=" + script(folder / "ill", "echo ill >&2; exit 9"), "exit code 9: ill"),
    ],
)
def test_what_a_device_lacks_is_one_sentence(device: Callable[[Path], str], sentence: str, fake: Path) -> None:
    with pytest.raises(LissomError, match=sentence):
        meter_for(device(fake)).capabilities("openvino")


def test_only_whole_artifacts_leave_this_machine(tmp_path: Path, fake: Path) -> None:
    artifact = build(tmp_path / "a")
    (tmp_path / "secret").write_text("x")
    with pytest.raises(LissomError, match="names a file outside itself"):
        SshMeter("board")._copy([Artifact(artifact.path, {**artifact.plan, "files": {"../secret": "0"}})])
    weights = artifact.path / "stage0.bin"
    weights.write_bytes(weights.read_bytes() + b"0")
    with pytest.raises(LissomError, match=r"stage0\.bin was altered since its export"):
        SshMeter("board")._copy([artifact])
    weights.unlink()
    with pytest.raises(LissomError, match=r"lacks its file stage0\.bin"):
        SshMeter("board")._copy([artifact])
    assert uploads(fake) == 0


@pytest.mark.parametrize("python", ["~/my env/python", "my env/python"])
def test_a_python_below_the_home_there(python: str, fake: Path) -> None:
    (fake / "home" / "my env").mkdir()
    script(fake / "home" / "my env" / "python", 'echo \'{"lissom": 1, "capabilities": {"processors": 3}}\'')
    assert meter_for(f"ssh://board/python={python}").capabilities("openvino") == {"processors": 3}


def test_without_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISSOM_SSH", "no-such-ssh")
    with pytest.raises(LissomError, match="no program 'no-such-ssh'"):
        meter_for("ssh://board").capabilities("openvino")


def test_devices_by_name() -> None:
    assert isinstance(meter_for("cpu"), LocalMeter)
    assert meter_for("ssh://board") == SshMeter("board", None, "python3")
    assert meter_for("ssh://me@10.0.0.7:22/python=/opt/v e/bin/python") == SshMeter(
        "me@10.0.0.7", 22, "/opt/v e/bin/python"
    )
    assert meter_for("ssh://[fe80::1]:22") == SshMeter("fe80::1", 22, "python3")
    # The last is an option to ssh that would run a program here.
    for bad in ("gpu", "ssh://", "ssh://a b", "ssh://board:port", "ssh://board/pip", "ssh://-oProxyCommand=touch"):
        with pytest.raises(LissomError, match=r"is not of the form|known: cpu"):
            meter_for(bad)
    with pytest.raises(LissomError, match="is not of the form"):
        meter_for("ssh://-l@board")
