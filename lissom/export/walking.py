"""Back along a graph from what is wanted to what is given: the part that a stage needs of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from lissom.errors import NotApplicable

__all__ = ["needed"]

T = TypeVar("T")
SHOWN = 6  # places of a refused way that are named


def needed(
    wanted: Iterable[T],
    before: Callable[[T], Iterable[T]],
    given: Collection[T],
    inputs: Collection[T],
    stage: int,
    name: Callable[[T], str],
) -> set[T]:
    """``wanted`` and all that it is computed from, but nothing behind ``given``. ``before`` tells of what a thing is
    computed, ``name`` where it is computed (the path of its module).

    Raises NotApplicable, with the way, where a stage behind the first still needs one of ``inputs``, which are the
    model's own.
    """
    found: set[T] = set(wanted)
    todo = list(found)
    after: dict[T, T] = {}
    while todo:
        here = todo.pop()
        if here in given:
            continue
        if stage and here in inputs:
            way = [here]
            while way[-1] in after:
                way.append(after[way[-1]])
            names = list(dict.fromkeys(name(place) or "the model's own forward" for place in way[1:]))
            path = " > ".join(names[:SHOWN]) or "nothing else"
            raise NotApplicable(f"stage {stage} cannot stand alone: it still reads the input through {path}")
        for source in before(here):
            if source not in found:
                found.add(source)
                after[source] = here
                todo.append(source)
    return found
