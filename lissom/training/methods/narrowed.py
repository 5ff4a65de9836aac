"""Narrowed: what a recovery is told of a network that has lost channels (``lissom.techniques.crop``)."""

from __future__ import annotations

from dataclasses import dataclass

from lissom.training.methods.pela import Retrained

__all__ = ["Narrowed"]


@dataclass(frozen=True)
class Narrowed(Retrained):
    """Asks for a training of everything and adds nothing to its loss: the answers alone are to mend the network.

    ``paths``: modules whose outputs have another shape than the original's, so that no loss can compare the two.
    """

    paths: tuple[str, ...] = ()
