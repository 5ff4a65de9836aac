"""Weights that several stages of an OpenVINO artifact read, in one file for all of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["SHARED", "SMALL", "share_weights"]

SHARED = "stages.bin"
SMALL = 1024  # bytes: what is smaller (axes, ranges) may lie in several stages
ALIGNED = 64  # bytes


def share_weights(graphs: Sequence[Path]) -> str | None:
    """Where two of the saved ``graphs`` (``stage0.xml``, ... in one folder) hold the same weights, put the weights of
    all of them into ``stages.bin``, each once, instead of the ``.bin`` of each, and return that name; else None.

    A graph's constants say in its ``.xml`` where in its weights they begin.
    """
    trees = [ElementTree.parse(graph) for graph in graphs]
    weights = [graph.with_suffix(".bin").read_bytes() for graph in graphs]
    found = []  # of each graph: (the constant's element, its bytes)
    for tree, data in zip(trees, weights, strict=True):
        constants = tree.findall(".//layer[@type='Const']/data")  # those in the bodies of loops too
        places_of = [(int(c.attrib["offset"]), int(c.attrib["size"])) for c in constants]
        found.append([(c, data[start : start + size]) for c, (start, size) in zip(constants, places_of, strict=True)])
    counts: Counter[bytes] = Counter()
    for held in found:
        counts.update({_digest(blob) for _, blob in held if len(blob) >= SMALL})
    if not any(count > 1 for count in counts.values()):
        return None
    places: dict[bytes, int] = {}
    parts: list[bytes] = []
    end = 0
    for held in found:
        for constant, blob in held:
            digest = _digest(blob)
            if digest not in places:
                places[digest] = end
                parts.append(blob + bytes(-len(blob) % ALIGNED))
                end += len(parts[-1])
            constant.set("offset", str(places[digest]))
    (graphs[0].parent / SHARED).write_bytes(b"".join(parts))
    for graph, tree in zip(graphs, trees, strict=True):
        tree.write(graph, encoding="utf-8", xml_declaration=True)
        graph.with_suffix(".bin").unlink()
    return SHARED


def _digest(blob: bytes) -> bytes:
    return hashlib.sha256(blob).digest()
