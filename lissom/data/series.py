"""Time series in a table of comma-separated numbers: read, divided by time, standardised, cut into windows.

The first column may hold the time (``date``); every other one is a series. ``ETT`` names the months of the published
split of the hourly Electricity Transformer Temperature tables (Zhou et al., Informer, AAAI 2021): 12 of training, 4 of
validation, 4 of test, 30 days each.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lissom.errors import LissomError

__all__ = ["ETT", "Division", "Series", "read_series"]


class Division(NamedTuple):
    """How many rows each part of a series has, one behind the other; rows behind the last are left out."""

    train: int
    val: int
    test: int


ETT = Division(12 * 30 * 24, 4 * 30 * 24, 4 * 30 * 24)


@dataclass(frozen=True, eq=False)
class Series:
    """Rows of numbers in the order of time: ``values`` (T, M) float64, ``columns`` their M names.

    ``times`` (T,) datetime64 where the table tells them, else None.
    """

    name: str
    columns: tuple[str, ...]
    values: np.ndarray
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, first: int, last: int) -> Series:
        """Rows ``first`` to ``last``, the latter left out."""
        times = None if self.times is None else self.times[first:last]
        return replace(self, values=self.values[first:last], times=times)

    def standardised(self, rows: int) -> Series:
        """The series less the mean, by the deviation, of each column's first ``rows``: those of training.

        A column that is constant there is divided by 1. Raises LissomError where there are fewer rows.
        """
        if not 0 < rows <= len(self):
            raise LissomError(f"{self.name} has {len(self)} rows; {rows} to standardise by cannot be taken of them")
        mean, deviation = self.values[:rows].mean(0), self.values[:rows].std(0)
        return replace(self, values=(self.values - mean) / np.where(deviation > 0, deviation, 1.0))

    def divided(self, division: Division, lookback: int) -> dict[str, Series]:
        """The parts ``train``, ``val`` and ``test``; the later two begin ``lookback`` rows early, so that the first
        forecast of each is of its first row, as published. Raises LissomError where there are too few rows."""
        needed = sum(division)
        if len(self) < needed:
            raise LissomError(f"{self.name} has {len(self)} rows, and the division wants {needed}")
        parts, first = {}, 0
        for name, rows in zip(Division._fields, division, strict=True):
            parts[name] = self.take(max(0, first - lookback), first + rows)
            first += rows
        return parts

    def windows(self, lookback: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Every window, one a row: what is seen (n, lookback, M) and what follows (n, horizon, M), float32.

        Both are views of one array: as little memory as the series. Raises LissomError where not one fits.
        """
        count = len(self) - lookback - horizon + 1
        if lookback < 1 or horizon < 1 or count < 1:
            raise LissomError(f"{self.name} has {len(self)} rows; windows of {lookback} and {horizon} do not fit in")
        values = self.values.astype(np.float32)
        every = np.lib.stride_tricks.sliding_window_view(values, lookback + horizon, 0).swapaxes(1, 2)
        return every[:, :lookback], every[:, lookback:]

    def time_features(self) -> np.ndarray:
        """Hour of the day, day of the week, of the month and of the year, each from -0.5 to 0.5: (T, 4) float32.

        Raises LissomError where the table told no times.
        """
        if self.times is None:
            raise LissomError(f"{self.name} has no column of times")
        hours = self.times.astype("datetime64[h]")
        days, months, years = (self.times.astype(f"datetime64[{unit}]") for unit in "DMY")
        hour = (hours - days.astype(hours.dtype)).astype(int) / 23
        week = ((days.astype(int) + 3) % 7) / 6  # 1 January 1970 was a Thursday, and weeks begin on Monday
        month = (days - months.astype(days.dtype)).astype(int) / 30
        year = (days - years.astype(days.dtype)).astype(int) / 365
        return (np.stack([hour, week, month, year], 1) - 0.5).astype(np.float32)


def read_series(path: str | Path) -> Series:
    """The series of a CSV file with a line of names first.

    Raises LissomError, with the line where there is one, for a file that is missing or no such table, a number that
    is none or not finite, and times that are none or do not ascend.
    """
    path = Path(path).expanduser()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise LissomError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LissomError(f"{path} is no table of comma-separated values ({error})") from error
    if len(rows) < 2 or len(rows[0]) < 1:
        raise LissomError(f"{path} holds no rows below a line of names")
    names = rows[0]
    timed = names[0].strip().lower() in ("date", "time", "datetime", "timestamp")
    if len(names) == int(timed):
        raise LissomError(f"{path} holds times and no series")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise LissomError(f"line {number} of {path} has {len(row)} values, and there are {len(names)} names")
    times = None
    if timed:
        try:
            times = np.array([row[0] for row in rows[1:]], "datetime64[s]")
        except ValueError as error:
            raise LissomError(f"the column {names[0]} of {path} holds what is no time ({error})") from error
        if np.isnat(times).any() or not (np.diff(times) > np.timedelta64(0, "s")).all():
            raise LissomError(f"the times in {path} do not ascend; sort its lines by {names[0]}")
    values = np.empty((len(rows) - 1, len(names) - timed))
    for number, row in enumerate(rows[1:]):
        try:
            values[number] = [float(cell) for cell in row[int(timed) :]]
        except ValueError as error:
            raise LissomError(f"line {number + 2} of {path}: {error}") from error
    wrong = np.flatnonzero(~np.isfinite(values).all(1))
    if len(wrong):
        raise LissomError(f"line {wrong[0] + 2} of {path} holds a number that is missing or not finite")
    return Series(path.stem, tuple(names[int(timed) :]), values, times)
