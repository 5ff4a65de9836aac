"""The index of parts: techniques, methods, proofs, back ends, networks. No part is imported to answer what exists.

A part registers itself in its own file, with a decorator that stands at the start of a line and names it literally::

    @register("technique", "int8")
    class Int8(Technique): ...

The index reads those lines as text, so that a new part is one new file and ``lissom list`` needs no torch. A part's
summary is the first line of its file's docstring. Networks register with timm's ``@register_model``.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lissom.errors import LissomError

__all__ = ["Part", "find", "load_part", "parts", "register"]

KINDS = ("technique", "method", "proof", "backend", "exporter", "network")
_PART = re.compile(r'^@register\("(\w+)", "([\w.-]+)"\)', re.M)
_NETWORK = re.compile(r"^@register_model\s*\ndef (\w+)", re.M)
_SUMMARY = re.compile(r'\A"""(.+?)(?:\.?"""|\.?\n|\.\s)', re.S)
_objects: dict[tuple[str, str], Any] = {}
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One registered part: its kind, its name, the module that holds it, and that module's first line."""

    kind: str
    name: str
    module: str
    summary: str


def register(kind: str, name: str) -> Callable[[T], T]:
    """Decorator: make the decorated class or function the part ``name`` of ``kind`` (one of ``KINDS``)."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")

    def keep(part: T) -> T:
        _objects[kind, name] = part
        return part

    return keep


@functools.cache
def _index() -> dict[tuple[str, str], Part]:
    root = Path(__file__).parent
    index: dict[tuple[str, str], Part] = {}
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found = [(m[1], m[2]) for m in _PART.finditer(text)] + [("network", m[1]) for m in _NETWORK.finditer(text)]
        if not found:
            continue
        names = path.relative_to(root).with_suffix("").parts
        module = ".".join(("lissom", *(names[:-1] if names[-1] == "__init__" else names)))
        summary = _SUMMARY.match(text)
        for kind, name in found:
            index[kind, name] = Part(kind, name, module, summary[1].strip() if summary else "")
    return index


def parts(kind: str | None = None) -> list[Part]:
    """Every part of ``kind`` (of all kinds: None), by name; nothing is imported."""
    return sorted((p for p in _index().values() if kind in (None, p.kind)), key=lambda p: (p.kind, p.name))


def find(kind: str, name: str) -> Part | None:
    """The part's entry in the index, or None."""
    return _index().get((kind, name))


def load_part(kind: str, name: str) -> Any:
    """The registered object, its module imported. Raises LissomError with the known names for an unknown one."""
    if (kind, name) not in _objects:
        part = find(kind, name)
        if part is None:
            known = ", ".join(p.name for p in parts(kind)) or "none"
            raise LissomError(f"no {kind} is called {name!r}; known: {known}")
        importlib.import_module(part.module)
    return _objects[kind, name]
