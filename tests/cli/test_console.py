"""Tables and numbers with units on a terminal and in a pipe."""

from __future__ import annotations

import pytest

from lissom.cli.console import clean, mb, ms, percent, remarks, results, table, times


def test_numbers():
    assert ms(3.14159) == "3.14 ms"
    assert mb(12.345) == "12.3 MB"
    assert percent(97.25) == "97.2 %"
    assert times(1.476, (1.451, 1.509)) == "1.48x [1.45, 1.51]"
    assert times(2.0) == "2.00x"


@pytest.mark.parametrize("show", [ms, mb, percent, times])
def test_what_is_not_available_is_a_dash(show):
    assert show(None) == "–"


def test_a_table_in_a_pipe_is_neither_wrapped_nor_coloured(capsys):
    long = "a/very/long/path/" * 12
    results().print(table(("name", "ms"), [(long, 1.5), ("[red]b", 20)], right=("ms",), title="Times"))
    out = capsys.readouterr().out
    assert long in out
    assert "[red]b" in out
    assert "\x1b" not in out
    lines = [line.rstrip() for line in out.splitlines() if line.strip()]
    assert lines[0] == "Times"
    assert len({len(line) for line in lines if line.endswith(("1.5", "20"))}) == 1  # figures end below each other


def test_remarks_go_to_stderr(capsys):
    remarks().print("a remark")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a remark\n")


def test_control_characters_are_shown_as_such():
    assert clean("a\x1b[31mb\n") == "a?[31mb\n"
