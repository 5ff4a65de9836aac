"""Artifact: a Plan exported to a directory, as users hold, load and serve it.

``plan.json`` is written for people and programs alike::

    {"lissom": 1, "runtime": "openvino", "stages": [{"graph": "stage0.xml", "options": {...}}],
     "decisions": [{"at": "blocks.3", "rule": "confidence", "threshold": 0.87}], "exits": {"shares": [0.6, 0.4], ...},
     "input": {"shape": [1, 3, 32, 32], "preprocessing": {...}}, "classes": [...], "recipe": "int8()",
     "precision": {"": 8}, "layers": [...], "verification": {...}, "metrics": {...}, "files": {"stage0.xml": "sha256"}}

``packs`` is true where rows of several batches may run together (``lissom.runtime.pooling``). A weight that several
stages read lies in one file beside the graphs, which stands among ``files``.

An artifact appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lissom.errors import LissomError

__all__ = ["SCHEMA", "Artifact", "new_artifact", "new_file", "replace_folder", "write_atomic"]

SCHEMA = 1
PLAN = "plan.json"
PLAN_BYTES = 64 * 2**20  # at most: the largest plan lists the nodes of a graph, a few megabytes
WEIGHTS = {".bin", ".data", ".safetensors"}  # files that back ends look for beside a graph, told or not


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes the file ``path`` on leaving: whole, or not at all, and on the disk."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all, and to the disk."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_folder(new: Path, old: Path) -> None:
    """Rename the folder ``new`` to ``old``, in place of the folder that may stand there: an interrupt leaves the old or
    the new one under that name, whole.

    Both lie in the same file system. What stood there waits under a name with a dot beside it until the new one is in
    its place, and is deleted then. Raises OSError, and leaves both as they are, where ``old`` is something else than a
    folder.
    """
    aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=f".{old.name}."))
    kept = aside / "old"
    try:
        if old.is_dir():
            os.replace(old, kept)
        os.replace(new, old)
    finally:
        if os.path.lexists(kept) and not os.path.lexists(old):  # interrupted between the two
            os.replace(kept, old)
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Artifact:
    """An artifact directory and what its ``plan.json`` says."""

    path: Path
    plan: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read ``path/plan.json``; ``verify`` looks at the other files.

        Raises LissomError where it is missing, damaged or of another version.
        """
        path = Path(path)
        if not (path / PLAN).is_file():
            raise LissomError(f"{path} is no artifact: it holds no {PLAN}")
        with (path / PLAN).open("rb") as file:
            text = file.read(PLAN_BYTES + 1)
        if len(text) > PLAN_BYTES:
            raise LissomError(f"{path / PLAN} is damaged: it is larger than {PLAN_BYTES >> 20} MiB; export it anew")
        try:
            plan = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise LissomError(f"{path / PLAN} is damaged: {error}") from error
        if not isinstance(plan, dict) or plan.get("lissom") != SCHEMA:
            raise LissomError(f"{path / PLAN} is not of version {SCHEMA}; export it anew with this lissom")
        if not _well_formed(plan):
            raise LissomError(f"{path / PLAN} is damaged: a field is missing or of another kind; export it anew")
        artifact = cls(path, plan)
        for name in [*plan["files"], *(stage["graph"] for stage in plan["stages"])]:
            if not _is_inside(name):
                raise LissomError(f"{path} names {name!r}, which may be a file outside itself; export it anew")
        for graph in artifact.graphs:
            if not graph.is_file() or not graph.resolve().is_relative_to(path.resolve()):
                raise LissomError(f"{path} lacks its graph {graph.name}; export it anew")
        return artifact

    def verify(self) -> None:
        """Raise LissomError where a file that a back end may open is not the one that was exported, or is no file."""
        files = self.plan["files"]
        for stage in self.plan["stages"]:
            if stage["graph"] not in files:
                raise LissomError(f"{self.path} does not vouch for its graph {stage['graph']}; export it anew")
            if (weights := stage.get("options", {}).get("weights")) is not None and weights not in files:
                raise LissomError(f"{self.path} does not vouch for its weights {weights}; export it anew")
        for path in self.path.rglob("*"):
            name = path.relative_to(self.path).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise LissomError(f"{self.path} holds {name}, which is a link or no file; copy its files anew")
            if path.suffix.lower() in WEIGHTS and path.is_file() and name not in files:
                raise LissomError(f"{self.path} does not vouch for {name}; take it out, or export the artifact anew")
        for name, expected in files.items():
            path = self.path / name
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise LissomError(f"{self.path} lacks its file {name}; export it anew") from error
            if digest.hexdigest() != expected:
                raise LissomError(f"{path} was altered since its export; export it anew")

    @property
    def graphs(self) -> list[Path]:
        """The stages' graph files."""
        return [self.path / stage["graph"] for stage in self.plan["stages"]]

    @property
    def runtime(self) -> str:
        return self.plan["runtime"]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(batch, C, H, W)."""
        return tuple(self.plan["input"]["shape"])

    @property
    def size(self) -> int:
        """Bytes of the graphs and weights on disk, without card and plan."""
        return sum((self.path / name).stat().st_size for name in self.plan["files"])

    @property
    def digest(self) -> str:
        """Hash of the graph files and of how they are run: the key under which measurements are kept."""
        how = [self.plan["files"], self.plan["stages"], self.runtime, self.plan["input"]["shape"],
               self.plan.get("decisions"), self.plan.get("exits")]  # fmt: skip
        return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]

    def with_decisions(self, decisions: list[dict[str, Any]], exits: dict[str, Any]) -> Artifact:
        """Record the decisions between the stages and what is known of them (``shares`` of samples a stage)."""
        plan = {**self.plan, "decisions": decisions, "exits": exits}
        write_atomic(self.path / PLAN, json.dumps(plan, indent=1))
        return Artifact(self.path, plan)

    def with_metrics(self, metrics: dict[str, Any]) -> Artifact:
        """Record what was measured of it in ``plan.json``."""
        plan = {**self.plan, "metrics": metrics}
        write_atomic(self.path / PLAN, json.dumps(plan, indent=1))
        return Artifact(self.path, plan)


def _is_inside(name: str) -> bool:
    """Whether ``name`` is that of a file in the artifact's own folder, in characters that can be printed."""
    path = PurePath(name)
    return name.isprintable() and bool(path.parts) and not path.anchor and ".." not in path.parts


