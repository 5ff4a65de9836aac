"""Early exits over many inputs: those that wait for a stage are gathered until a whole batch of them is there.

Graphs have a static batch. Were every batch run to its end by itself, a stage would run as long as one of its inputs
has not left, mostly on rows whose answers are known. Here a stage runs on rows that need it, whichever batches they
came in: N inputs of which a share s reaches a stage take about s N / batch runs of it. Rows of a batch do not feel each
other, so that an input is answered as it is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lissom.runtime.backends import Graph

__all__ = ["filled", "run_pooled"]


def run_pooled(
    graphs: Sequence[Graph], thresholds: Sequence[np.float64], x: np.ndarray, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 ``x`` (n, ...) through K + 1 stages of batch ``batch`` with K ``thresholds`` between them: the answers
    (n, ...) and the stage that gave each, int64 (n,), both in the order of ``x``.

    What is carried from stage to stage has its batch in front (``Stages.packs`` says whether it has).
    """
    stream = _Stream(graphs, thresholds, len(x), batch)
    for number, part in enumerate(filled(x, batch)):
        stream.run(0, part, np.arange(number * batch, min((number + 1) * batch, len(x))))
    return stream.end()


def filled(inputs: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Float32 (n, ...) in parts of ``batch`` rows, at least one: the last is filled up with its own last row, or with
    zeros where there is no input at all."""
    for start in range(0, max(1, len(inputs)), batch):
        part = np.ascontiguousarray(inputs[start : start + batch], np.float32)
        if len(part) < batch:
            last = part[-1:] if len(part) else np.zeros((1, *inputs.shape[1:]), np.float32)
            part = np.concatenate([part, np.repeat(last, batch - len(part), axis=0)])
        yield part


class _Pool:
    """Rows that wait for a stage, at most one batch of them: what was carried, and the inputs' numbers."""

    def __init__(self, carried: Sequence[np.ndarray], batch: int) -> None:
        # Like what is carried, its order in memory too: PyTorch's kernels choose by it.
        self.tensors = [np.empty_like(tensor) for tensor in carried]
        self.rows = np.empty(batch, np.int64)
        self.count = 0


class _Stream:
    """One pass of many inputs: the pools before the stages, the answers so far."""

    def __init__(self, graphs: Sequence[Graph], thresholds: Sequence[np.float64], count: int, batch: int) -> None:
        self.graphs, self.thresholds, self.batch = graphs, thresholds, batch
        self.pools: dict[int, _Pool] = {}
        self.answers: np.ndarray | None = None
        self.left = np.empty(count, np.int64)

    def run(self, stage: int, given: np.ndarray | list[np.ndarray], rows: np.ndarray) -> None:
        """A stage on one batch, the first of which are the inputs ``rows``; then the stages behind it, as far as their
        pools fill."""
        found = self.graphs[stage].run(given)
        answer = found[0] if isinstance(found, list) else found
        if self.answers is None:
            self.answers = np.empty((len(self.left), *answer.shape[1:]), answer.dtype)
        if stage == len(self.thresholds):
            self.answers[rows], self.left[rows] = answer[: len(rows)], stage
            return
        assert isinstance(found, list)
        leaves = found[1].reshape(-1)[: len(rows)] > self.thresholds[stage]
        gone = rows[leaves]
        self.answers[gone], self.left[gone] = answer[: len(rows)][leaves], stage
        if len(gone) < len(rows):
            self._wait(stage + 1, found[2:], np.flatnonzero(~leaves), rows)

    def _wait(self, stage: int, carried: list[np.ndarray], places: np.ndarray, rows: np.ndarray) -> None:
        """Rows ``places`` of a batch wait for ``stage``, which runs whenever there is a batch of them."""
        pool = self.pools.get(stage)
        if len(places) == self.batch and (pool is None or not pool.count):
            self.run(stage, carried, rows)  # a batch as it is: nothing to gather
            return
        if pool is None:
            pool = self.pools[stage] = _Pool(carried, self.batch)
        while len(places):
            some = places[: self.batch - pool.count]
            into = slice(pool.count, pool.count + len(some))
            for held, tensor in zip(pool.tensors, carried, strict=True):
                held[into] = tensor[some]
            pool.rows[into] = rows[some]
            pool.count += len(some)
            places = places[len(some) :]
            if pool.count == self.batch:
                self._empty(stage, pool)

    def _empty(self, stage: int, pool: _Pool) -> None:
        """Run a stage on its pool, filled up where it is not full."""
        for tensor in pool.tensors:
            tensor[pool.count :] = tensor[pool.count - 1]
        rows, pool.count = pool.rows[: pool.count].copy(), 0
        self.run(stage, pool.tensors, rows)

    def end(self) -> tuple[np.ndarray, np.ndarray]:
        """Run what still waits; the answers, and where each was given."""
        for stage in range(1, len(self.graphs)):
            pool = self.pools.get(stage)
            if pool is not None and pool.count:
                self._empty(stage, pool)
        assert self.answers is not None
        return self.answers, self.left
