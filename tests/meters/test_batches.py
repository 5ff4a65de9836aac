"""Adaptive beside static at several batch sizes: both go through the same stream, and the last batch that wins is
found. The clock is the test's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lissom.meters.batches as module
from lissom.errors import LissomError
from lissom.meters.batches import BatchRow, break_even, measure_batches
from lissom.runtime.artifact import Artifact

INPUTS = np.random.default_rng(0).random((10, 3), dtype=np.float32)


class Opened:
    """Stages that take 8 ms a batch without exits, and with them 2 ms an input of a stream, 3 ms one of a batch."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.plan, self.batch = artifact.plan, artifact.input_shape[0]
        self.graphs = [None] * 2
        self.seen: list[int] = []

    def run(self, x: np.ndarray) -> np.ndarray:
        assert x.shape == (self.batch, 3)
        CLOCK.now += 8e-3
        return x

    def run_exits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert x.shape == (self.batch, 3)
        CLOCK.now += 3e-3 * len(x)
        return x, np.zeros(len(x), np.int64)

    def run_many(self, x: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
        assert batch == self.batch
        np.testing.assert_array_equal(x, INPUTS)
        CLOCK.now += 2e-3 * len(x)
        return x, (x[:, 0] > np.sort(x[:, 0])[6]).astype(np.int64)


CLOCK: Any = SimpleNamespace(now=0.0)


def artifact(batch: int, exits: bool) -> Artifact:
    plan = {"input": {"shape": [batch, 3]}, "decisions": [{"at": "a", "threshold": 0.5}] if exits else []}
    return Artifact(Path(f"{batch}"), plan)


def test_the_stream_is_timed_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Stages", Opened)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: CLOCK.now))
    pairs = [(artifact(batch, False), artifact(batch, True)) for batch in (1, 2, 4, 5)]
    rows = measure_batches(pairs, INPUTS, threads=1, seconds=0.1)
    assert [row.batch for row in rows] == [1, 2, 4, 5]
    assert [row.static_ms for row in rows] == pytest.approx([8.0, 4.0, 2.4, 1.6])
    assert [row.adaptive_ms for row in rows] == pytest.approx([2.0] * 4)
    assert [row.ratio for row in rows] == pytest.approx([4.0, 2.0, 1.2, 0.8])
    assert all(row.interval == pytest.approx((row.ratio, row.ratio)) for row in rows)
    assert all(row.shares == (0.7, 0.3) for row in rows)
    # Ten inputs in batches of 4 are three batches, the last of them filled up.
    assert [row.apart_ms for row in rows] == pytest.approx([3.0, 3.0, 3.6, 3.0])
    assert [row.apart_ratio for row in rows] == pytest.approx([8 / 3, 4 / 3, 2 / 3, 1.6 / 3])
    assert all(row.apart_interval == pytest.approx((row.apart_ratio, row.apart_ratio)) for row in rows)
    assert rows[0].to_json()["batch"] == 1
    assert break_even(rows) == 4
    assert break_even(rows, apart=True) == 2


def test_pairs_that_cannot_be_compared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Stages", Opened)
    with pytest.raises(LissomError, match="different shapes or batches"):
        measure_batches([(artifact(1, False), artifact(2, True))], INPUTS, threads=1)
    for first, second in ((True, True), (False, False), (True, False)):
        with pytest.raises(LissomError, match="only the second is to have exits"):
            measure_batches([(artifact(1, first), artifact(1, second))], INPUTS, threads=1)


def row(batch: int, low: float) -> BatchRow:
    return BatchRow(batch, low + 0.1, (low, low + 0.2), 1.0, 1.0, (1.0,), low, (low - 0.3, low + 0.3), 1.0)


@pytest.mark.parametrize(
    ("lows", "best"),
    [((1.4, 1.2, 1.1), 4), ((1.4, 1.2, 0.95), 2), ((1.4, 0.9, 1.1), 1), ((1.0, 1.3, 1.3), None)],
)
def test_the_largest_batch_that_still_wins(lows: tuple[float, ...], best: int | None) -> None:
    rows = [row(batch, low) for batch, low in zip((1, 2, 4), lows, strict=True)]
    assert break_even(rows[::-1]) == best
    apart = [dataclasses.replace(r, interval=r.apart_interval, apart_interval=r.interval) for r in rows]
    assert break_even(apart, apart=True) == best
