"""From which batch size on early exits no longer pay: an adaptive artifact beside its static model, batch by batch.

A static graph gains from a larger batch, and so does an adaptive one whose later stages run on batches gathered from
many (``Stages.run_many``); what the exits save must pay for the gathering. So both run over the same stream of real
inputs, in turns, and what counts is the time of the whole stream. A batch that is answered by itself has no others to
be gathered with, and runs on as long as one of its inputs does: that is timed beside the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
    both in milliseconds an input. ``shares``: of the K + 1 stages, how often each was the last one. ``apart``: the same
    three figures of the adaptive model where each batch is answered by itself."""

    batch: int
    ratio: float
    interval: tuple[float, float]
    static_ms: float
    adaptive_ms: float
    shares: tuple[float, ...]
    apart_ratio: float
    apart_interval: tuple[float, float]
    apart_ms: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_batches(
    pairs: Sequence[tuple[Artifact, Artifact]], inputs: np.ndarray, *, threads: int, seconds: float = 20.0
) -> list[BatchRow]:
    """Time ``pairs`` (static, adaptive) of one model, each pair at a batch size of its own, over float32 ``inputs``
    (N, C, H, W), for about ``seconds`` each pair.

    In each round every artifact runs over all inputs, the static one once, the adaptive one as a stream and batch by
    batch; these three follow each other, each of them first in its turn. The inputs must be such as the model meets:
    noise leaves anywhere. Raises LissomError where a pair's batches differ, the static one has exits or the adaptive
    one has none.
    """
    opened = []
    for plain, exits in pairs:
        if plain.input_shape != exits.input_shape:
            raise LissomError(f"{plain.path} and {exits.path} take inputs of different shapes or batches")
        if plain.plan.get("decisions") or not exits.plan.get("decisions"):
            raise LissomError(f"of {plain.path} and {exits.path} only the second is to have exits")
        opened.append((Stages(plain, threads), Stages(exits, threads), plain.input_shape[0]))
    times: list[list[list[np.ndarray]]] = [[[], [], []] for _ in opened]
    shares = []
    for static, adaptive, batch in opened:  # a first pass warms up, and tells where inputs leave
        _through(static, inputs, batch)
        _apart(adaptive, inputs, batch)
        _, left = adaptive.run_many(inputs, batch)
        shares.append(np.bincount(left, minlength=len(adaptive.graphs)) / max(1, len(left)))
    start = time.perf_counter()
    turn = 0
    while turn < ROUNDS or time.perf_counter() - start < seconds * len(opened):
        for (static, adaptive, batch), found in zip(opened, times, strict=True):
            arms: list[Callable[[], object]] = [
                partial(_through, static, inputs, batch),
                partial(adaptive.run_many, inputs, batch),
                partial(_apart, adaptive, inputs, batch),
            ]
            for arm in (0, 1, 2)[turn % 3 :] + (0, 1, 2)[: turn % 3]:
                begun = time.perf_counter()
                arms[arm]()
                found[arm].append(np.array([time.perf_counter() - begun]))
        turn += 1
    rows = []
    for (_, _, batch), (plainly, streamed, apart), left_at in zip(opened, times, shares, strict=True):
        ratio, interval = paired(plainly, streamed)
        apart_ratio, apart_interval = paired(plainly, apart)
        plain_ms, stream_ms, apart_ms = (
            1e3 * float(np.median(np.concatenate(t))) / len(inputs) for t in (plainly, streamed, apart)
        )
        where = tuple(float(s) for s in left_at)
        rows.append(BatchRow(batch, ratio, interval, plain_ms, stream_ms, where, apart_ratio, apart_interval, apart_ms))
    return rows


def _through(stages: Stages, inputs: np.ndarray, batch: int) -> np.ndarray:
    """A static model's answers, handed back in one array as an adaptive one's are."""
    return np.concatenate([np.asarray(stages.run(part)) for part in filled(inputs, batch)])[: len(inputs)]


def _apart(stages: Stages, inputs: np.ndarray, batch: int) -> np.ndarray:
    """An adaptive model's answers, each batch run until all of its inputs have left."""
    return np.concatenate([stages.run_exits(part)[0] for part in filled(inputs, batch)])[: len(inputs)]


def break_even(rows: Sequence[BatchRow], *, apart: bool = False) -> int | None:
    """The largest batch of ``rows`` up to which the adaptive model wins beyond the interval, at this and every smaller
    batch; None where it does not win at the smallest. ``apart``: where each batch is answered by itself."""
    best = None
    for row in sorted(rows, key=lambda row: row.batch):
        if (row.apart_interval if apart else row.interval)[0] <= 1:
            break
        best = row.batch
    return best
