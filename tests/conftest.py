"""Cheap failures first: tests marked ``last`` come after all others."""

import os
import signal

import pytest

os.environ.setdefault("NNCF_CI", "1")

# A shell starts background jobs, and so perhaps these tests, with Ctrl-C ignored, and processes that they start would
# ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
