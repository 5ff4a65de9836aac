"""What the commands share on a terminal: consoles, tables, numbers with units.

Results go to stdout, progress and remarks to stderr, so that output can be piped. Rich leaves colours out where
``NO_COLOR`` is set or the output is no terminal. Text is shown as it is: a user's ``[name]`` is no markup.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["clean", "mb", "ms", "percent", "remarks", "results", "table", "times"]

PIPE_WIDTH = 1000  # columns of output that is no terminal: nothing is wrapped or cut there


def results() -> Console:
    """The console on stdout."""
    return _console(stderr=False)


def remarks() -> Console:
    """The console on stderr: progress, warnings, remarks."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else PIPE_WIDTH
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = (), title: str = ""
) -> Table:
    """A table to print; the columns named in ``right`` are aligned to the right, as figures are."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left", pad_edge=False)
    for name in columns:
        shown.add_column(Text(name), justify="right" if name in right else "left", no_wrap=name in right)
    for row in rows:
        shown.add_row(*(Text(clean(str(cell))) for cell in row))
    return shown


def clean(text: str) -> str:
    """The text without control characters: a hostile file's name must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits; an en dash for None, here and below."""
    return _with(" ms", value)


def mb(value: float | None) -> str:
    """Megabytes (10^6 bytes) with three significant digits."""
    return _with(" MB", value)


def percent(value: float | None, places: int = 1) -> str:
    """Points (0 to 100) as per cent."""
    from lissom.report.text import NONE, fixed

    return NONE if value is None else f"{fixed(value, places)} %"


def times(value: float | None, ci: tuple[float, float] | None = None) -> str:
    """A ratio, with its interval where it has one: ``1.48x [1.45, 1.51]``."""
    from lissom.report.text import NONE, fixed, interval

    return NONE if value is None else f"{fixed(value, 2)}x {interval(ci)}".rstrip()


def _with(unit: str, value: float | None) -> str:
    from lissom.report.text import NONE, figure

    return NONE if value is None else figure(value) + unit
