"""What a machine offers, and how many threads lissom takes of it unless told."""

import os

import pytest

from lissom.runtime import target


@pytest.mark.parametrize(
    ("said", "threads"),
    [("", 4), ("3", 3), ("3,1", 3), (" 2 ", 2), ("64", 4), ("0", 4), ("many", 4), ("-1", 4)],
)
def test_threads_are_those_of_the_processors_and_of_the_environment(monkeypatch, said, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 5}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert target.default_threads() == threads
    assert target.local_capabilities()["processors"] == 4
