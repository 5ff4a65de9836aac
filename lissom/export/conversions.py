"""Graphs that a runtime's converter made of a model, so that candidates which differ in precision alone share one.

The conversion is the expensive half of an export, 3 to 5 s a network. A graph is found again by the model itself, what
its exits are, and a digest of all its weights: a model that was trained on since is converted anew.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lissom.export.plan import Plan

__all__ = ["Conversions"]


class Conversions:
    """The graphs of one runtime; a model that nobody holds any more is forgotten with them."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[bytes, dict[tuple[Any, ...], Any]]] = (
            weakref.WeakKeyDictionary()
        )

    def get(
        self, plan: Plan, shape: tuple[int, ...], batch: int, convert: Callable[[], tuple[Any, dict[str, str]]]
    ) -> tuple[Any, dict[str, str]]:
        """The graph of the plan's model for inputs (batch, *shape), and graph node name -> module path.

        ``convert`` makes both where they are not known, with the paths of the joint graph. The graph is shared: who
        changes it, changes a copy.
        """
        digest = _digest(plan.model)
        before, graphs = self._known.get(plan.model, (b"", {}))
        if before != digest:  # graphs of weights that are gone are of no use to anybody
            graphs = {}
            self._known[plan.model] = digest, graphs
        exits = plan.decisions
        key = (batch, *shape, *((e.at, e.rule, e.carries, e.patience) for e in exits))
        if key not in graphs:
            graph, paths = convert()
            graphs[key] = graph, {n: p.removeprefix("model.") for n, p in paths.items()} if exits else paths
        return graphs[key]


def _digest(model: nn.Module) -> bytes:
    """Of every parameter and buffer, kept in a state dict or not, its name, type, shape and bytes."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # Bytes, since NumPy has no bfloat16. A view of a scalar needs a dimension.
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy().data)
    return found.digest()
