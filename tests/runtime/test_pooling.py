"""Early exits over many inputs: order kept, each answered as it is alone, later stages run on full batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lissom.runtime.pooling import filled, run_pooled


class Stage:
    """A stage in NumPy of a static batch: answers (B, 2), a score that is one of the sample's own numbers, and two
    carried tensors, one of whole numbers. Counts its runs."""

    def __init__(self, number: int, last: bool, batch: int) -> None:
        self.number, self.last, self.batch = number, last, batch
        self.gpu = None
        self.runs = 0

    def run(self, x: np.ndarray | list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
        self.runs += 1
        if isinstance(x, list):
            values, marks = x
            assert marks.dtype == np.int64
        else:
            values, marks = x, np.rint(1000 * x[:, 0]).astype(np.int64)
        assert values.shape == (self.batch, 4)
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        assert (marks == np.rint(1000 * values[:, 0])).all()  # the two tensors of a row stayed together
        answer = np.stack([values[:, 0] + self.number, values.sum(1)], 1)
        if self.last:
            return answer
        return [answer, values[:, 1 + self.number].copy(), values.copy(), marks.copy()]


def stages(batch: int) -> list[Stage]:
    return [Stage(number, number == 3, batch) for number in range(4)]


THRESHOLDS = [np.float64(t) for t in (0.6, 0.3, 0.5)]


def alone(x: np.ndarray, thresholds: list[np.float64]) -> tuple[np.ndarray, np.ndarray]:
    gone = np.stack([x[:, 1 + k] > thresholds[k] for k in range(3)] + [np.ones(len(x), bool)], 1).argmax(1)
    return np.stack([x[:, 0] + gone.astype(np.float32), x.sum(1)], 1), gone


@pytest.mark.parametrize("batch", [2, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 64, 97])
def test_answers_and_exits_are_those_of_each_alone_in_their_order(batch: int, count: int) -> None:
    x = np.random.default_rng(count).random((count, 4)).astype(np.float32)
    got, left = run_pooled(stages(batch), THRESHOLDS, x, batch)
    want, where = alone(x, THRESHOLDS)
    assert left.dtype == np.int64
    np.testing.assert_array_equal(left, where)
    np.testing.assert_array_equal(got, want)


def test_a_stage_runs_on_full_batches_of_those_that_need_it() -> None:
    x = np.random.default_rng(0).random((400, 4)).astype(np.float32)
    graphs = stages(8)
    _, left = run_pooled(graphs, THRESHOLDS, x, 8)
    for number, graph in enumerate(graphs):
        assert graph.runs == -(-int((left >= number).sum()) // 8)
    # A batch run to its end by itself takes each stage that one of its inputs reaches.
    apart = sum((left[start : start + 8] >= 3).any() for start in range(0, 400, 8))
    assert graphs[3].runs < apart / 2


@pytest.mark.parametrize(
    ("thresholds", "runs"),
    [
        ((np.inf, np.inf, np.inf), [5, 5, 5, 5]),
        ((-1.0, 0.5, 0.5), [5, 0, 0, 0]),
        ((np.inf, np.inf, -1.0), [5, 5, 5, 0]),
    ],
)
def test_nobody_or_everybody_leaves(thresholds: tuple[float, ...], runs: list[int]) -> None:
    x = np.random.default_rng(1).random((18, 4)).astype(np.float32)
    graphs = stages(4)
    limits = [np.float64(t) for t in thresholds]
    got, left = run_pooled(graphs, limits, x, 4)
    want, where = alone(x, limits)
    assert [graph.runs for graph in graphs] == runs
    np.testing.assert_array_equal(left, where)
    np.testing.assert_array_equal(got, want)


def test_a_score_is_compared_with_its_threshold_unrounded() -> None:
    # In float32 the two are the same number; the threshold is a little above the score.
    x = np.full((3, 4), 0.1, np.float32)
    limit = np.float64(np.float32(0.1)) + 1e-12
    assert np.float32(limit) == x[0, 1]
    _, left = run_pooled(stages(2), [limit, np.float64(np.inf), np.float64(np.inf)], x, 2)
    assert left.tolist() == [3, 3, 3]


def test_a_score_that_is_no_number_leaves_nowhere() -> None:
    x = np.random.default_rng(2).random((5, 4)).astype(np.float32)
    x[:, 1] = np.nan
    _, left = run_pooled(stages(2), [np.float64(-1.0), np.float64(-1.0), np.float64(0.5)], x, 2)
    assert left.tolist() == [1] * 5


@pytest.mark.parametrize(("count", "parts"), [(0, 1), (3, 1), (4, 1), (9, 3)])
def test_parts_are_filled_up(count: int, parts: int) -> None:
    x = np.arange(2 * count, dtype=np.float64).reshape(count, 2)
    found = list(filled(x, 4))
    assert [part.shape for part in found] == [(4, 2)] * parts
    assert all(part.dtype == np.float32 for part in found)
    np.testing.assert_array_equal(np.concatenate(found)[:count], x)
    if count % 4:
        np.testing.assert_array_equal(found[-1][count % 4 :], np.repeat(x[-1:], -count % 4, 0))
    if not count:
        assert not found[0].any()


def test_order_in_memory_is_that_of_what_is_carried() -> None:
    """PyTorch's kernels choose by it, so that gathered rows run as a batch that came whole."""
    seen: list[tuple[int, ...]] = []

    def stage(last: bool) -> Callable[[np.ndarray | list[np.ndarray]], np.ndarray | list[np.ndarray]]:
        def run(x: np.ndarray | list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
            if isinstance(x, list):
                seen.append(x[0].strides)
                return x[0].sum((1, 2))[:, None]
            carried = np.zeros((4, 5, 3), np.float32).transpose(0, 2, 1)
            return [x[:, :1], x[:, 0], carried]

        return run

    class Two:
        gpu = None

        def __init__(self, last: bool) -> None:
            self.run = stage(last)

    x = np.array([[1.0], [0.0], [0.0], [1.0], [0.0]], np.float32)
    _, left = run_pooled([Two(False), Two(True)], [np.float64(0.5)], x, 4)
    assert left.tolist() == [0, 1, 1, 0, 1]
    assert seen == [np.zeros((4, 5, 3), np.float32).transpose(0, 2, 1).strides]
