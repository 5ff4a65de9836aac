"""Tables of time series: what is read, how it is divided and cut, and one sentence for each way of being wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lissom.data.series import ETT, Division, read_series
from lissom.errors import LissomError

TABLE = "date,a,b\n" + "".join(f"2020-01-{d:02} 00:00:00,{d},{-2 * d}\n" for d in range(1, 13))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "days.csv"
    path.write_text(TABLE)
    return path


def test_a_table_is_read(table: Path) -> None:
    series = read_series(table)
    assert (series.name, series.columns, len(series)) == ("days", ("a", "b"), 12)
    np.testing.assert_array_equal(series.values[:, 1], -2 * np.arange(1.0, 13))
    assert series.times is not None
    assert str(series.times[1]) == "2020-01-02T00:00:00"
    table.write_text("a,b\n1,2\n\n3,4e1\n")
    plain = read_series(table)
    assert plain.times is None
    np.testing.assert_array_equal(plain.values, [[1, 2], [3, 40]])


def test_standardised_by_the_rows_of_training(table: Path) -> None:
    series = read_series(table).standardised(4)
    np.testing.assert_allclose(series.values[:4].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(series.values[:4].std(0), 1)
    np.testing.assert_allclose(series.values[11, 0], (12 - 2.5) / np.std([1, 2, 3, 4]))
    table.write_text("a\n" + "5\n" * 6)
    np.testing.assert_array_equal(read_series(table).standardised(3).values, 0)
    with pytest.raises(LissomError, match="6 rows; 7 to standardise"):
        read_series(table).standardised(7)


def test_parts_begin_early_and_windows_are_views(table: Path) -> None:
    series = read_series(table)
    parts = series.divided(Division(5, 3, 3), 2)
    assert [(part.values[0, 0], part.values[-1, 0]) for part in parts.values()] == [(1, 5), (4, 8), (7, 11)]
    seen, follows = parts["test"].windows(2, 2)
    np.testing.assert_array_equal(seen[..., 0], [[7, 8], [8, 9]])
    np.testing.assert_array_equal(follows[..., 0], [[9, 10], [10, 11]])
    assert seen.base is not None
    assert (seen.dtype, seen.shape) == (np.float32, (2, 2, 2))
    with pytest.raises(LissomError, match="do not fit in"):
        parts["test"].windows(4, 2)
    with pytest.raises(LissomError, match="12 rows, and the division wants"):
        series.divided(ETT, 96)


def test_features_of_the_time(table: Path) -> None:
    table.write_text("date,a\n2016-07-01 00:00:00,1\n2016-07-03 23:00:00,2\n2017-12-31 06:00:00,3\n")
    found = read_series(table).time_features()
    want = [[0, 4 / 6, 0, 182 / 365], [1, 1, 2 / 30, 184 / 365], [6 / 23, 1, 1, 364 / 365]]  # from Monday, from 1st
    np.testing.assert_allclose(found, np.array(want) - 0.5, atol=1e-6)
    table.write_text("a\n1\n")
    with pytest.raises(LissomError, match="no column of times"):
        read_series(table).time_features()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("date\n2020-01-01\n", "no series"),
        ("a,b\n1,2\n3\n", "line 3 of .* has 1 values"),
        ("a,b\n1,2\n3,x\n", "line 3 of .*'x'"),
        ("a,b\n1,2\n3,nan\n", "line 3 of .* missing or not finite"),
        ("a,b\n1,2\n3,\n", "line 3 of"),
        ("date,a\nyesterday,1\n", "no time"),
        ("date,a\n2020-01-02,1\n2020-01-01,2\n", "do not ascend"),
        ("date,a\n2020-01-02,1\n,2\n", "do not ascend"),
    ],
)
def test_tables_that_are_wrong(table: Path, text: str, reason: str) -> None:
    table.write_text(text)
    with pytest.raises(LissomError, match=reason):
        read_series(table)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(LissomError, match="cannot be read"):
        read_series(tmp_path / "nowhere.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(LissomError, match="no table"):
        read_series(tmp_path / "x.csv")


@pytest.mark.skipif("LISSOM_DATA" not in os.environ, reason="LISSOM_DATA names no folder with ett")
def test_transformer_temperatures() -> None:
    series = read_series(Path(os.environ["LISSOM_DATA"]) / "ett" / "ETTh1.csv")
    assert series.values.shape == (17420, 7)
    parts = series.standardised(ETT.train).divided(ETT, 96)
    assert [len(part.windows(96, 96)[0]) for part in parts.values()] == [8449, 2785, 2785]
