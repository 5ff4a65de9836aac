"""Meters of devices: this machine, or one behind ssh; both run ``python -m lissom.runtime.bench`` and read its JSON."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lissom.errors import LissomError
from lissom.meters.measurement import Measurement, Meter
from lissom.runtime.artifact import Artifact
from lissom.runtime.bench import VERSION, command, environment

__all__ = ["LocalMeter", "SshMeter", "meter_for"]

CACHE = '"${XDG_CACHE_HOME:-$HOME/.cache}/lissom/artifacts"'  # for a shell to expand
KEPT = 16  # artifacts that stay in a device's cache: enough for a reference and its rivals, little for a small disk


def meter_for(device: str) -> Meter:
    """The meter of ``cpu`` (this machine) or ``ssh://[user@]host[:port][/python=PATH]``. Raises LissomError else."""
    if device == "cpu":
        return LocalMeter()
    if device.startswith("ssh://"):
        return SshMeter.of(device)
    raise LissomError(f"no device is called {device!r}; known: cpu, ssh://[user@]host[:port][/python=PATH]")


class LocalMeter:
    """Measures on this machine, in fresh processes of this interpreter."""

    def capabilities(self, runtime: str) -> dict[str, Any]:
        return _document(_run(command("--capabilities", runtime), env=environment()))["capabilities"]

    def measure(
        self, artifacts: Sequence[Artifact], *, threads: int, seconds: float = 2.0, memory: bool = True
    ) -> list[Measurement]:
        options = _options([str(a.path.resolve()) for a in artifacts], threads, seconds, memory)
        return _measurements(_document(_run(command(*options), env=environment())))