def _well_formed(plan: dict[str, Any]) -> bool:
    """Whether the fields that opening, running and profiling read are there, of their kinds."""
    stages, files, given = plan.get("stages"), plan.get("files"), plan.get("input")
    shape = given.get("shape") if isinstance(given, dict) else None
    classes, layers, nodes = plan.get("classes") or [], plan.get("layers") or [], plan.get("nodes") or {}
    return (
        isinstance(plan.get("runtime"), str)
        and isinstance(plan.get("recipe", ""), str)
        and _texts(files)
        and isinstance(shape, list)
        and len(shape) > 0
        and all(type(n) is int and n > 0 for n in shape)
        and isinstance(stages, list)
        and len(stages) > 0
        and all(isinstance(s, dict) and isinstance(s.get("graph"), str) for s in stages)
        and all(isinstance(s.get("options", {}), dict) for s in stages)
        and all(isinstance(s.get("options", {}).get("weights", ""), str) for s in stages)
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and isinstance(layers, list)
        and all(isinstance(layer, dict) for layer in layers)
        and _texts(nodes)
        and _well_formed_exits(plan.get("decisions") or [], plan.get("exits") or {}, len(stages))
    )


def _texts(fields: Any) -> bool:
    """Whether ``fields`` is an object of strings."""
    return isinstance(fields, dict) and all(isinstance(value, str) for value in fields.values())


def _well_formed_exits(decisions: Any, exits: Any, stages: int) -> bool:
    def number(value: Any) -> bool:  # a whole number of JSON may be larger than any float
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

    shares = exits.get("shares") if isinstance(exits, dict) else ()
    return (
        isinstance(decisions, list)
        and len(decisions) in (0, stages - 1)
        and all(isinstance(d, dict) and "threshold" in d for d in decisions)
        and all(d["threshold"] is None or number(d["threshold"]) for d in decisions)
        and all(isinstance(d.get("at") or "", str) for d in decisions)
        and (shares is None or (isinstance(shares, list) and len(shares) == stages and all(map(number, shares))))
    )


@contextmanager
def new_artifact(path: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """A folder to write graphs into, which becomes the artifact ``path`` on leaving: whole, or not at all.

    ``plan`` may be completed inside the block; the files' hashes and the version are added here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        files = {
            str(file.relative_to(temporary)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        (temporary / PLAN).write_text(json.dumps({"lissom": SCHEMA, **plan, "files": files}, indent=1))
        os.chmod(temporary, 0o755)
        replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
