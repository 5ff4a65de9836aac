"""SearchSpace: named discrete choices as one integer vector and back, as SimQ-NAS (arXiv 2312.13301) encodes them.

A space is an ordered table name -> (count, values). Its vector holds, name after name, ``count`` entries in
0 to len(values) - 1; the one-hot form gives every entry a segment of len(values) places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lissom.errors import LissomError

__all__ = ["SearchSpace"]


@dataclass(frozen=True)
class SearchSpace:
    """``variables``: name -> (count, values), in order. The values of one name are distinct.

    ``SearchSpace({"num_layers": (1, (2, 3, 4)), "q_bits": (17, (4, 8, 32))})`` has vectors of 18 entries.
    """

    variables: Mapping[str, tuple[int, Sequence[Any]]]

    def __post_init__(self) -> None:
        for name, (count, values) in self.variables.items():
            if count < 1 or len(values) < 1:
                raise LissomError(f"the variable {name!r} of the space has no entry or no value")
            if any(value in values[:i] for i, value in enumerate(values)):
                raise LissomError(f"the variable {name!r} of the space lists a value twice")

    @property
    def sizes(self) -> np.ndarray:
        """int64 (entries,): the number of values of each entry."""
        return np.array([len(values) for count, values in self.variables.values() for _ in range(count)], np.int64)

    def __len__(self) -> int:
        """The number of entries of a vector."""
        return sum(count for count, _ in self.variables.values())

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of vectors."""
        return math.fsum(count * math.log10(len(values)) for count, values in self.variables.values())

    def decode(self, vector: Sequence[float] | np.ndarray) -> dict[str, tuple[Any, ...]]:
        """Vector (entries,) -> name -> values. Fractions are rounded, as continuous optimisers deliver them.

        Raises LissomError for a vector of another length, and for an entry outside its range.
        """
        entries = self._entries(vector)
        found, start = {}, 0
        for name, (count, values) in self.variables.items():
            found[name] = tuple(values[i] for i in entries[start : start + count])
            start += count
        return found

    def encode(self, params: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """What ``decode`` returned, to int64 (entries,). Raises LissomError for choices that are not of this space."""
        if set(params) != set(self.variables):
            wrong = sorted(set(params) ^ set(self.variables))
            raise LissomError(f"the choices and the space differ in: {', '.join(wrong)}")
        vector: list[int] = []
        for name, (count, values) in self.variables.items():
            if len(params[name]) != count:
                raise LissomError(f"{name} has {len(params[name])} choices and the space {count}")
            for value in params[name]:
                if value not in values:
                    raise LissomError(
                        f"{name} has the choice {value!r}, which is none of {', '.join(map(str, values))}"
                    )
                vector.append(list(values).index(value))
        return np.array(vector, np.int64)

    def one_hot(self, vector: Sequence[float] | np.ndarray) -> np.ndarray:
        """Vector (entries,) -> float32 (sum of sizes,), one place set a segment."""
        sizes = self.sizes
        features = np.zeros(int(sizes.sum()), np.float32)
        features[np.cumsum(sizes) - sizes + self._entries(vector)] = 1
        return features

    def sample(self, generator: np.random.Generator) -> np.ndarray:
        """A vector, every entry drawn evenly: int64 (entries,)."""
        return generator.integers(0, self.sizes)

    def _entries(self, vector: Sequence[float] | np.ndarray) -> np.ndarray:
        entries = np.asarray(vector, np.float64)
        if entries.shape != (len(self),):
            raise LissomError(f"a vector of shape {entries.shape} is none of this space's {len(self)} entries")
        rounded = np.rint(entries)
        if not np.isfinite(entries).all() or (rounded < 0).any() or (rounded >= self.sizes).any():
            raise LissomError("an entry of the vector lies outside its range")
        return rounded.astype(np.int64)