@dataclass(frozen=True)
class SshMeter:
    """Measures on a machine behind ssh, where Python, NumPy, the runtime and lissom are installed.

    Artifacts are copied once into ``~/.cache/lissom/artifacts`` there, under the hash of their content; the last
    sixteen stay. ssh must work without questions: it asks none (BatchMode). ``LISSOM_SSH`` in the environment is
    the ssh command to use, with options if wished.
    """

    host: str
    port: int | None = None
    python: str = "python3"

    @classmethod
    def of(cls, device: str) -> SshMeter:
        """From ``ssh://[user@]host[:port][/python=PATH]``. Raises LissomError where it has another form."""
        # A name that starts with a dash would be an option to ssh.
        form = r"ssh://((?:[\w.][\w.-]*@)?(?:[\w.][\w.-]*|\[[0-9a-fA-F:]+\]))(?::(\d{1,5}))?(?:/(?:python=(.+))?)?"
        found = re.fullmatch(form, device)
        if not found:
            raise LissomError(f"{device!r} is not of the form ssh://[user@]host[:port][/python=PATH]")
        host = found[1].replace("[", "").replace("]", "")
        return cls(host, int(found[2]) if found[2] else None, found[3] or "python3")

    def capabilities(self, runtime: str) -> dict[str, Any]:
        return self._bench(["--capabilities", runtime])["capabilities"]

    def measure(
        self, artifacts: Sequence[Artifact], *, threads: int, seconds: float = 2.0, memory: bool = True
    ) -> list[Measurement]:
        self._copy(artifacts)
        names = {artifact.digest: str(artifact.path) for artifact in artifacts}
        try:
            options = _options([artifact.digest for artifact in artifacts], threads, seconds, memory)
            return _measurements(self._bench(options))
        except LissomError as error:
            # The user knows the artifact by its own name, not by that of its copy.
            message = str(error).replace("does not run here", f"does not run on {self.host}")
            raise LissomError(re.sub("|".join(names), lambda found: names[found[0]], message)) from error

    def _bench(self, options: Sequence[str]) -> dict[str, Any]:
        """What bench prints there, in the folder of the copies."""
        python = self.python.removeprefix("~/")
        program = shlex.quote(python)
        if "/" in python and not python.startswith("/"):
            program = f'"$HOME"/{program}'
        words = shlex.join(["-P", "-m", "lissom.runtime.bench", *options])
        script = f"mkdir -p {CACHE} && cd {CACHE} && {program} {words}"
        return _document(self._shell(script, codes=(0, 2)), self.host)

    def _copy(self, artifacts: Sequence[Artifact]) -> None:
        """Bring those artifacts over that are not there yet, whole or not at all; forget the oldest."""
        wanted = {artifact.digest: artifact for artifact in artifacts}
        # What is used now becomes the youngest. An upload that was cut off is forgotten after a day.
        have = self._shell(
            f"mkdir -p {CACHE} && cd {CACHE} && find . -maxdepth 1 -name '.new.*' -mtime +1 -exec rm -rf {{}} + && "
            f"for d in {' '.join(wanted)}; do "
            'if [ -f "$d/plan.json" ]; then touch "$d" && echo "have $d"; fi; done'
        )
        there = set(re.findall(r"^have (\w+)$", have.stdout.decode(errors="replace"), re.M))
        for digest in wanted.keys() - there:
            self._shell(
                f"cd {CACHE} && t=$(mktemp -d .new.XXXXXX) && tar -xf - -C $t && touch $t && "
                f"rm -rf {digest} && mv $t {digest} && "
                f"ls -1t | tail -n +{max(KEPT, len(wanted)) + 1} | xargs rm -rf",
                data=_packed(wanted[digest]),
            )

    def _shell(
        self, script: str, *, data: bytes | None = None, codes: tuple[int, ...] = (0,)
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a script in the device's POSIX shell, with ``data`` as its input.

        Raises LissomError where the device cannot be reached, or the script ends with none of ``codes``.
        """
        ssh = shlex.split(os.environ.get("LISSOM_SSH", "ssh"))
        ssh += ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15"]
        ssh += ["-p", str(self.port)] if self.port else []
        result = _run([*ssh, "--", self.host, f"sh -c {shlex.quote(script)}"], data=data)
        said = _last_line(result.stderr)
        if result.returncode == 255:
            raise LissomError(f"{self.host} cannot be reached by ssh: {said}")
        if re.search("No module named '?lissom", said):
            raise LissomError(
                f"lissom is not installed for {self.python} on {self.host}; install it there, without its dependencies "
                "(pip install --no-deps), beside NumPy and the runtime"
            )
        if result.returncode == 127:
            raise LissomError(f"{self.host} lacks a program ({said}); name its Python as ssh://HOST/python=PATH")
        if result.returncode not in codes:
            raise LissomError(f"{self.host} failed with exit code {result.returncode}: {said}")
        return result


def _packed(artifact: Artifact) -> bytes:
    """A tar archive of the artifact's plan and graphs, as they were exported: the device refuses others, and keeps what
    it has under the plan's own digest."""
    names = ("plan.json", *artifact.plan["files"])
    for name in names:
        if not (artifact.path / name).resolve().is_relative_to(artifact.path.resolve()):
            raise LissomError(f"{artifact.path} names a file outside itself: {name}")
    artifact.verify()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.add(artifact.path / name, name, recursive=False)
    return buffer.getvalue()


def _options(folders: Sequence[str], threads: int, seconds: float, memory: bool) -> list[str]:
    first, *others = folders
    options = [first, *(word for folder in others for word in ("--against", folder))]
    options += ["--threads", str(threads), "--seconds", str(seconds), "--end-with-stdin"]
    return [*options, "--memory"] if memory else options


def _run(
    arguments: Sequence[str], *, data: bytes | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end. Without ``data`` its stdin stays open and silent for as long as this process lives, so
    that a bench that waits for its end does not outlive us, here or behind ssh."""
    if not arguments or shutil.which(arguments[0]) is None:
        raise LissomError(f"there is no program {arguments[0] if arguments else 'to run'!r}")
    if data is not None:
        return subprocess.run(arguments, input=data, capture_output=True, env=env)
    theirs, ours = os.pipe()
    try:
        return subprocess.run(arguments, stdin=theirs, capture_output=True, env=env)
    finally:
        os.close(theirs)
        os.close(ours)


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it says nothing"


def _document(result: subprocess.CompletedProcess[bytes], where: str = "this machine") -> dict[str, Any]:
    """The JSON document that bench has printed. Raises LissomError with the sentence where it is an error."""
    # A remote shell may greet before: the document is the last line.
    try:
        document = json.loads(result.stdout.decode(errors="replace").strip().splitlines()[-1])
        version = document["lissom"]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise LissomError(f"measuring on {where} failed: {_last_line(result.stderr)}") from error
    if version != VERSION:
        raise LissomError(f"{where} has another version of lissom; install the same there")
    if "error" in document:
        raise LissomError(document["error"])
    return document


LISTS = ("speedup_ci", "stages_ms")  # what JSON has no tuples for


def _measurements(document: dict[str, Any]) -> list[Measurement]:
    known = {field.name for field in fields(Measurement)}
    rows = [{key: value for key, value in row.items() if key in known} for row in document["artifacts"]]
    return [
        Measurement(**row | {name: tuple(row[name]) for name in LISTS if row.get(name) is not None}) for row in rows
    ]
