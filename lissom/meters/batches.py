"""From which batch size on early exits no longer pay: an adaptive artifact beside its static model, batch by batch.

A static graph gains from a larger batch, and so does an adaptive one whose later stages run on batches gathered from
many (``Stages.run_many``); what the exits save must pay for the gathering. So both run over the same stream of real
inputs, in turns, and what counts is the time of the whole stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Stages
from lissom.runtime.bench import paired
from lissom.runtime.pooling import filled

__all__ = ["BatchRow", "break_even", "measure_batches"]

ROUNDS = 5  # at the least: an interval wants several


@dataclass(frozen=True)
class BatchRow:
    """At one ``batch`` size: the static model's time over the adaptive one's, with its 95 % interval, and the times of
    both in milliseconds an input. ``shares``: of the K + 1 stages, how often each was the last one."""

    batch: int
    ratio: float
    interval: tuple[float, float]
    static_ms: float
    adaptive_ms: float
    shares: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_batches(
    pairs: Sequence[tuple[Artifact, Artifact]], inputs: np.ndarray, *, threads: int, seconds: float = 20.0
) -> list[BatchRow]:
    """Time ``pairs`` (static, adaptive) of one model, each pair at a batch size of its own, over float32 ``inputs``
    (N, C, H, W), for about ``seconds`` each pair.

    In each round every artifact runs over all inputs once, the two of a pair next to each other, in turns first. The
    inputs must be such as the model meets: noise leaves anywhere. Raises LissomError where a pair's batches differ, the
    static one has exits or the adaptive one has none.
    """
    opened = []
    for plain, exits in pairs:
        if plain.input_shape != exits.input_shape:
            raise LissomError(f"{plain.path} and {exits.path} take inputs of different shapes or batches")
        if plain.plan.get("decisions") or not exits.plan.get("decisions"):
            raise LissomError(f"of {plain.path} and {exits.path} only the second is to have exits")
        opened.append((Stages(plain, threads), Stages(exits, threads), plain.input_shape[0]))
    times: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in opened]
    shares = []
    for static, adaptive, batch in opened:  # a first pass warms up, and tells where inputs leave
        _through(static, inputs, batch)
        _, left = adaptive.run_many(inputs, batch)
        shares.append(np.bincount(left, minlength=len(adaptive.graphs)) / max(1, len(left)))
    start = time.perf_counter()
    turn = 0
    while turn < ROUNDS or time.perf_counter() - start < seconds * len(opened):
        for (static, adaptive, batch), found in zip(opened, times, strict=True):
            for arm in (0, 1) if turn % 2 == 0 else (1, 0):
                begun = time.perf_counter()
                if arm:
                    adaptive.run_many(inputs, batch)
                else:
                    _through(static, inputs, batch)
                found[arm].append(np.array([time.perf_counter() - begun]))
        turn += 1
    rows = []
    for (_, _, batch), (static_times, adaptive_times), left_at in zip(opened, times, shares, strict=True):
        ratio, interval = paired(static_times, adaptive_times)
        each = [1e3 * float(np.median(np.concatenate(t))) / len(inputs) for t in (static_times, adaptive_times)]
        rows.append(BatchRow(batch, ratio, interval, each[0], each[1], tuple(float(s) for s in left_at)))
    return rows


def _through(stages: Stages, inputs: np.ndarray, batch: int) -> np.ndarray:
    """A static model's answers, handed back in one array as an adaptive one's are."""
    return np.concatenate([np.asarray(stages.run(part)) for part in filled(inputs, batch)])[: len(inputs)]


def break_even(rows: Sequence[BatchRow]) -> int | None:
    """The largest batch of ``rows`` up to which the adaptive model wins beyond the interval, at this and every smaller
    batch; None where it does not win at the smallest."""
    best = None
    for row in sorted(rows, key=lambda row: row.batch):
        if row.interval[0] <= 1:
            break
        best = row.batch
    return best
