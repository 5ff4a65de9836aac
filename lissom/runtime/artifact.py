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
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lissom.errors import LissomError

__all__ = ["SCHEMA", "Artifact", "new_artifact", "new_file", "write_atomic"]

SCHEMA = 1
PLAN = "plan.json"


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


@dataclass(frozen=True)
class Artifact:
    """An artifact directory and what its ``plan.json`` says."""

    path: Path
    plan: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read ``path/plan.json``. Raises LissomError where it is missing, damaged or of another version."""
        path = Path(path)
        if not (path / PLAN).is_file():
            raise LissomError(f"{path} is no artifact: it holds no {PLAN}")
        try:
            plan = json.loads((path / PLAN).read_text(encoding="utf-8"))
        except ValueError as error:
            raise LissomError(f"{path / PLAN} is damaged: {error}") from error
        if not isinstance(plan, dict) or plan.get("lissom") != SCHEMA:
            raise LissomError(f"{path / PLAN} is not of version {SCHEMA}; export it anew with this lissom")
        if not _well_formed(plan):
            raise LissomError(f"{path / PLAN} is damaged: a field is missing or of another kind; export it anew")
        artifact = cls(path, plan)
        for graph in artifact.graphs:
            inside = graph.resolve().is_relative_to(path.resolve())
            if not inside or not graph.is_file():
                raise LissomError(f"{path} lacks its graph {graph.name}; export it anew")
        return artifact

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


def _well_formed(plan: dict[str, Any]) -> bool:
    """Whether the fields that opening and running read are there, of their kinds."""
    stages, files, given = plan.get("stages"), plan.get("files"), plan.get("input")
    shape = given.get("shape") if isinstance(given, dict) else None
    return (
        isinstance(plan.get("runtime"), str)
        and isinstance(files, dict)
        and isinstance(shape, list)
        and all(isinstance(n, int) and n > 0 for n in shape)
        and isinstance(stages, list)
        and len(stages) > 0
        and all(isinstance(s, dict) and isinstance(s.get("graph"), str) for s in stages)
        and all(isinstance(s.get("options", {}), dict) for s in stages)
        and _well_formed_exits(plan.get("decisions") or [], plan.get("exits") or {}, len(stages))
    )


def _well_formed_exits(decisions: Any, exits: Any, stages: int) -> bool:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    shares = exits.get("shares") if isinstance(exits, dict) else ()
    return (
        isinstance(decisions, list)
        and len(decisions) in (0, stages - 1)
        and all(isinstance(d, dict) and "threshold" in d for d in decisions)
        and all(d["threshold"] is None or number(d["threshold"]) for d in decisions)
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
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
